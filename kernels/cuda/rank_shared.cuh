// rank_shared.cuh: the heads of a layer compete for heads x B places (policy::share_places), by one
// block for all of them.
//
// The numbers of all heads together have no room in the block, so the last place is found by radix
// selection, a byte of the key at a time, and each head's rows are read again for every byte.
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_apply.cuh"
#include "kernels/cuda/rank_head.cuh"

namespace thinkv::cuda {
namespace shared_detail {

inline constexpr uint32_t kHeadBits = 64 - 32 - kRankRowBits;
static_assert(kSharedHeadsMax <= 1u << kHeadBits);

// The order of all rows: by number, then the newer row of its head, then the lower head.
[[nodiscard]] __device__ __forceinline__ uint64_t layer_key(float score, uint32_t row,
                                                            uint32_t head) {
  return rank_detail::rank_key(score, row) << kHeadBits | ((1u << kHeadBits) - 1 - head);
}

// How many rows of the layer may go and how many of them stay; RankShared.places: those that are
// each head's own.
struct SharedPlaces {
  uint32_t open;  // rows without a place of their own
  uint32_t left;  // places for them
  bool due;
};
template <int kDim>
[[nodiscard]] __device__ inline SharedPlaces own_places(const RankItem& layer,
                                                        const RankRule& rule) {
  LoadedHead head;
  RankShared& shared = *layer.shared;
  uint32_t counted = 0, free = 0, limit = 0;
  bool over = false;
  for (uint32_t h = 0; h < layer.heads; ++h)
    over = budget_of(layer, rule, layer.lane(h)).due || over;
  if (!over) return {};
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!load_head<kDim>(layer, rule, h, false, head)) return {};
    const uint32_t budget = head.budget.limit.limit;
    const auto own = static_cast<uint32_t>(exact_mul(rule.budget_low, static_cast<float>(budget)));
    const uint32_t staying = head.budget.limit.counted - head.free;
    if (threadIdx.x == 0) shared.places[h] = min(own > staying ? own - staying : 0, head.free);
    counted += head.budget.limit.counted;
    free += head.free;
    limit += budget;
  }
  __syncthreads();
  if (counted <= limit) return {};
  const uint32_t target = free - min(counted - limit, free);
  uint32_t given = 0;
  for (uint32_t h = 0; h < layer.heads; ++h) given += min(shared.places[h], target - given);
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t left = target;
    for (uint32_t h = 0; h < layer.heads; ++h) {
      shared.places[h] = min(shared.places[h], left);
      left -= shared.places[h];
    }
  }
  __syncthreads();
  return {free - given, min(target - given, free - given), true};
}

// RankShared.own: the least key of each head's own places; what is below it is open.
template <int kDim>
[[nodiscard]] __device__ inline bool find_own(const RankItem& layer, const RankRule& rule) {
  LoadedHead head;
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!load_head<kDim>(layer, rule, h, true, head)) return false;
    const uint32_t places = layer.shared->places[h];
    uint64_t least = lane_detail::kNoKey;  // nothing is its own
    if (places > 0) {
      least = places >= head.free
                  ? 0
                  : rank_detail::least_kept(layer.rows, *layer.shared, head.n, places);
    }
    __syncthreads();
    if (threadIdx.x == 0) layer.shared->own[h] = least;
  }
  __syncthreads();
  return true;
}

// Calls visit(key) for the open rows of a head that is loaded.
template <class Visit>
__device__ __forceinline__ void for_each_open(const LoadedHead& head, uint32_t h,
                                              const Visit& visit) {
  const RankRows& rows = head.item.rows;
  const uint64_t own = head.item.shared->own[h];
  for (uint32_t i = threadIdx.x; i < head.n; i += blockDim.x) {
    if (rows.fixed[i] != 0 || rank_detail::rank_key(rows.score[i], i) >= own) continue;
    visit(layer_key(rows.score[i], i, h));
  }
}

// The least key of the `left` highest open rows. Result: kNoKey for bad metadata. Requires: there
// are so many, and left > 0.
template <int kDim>
[[nodiscard]] __device__ inline uint64_t least_open(const RankItem& layer, const RankRule& rule,
                                                    uint32_t left) {
  LoadedHead head;
  RankShared& shared = *layer.shared;
  return least_of_highest<uint64_t>(shared, shared.layer_bins, 64, left, [&](const auto& visit) {
    for (uint32_t h = 0; h < layer.heads; ++h) {
      if (!load_head<kDim>(layer, rule, h, true, head)) return false;
      for_each_open(head, h, visit);
      __syncthreads();
    }
    return true;
  });
}

}  // namespace shared_detail

// The rule on all heads of a layer.
template <int kDim>
__device__ inline void share_layer(const RankItem& layer, const RankRule& rule) {
  const shared_detail::SharedPlaces places = shared_detail::own_places<kDim>(layer, rule);
  if (!places.due || !shared_detail::find_own<kDim>(layer, rule)) return;
  uint64_t least = lane_detail::kNoKey;
  if (places.left >= places.open) {
    least = 0;
  } else if (places.left > 0) {
    least = shared_detail::least_open<kDim>(layer, rule, places.left);
  }
  LoadedHead head;
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!load_head<kDim>(layer, rule, h, true, head)) return;
    if (threadIdx.x == 0) layer.shared->taken = 0;
    __syncthreads();
    shared_detail::for_each_open(head, h, [&](uint64_t key) {
      if (key >= least) atomicAdd(&layer.shared->taken, 1u);
    });
    __syncthreads();
    const uint32_t stays = layer.shared->places[h] + layer.shared->taken;
    keep_best(head.item, head.n, head.free, stays);
    recode_dropped(head.item, rule, head.n);
    apply_fates<kDim>(head.item, rule, head.lane, head.item.first_lane, head.n);
  }
}

}  // namespace thinkv::cuda
