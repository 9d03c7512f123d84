// rank_strata.cuh: KVCrush's representatives: the best tokens of every head, and of the others an
// even spread over their distances to an anchor, by one block for the heads of a layer.
//
// A token's signature has a bit for every head that counts it among its best. Signatures are not
// kept: what each head keeps stands in DeviceDescriptor.marks, and a head's distances are counted
// up head by head.
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_apply.cuh"
#include "kernels/cuda/rank_choose.cuh"
#include "kernels/cuda/rank_head.cuh"

namespace thinkv::cuda {
namespace strata_detail {

[[nodiscard]] __device__ __forceinline__ bool is_marked(const LaneView& lane, uint32_t place) {
  const DeviceDescriptor* d = descriptor_at(lane, place >> 6);
  return d != nullptr && ((d->marks >> (place & 63u)) & 1u) != 0;
}

__device__ inline void clear_marks(const LaneView& lane) {
  for (uint32_t i = threadIdx.x; i < lane.lane->pages; i += blockDim.x) {
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (d != nullptr) d->marks = 0;
  }
  __syncthreads();
}

// Marks the rows that the head keeps for their scores alone.
__device__ inline void mark_best(const LoadedHead& head, const RankRule& rule) {
  const RankRows& rows = head.item.rows;
  const RankLimit& limit = head.budget.limit;
  const uint32_t places = head.free - min(head.free, limit.surplus());
  const uint32_t spread = policy::percent_of(limit.limit, rule.representative_percent);
  keep_best(head.item, head.n, head.free, limit.over() ? places - min(places, spread) : places);
  clear_marks(head.lane);
  for (uint32_t i = threadIdx.x; i < head.n; i += blockDim.x) {
    DeviceDescriptor* d = descriptor_at(head.lane, rows.place[i] >> 6);
    // Each bit is added once to bits that are clear.
    if (d != nullptr && rows.fate[i] == kRankKeep) {
      add_64(&d->marks, uint64_t{1} << (rows.place[i] & 63u));
    }
  }
  __syncthreads();
}

// The row at `position`, or n.
[[nodiscard]] __device__ __forceinline__ uint32_t row_at(const uint32_t* positions, uint32_t n,
                                                         uint32_t position) {
  uint32_t low = 0, high = n;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (positions[middle] < position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < n && positions[low] == position ? low : n;
}

// Bit g of the anchor (policy::anchor_of). set: rows of `rows` that have the bit.
[[nodiscard]] __device__ inline bool anchor_bit(const RankRule& rule, uint32_t layer, uint32_t g,
                                                uint32_t set, uint32_t rows) {
  switch (rule.anchor) {
    case Anchor::kRandom:
      return ((policy::random_bits(rule.seed, layer, g / 64) >> (g % 64)) & 1u) != 0;
    case Anchor::kOnes:
      return true;
    case Anchor::kAlternating:
      return g % 2 == 1;
    case Anchor::kMean:
      return 2 * uint64_t{set} > rows;
    default:
      return false;
  }
}

// The working memory of a head's distances, beside the rows of another head.
struct Distances {
  uint32_t* positions;  // of the head's rows
  uint32_t* distance;
  uint32_t* bit;  // of the head in question
  uint32_t n;
};

// Counts bit g of all signatures against the anchor's.
__device__ inline void compare_bit(const RankItem& layer, const RankRule& rule, uint32_t g,
                                   const LaneView& other, uint32_t others, const Distances& to) {
  const RankRows& rows = layer.rows;
  for (uint32_t i = threadIdx.x; i < to.n; i += blockDim.x) {
    const uint32_t row = row_at(rows.position, others, to.positions[i]);
    to.bit[i] = row < others && is_marked(other, rows.place[row]) ? 1 : 0;
  }
  __syncthreads();
  const uint32_t set =
      rank_detail::count_rows(*layer.shared, to.n, [&](uint32_t i) { return to.bit[i] != 0; });
  const uint32_t anchor = anchor_bit(rule, layer.layer(), g, set, to.n) ? 1 : 0;
  for (uint32_t i = threadIdx.x; i < to.n; i += blockDim.x) {
    to.distance[i] += to.bit[i] != anchor ? 1 : 0;
  }
  __syncthreads();
}

// Distances of head h's rows to its anchor, to rows.score as whole numbers. Result: false for bad
// metadata.
[[nodiscard]] __device__ inline bool measure_head(const RankItem& layer, const RankRule& rule,
                                                  uint32_t h) {
  const RankRows& rows = layer.rows;
  const LaneView lane = layer.lane(h);
  const Distances to{.positions = reinterpret_cast<uint32_t*>(rows.attention),
                     .distance = reinterpret_cast<uint32_t*>(rows.score),
                     .bit = reinterpret_cast<uint32_t*>(rows.number),
                     .n = gather_lane(layer, lane)};
  if (to.n >= rows.room) return false;
  for (uint32_t i = threadIdx.x; i < to.n; i += blockDim.x) {
    to.positions[i] = rows.position[i];
    to.distance[i] = 0;
  }
  __syncthreads();
  for (uint32_t g = 0; g < layer.heads; ++g) {
    const LaneView other = layer.lane(g);
    const uint32_t others = gather_lane(layer, other);
    if (others >= rows.room) return false;
    compare_bit(layer, rule, g, other, others, to);
  }
  return true;
}

// Keys in ascending order, by a bitonic network whose comparisons all point upwards.
__device__ inline void exchange_keys(uint32_t* keys, uint32_t n, uint32_t mask) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t j = i ^ mask;
    if (j <= i || j >= n) continue;
    const uint32_t mine = keys[i], other = keys[j];
    if (mine <= other) continue;
    keys[i] = other;
    keys[j] = mine;
  }
  __syncthreads();
}
__device__ inline void sort_keys(uint32_t* keys, uint32_t n) {
  for (uint32_t run = 1; run < n; run *= 2) {
    exchange_keys(keys, n, 2 * run - 1);
    for (uint32_t step = run / 2; step > 0; step /= 2) exchange_keys(keys, n, step);
  }
}

// Fates of head h: what it marked stays, and of the others every so manyth by distance
// (policy::pick_strata). Requires: measure_head() before; the head's rows are gathered.
__device__ inline void choose_strata(const RankItem& head, const LaneView& lane,
                                     const RankLimit& limit, uint32_t n) {
  const RankRows& rows = head.rows;
  auto* keys = reinterpret_cast<uint32_t*>(rows.score);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const bool kept = is_marked(lane, rows.place[i]);
    rows.fate[i] = kept ? kRankKeep : kRankDrop;
    keys[i] = kept ? 0xFFFF'FFFFu : keys[i] << kRankRowBits | i;
  }
  __syncthreads();
  const uint32_t count =
      rank_detail::count_rows(*head.shared, n, [&](uint32_t i) { return rows.fate[i] == 0; });
  sort_keys(keys, n);
  const uint32_t target = count - min(count, limit.surplus());
  const uint32_t step = target == 0 ? 1 : max(count / target, 1u);
  for (uint32_t i = threadIdx.x; i < min(target, count); i += blockDim.x) {
    rows.fate[keys[i * step] & ((1u << kRankRowBits) - 1)] = kRankKeep;
  }
  __syncthreads();
}

}  // namespace strata_detail

// The rule on all heads of a layer. Result: false where what is protected is more than the budget
// of some head.
template <int kDim>
[[nodiscard]] __device__ inline bool keep_strata(const RankItem& layer, const RankRule& rule) {
  bool due = false, reached = true;
  for (uint32_t h = 0; h < layer.heads; ++h) {
    due = budget_of(layer, rule, layer.lane(h)).due || due;
  }
  if (!due) return true;
  LoadedHead head;
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!load_head<kDim>(layer, rule, h, true, head)) return true;
    strata_detail::mark_best(head, rule);
    reached = reached && head.budget.limit.surplus() <= head.free;
  }
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!strata_detail::measure_head(layer, rule, h)) return true;
    const LaneView lane = layer.lane(h);
    const RankBudget budget = budget_of(layer, rule, lane);
    const uint32_t n = gather_lane(layer, lane);
    strata_detail::choose_strata(layer, lane, budget.limit, n);
    recode_dropped(layer, rule, n);
    // What is marked stays in its slot, so the heads still to come read the same marks.
    apply_fates<kDim>(layer, rule, lane, layer.first_lane + h, n);
  }
  for (uint32_t h = 0; h < layer.heads; ++h) strata_detail::clear_marks(layer.lane(h));
  return reached;
}

}  // namespace thinkv::cuda
