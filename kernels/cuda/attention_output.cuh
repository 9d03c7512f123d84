// attention_output.cuh: what a warp writes of a lane: the whole result, or its part of it.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_query.cuh"
#include "kernels/cuda/attention_state.cuh"

namespace thinkv::cuda {

__device__ __forceinline__ void store_value(void* tensor, Element element, uint64_t index,
                                            float value) {
  if (element == Element::kF32) {
    static_cast<float*>(tensor)[index] = value;
    return;
  }
  const uint32_t pair = element == Element::kF16 ? pack_f16(value, 0.0f) : pack_bf16(value, 0.0f);
  static_cast<uint16_t*>(tensor)[index] = static_cast<uint16_t>(pair);
}

// Rows 16 m + 8 half + g of the output: x = D H y / sqrt(d). Bits 0..2 of the dim are g.
template <int kSlices>
__device__ __forceinline__ void rotate_output(float (&out)[kSlices][4]) {
#pragma unroll
  for (auto& tile : out) {
#pragma unroll
    for (float& value : tile) {
      value = butterfly_across(value, 4);
      value = butterfly_across(value, 8);
      value = butterfly_across(value, 16);
    }
    butterfly(tile[0], tile[2]);
    butterfly(tile[1], tile[3]);
  }
#pragma unroll
  for (int distance = 1; distance < kSlices; distance *= 2) {
#pragma unroll
    for (int m = 0; m < kSlices; ++m) {
      if ((m & distance) != 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) butterfly(out[m][i], out[m + distance][i]);
    }
  }
#pragma unroll
  for (int m = 0; m < kSlices; ++m) {
    const uint64_t signs = rotation_word(m / 4) >> (threadIdx.x % 32 / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[m][i] =
          negate_if(out[m][i] * rotation_norm(16 * kSlices), signs, 16 * (m % 4) + 8 * (i / 2));
    }
  }
}

// The two scratch areas of launch_attend: parts of lanes (attention_parts.cuh), then the
// log-sum-exp (log2) of every row for the emission.
[[nodiscard]] __host__ __device__ constexpr uint64_t part_floats(uint32_t group,
                                                                 uint32_t head_dim) {
  return uint64_t{group} * (head_dim + 2);
}
__device__ __forceinline__ void store_log_sum(const AttendParams& p, float* log_sums, uint64_t row,
                                              float maximum, float sum) {
  const float log2_sum = log_sum_exp_2(maximum, sum);
  if (p.lse != nullptr) p.lse[row] = log2_sum * kLn2;
  if (p.emit != nullptr) log_sums[row] = log2_sum;
}

// Query heads 8 kTile .. of a lane that this warp had whole, and of the tiles after it. By
// recursion, not a loop: one that the compiler leaves rolled keeps all of `s.out` in local memory.
template <int kTile = 0, int kHeadDim, int kN>
__device__ __forceinline__ void write_lane(LaneState<kHeadDim, kN>& s, const AttendParams& p,
                                           float* log_sums, uint32_t lane_index) {
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  if (p.rotate) rotate_output(s.out[kTile]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t head = 8 * kTile + 2 * c + h;
    if (head >= p.group) continue;
    const uint64_t row = uint64_t{lane_index} * p.group + head;
    const float scale = s.sum[kTile][h] > 0.0f ? 1.0f / s.sum[kTile][h] : 0.0f;
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
      const uint64_t at = row * kHeadDim + 16 * m + g;
      store_value(p.out, p.out_element, at, s.out[kTile][m][h] * scale);
      store_value(p.out, p.out_element, at + 8, s.out[kTile][m][h + 2] * scale);
    }
    if (g == 0) store_log_sum(p, log_sums, row, s.maximum[kTile][h], s.sum[kTile][h]);
  }
  if constexpr (kTile + 1 < kN) write_lane<kTile + 1>(s, p, log_sums, lane_index);
}

// What this warp has of a lane that was cut: maximum [group], sum [group], values [group][dims].
template <int kHeadDim, int kN>
__device__ __forceinline__ void write_part(const LaneState<kHeadDim, kN>& s, uint32_t group,
                                           float* part) {
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t head = 8 * n + 2 * c + h;
      if (head >= group) continue;
      if (g == 0) {
        part[head] = s.maximum[n][h];
        part[group + head] = s.sum[n][h];
      }
      float* row = part + 2 * group + head * kHeadDim;
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
        row[16 * m + g] = s.out[n][m][h];
        row[16 * m + 8 + g] = s.out[n][m][h + 2];
      }
    }
  }
}

}  // namespace thinkv::cuda
