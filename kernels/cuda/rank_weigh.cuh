// rank_weigh.cuh: what attention is weighed with, from the vectors of each token: the norm of the
// value, and how far the key points away from its prompt's mean (kernels/policy/distinct.h).
// Functions of a whole block.
#pragma once

#include <cstdint>

#include "kernels/cuda/centre.cuh"
#include "kernels/cuda/rank_rows.cuh"
#include "kernels/policy/distinct.h"

namespace thinkv::cuda {
namespace rank_detail {

// policy::sum_of_rows of number(i), the same for all threads. Requires: kShareSums threads.
template <class Number>
[[nodiscard]] __device__ __forceinline__ float sum_of_rows(RankShared& shared, uint32_t n,
                                                           const Number& number) {
  constexpr uint32_t kSums = policy::kShareSums;
  auto* const sums = reinterpret_cast<float*>(shared.bins);
  static_assert(sizeof shared.bins == kSums * sizeof(float));
  float sum = 0.0f;
  for (uint32_t i = threadIdx.x; i < n && threadIdx.x < kSums; i += kSums)
    sum = exact_add(sum, number(i));
  if (threadIdx.x < kSums) sums[threadIdx.x] = sum;
  __syncthreads();
  for (uint32_t half = kSums / 2; half >= 1; half /= 2) {
    if (threadIdx.x < half) {
      sums[threadIdx.x] = exact_add(sums[threadIdx.x], sums[threadIdx.x + half]);
    }
    __syncthreads();
  }
  const float all = sums[0];
  __syncthreads();
  return all;
}

// The centre of a lane as the thread's share of it; zeros before there is one.
template <int kDim>
__device__ __forceinline__ void load_lane_centre(float (&centre)[kDim / 8], const LaneView& lane) {
  const unsigned char* page =
      is_centred(lane.sequence) ? page_at(*lane.batch, lane.lane->buffer_page[0]) : nullptr;
  if (page != nullptr) return load_centre<kDim>(centre, page);
#pragma unroll
  for (int c = 0; c < kDim / 8; ++c) centre[c] = 0.0f;
}

// policy::key_distance of a centred key; eight threads hold it, all of the warp call.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ float key_distance(float (&key)[kDim / 8],
                                                            const float (&mean)[kDim / 8],
                                                            float mean_norm) {
#pragma unroll
  for (int c = 0; c < kDim / 8; ++c) key[c] = exact_add(key[c], mean[c]);
  const float square = dot_of_eight<kDim>(key, key), along = dot_of_eight<kDim>(key, mean);
  const float norms = exact_mul(exact_sqrt(square), mean_norm);
  const float distance = norms == 0.0f ? 1.0f : exact_sub(1.0f, exact_div(along, norms));
  return distance > 0.0f ? distance : 0.0f;
}

// rows.number times the norm of the value, and rows.score the distance of the key times it, where
// the rule says so; eight threads a row.
template <int kDim>
__device__ THINKV_OUT_OF_LINE void weigh_rows(const RankItem& item, const RankRule& rule,
                                              const LaneView& lane, uint32_t n) {
  const RankRows& rows = item.rows;
  const bool values = rule.value_norm != 0, keys = rule.distinct != 0.0f;
  float mean[kDim / 8];
  load_lane_centre<kDim>(mean, lane);
  const float mean_norm = exact_sqrt(dot_of_eight<kDim>(mean, mean));
  for (uint32_t base = 0; base < n; base += blockDim.x / 8) {
    const uint32_t i = base + threadIdx.x / 8;
    float norm = 1.0f, distance = 0.0f;
    float x[kDim / 8] = {};
    if (values) {
      if (i < n) decode_place<kDim, false>(x, lane, rows.place[i]);
      norm = exact_sqrt(dot_of_eight<kDim>(x, x));
    }
    if (keys) {
      if (i < n) decode_place<kDim, true>(x, lane, rows.place[i]);
      distance = key_distance<kDim>(x, mean, mean_norm);
    }
    if (i >= n || threadIdx.x % 8 != 0) continue;
    if (values) rows.number[i] = exact_mul(rows.number[i], norm);
    if (keys) rows.score[i] = values ? exact_mul(distance, norm) : distance;
  }
  __syncthreads();
}

}  // namespace rank_detail
}  // namespace thinkv::cuda
