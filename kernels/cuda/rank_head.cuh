// rank_head.cuh: one of the heads of a layer that a rule compares with each other (rank.h).
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_choose.cuh"
#include "kernels/cuda/rank_signals.cuh"

namespace thinkv::cuda {

// One head of a layer with its rows.
struct LoadedHead {
  RankItem item;
  LaneView lane;
  RankBudget budget;
  uint32_t n;
  uint32_t free;
};

// Result: false for bad metadata.
template <int kDim>
[[nodiscard]] __device__ inline bool load_head(const RankItem& layer, const RankRule& rule,
                                               uint32_t head, bool with_scores, LoadedHead& out) {
  out.item = layer.head(head);
  out.lane = out.item.lane(0);
  if (out.lane.lane == nullptr) return false;
  out.budget = budget_of(out.item, rule, out.lane);
  out.n = gather_lane(out.item, out.lane);
  if (out.n >= layer.rows.room) return false;
  if (with_scores) {
    score_rows<kDim>(out.item, rule, out.lane, out.item.first_lane, out.budget.limit, out.n);
  }
  protect_rows(out.item, rule, out.budget.limit, out.n);
  out.free = rank_detail::count_rows(*layer.shared, out.n,
                                     [&](uint32_t i) { return layer.rows.fixed[i] == 0; });
  return true;
}

}  // namespace thinkv::cuda
