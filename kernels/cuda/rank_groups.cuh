// rank_groups.cuh: what a head of a layer may keep where the heads have budgets by groups
// (kernels/sequence/rank_limits.cpp).
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_rows.cuh"

namespace thinkv::cuda {
namespace rank_detail {

// A lane of the layer, or null with kBadMetadata raised. Another block may be taking pages from it
// or giving some, so its counts are not looked at, as lane_view() would.
[[nodiscard]] __device__ __forceinline__ const DeviceLane* lane_beside(const RankItem& item,
                                                                       uint32_t index) {
  const uint32_t per_page = lanes_per_page(item.batch->geometry.head_dim);
  const auto* page = page_at(*item.batch, lane_page_ids(item.sequence)[index / per_page]);
  if (page == nullptr) return nullptr;
  return reinterpret_cast<const DeviceLane*>(page) + index % per_page;
}

// How many heads of the lane's layer come before it, the largest signal first; `heads` where one
// has no signal: there was no prompt. Every thread looks at all of them.
[[nodiscard]] __device__ inline uint32_t head_rank(const RankItem& item) {
  const uint32_t heads = item.batch->geometry.kv_heads;
  const uint32_t first = item.layer() * heads, own = item.first_lane - first;
  const LaneView mine = item.lane(0);
  if (mine.lane == nullptr) return heads;
  const float signal = mine.lane->head_signal;
  uint32_t rank = 0;
  for (uint32_t h = 0; h < heads; ++h) {
    const DeviceLane* lane = lane_beside(item, first + h);
    if (lane == nullptr) return heads;
    const float other = lane->head_signal;
    if (other != other) return heads;
    rank += other > signal || (other == signal && h < own) ? 1 : 0;
  }
  return rank;
}

// The lane's limit. Until the sequence had more tokens than the budget, none.
[[nodiscard]] __device__ THINKV_OUT_OF_LINE inline uint32_t group_limit(const RankItem& item,
                                                                        const RankRule& rule,
                                                                        uint32_t budget) {
  const DeviceSequence& s = *item.sequence;
  if (policy::tokens_counted(rule, s.tokens, s.prompt_tokens) <= budget) return kRankBudgetNone;
  const uint32_t heads = item.batch->geometry.kv_heads, rank = head_rank(item);
  if (rank >= heads) return budget;
  const uint32_t groups = max(min(uint32_t{rule.group_count}, kRankGroupsMax), 1u);
  return policy::group_budget(budget, heads, rank, {rule.group_share, groups});
}

}  // namespace rank_detail
}  // namespace thinkv::cuda
