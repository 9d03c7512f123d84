// rank_trigger.h: when the rules of a rank policy fire, and which steps measure attention.
//
// Pure functions of the policy and of counts. Rules of the prompt's end that look at queries, where
// the engine gave none, wait for the first score_window steps of decoding and take those queries
// instead; until then no rule that reads attention fires, because the slots know too little.
#pragma once

#include <cstdint>

#include "thinkv/internal/rank_check.h"

namespace thinkv::policy {

// The end of the prompt or of a decode step.
struct Moment {
  uint32_t generated;  // tokens, that of the step included; 0: the prompt's end
  bool waiting;        // the prompt's rules have no queries yet
};

[[nodiscard]] constexpr bool waits_for_queries(const RankRule& rule) {
  return rule.at_prompt_end != 0 && uses_prompt_queries(rule);
}
[[nodiscard]] constexpr bool any_waits_for_queries(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) any = any || waits_for_queries(policy.rules[i]);
  return any;
}
[[nodiscard]] constexpr bool waiting_is_over(const PolicyParams& policy, uint32_t generated) {
  return generated >= policy.score_window;
}

[[nodiscard]] constexpr bool fires(const PolicyParams& policy, const RankRule& rule,
                                   const Moment& moment) {
  const bool held = moment.waiting && uses_prompt_queries(rule);
  if (moment.generated == 0) return rule.at_prompt_end != 0 && !held;
  if (held) return rule.at_prompt_end != 0 && waiting_is_over(policy, moment.generated);
  return rule.every > 0 && moment.generated % rule.every == 0;
}
// Requires: the rule fires. True where it is for the tokens of the whole prompt, and not for what
// one step brought.
[[nodiscard]] constexpr bool fires_for_prompt(const RankRule& rule, const Moment& moment) {
  return moment.generated == 0 || (moment.waiting && uses_prompt_queries(rule));
}
[[nodiscard]] constexpr bool any_fires(const PolicyParams& policy, const Moment& moment) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) {
    any = any || fires(policy, policy.rules[i], moment);
  }
  return any;
}

[[nodiscard]] constexpr bool keeps_sums(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) any = any || uses_attention(policy.rules[i]);
  return policy.evict == EvictRule::kRank && any;
}
[[nodiscard]] constexpr bool reads_entropy(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) {
    any = any || policy.rules[i].budget == BudgetRule::kGroups;
  }
  return any;
}
[[nodiscard]] constexpr bool reads_classes(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) {
    const RankRule& r = policy.rules[i];
    any = any || (r.classes | r.special_classes | r.punctuation_classes) != 0;
  }
  return any;
}
// Some rule recodes to keys of fewer channels.
[[nodiscard]] constexpr bool leaves_channels_out(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) {
    any = any || (writes_blocks(policy.rules[i]) && is_think(policy.rules[i].recode_format));
  }
  return any;
}
// The firing interval of the rules that read attention in decoding; 0: none does.
[[nodiscard]] constexpr uint32_t attention_interval(const PolicyParams& policy) {
  for (uint32_t i = 0; i < policy.rule_count; ++i) {
    if (policy.rules[i].every > 0 && uses_attention(policy.rules[i])) return policy.rules[i].every;
  }
  return 0;
}

// True where this step adds its probabilities to the slots. Requires: moment.generated > 0.
[[nodiscard]] constexpr bool measures(const PolicyParams& policy, const Moment& moment) {
  if (!keeps_sums(policy)) return false;
  if (moment.waiting) return true;
  const uint32_t interval = attention_interval(policy);
  if (interval == 0) return false;
  if (policy.score_kind == ScoreKind::kDecayed) {
    return (moment.generated - 1) % policy.score_every == 0;
  }
  if (policy.score_kind != ScoreKind::kWindow) return true;
  return (moment.generated - 1) % interval >= interval - policy.score_window;
}
// True where slots start again from 0 before this step adds: a window begins. A window that is
// still collected for the prompt's rules goes on instead.
[[nodiscard]] constexpr bool starts_window(const PolicyParams& policy, const Moment& moment) {
  const uint32_t interval = attention_interval(policy);
  return !moment.waiting && policy.score_kind == ScoreKind::kWindow && interval > 0 &&
         keeps_sums(policy) && (moment.generated - 1) % interval == interval - policy.score_window;
}

}  // namespace thinkv::policy
