// rank_medoids.cuh: which tokens of a lane stay, or of all heads of a layer alike, by k-means on
// their keys: keep_medoids() of kernels/sequence/rank_choose.cpp. Functions of a whole block.
//
// A run's keys and centres lie in the block's part of RankMemory behind its rows: 1,024 of each are
// 1 MiB at head_dim 128, more than a block has of shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/medoids.cuh"
#include "kernels/cuda/rank_choose.cuh"

namespace thinkv::cuda {
namespace rank_detail {

// What runs have in common; weights, where there are any, follow the centres. Requires:
// has_medoid_room().
[[nodiscard]] __device__ inline Medoids medoid_space(const RankItem& item, uint32_t dims) {
  constexpr uint32_t kRows = kernels::kMedoidRowsMax;
  const RankMemory memory = memory_of(*item.batch);
  unsigned char* const space = region_of(memory) + uint64_t{memory.room} * kRankLongRowBytes;
  auto* const keys = reinterpret_cast<float*>(space + kRankMedoidScratchBytes);
  auto* const centres = keys + kRows * dims;
  auto* const cluster_of = reinterpret_cast<uint16_t*>(centres + kRows * dims + kRows);
  return {.keys = keys,
          .centres = centres,
          .weights = nullptr,
          .cluster_of = cluster_of,
          .keep = reinterpret_cast<uint8_t*>(cluster_of + kRows),
          .scratch = space,
          .scratch_bytes = kRankMedoidScratchBytes,
          .n = 0,
          .stride = dims,
          .target = 0,
          .iterations = item.sequence->policy.kmeans_iterations};
}
static_assert(kRankMedoidScratchBytes % 16 == 0 && 8192 * kRankLongRowBytes % 16 == 0,
              "keys are read 16 bytes at a time");
static_assert(kRankMedoidScratchBytes >= medoid_scratch_bytes(kernels::kMedoidRowsMax));

[[nodiscard]] __device__ __forceinline__ float* medoid_weights(const Medoids& space) {
  return space.centres + kernels::kMedoidRowsMax * space.stride;
}

// Rows that may go, ascending; by one warp, which has them in order without a sum over the block.
// Their attention is in their scores by now, and its memory is free.
[[nodiscard]] __device__ inline const uint32_t* list_free(const RankRows& rows, uint32_t n) {
  auto* const order = reinterpret_cast<uint32_t*>(rows.attention);
  const uint32_t below = (1u << threadIdx.x % 32) - 1;
  uint32_t count = 0;
  for (uint32_t base = 0; base < n && threadIdx.x < 32; base += 32) {
    const uint32_t i = base + threadIdx.x;
    const bool free = i < n && rows.fixed[i] == 0;
    const uint32_t ballot = __ballot_sync(kAllLanes, free);
    if (free) order[count + static_cast<uint32_t>(__popc(ballot & below))] = i;
    count += static_cast<uint32_t>(__popc(ballot));
  }
  __syncthreads();
  return order;
}

// A head's part of the keys of rows order[0 .. n - 1], as medoid_place() says; eight threads a key.
template <int kDim>
__device__ inline void load_keys(const RankItem& item, uint32_t head, const uint32_t* order,
                                 const Medoids& m) {
  const LaneView lane = item.lane(head);
  for (uint32_t i = threadIdx.x / 8; i < m.n; i += blockDim.x / 8) {
    float x[kDim / 8] = {};
    decode_place<kDim, true>(x, lane, item.rows.place[order[i]]);
    float* const key = m.keys + i * m.stride + head * kDim + threadIdx.x % 8 * 4;
#pragma unroll
    for (uint32_t c = 0; c < kDim / 32; ++c) {
      *reinterpret_cast<float4*>(key + 32 * c) =
          make_float4(x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
    }
  }
}

// Keys and weights of rows order[0 .. m.n - 1]. Result: false for bad metadata.
template <int kDim>
[[nodiscard]] __device__ inline bool load_run(const RankItem& item, uint32_t n,
                                              const uint32_t* order, const Medoids& m) {
  for (uint32_t head = 0; head < item.heads; ++head) {
    // Of several heads, rows have the places of the one that was gathered last.
    if (item.heads > 1 && gather_lane(item, item.lane(head)) != n) return false;
    load_keys<kDim>(item, head, order, m);
    __syncthreads();
  }
  constexpr float kLeast = 1.0f / (1 << 24);  // distances are divided by it
  float* const weights = medoid_weights(m);
  for (uint32_t i = threadIdx.x; i < m.n && m.weights != nullptr; i += blockDim.x) {
    const float score = item.rows.score[order[i]];
    weights[i] = score < kLeast ? kLeast : score;  // and what is not a number stays so
  }
  __syncthreads();
  return true;
}

}  // namespace rank_detail

// Whether the keys that the rule looks at have room. Without it a fault is raised: as with rows.
template <int kDim>
[[nodiscard]] __device__ inline bool has_medoid_room(const RankItem& item, const RankRule& rule) {
  if (rule.select != RankSelect::kMedoids) return true;
  const RankMemory memory = memory_of(*item.batch);
  if (memory.blocks != 0 && kDim * item.heads <= memory.dims) return true;
  if (threadIdx.x == 0) raise_fault(item.batch->lease, kRowsFull);
  return false;
}

// rows.fate of `n` rows: of the `free` ones that are not fixed `places` stay, chosen in runs of at
// most kMedoidRowsMax, each with its share of the places. Requires: has_medoid_room().
template <int kDim>
__device__ THINKV_OUT_OF_LINE void keep_medoids(const RankItem& item, const RankRule& rule,
                                                uint32_t places, uint32_t n, uint32_t free) {
  const RankRows& rows = item.rows;
  Medoids m = rank_detail::medoid_space(item, kDim * item.heads);
  if (rule.attention != 0.0f) m.weights = rank_detail::medoid_weights(m);
  const uint32_t* const order = rank_detail::list_free(rows, n);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    rows.fate[i] = rows.fixed[i] != 0 ? kRankKeep : kRankDrop;
  }
  const uint32_t runs = (free + kernels::kMedoidRowsMax - 1) / kernels::kMedoidRowsMax;
  for (uint32_t run = 0; run < runs; ++run) {
    const auto begin = static_cast<uint32_t>(uint64_t{free} * run / runs);
    const auto end = static_cast<uint32_t>(uint64_t{free} * (run + 1) / runs);
    const auto before = static_cast<uint32_t>(uint64_t{places} * begin / free);
    m.n = end - begin;
    m.target = static_cast<uint32_t>(uint64_t{places} * end / free) - before;
    if (m.target == 0) continue;
    if (!rank_detail::load_run<kDim>(item, n, order + begin, m)) return;
    select_medoids(m);
    for (uint32_t i = threadIdx.x; i < m.n; i += blockDim.x) {
      if (m.keep[i] != 0) rows.fate[order[begin + i]] = kRankKeep;
    }
    __syncthreads();
  }
  __syncthreads();
  recode_dropped(item, rule, n);
}

}  // namespace thinkv::cuda
