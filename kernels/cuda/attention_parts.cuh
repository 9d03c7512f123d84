// attention_parts.cuh: how the pages of all lanes are divided among warps, and how the results of a
// lane that was cut come together again.
//
// Warp w of W reads pages [w total / W, (w + 1) total / W) of the flat list. A lane inside one run
// is finished by its warp. Of a cut lane each warp leaves a part: at most one lane comes in and
// ends inside the run (its part goes to p.parts), and one is still open at its end (to the warp's
// own ring, which is empty by then). The warps of a CTA merge theirs after a barrier, one row of
// the output a warp; what is still cut goes into two slots a CTA, for the combine kernel.
//   p.parts: [2 ctas] parts of CTAs, [warps] parts of warps, then [lanes x group] log-sum-exps
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_output.cuh"

namespace thinkv::cuda {

constexpr uint32_t kNoLane = 0xFFFFFFFFu;

// Runs of equal length, to one page, spread evenly.
struct Split {
  uint32_t runs, length, rest;
  __device__ __forceinline__ Split(uint32_t pages, uint32_t run_count)
      : runs(run_count), length(pages / run_count), rest(pages % run_count) {}
  // Requires: run <= runs < 2^16.
  [[nodiscard]] __device__ __forceinline__ uint32_t begin(uint32_t run) const {
    return run * length + run * rest / runs;
  }
  // The run that holds `page`.
  [[nodiscard]] __device__ __forceinline__ uint32_t run_of(uint32_t page) const {
    const uint64_t pages = uint64_t{runs} * length + rest;
    uint32_t run = static_cast<uint32_t>(uint64_t{page} * runs / pages);
    while (begin(run) > page) --run;
    while (begin(run + 1) <= page) ++run;
    return run;
  }
};

// The lane that holds page `page`; every thread of the warp calls.
// Requires: page < lane_begin[lanes].
__device__ __forceinline__ uint32_t lane_of_page(const AttendParams& p, uint32_t page) {
  const uint32_t thread = threadIdx.x % 32;
  uint32_t low = 0, high = p.lanes;  // lane_begin[low] <= page < lane_begin[high]
  while (high - low > 1) {
    const uint32_t step = (high - low + 31) / 32, probe = low + step * thread;
    const bool reached = probe < high && p.lane_begin[probe] <= page;
    const uint32_t count = __popc(__ballot_sync(kFullWarp, reached));
    low += step * (count - 1);
    high = min(high, low + step);
  }
  return low;
}

// Lanes without pages: nobody's run meets them.
template <int kHeadDim>
__device__ __forceinline__ void write_empty_lanes(const AttendParams& p, float* log_sums,
                                                  uint32_t warp, uint32_t warps) {
  const uint32_t thread = threadIdx.x % 32;
  for (uint32_t first = warp * 32; first < p.lanes; first += warps * 32) {
    const uint32_t mine = first + thread;
    const bool empty = mine < p.lanes && p.lane_begin[mine] == p.lane_begin[mine + 1];
    for (uint32_t left = __ballot_sync(kFullWarp, empty); left != 0; left &= left - 1) {
      const uint64_t row = uint64_t{first + __ffs(left) - 1} * p.group;
      for (uint32_t i = thread; i < p.group * kHeadDim; i += 32) {
        store_value(p.out, p.out_element, row * kHeadDim + i, 0.0f);
      }
      if (thread < p.group) store_log_sum(p, log_sums, row + thread, kNegativeInfinity, 0.0f);
    }
  }
}

// One output row of a cut lane, held by a warp: thread t has dims t + 32 j.
template <int kHeadDim>
struct Row {
  static constexpr int kValues = kHeadDim / 32;
  float maximum = kNegativeInfinity, sum = 0.0f;
  float values[kValues] = {};

  // Adds the row of head `head` of a part. Every thread calls.
  __device__ __forceinline__ void add(const float* part, uint32_t group, uint32_t head) {
    const float other = part[head], other_sum = part[group + head];
    float data[kValues];
    const float* row = part + 2 * group + head * kHeadDim + threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kValues; ++j) data[j] = row[32 * j];
    const float top = fmaxf(maximum, other);
    const float floor = top == kNegativeInfinity ? 0.0f : top;  // two parts without live slots
    const float mine = exp2_approx(maximum - floor), theirs = exp2_approx(other - floor);
    maximum = top;
    sum = sum * mine + other_sum * theirs;
#pragma unroll
    for (int j = 0; j < kValues; ++j) values[j] = values[j] * mine + data[j] * theirs;
  }

  __device__ __forceinline__ void store_part(float* part, uint32_t group, uint32_t head) const {
    const uint32_t thread = threadIdx.x % 32;
    if (thread == 0) {
      part[head] = maximum;
      part[group + head] = sum;
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j)
      part[2 * group + head * kHeadDim + thread + 32 * j] = values[j];
  }

  __device__ __forceinline__ void rotate_back() {
#pragma unroll
    for (float& value : values) {
#pragma unroll
      for (uint32_t x = 1; x < 32; x *= 2) value = butterfly_across(value, x);
    }
#pragma unroll
    for (int distance = 1; distance < kValues; distance *= 2) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if ((j & distance) == 0) butterfly(values[j], values[j + distance]);
      }
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const uint64_t signs = rotation_word(j / 2) >> (threadIdx.x % 32);
      values[j] = negate_if(values[j] * rotation_norm(kHeadDim), signs, 32 * (j % 2));
    }
  }

  // The lane's result.
  __device__ __forceinline__ void finish(const AttendParams& p, float* log_sums, uint64_t row) {
    if (p.rotate) rotate_back();
    const uint32_t thread = threadIdx.x % 32;
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      store_value(p.out, p.out_element, row * kHeadDim + thread + 32 * j, values[j] * scale);
    }
    if (thread == 0) store_log_sum(p, log_sums, row, maximum, sum);
  }
};

// Where the parts of this CTA's warps are: slot 2w, a lane that ended inside the run of warp w;
// slot 2w + 1, the one that was open at its end. Slots of one lane are neighbours, but for unused
// ones between them.
struct WarpParts {
  const uint32_t* lane;  // [2 warps], shared: kNoLane where unused
  const float* ended;    // [warps] parts
  unsigned char* rings;  // shared: a part at the start of each warp's ring
  uint32_t ring_bytes, part_size;
  [[nodiscard]] __device__ __forceinline__ const float* part(uint32_t slot) const {
    return slot % 2 == 0 ? ended + uint64_t{slot / 2} * part_size
                         : reinterpret_cast<const float*>(rings + slot / 2 * ring_bytes);
  }
};

// Merges the parts that the warps of this CTA left, one output row a warp at a time. A lane that
// also has pages in other CTAs goes on as one part of this CTA: global slot 2 CTA (+ 1).
template <int kHeadDim, int kWarps>
__device__ __forceinline__ void merge_cta(const AttendParams& p, float* log_sums,
                                          const WarpParts& parts, uint32_t cta_begin,
                                          uint32_t cta_end) {
  static_assert(2 * kWarps <= 32);
  const uint32_t thread = threadIdx.x % 32;
  const uint32_t mine = thread < 2 * kWarps ? parts.lane[thread] : kNoLane;
  const uint32_t used = __ballot_sync(kFullWarp, mine != kNoLane);
  const uint32_t before = used & ((1u << thread) - 1);
  const uint32_t previous = __shfl_sync(kFullWarp, mine, before == 0 ? 0 : 31 - __clz(before));
  uint32_t starts = __ballot_sync(kFullWarp, mine != kNoLane && (before == 0 || previous != mine));
  uint32_t row = 0;
  for (; starts != 0; starts &= starts - 1) {
    const uint32_t first = __ffs(starts) - 1, later = starts & (starts - 1);
    const uint32_t slots =
        used & (later == 0 ? kFullWarp : (later & (0u - later)) - 1) & (~0u << first);
    const uint32_t lane_index = parts.lane[first];
    for (uint32_t head = 0; head < p.group; ++head, ++row) {
      if (row % kWarps != threadIdx.x / 32) continue;
      Row<kHeadDim> merged;
#pragma unroll 2
      for (uint32_t left = slots; left != 0; left &= left - 1) {
        merged.add(parts.part(__ffs(left) - 1), p.group, head);
      }
      const uint32_t begin = p.lane_begin[lane_index], end = p.lane_begin[lane_index + 1];
      if (begin >= cta_begin && end <= cta_end) {
        merged.finish(p, log_sums, uint64_t{lane_index} * p.group + head);
        continue;
      }
      const uint64_t slot = 2 * blockIdx.x + (begin < cta_begin ? 0u : 1u);
      merged.store_part(p.parts + slot * parts.part_size, p.group, head);
    }
  }
}

}  // namespace thinkv::cuda
