// rank_adaptive.cuh: selections of one lane that look at attention itself: DiffKV's tiers and
// FastGen's masks, as kernels/sequence/rank_adaptive.cpp has them. Functions of a whole block; the
// item is one lane.
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_choose.cuh"

namespace thinkv::cuda {
namespace rank_detail {

// The rows of an item are chosen by their attention.
__device__ inline void score_by_attention(const RankRows& rows, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) rows.score[i] = rows.attention[i];
  __syncthreads();
}

// ---- threshold ----

[[nodiscard]] __device__ inline policy::Tiers tiers_of(const RankItem& item, const RankRule& rule) {
  // Without a low format there is one threshold.
  const bool two = rule.action == RankAction::kRecode;
  return policy::tiers_of(rule.budget_low, two ? rule.budget_high : rule.budget_low,
                          item.sequence->tokens);
}

// The prompt: every token by its own mean; the lowest go first where the budget ends it.
__device__ inline void sort_into_tiers(const RankItem& item, const RankRule& rule,
                                       const RankLimit& limit, uint32_t n, uint32_t free) {
  const RankRows& rows = item.rows;
  const policy::Tiers t = tiers_of(item, rule);
  const uint8_t lower = rule.action == RankAction::kRecode ? kRankRecode : kRankKeep;
  score_by_attention(rows, n);
  // The host stops at the first row of the high tier; what is not a number comes first and is high.
  const uint32_t unknown = count_rows(*item.shared, n, [&](uint32_t i) {
    return rows.fixed[i] == 0 && rows.attention[i] != rows.attention[i];
  });
  keep_best(item, n, free, unknown != 0 ? free : free - min(free, limit.surplus()));
  for (uint32_t i = threadIdx.x; i < n && unknown == 0; i += blockDim.x) {
    if (rows.fixed[i] != 0) continue;
    const policy::Tier tier = policy::tier_of(rows.attention[i], t);
    const bool goes = rows.fate[i] == kRankDrop && tier == policy::Tier::kPruned;
    const auto kept = static_cast<uint8_t>(kRankKeep);
    if (!goes) rows.fate[i] = tier == policy::Tier::kHigh ? kept : lower;
  }
  __syncthreads();
}

// The lowest row of a tier and its attention; infinite for an empty tier.
struct LowestRow {
  uint32_t row;
  float attention;
};
[[nodiscard]] __device__ inline LowestRow lowest_row(const RankRows& rows, uint64_t key) {
  const float nothing = __uint_as_float(0x7F80'0000u);
  if (key == lane_detail::kNoKey) return {0, nothing};
  const auto row = static_cast<uint32_t>(key) & ((1u << kRankRowBits) - 1);
  return {row, rows.attention[row]};
}

// shared.least of the tiers high and low.
__device__ inline void find_lowest(const RankItem& item, const RankRule& rule, const LaneView& lane,
                                   uint32_t n) {
  const RankRows& rows = item.rows;
  const float nothing = __uint_as_float(0x7F80'0000u);
  const bool two = rule.action == RankAction::kRecode;
  if (threadIdx.x < 2) item.shared->least[threadIdx.x] = lane_detail::kNoKey;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const DeviceDescriptor* d = descriptor_at(lane, rows.place[i] >> 6);
    if (d == nullptr || rows.fixed[i] != 0 || !(rows.attention[i] < nothing)) continue;
    const bool low =
        two && d->format == static_cast<uint8_t>(resolve_format(*item.batch, rule.recode_format));
    min_64(&item.shared->least[low ? 1 : 0], rank_key(rows.attention[i], i));
  }
  __syncthreads();
}

// A decode step: at most one token leaves its slot.
__device__ inline void move_one_tier(const RankItem& item, const RankRule& rule,
                                     const LaneView& lane, uint32_t n) {
  const RankRows& rows = item.rows;
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) rows.fate[i] = kRankKeep;
  find_lowest(item, rule, lane, n);
  const LowestRow high = lowest_row(rows, item.shared->least[0]);
  const LowestRow low = lowest_row(rows, item.shared->least[1]);
  const policy::TierMove move =
      policy::tier_move(high.attention, low.attention, tiers_of(item, rule));
  if (threadIdx.x == 0) {
    if (move == policy::TierMove::kEvictHigh) rows.fate[high.row] = kRankDrop;
    if (move == policy::TierMove::kRecodeReplace) rows.fate[low.row] = kRankDrop;
    const bool recodes =
        move == policy::TierMove::kRecodeReplace || move == policy::TierMove::kRecode;
    if (recodes && rule.action == RankAction::kRecode) rows.fate[high.row] = kRankRecode;
  }
  __syncthreads();
}

// ---- first_fit ----

// policy::choose_mask by one thread: rows.fate holds the first mask of every row.
[[nodiscard]] __device__ inline uint32_t fitting_mask(const RankRows& rows, uint32_t n,
                                                      float recover) {
  float recovered[policy::kMasks] = {};
  float all = 0.0f;
  for (uint32_t i = 0; i < n; ++i) {
    const float attention = rows.attention[i];
    all = exact_add(all, attention);
    for (uint32_t m = 0; m < policy::kMasks; ++m) {
      if (m >= rows.fate[i]) recovered[m] = exact_add(recovered[m], attention);
    }
  }
  uint32_t mask = policy::kMaskFull;
  for (uint32_t m = policy::kMasks; m-- > 0;) {
    const float share = all > 0.0f ? exact_div(recovered[m], all) : 0.0f;
    if ((m == policy::kMaskFull ? 1.0f : share) >= recover) mask = m;
  }
  return mask;
}

// rows.fixed while masks are chosen: beside those that the rule protects, tokens with a mask of
// their own.
inline constexpr uint8_t kFixedSpecial = 2, kFixedPunctuation = 3;

[[nodiscard]] __device__ __forceinline__ uint32_t class_of_row(const RankItem& item, uint32_t i) {
  if (item.sequence->class_pages == 0) return 0;
  return class_of(*item.batch, item.sequence, item.rows.position[i]);
}

__device__ inline void fix_classes(const RankItem& item, const RankRule& rule, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (item.rows.fixed[i] != 0) continue;
    const uint32_t classes = class_of_row(item, i);
    if ((classes & rule.punctuation_classes) != 0) item.rows.fixed[i] = kFixedPunctuation;
    if ((classes & rule.special_classes) != 0) item.rows.fixed[i] = kFixedSpecial;
  }
  __syncthreads();
}

// The first mask that holds each row (policy::first_masks) to rows.fate.
__device__ inline void first_masks(const RankItem& item, const RankRule& rule, uint32_t n) {
  const RankRows& rows = item.rows;
  const uint32_t free = count_rows(*item.shared, n, [&](uint32_t i) { return rows.fixed[i] == 0; });
  const uint32_t prompt = item.sequence->prompt_tokens;
  const uint32_t local = policy::percent_of(prompt, rule.local_percent);
  const uint32_t frequent = min(policy::percent_of(prompt, rule.frequent_percent), free);
  const uint64_t least = frequent == 0 ? 0 : least_kept(rows, *item.shared, n, frequent);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    uint32_t first = n - i <= local ? policy::kMaskLocal : policy::kMaskFull;
    if (frequent > 0 && rank_key(rows.score[i], i) >= least) first = policy::kMaskFrequent;
    if (rows.fixed[i] != 0) {
      first = rows.fixed[i] == kFixedPunctuation ? policy::kMaskPunctuation : policy::kMaskSpecial;
    }
    rows.fate[i] = static_cast<uint8_t>(first);
  }
  __syncthreads();
}

// Chooses the lane's mask, and what stays under it.
__device__ inline void fit_mask(const RankItem& item, const RankRule& rule, const LaneView& lane,
                                const RankLimit& limit, uint32_t n) {
  const RankRows& rows = item.rows;
  RankShared& shared = *item.shared;
  score_by_attention(rows, n);
  fix_classes(item, rule, n);
  first_masks(item, rule, n);
  if (threadIdx.x == 0) shared.digit = fitting_mask(rows, n, rule.budget_low);
  __syncthreads();
  const uint32_t mask = shared.digit;
  const uint32_t of_mask = mask >= policy::kMaskPunctuation ? rule.punctuation_classes : 0;
  const uint32_t classes = rule.classes | rule.special_classes | of_mask;
  const uint32_t held = count_rows(shared, n, [&](uint32_t i) {
    return rows.fate[i] <= mask && (class_of_row(item, i) & classes) == 0;
  });
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    rows.fixed[i] = rows.fate[i] <= mask ? 1 : 0;
  }
  if (threadIdx.x == 0) {
    lane.lane->mask = static_cast<uint8_t>(mask);
    lane.lane->mask_tokens = held;
  }
  const uint32_t left = count_rows(shared, n, [&](uint32_t i) { return rows.fixed[i] == 0; });
  keep_best(item, n, left, left - min(left, limit.surplus()));
}

__device__ inline void apply_first_fit(const RankItem& item, const RankRule& rule,
                                       const LaneView& lane, const RankLimit& limit, uint32_t n,
                                       uint32_t free) {
  const RankRows& rows = item.rows;
  if (rule.at_prompt_end != 0) return fit_mask(item, rule, lane, limit, n);
  // Without a frequent part the oldest goes, else the one with the least attention.
  const bool frequent = lane.lane->mask >= policy::kMaskFrequent;
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    rows.score[i] = frequent ? rows.attention[i] : static_cast<float>(rows.position[i]);
  }
  __syncthreads();
  keep_best(item, n, free, free - min(free, limit.surplus()));
}

}  // namespace rank_detail

// rows.fate by the rule. Requires: the rule is due in the item.
__device__ inline void choose(const RankItem& item, const RankRule& rule, const LaneView& lane,
                              const RankLimit& limit, uint32_t n, uint32_t free) {
  if (rule.budget == BudgetRule::kFirstFit) {
    return rank_detail::apply_first_fit(item, rule, lane, limit, n, free);
  }
  if (rule.select != RankSelect::kThreshold) return choose_fates(item, rule, limit, n, free);
  if (policy::fires_for_prompt(rule, moment_of_step(item.sequence))) {
    rank_detail::sort_into_tiers(item, rule, limit, n, free);
  } else {
    rank_detail::move_one_tier(item, rule, lane, n);
  }
}

}  // namespace thinkv::cuda
