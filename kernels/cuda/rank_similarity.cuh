// rank_similarity.cuh: R-KV's redundancy of the keys of a lane (policy::redundancy), by one block.
//
// Keys do not stay in memory: tiles of 32 by 32 of them are decoded, scaled to length 1 and
// compared, twice. The first pass finds the near-duplicate that each row forgives, the second adds
// the cosines of a column by ascending rows. Cosines are added by ascending channels, so both have
// the host's bits.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_steps.cuh"
#include "kernels/cuda/rank_rows.cuh"
#include "kernels/policy/exact_exp.h"

namespace thinkv::cuda {
namespace similarity_detail {

inline constexpr uint32_t kTile = kSimilarityTile;
inline constexpr uint32_t kNone = 0xFFFFu;

struct Tiles {
  float* rows;     // [kTile, dim + 1]
  float* columns;  // [kTile, dim + 1]
  float* cosines;  // [kTile, kTile + 1]
};
[[nodiscard]] __device__ __forceinline__ Tiles tiles_at(float* space, uint32_t dim) {
  return {space, space + kTile * (dim + 1), space + 2 * kTile * (dim + 1)};
}

// Keys first .. first + kTile - 1 of the rows, of length 1; zeros beyond n. Eight threads a key.
template <int kDim>
__device__ THINKV_OUT_OF_LINE void load_tile(const RankItem& item, const LaneView& lane,
                                             uint32_t first, uint32_t n, float* tile) {
  const uint32_t row = threadIdx.x / 8, i = first + row, l = threadIdx.x % 8;
  if (row >= kTile) return;  // whole warps
  float x[kDim / 8] = {};
  if (i < n) decode_place<kDim, true>(x, lane, item.rows.place[i]);
  const float norm = exact_sqrt(rank_detail::dot_of_eight<kDim>(x, x));
  const float factor = norm > 0.0f ? exact_div(1.0f, norm) : 0.0f;
#pragma unroll
  for (int c = 0; c < kDim / 8; ++c) tile[row * (kDim + 1) + l + 8 * c] = exact_mul(x[c], factor);
}

// tiles.cosines of all pairs; a thread has one row and four columns.
template <int kDim>
__device__ inline void compare_tiles(const Tiles& tiles) {
  const uint32_t row = threadIdx.x / 8, l = threadIdx.x % 8;
  if (row >= kTile) return;
  const float* a = tiles.rows + row * (kDim + 1);
  float sums[kTile / 8] = {};
  for (uint32_t d = 0; d < kDim; ++d) {
#pragma unroll
    for (uint32_t c = 0; c < kTile / 8; ++c) {
      const float b = tiles.columns[(l + 8 * c) * (kDim + 1) + d];
      sums[c] = exact_add(sums[c], exact_mul(a[d], b));
    }
  }
#pragma unroll
  for (uint32_t c = 0; c < kTile / 8; ++c) {
    tiles.cosines[row * (kTile + 1) + l + 8 * c] = sums[c];
  }
}

// forgiven[i]: the newest other row whose cosine is above the rule's bound, or kNone.
template <int kDim>
__device__ inline void find_forgiven(const RankItem& item, const LaneView& lane, float above,
                                     uint32_t n, const Tiles& tiles, uint16_t* forgiven) {
  for (uint32_t first = 0; first < n; first += kTile) {
    load_tile<kDim>(item, lane, first, n, tiles.rows);
    const uint32_t i = first + threadIdx.x;
    uint32_t last = kNone;
    for (uint32_t other = 0; other < n; other += kTile) {
      load_tile<kDim>(item, lane, other, n, tiles.columns);
      __syncthreads();
      compare_tiles<kDim>(tiles);
      __syncthreads();
      for (uint32_t c = 0; c < kTile && threadIdx.x < kTile; ++c) {
        const uint32_t j = other + c;
        if (j >= n || j == i) continue;
        if (tiles.cosines[threadIdx.x * (kTile + 1) + c] > above) last = j;
      }
    }
    if (threadIdx.x < kTile && i < n) forgiven[i] = static_cast<uint16_t>(last);
  }
  __syncthreads();
}

// rows.number: the mean of each column.
template <int kDim>
__device__ inline void add_columns(const RankItem& item, const LaneView& lane, uint32_t n,
                                   const Tiles& tiles, const uint16_t* forgiven) {
  for (uint32_t first = 0; first < n; first += kTile) {
    load_tile<kDim>(item, lane, first, n, tiles.columns);
    const uint32_t j = first + threadIdx.x;
    float sum = 0.0f;
    for (uint32_t other = 0; other < n; other += kTile) {
      load_tile<kDim>(item, lane, other, n, tiles.rows);
      __syncthreads();
      compare_tiles<kDim>(tiles);
      __syncthreads();
      for (uint32_t r = 0; r < kTile && threadIdx.x < kTile; ++r) {
        const uint32_t i = other + r;
        if (i >= n || j >= n) continue;
        const bool nothing = i == j || forgiven[i] == j;
        sum = exact_add(sum, nothing ? 0.0f : tiles.cosines[r * (kTile + 1) + threadIdx.x]);
      }
    }
    if (threadIdx.x < kTile && j < n) {
      item.rows.number[j] = exact_div(sum, static_cast<float>(n));
    }
  }
  __syncthreads();
}

// policy::softmax_rows of rows.number; one thread adds in ascending order.
__device__ inline void softmax_rows(const RankItem& item, uint32_t n) {
  float* number = item.rows.number;
  RankShared& shared = *item.shared;
  if (threadIdx.x < 32) {
    float most = __uint_as_float(0xFF80'0000u);
    for (uint32_t i = threadIdx.x; i < n; i += 32) most = most < number[i] ? number[i] : most;
    for (uint32_t x = 16; x > 0; x /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, most, x);
      most = most < other ? other : most;
    }
    if (threadIdx.x == 0) shared.sum = most;
  }
  __syncthreads();
  const float most = shared.sum;
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    number[i] = policy::exact_exp<DeviceSteps>(exact_sub(number[i], most));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (uint32_t i = 0; i < n; ++i) sum = exact_add(sum, number[i]);
    shared.sum = sum;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    number[i] = exact_div(number[i], shared.sum);
  }
  __syncthreads();
}

}  // namespace similarity_detail

// Adds the rule's share of the redundancy to rows.score. rows.fixed and rows.fate are working
// memory. Requires: at least kTile * 8 threads; item.tiles.
template <int kDim>
__device__ inline void add_similarity(const RankItem& item, const RankRule& rule,
                                      const LaneView& lane, uint32_t n) {
  const similarity_detail::Tiles tiles = similarity_detail::tiles_at(item.tiles, kDim);
  auto* forgiven = reinterpret_cast<uint16_t*>(item.rows.fixed);
  similarity_detail::find_forgiven<kDim>(item, lane, rule.similarity_above, n, tiles, forgiven);
  similarity_detail::add_columns<kDim>(item, lane, n, tiles, forgiven);
  similarity_detail::softmax_rows(item, n);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    item.rows.score[i] =
        exact_add(item.rows.score[i], exact_mul(rule.similarity, item.rows.number[i]));
  }
  __syncthreads();
}

}  // namespace thinkv::cuda
