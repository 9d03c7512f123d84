// rank_check.h: which settings of a rank policy go together, each refusal with its reason.
//
// The one place of these conditions: the policy file's reader turns a problem into a message about
// the key, policy_params_valid() into false. Any bytes may be checked.
#pragma once

#include <cstdint>

#include "thinkv/internal/policy_params.h"

namespace thinkv {

// Both null: no problem. `key` as in the policy file, relative to the rule.
struct RankProblem {
  const char* key = nullptr;
  const char* what = nullptr;
  [[nodiscard]] constexpr bool any() const { return what != nullptr; }
};

// The rule needs the number that slots keep.
[[nodiscard]] constexpr bool uses_attention(const RankRule& r) {
  return r.attention != 0.0f || r.budget == BudgetRule::kMaxDrop ||
         r.budget == BudgetRule::kThreshold || r.budget == BudgetRule::kFirstFit;
}
// The rule looks at the prompt's queries, or waits for the first decode steps instead.
[[nodiscard]] constexpr bool uses_prompt_queries(const RankRule& r) {
  return uses_attention(r) || r.budget == BudgetRule::kGroups;
}
// Budgets that are found from the tokens themselves.
[[nodiscard]] constexpr bool is_adaptive(BudgetRule budget) {
  return budget == BudgetRule::kMaxDrop || budget == BudgetRule::kThreshold ||
         budget == BudgetRule::kFirstFit;
}

namespace detail {

// No field holds a value outside of its enumeration or range.
[[nodiscard]] constexpr bool rank_fields_valid(const RankRule& r) {
  bool ok = r.every <= kRankEveryMax && r.at_prompt_end <= 1 && r.value_norm <= 1;
  ok = ok && static_cast<uint8_t>(r.counts) <= 1 && static_cast<uint8_t>(r.budget) <= 8;
  ok = ok && static_cast<uint8_t>(r.select) <= 5 && static_cast<uint8_t>(r.action) <= 1;
  ok = ok && static_cast<uint8_t>(r.pool) <= 2 && static_cast<uint8_t>(r.anchor) <= 4;
  ok = ok && recode_format_valid(static_cast<uint8_t>(r.recode_format)) && r.reserved == 0;
  ok = ok && (r.layer_end == 0 || r.layer_first < r.layer_end);
  ok = ok && r.budget_percent >= 1 && r.budget_percent <= 100 && r.recent_percent <= 100;
  ok = ok && r.representative_percent <= 100 && r.frequent_percent <= 100;
  ok = ok && r.local_percent <= 100 && r.group_count <= kRankGroupsMax;
  ok = ok && r.pool_width >= 1 && r.pool_width <= kPoolWidthMax && r.pool_width % 2 == 1;
  for (const float weight : {r.attention, r.similarity, r.position, r.random, r.distinct}) {
    ok = ok && weight >= -1e6f && weight <= 1e6f;  // false for what is not a number
  }
  ok = ok && r.similarity_above >= -1.0f && r.similarity_above <= 1.0f;
  return ok && r.budget_low >= 0.0f && r.budget_low <= 1e6f && r.budget_high >= 0.0f &&
         r.budget_high <= 1e6f;
}

[[nodiscard]] constexpr RankProblem trigger_problem(const PolicyParams& p, const RankRule& r) {
  if (r.every == 0 && r.at_prompt_end == 0) {
    return {"trigger", "needs prompt_end, every, or both: a rule that never fires does nothing"};
  }
  if (r.every > 0 && uses_attention(r) && p.score_kind == ScoreKind::kWindow) {
    if (r.every < p.score_window) {
      return {"trigger.every",
              "must be at least scores.window: the window is collected between two firings"};
    }
    for (uint32_t i = 0; i < p.rule_count && i < kRulesMax; ++i) {
      const RankRule& other = p.rules[i];
      if (uses_attention(other) && other.every != 0 && other.every != r.every) {
        return {"trigger.every",
                "must be that of the other rules with attention: a slot keeps one window"};
      }
    }
  }
  if (r.every > 0 && uses_attention(r) && p.score_every != 1 &&
      p.score_kind != ScoreKind::kDecayed) {
    return {"signal.attention",
            "needs scores.every: 1: sums, means and windows are counted in single steps"};
  }
  if (r.similarity != 0.0f && r.every > 0 && r.every < 16) {
    return {"signal.redundancy",
            "compares all keys with all keys: trigger.every must be at least 16"};
  }
  return {};
}

[[nodiscard]] constexpr RankProblem threshold_problem(const PolicyParams& p, const RankRule& r) {
  if (r.budget_low > r.budget_high) return {"budget.low", "must not be above budget.high"};
  if (p.score_kind != ScoreKind::kMean) {
    return {"budget.rule",
            "threshold compares with uniform attention: scores.accumulate must be mean"};
  }
  if (r.every > 1) return {"trigger.every", "must be 1: threshold looks at each new token"};
  return {};
}

[[nodiscard]] constexpr RankProblem budget_problem(const PolicyParams& p, const RankRule& r) {
  if (p.grain == SelectGrain::kLayer &&
      (is_adaptive(r.budget) || r.budget == BudgetRule::kGroups || r.budget == BudgetRule::kSplit ||
       r.budget == BudgetRule::kShared)) {
    return {"budget.rule", "works head by head: evict.grain must be kv_head"};
  }
  switch (r.budget) {
    case BudgetRule::kPyramid:
      if (!(r.budget_low > 1.0f)) return {"budget.beta", "must be above 1"};
      break;
    case BudgetRule::kGroups: {
      uint32_t shares = 0;
      for (uint32_t i = 0; i < r.group_count; ++i) shares += r.group_share[i] > 0 ? 1 : 0;
      if (r.group_count < 2 || shares != r.group_count) {
        return {"budget.shares", "2 to 4 whole numbers from 1 to 255 are needed"};
      }
      break;
    }
    case BudgetRule::kSplit:
      if (r.representative_percent == 0 || r.representative_percent >= 100) {
        return {"budget.representative", "must be 1 to 99 percent"};
      }
      break;
    case BudgetRule::kShared:
      if (!(r.budget_low <= 1.0f)) return {"budget.least", "must be at most 1"};
      break;
    case BudgetRule::kMaxDrop:
      if (!(r.budget_low < 1.0f)) return {"budget.drop", "must be below 1"};
      break;
    case BudgetRule::kThreshold:
      return threshold_problem(p, r);
    case BudgetRule::kFirstFit:
      if (!(r.budget_low > 0.0f && r.budget_low <= 1.0f)) {
        return {"budget.recover", "must be above 0, at most 1"};
      }
      if (p.score_kind == ScoreKind::kWindow) {
        return {"budget.rule",
                "first_fit goes on in decoding: scores.accumulate must be sum or "
                "mean"};
      }
      break;
    default:
      break;
  }
  return {};
}

// Selections and budgets that only mean something together.
[[nodiscard]] constexpr RankProblem pair_problem(const RankRule& r) {
  if ((r.select == RankSelect::kThreshold) != (r.budget == BudgetRule::kThreshold)) {
    return {"select.rule", "threshold and budget.rule: threshold go together, and only they"};
  }
  if ((r.select == RankSelect::kStrata) != (r.budget == BudgetRule::kSplit)) {
    return {"select.rule", "strata and budget.rule: split go together, and only they"};
  }
  if (r.budget == BudgetRule::kShared && r.select != RankSelect::kTopK) {
    return {"select.rule", "must be topk: shared compares the numbers of all heads of a layer"};
  }
  if (r.budget == BudgetRule::kMaxDrop && r.select != RankSelect::kPrefix) {
    return {"select.rule", "must be prefix: max_drop finds how much of the order can go"};
  }
  if (r.budget == BudgetRule::kMaxDrop && r.every > 0) {
    return {"trigger.every", "max_drop is found once, at the prompt's end: every must be absent"};
  }
  if (r.select == RankSelect::kArgMin1 && (r.every != 1 || r.at_prompt_end != 0)) {
    return {"select.rule",
            "argmin1 takes one token a step: trigger.every must be 1 and prompt_end absent"};
  }
  if (r.budget == BudgetRule::kFirstFit &&
      r.select != (r.at_prompt_end != 0 ? RankSelect::kTopK : RankSelect::kArgMin1)) {
    return {"select.rule", "first_fit takes topk at the prompt's end and argmin1 in decoding"};
  }
  if (r.budget == BudgetRule::kFirstFit && r.at_prompt_end != 0 && r.every != 0) {
    return {"trigger", "first_fit chooses at the prompt's end; decoding is a rule of its own"};
  }
  return {};
}

[[nodiscard]] constexpr RankProblem distinct_problem(const PolicyParams& p, const RankRule& r) {
  if (r.distinct == 0.0f) return {};
  if (p.centre == 0) {
    return {"signal.distinct", "needs centring: prompt, which keeps the mean of the prompt's keys"};
  }
  if (r.attention == 0.0f) {
    return {"signal.attention", "is needed for distinct, which is scaled to a share of it"};
  }
  return {};
}

[[nodiscard]] constexpr RankProblem signal_problem(const RankRule& r) {
  const bool weighs =
      r.attention != 0.0f || r.similarity != 0.0f || r.position != 0.0f || r.random != 0.0f;
  const bool by_itself = r.select == RankSelect::kMedoids || r.select == RankSelect::kThreshold ||
                         r.budget == BudgetRule::kFirstFit;
  if (!weighs && !by_itself) {
    return {"signal", "a weight for attention, similarity, position or random is needed"};
  }
  if (weighs && (r.select == RankSelect::kThreshold || r.budget == BudgetRule::kFirstFit)) {
    return {"signal", "has no effect: threshold and first_fit read the attention themselves"};
  }
  if (r.attention == 0.0f && (r.pool != Pool::kNone || r.value_norm != 0)) {
    return {"signal.attention", "is needed for pool and values: they change it"};
  }
  if ((r.pool == Pool::kNone) != (r.pool_width == 1)) {
    return {"signal.width", "goes with pool: average or maximum over 3 to 15 neighbours"};
  }
  if (r.action == RankAction::kRecode && is_16bit(r.recode_format)) {
    return {"action", "recoding to 16 bits wins nothing"};
  }
  if (r.action == RankAction::kRecode && r.budget == BudgetRule::kFirstFit) {
    return {"action", "first_fit evicts"};
  }
  return {};
}

// A block is written as a whole, and no slot of it is written again.
[[nodiscard]] constexpr RankProblem block_problem(const PolicyParams& p, const RankRule& r) {
  const bool singly = r.select == RankSelect::kArgMin1 || r.select == RankSelect::kThreshold;
  for (uint32_t i = 0; i < p.rule_count && i < kRulesMax; ++i) {
    const RankRule& other = p.rules[i];
    if (!writes_blocks(other) || !share_layers(r, other)) continue;
    if (singly) {
      return {"select.rule",
              "takes single tokens, whose slots a block cannot reuse: topk, prefix, strata or "
              "medoids go with a format of blocks"};
    }
    if (r.action == RankAction::kEvict && r.every != 0 && r.every < 16) {
      return {"trigger.every",
              "must be at least 16 where a rule recodes to blocks: slots of a block are not "
              "reused alone, it goes when all of it is dead"};
    }
  }
  if (writes_blocks(r) && is_think(r.recode_format) && p.rotate != 0) {
    return {"format", "think leaves out channels of the model's own keys: rotation must be none"};
  }
  return {};
}

// Two layers on one page: everything that happens to it must happen to both lanes alike.
[[nodiscard]] constexpr RankProblem layer_pair_problem(const PolicyParams& p, uint32_t index) {
  const RankRule& r = p.rules[index];
  if (!writes_blocks(r) || !is_pair(r.recode_format)) return {};
  if (r.layer_first % 2 != 0 || r.layer_end % 2 != 0) {
    return {"layers", "must begin and end with an even number: a layer and the next are a pair"};
  }
  if (r.attention != 0.0f || r.similarity != 0.0f || r.random != 0.0f) {
    return {"signal", "must be position alone: both layers of a pair choose the same tokens"};
  }
  if (r.budget != BudgetRule::kFixed || r.select == RankSelect::kMedoids) {
    return {"budget.rule", "must be fixed, with topk or prefix: the layers of a pair are alike"};
  }
  for (uint32_t i = 0; i < p.rule_count && i < kRulesMax; ++i) {
    if (i == index || !share_layers(r, p.rules[i])) continue;
    return {"layers",
            "another rule has some of them: nothing of a layer pair is evicted or recoded alone"};
  }
  return {};
}

}  // namespace detail

// What is wrong with rule `i`. Requires: i < kRulesMax.
[[nodiscard]] constexpr RankProblem rank_problem(const PolicyParams& p, uint32_t i) {
  const RankRule& r = p.rules[i];
  if (!detail::rank_fields_valid(r)) return {"", "holds a value that is out of range"};
  for (const RankProblem problem :
       {detail::trigger_problem(p, r), detail::budget_problem(p, r), detail::pair_problem(r),
        detail::signal_problem(r), detail::distinct_problem(p, r), detail::block_problem(p, r),
        detail::layer_pair_problem(p, i)}) {
    if (problem.any()) return problem;
  }
  if (r.budget == BudgetRule::kFirstFit && r.at_prompt_end == 0) {
    bool chosen = false;
    for (uint32_t j = 0; j < p.rule_count && j < kRulesMax; ++j) {
      chosen =
          chosen || (p.rules[j].budget == BudgetRule::kFirstFit && p.rules[j].at_prompt_end != 0);
    }
    if (!chosen) return {"budget.rule", "first_fit in decoding needs one at the prompt's end"};
  }
  if (p.budget_tokens == 0 && !is_adaptive(r.budget)) {
    return {"budget.rule", "needs evict.budget, a number of tokens"};
  }
  return {};
}

}  // namespace thinkv
