// rank_choose.cuh: how many tokens of a lane stay, and which (rank.h): the decisions of
// kernels/sequence/rank_limits.cpp and rank_choose.cpp. Functions of a whole block.
#pragma once

#include <cstdint>

#include "kernels/cuda/radix.cuh"
#include "kernels/cuda/rank_classes.cuh"
#include "kernels/cuda/rank_groups.cuh"
#include "kernels/cuda/rank_rows.cuh"

namespace thinkv::cuda {
namespace rank_detail {

// The fewest slots a page of the policy's formats has.
[[nodiscard]] __device__ inline uint32_t least_slots(const BatchView& view,
                                                     const PolicyParams& policy) {
  const uint32_t dim = view.geometry.head_dim;
  uint32_t least = kSlotsPerPageMax;
  const auto look = [&](Format format) {
    if (!format_valid(static_cast<uint8_t>(format))) return;
    least = min(least, slot_shape(dim, static_cast<uint32_t>(resolve_format(view, format))).slots);
  };
  look(policy.prompt_format);
  for (const Format format : policy.thought_format) look(format);
  return least;
}

[[nodiscard]] __device__ inline uint32_t limit_of(const RankItem& item, const RankRule& rule,
                                                  uint32_t budget, uint32_t counted) {
  const BatchView& view = *item.batch;
  if (rule.budget == BudgetRule::kPyramid) {
    return policy::pyramid_budget({.budget = budget,
                                   .window = rule.recent,
                                   .tokens = counted,
                                   .beta = rule.budget_low,
                                   .layers = view.geometry.layers},
                                  item.layer());
  }
  if (rule.budget == BudgetRule::kBytes) {
    const uint32_t wide =
        slot_shape(view.geometry.head_dim, static_cast<uint32_t>(wide_format(view))).slots;
    return policy::tokens_of_equal_bytes(budget, least_slots(view, item.sequence->policy), wide);
  }
  if (rule.budget == BudgetRule::kGroups) return group_limit(item, rule, budget);
  return budget;
}

// ---- the best of the rows that may go ----

// Rows from the lowest to the highest: by score, what is not a number lowest, then by position.
[[nodiscard]] __device__ __forceinline__ uint64_t rank_key(float score, uint32_t row) {
  return uint64_t{ordered_bits(score)} << kRankRowBits | row;
}

// The least key of the `target` highest rows that are not fixed. Requires: 0 < target <= free rows.
[[nodiscard]] __device__ inline uint64_t least_kept(const RankRows& rows, RankShared& shared,
                                                    uint32_t n, uint32_t target) {
  constexpr uint32_t kBits = 32 + kRankRowBits;
  return least_of_highest<uint64_t>(shared, shared.bins, kBits, target, [&](const auto& visit) {
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      if (rows.fixed[i] == 0) visit(rank_key(rows.score[i], i));
    }
    return true;
  });
}

}  // namespace rank_detail

// What the rule makes of a lane's budget. False in `due` where there is none.
struct RankBudget {
  RankLimit limit;
  bool due;
};
[[nodiscard]] __device__ inline RankBudget budget_of(const RankItem& item, const RankRule& rule,
                                                     const LaneView& lane) {
  const uint32_t all = item.sequence->budget_tokens;
  if (all == kRankBudgetNone || lane.lane == nullptr) return {{0, 0, false, 0}, false};
  const uint32_t outside = rule.counts == BudgetCount::kGenerated ? lane.lane->live_prompt : 0;
  const uint32_t counted = lane.lane->live - outside;
  const uint32_t budget = policy::percent_of(all, rule.budget_percent);
  if (rule.budget == BudgetRule::kFirstFit) {
    // Masks are chosen whether or not something has to go.
    if (rule.at_prompt_end != 0) return {{counted, budget, false, rule.classes}, true};
    const uint32_t mask = lane.lane->mask, classes = protected_classes(rule, mask);
    const uint32_t held = mask == policy::kMaskFull
                              ? counted
                              : lane.lane->mask_tokens + count_in_classes(item, lane, classes);
    const uint32_t limit = max(budget, held);
    return {{counted, limit, mask == policy::kMaskLocal, classes}, counted > limit};
  }
  const uint32_t limit = rank_detail::limit_of(item, rule, budget, counted);
  return {{counted, limit, false, rule.classes}, counted > limit};
}

// The fixed rows and the `target` best of the others: rows.fate (policy::keep_best).
__device__ inline void keep_best(const RankItem& item, uint32_t n, uint32_t free, uint32_t target) {
  const RankRows& rows = item.rows;
  const bool all = target >= free;
  const uint64_t least =
      all || target == 0 ? 0 : rank_detail::least_kept(rows, *item.shared, n, target);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const bool best = target > 0 && rank_detail::rank_key(rows.score[i], i) >= least;
    rows.fate[i] = all || rows.fixed[i] != 0 || best ? kRankKeep : kRankDrop;
  }
  __syncthreads();
}

// What the rule does not keep goes to the other format instead, where that is its action.
__device__ inline void recode_dropped(const RankItem& item, const RankRule& rule, uint32_t n) {
  if (rule.action != RankAction::kRecode) return;
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (item.rows.fate[i] == kRankDrop) item.rows.fate[i] = kRankRecode;
  }
  __syncthreads();
}

// rows.fate of `n` rows, `free` of them not fixed.
__device__ inline void choose_fates(const RankItem& item, const RankRule& rule,
                                    const RankLimit& limit, uint32_t n, uint32_t free) {
  keep_best(item, n, free, free - min(free, limit.surplus()));
  recode_dropped(item, rule, n);
}

}  // namespace thinkv::cuda
