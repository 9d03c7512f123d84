// rank_limits.cpp: how many tokens of each lane of a layer may stay.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "kernels/policy/rank_budget.h"
#include "kernels/sequence/rank.h"

namespace thinkv::kernels {
namespace {

// B of the rule before it is shared out; nothing is over kBudgetNone.
uint32_t base_budget(const SequenceState& state, const RankRule& rule) {
  const uint32_t budget = state.header->budget_tokens;
  return budget == kBudgetNone ? budget : policy::percent_of(budget, rule.budget_percent);
}

// The fewest slots a page of the policy's formats has: what no thought's format breaks.
uint32_t least_slots(const SequenceState& state) {
  const PolicyParams& p = state.policy();
  uint32_t least = kSlotsPerPageMax;
  const auto look = [&](Format format) {
    const uint32_t slots = page_layout(state.resolve(format), state.geometry.head_dim).slots;
    least = std::min(least, static_cast<uint32_t>(slots));
  };
  look(p.prompt_format);
  for (const Format format : p.thought_format) look(format);
  return least;
}

// Without a prompt there is no signal, and each head has B.
void share_by_groups(SequenceState& state, const RankRule& rule, uint32_t layer, uint32_t budget) {
  RankWork& work = state.rank;
  const uint32_t heads = state.geometry.kv_heads;
  work.numbers.resize(heads);
  bool known = true;
  for (uint32_t h = 0; h < heads; ++h) {
    work.heads[h].limit = budget;
    work.numbers[h] = state.lane(state.lane_index(layer, h)).rank().head_signal;
    known = known && !std::isnan(work.numbers[h]);
  }
  if (!known) return;
  work.order.resize(heads);
  std::iota(work.order.begin(), work.order.end(), 0u);
  std::stable_sort(work.order.begin(), work.order.end(),
                   [&](uint32_t a, uint32_t b) { return work.numbers[a] > work.numbers[b]; });
  const std::span<const uint8_t> shares(rule.group_share, rule.group_count);
  for (uint32_t rank = 0; rank < heads; ++rank) {
    work.heads[work.order[rank]].limit = policy::group_budget(budget, heads, rank, shares);
  }
}

// The mask that was chosen at the prompt's end, and every token of the classes that it protects.
uint32_t mask_limit(const SequenceState& state, const RankRule& rule, uint32_t lane,
                    const RankHead& head) {
  const RankLane& rank = state.lane(lane).rank();
  if (rank.mask == policy::kMaskFull) return head.counted;
  const uint8_t classes = protected_classes(state, rule, lane);
  uint32_t in_class = 0;
  if (classes != 0) {
    const Lane view = state.lane(lane);
    view.pages().for_each([&](uint32_t, const PageDescriptor& page) {
      for (uint64_t left = page.live; left != 0; left &= left - 1) {
        const auto slot = static_cast<uint32_t>(std::countr_zero(left));
        in_class += (class_of(state, view.position(page, slot)) & classes) != 0 ? 1 : 0;
      }
    });
    for (uint32_t i = 1; i <= view.header().buffer_count; ++i) {
      in_class += (class_of(state, state.header->tokens - i) & classes) != 0 ? 1 : 0;
    }
  }
  return rank.mask_tokens + in_class;
}

uint32_t limit_of(SequenceState& state, const RankRule& rule, uint32_t layer, uint32_t h,
                  uint32_t budget) {
  const RankHead& head = state.rank.heads[h];
  switch (rule.budget) {
    case BudgetRule::kPyramid:
      return policy::pyramid_budget({.budget = budget,
                                     .window = rule.recent,
                                     .tokens = head.counted,
                                     .beta = rule.budget_low,
                                     .layers = state.geometry.layers},
                                    layer);
    case BudgetRule::kBytes:
      return policy::tokens_of_equal_bytes(
          budget, least_slots(state), page_layout(state.store.wide, state.geometry.head_dim).slots);
    case BudgetRule::kFirstFit: {
      if (rule.at_prompt_end != 0) return budget;
      return std::max(budget, mask_limit(state, rule, state.lane_index(layer, h), head));
    }
    default:
      return budget;
  }
}

}  // namespace

bool set_limits(SequenceState& state, const RankRule& rule, uint32_t layer) {
  RankWork& work = state.rank;
  const uint32_t budget = base_budget(state, rule);
  work.heads.resize(state.geometry.kv_heads);
  uint32_t most = 0;
  for (uint32_t h = 0; h < state.geometry.kv_heads; ++h) {
    const LaneHeader& lane = *state.lanes[state.lane_index(layer, h)];
    const uint32_t outside = rule.counts == BudgetCount::kGenerated ? lane.live_prompt : 0;
    work.heads[h].counted = lane.live - outside;
    most = std::max(most, work.heads[h].counted);
  }
  if (budget == kBudgetNone) return false;
  // Within it, no share is looked at: the shares are B on average, and nobody is short of room. Of
  // groups, while there were no more tokens than it in all: what a head does then depends on no
  // other head's evictions.
  if (rule.budget == BudgetRule::kPyramid && most <= budget) return false;
  if (rule.budget == BudgetRule::kGroups) {
    if (policy::tokens_counted(rule, state.header->tokens, state.header->prompt_tokens) <= budget) {
      return false;
    }
    share_by_groups(state, rule, layer, budget);
  } else {
    for (uint32_t h = 0; h < state.geometry.kv_heads; ++h) {
      work.heads[h].limit = limit_of(state, rule, layer, h, budget);
    }
  }
  // Masks are chosen whether or not something has to go.
  const bool chooses = rule.budget == BudgetRule::kFirstFit && rule.at_prompt_end != 0;
  return chooses || std::any_of(work.heads.begin(), work.heads.end(),
                                [](const RankHead& head) { return head.over(); });
}

}  // namespace thinkv::kernels
