// attention_parts.cuh: how the pages of all lanes are divided among warps, and how the results of a
// lane that was cut come together again.
//
// Warp w of all reads pages [w run, (w + 1) run) of the flat list. A lane inside one run is
// finished by its warp. Of a cut lane each warp leaves a part (maximum, sum, unnormalised values)
// in p.parts: two slots a warp, since at most one lane comes in and one goes on. The warps of a
// CTA merge theirs after a barrier; what is still cut goes into two slots a CTA.
//   p.parts: [2 ctas] parts of CTAs, [2 warps] parts of warps; a part is group x (head_dim + 2)
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_lane.cuh"

namespace thinkv::cuda {

constexpr uint32_t kNoLane = 0xFFFFFFFFu;

// Pages of each warp. Every warp reads the same number, but for the last ones.
__device__ __forceinline__ uint32_t run_length(uint32_t pages, uint32_t warps) {
  return (pages + warps - 1) / warps;
}

// The lane that holds page `page`. Requires: page < lane_begin[lanes].
__device__ __forceinline__ uint32_t lane_of_page(const AttendParams& p, uint32_t page) {
  uint32_t low = 0, high = p.lanes;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (p.lane_begin[middle] <= page)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Lanes without pages: nobody's run meets them.
template <int kHeadDim>
__device__ void write_empty_lanes(const AttendParams& p, uint32_t warp, uint32_t warps) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t l = warp; l < p.lanes; l += warps) {
    if (p.lane_begin[l] != p.lane_begin[l + 1]) continue;
    const uint64_t row = uint64_t{l} * p.group;
    for (uint32_t i = lane; i < p.group * kHeadDim; i += 32) p.out[row * kHeadDim + i] = 0.0f;
    if (lane < p.group) p.lse[row + lane] = kNegativeInfinity;
  }
}

// One part of a lane: maximum [group], sum [group], values [group, head_dim].
template <int kHeadDim>
__device__ __forceinline__ uint32_t part_size(uint32_t group) {
  return group * (kHeadDim + 2);
}

// Merges parts first..last of one lane for one output value; part(i) is null where i is no part of
// it. Returns the merged sum; `maximum` and `value` come back relative to the merged maximum.
template <class Part>
__device__ __forceinline__ float merge(const Part& part, uint32_t first, uint32_t last,
                                       uint32_t group, uint32_t head, uint32_t value_index,
                                       float& maximum, float& value) {
  maximum = kNegativeInfinity;
#pragma unroll 4
  for (uint32_t i = first; i <= last; ++i) {
    if (const float* data = part(i)) maximum = fmaxf(maximum, data[head]);
  }
  float sum = 0.0f;
  value = 0.0f;
  if (maximum == kNegativeInfinity) return sum;
#pragma unroll 4
  for (uint32_t i = first; i <= last; ++i) {
    const float* data = part(i);
    if (data == nullptr) continue;
    const float factor = exp2_approx(data[head] - maximum);  // 0 for a part without live slots
    sum += data[group + head] * factor;
    value += data[2 * group + value_index] * factor;
  }
  return sum;
}

template <int kHeadDim>
__device__ __forceinline__ void write_merged(const AttendParams& p, uint32_t lane_index,
                                             uint32_t value_index, float maximum, float sum,
                                             float value) {
  const uint64_t row = uint64_t{lane_index} * p.group;
  p.out[row * kHeadDim + value_index] = sum > 0.0f ? value / sum : 0.0f;
  if (value_index % kHeadDim == 0) p.lse[row + value_index / kHeadDim] = log_sum_exp(maximum, sum);
}

// Merges the parts that the warps of this CTA left. Slots 2w (the lane that came
// in) and 2w + 1 (the lane that goes on) of warp w; slots of one lane are neighbours. A lane that
// also has parts in other CTAs goes on as one part of this CTA: global slot 2 CTA (+ 1).
template <int kHeadDim, int kWarps>
__device__ void merge_cta(const AttendParams& p, const float* parts, const uint32_t* part_lane,
                          uint32_t cta_begin, uint32_t cta_end) {
  const uint32_t size = part_size<kHeadDim>(p.group);
  uint32_t first = 0;
  while (first < 2 * kWarps) {
    const uint32_t lane_index = part_lane[first];
    if (lane_index == kNoLane) {
      ++first;
      continue;
    }
    uint32_t last = first, next = first + 1;
    // Unused slots may lie between two parts of a lane.
    for (; next < 2 * kWarps; ++next) {
      if (part_lane[next] == lane_index)
        last = next;
      else if (part_lane[next] != kNoLane)
        break;
    }
    const uint32_t begin = p.lane_begin[lane_index], end = p.lane_begin[lane_index + 1];
    const bool whole = begin >= cta_begin && end <= cta_end;
    const auto part = [&](uint32_t i) -> const float* {
      return part_lane[i] == lane_index ? parts + i * size : nullptr;
    };
    float* out = p.parts + uint64_t{2 * blockIdx.x + (begin < cta_begin ? 0u : 1u)} * size;
    for (uint32_t i = threadIdx.x; i < p.group * kHeadDim; i += kWarps * 32) {
      float maximum, value;
      const uint32_t head = i / kHeadDim;
      const float sum = merge(part, first, last, p.group, head, i, maximum, value);
      if (whole) {
        write_merged<kHeadDim>(p, lane_index, i, maximum, sum, value);
        continue;
      }
      out[2 * p.group + i] = value;
      if (i % kHeadDim == 0) {
        out[head] = maximum;
        out[p.group + head] = sum;
      }
    }
    first = next;
  }
}

}  // namespace thinkv::cuda
