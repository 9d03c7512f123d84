// rank_sizes.cpp: bounds of what rules recode.
//
// A rule that has fired leaves few tokens above its target: those that it kept. So what its next
// firing can recode is what it may keep and what came since, however long the lane is. A rule that
// evicts leaves few tokens at all, and that bounds the rules behind it.
#include "kernels/cuda/rank_sizes.h"

#include <algorithm>

#include "kernels/cuda/device_format.h"
#include "kernels/policy/rank_budget.h"

namespace thinkv::cuda {
namespace {

constexpr uint64_t kBuffered = 2 * kBufferPageSlots;  // tokens that rules do not see yet
constexpr uint32_t kNever = 0xFFFF'FFFFu;

Format resolve(const ModelGeometry& geometry, Format format) {
  if (!is_16bit(format)) return format;
  return geometry.value_type == ValueType::kBf16 ? Format::kBf16 : Format::kF16;
}

uint32_t slots_of(const ModelGeometry& geometry, Format format) {
  return page_layout(format, geometry.head_dim).slots;
}

bool writes_any_blocks(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) any = any || writes_blocks(policy.rules[i]);
  return any;
}

// The most slots a page has from which tokens can go to `target` by a rule: only to fewer bytes, or
// into a block from anywhere, sparse blocks too.
uint32_t lowering_slots(const ModelGeometry& geometry, const PolicyParams& policy, Format target) {
  if (is_block(target)) return kSlotsPerPageMax;
  const uint32_t formats = writes_any_blocks(policy) ? kAllFormatCount : kFormatCount;
  const auto payload = [&](Format format) {
    return page_layout(format, geometry.head_dim).slot_payload_bytes();
  };
  uint32_t most = 0;
  for (uint32_t raw = 1; raw < formats; ++raw) {
    const Format other = resolve(geometry, static_cast<Format>(raw));
    if (payload(other) <= payload(target)) continue;
    most = std::max(most, page_layout(other, geometry.head_dim).slots);
  }
  return most;
}

// Pages for that many tokens: whole blocks only, in the smaller ones where a layer has no partner.
uint64_t pages_of_recoding(const ModelGeometry& geometry, Format target, uint64_t tokens) {
  const uint64_t slots = slots_of(geometry, target);
  if (!is_block(target)) return (tokens + slots - 1) / slots;
  return tokens / std::min<uint64_t>(slots, slots_of(geometry, single_of(target)));
}

// The rule keeps a lane's protected tokens and the best of the others up to a budget that is the
// lane's own.
bool has_own_budget(const RankRule& rule) {
  return rule.budget == BudgetRule::kFixed || rule.budget == BudgetRule::kPyramid ||
         rule.budget == BudgetRule::kBytes;
}

// The most tokens of those that its budget counts that such a rule leaves as they are.
uint64_t kept_at_most(const ModelGeometry& geometry, const RankRule& rule, uint32_t budget) {
  uint64_t limit = policy::percent_of(budget, rule.budget_percent);
  // The first layer has at most twice the mean, rounded.
  if (rule.budget == BudgetRule::kPyramid) limit = 2 * limit + 1;
  if (rule.budget == BudgetRule::kBytes) {
    const uint32_t wide = page_layout(resolve(geometry, Format::kF16), geometry.head_dim).slots;
    limit = limit * kSlotsPerPageMax / wide;
  }
  const uint64_t recent =
      std::max<uint64_t>(rule.recent, limit * rule.recent_percent / 100) + rule.sinks;
  return std::max(limit, recent);
}

// The moment before `moment` at which the rule fired last, none of them before `from`; kNever: none
// that is known.
uint32_t last_firing(const PolicyParams& policy, const RankRule& rule, const policy::Moment& moment,
                     const RankedLane& lane) {
  const uint32_t from = std::max(lane.settled_from, lane.prompt.tokens > 0 ? 0u : 1u);
  for (uint32_t at = moment.generated; at-- > from;) {
    if (policy::fires(policy, rule, rank_moment_at(policy, lane.prompt, at))) return at;
  }
  return kNever;
}

// Tokens of the lane that the rule may recode, of `live` in its pages.
uint64_t recoded_at_most(const ModelGeometry& geometry, const PolicyParams& policy,
                         const RankRule& rule, const policy::Moment& moment, const RankedLane& lane,
                         uint64_t live) {
  if (rule.select == RankSelect::kThreshold && !policy::fires_for_prompt(rule, moment)) return 1;
  // Evictions by position, of which nothing is known here, make any number of blocks sparse.
  if (writes_blocks(rule) || !has_own_budget(rule)) return live;
  const uint32_t last = last_firing(policy, rule, moment, lane);
  if (last == kNever) return live;
  const uint64_t since = moment.generated - last + kBuffered;
  return std::min(live, kept_at_most(geometry, rule, lane.budget) + since);
}

}  // namespace

policy::Moment rank_moment_at(const PolicyParams& policy, const Prompt& prompt,
                              uint32_t generated) {
  const bool waits =
      prompt.tokens > 0 && prompt.queries == 0 && policy::any_waits_for_queries(policy);
  return {.generated = generated, .waiting = waits && generated <= policy.score_window};
}

uint32_t rule_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                    const policy::Moment& moment, const RankedLane& lane) {
  if (lane.budget == kRankBudgetNone) return 0;
  uint64_t live = uint64_t{lane.prompt.tokens} + moment.generated;
  uint64_t pages = 0;
  for (uint32_t i = 0; i < policy.rule_count; ++i) {
    const RankRule& rule = policy.rules[i];
    if (!policy::fires(policy, rule, moment)) continue;
    if (rule.action == RankAction::kRecode) {
      const Format target = resolve(geometry, rule.recode_format);
      // A flush of this step may bring 16 tokens more than the pages held.
      const uint64_t held =
          uint64_t{lane.pages_max} * lowering_slots(geometry, policy, target) + kBuffered;
      const uint64_t tokens =
          recoded_at_most(geometry, policy, rule, moment, lane, std::min(live, held));
      pages += pages_of_recoding(geometry, target, tokens);
    } else if (has_own_budget(rule) && rule.layer_first == 0 && rule.layer_end == 0) {
      const bool prompt_stays = rule.counts == BudgetCount::kGenerated;
      const uint64_t kept = kept_at_most(geometry, rule, lane.budget);
      live = std::min(live, kept + (prompt_stays ? lane.prompt.tokens : 0));
    }
  }
  return static_cast<uint32_t>(pages);
}

}  // namespace thinkv::cuda
