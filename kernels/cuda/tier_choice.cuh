// tier_choice.cuh: which rows of a lane's tier a step fetches: kernels/policy/tier_select.h by one
// block of threads. The same rows bit by bit: every sum has the host's order and rounding, of equal
// numbers the lower channel and the newer row win, and what is not a number is the lowest.
#pragma once

#include <cstdint>

#include "kernels/cuda/radix.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tier.h"

namespace thinkv::cuda {

// Of the block: what a 128K prompt takes is rounds of reads, so there are as many threads as can
// be.
inline constexpr uint32_t kChoiceThreads = 1024;
inline constexpr uint32_t kChoiceWarps = kChoiceThreads / 32;

struct ChoiceShared {
  float query[256];
  float largeness[256];  // |query| x key_max
  uint8_t chosen[256];
  uint32_t channels[kTierChannelsMax];  // ascending
  uint32_t bins[256];
  uint32_t digit, left, whole;                        // of find_bin()
  uint32_t above[kChoiceWarps], equal[kChoiceWarps];  // rows of a warp's share
};

// The rows of one lane, as the kernel sees them.
struct TierLaneView {
  const uint16_t* k;
  const uint16_t* v;
  const uint16_t* by_channel;
  const float* key_max;
  uint32_t tokens;
};
[[nodiscard]] __device__ __forceinline__ TierLaneView tier_lane(const TierSequence& tier,
                                                                const ModelGeometry& geometry,
                                                                uint32_t layer, uint32_t head) {
  const uint32_t dim = geometry.head_dim;
  const uint64_t values = uint64_t{tier.tokens} * dim;
  const auto* rows = reinterpret_cast<const uint16_t*>(tier.layers[layer]) + head * 3 * values;
  return {rows, rows + values, rows + 2 * values,
          tier.key_max + (uint64_t{layer} * geometry.kv_heads + head) * dim, tier.tokens};
}

namespace tier_detail {

// Two keys. By the machine's conversion: what differs from small_float.h is NaN alone, and that is
// the lowest whatever its bits are.
[[nodiscard]] __device__ __forceinline__ float2 from_wide(uint32_t pair, bool bf16) {
  if (!bf16) return unpack_f16(pair);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF'0000u));
}
[[nodiscard]] __device__ __forceinline__ float or_lowest(float x) {
  return x == x ? x : __uint_as_float(0xFF80'0000u);
}

// As policy::mean_query, of rotated rows where the tier's are. By the first warp.
template <int kDim>
__device__ __forceinline__ void mean_query(const void* q, Element element, uint64_t first,
                                           uint32_t group, bool rotates, float* mean) {
  float sum[kDim / 8] = {};
  for (uint32_t g = 0; g < group; ++g) {
    float x[kDim / 8];
    load_row<kDim>(x, q, element, first + uint64_t{g} * kDim, true);
    if (rotates) rotate_vector<kDim>(x);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) sum[i] = exact_add(sum[i], x[i]);
  }
  if (threadIdx.x >= 8) return;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    mean[threadIdx.x + 8 * i] = exact_div(sum[i], static_cast<float>(group));
  }
}

// As policy::choose_channels. Result: how many.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint32_t choose_channels(ChoiceShared& shared,
                                                                  const float* key_max,
                                                                  uint32_t count) {
  count = min(min(count, kTierChannelsMax), static_cast<uint32_t>(kDim));
  const uint32_t channel = threadIdx.x;
  if (channel < kDim) {
    const float size = __uint_as_float(__float_as_uint(shared.query[channel]) & 0x7FFF'FFFFu);
    shared.largeness[channel] = or_lowest(exact_mul(size, key_max[channel]));
  }
  __syncthreads();
  if (channel < kDim) {
    const float mine = shared.largeness[channel];
    uint32_t better = 0;
    for (uint32_t other = 0; other < kDim; ++other) {
      const float its = shared.largeness[other];
      if (its > mine || (its == mine && other < channel)) ++better;
    }
    shared.chosen[channel] = better < count ? 1 : 0;
  }
  __syncthreads();
  if (channel < kDim && shared.chosen[channel] != 0) {
    uint32_t before = 0;
    for (uint32_t other = 0; other < channel; ++other) before += shared.chosen[other];
    shared.channels[before] = channel;
  }
  __syncthreads();
  return count;
}

// The partial products of all rows, as integers of the same order.
template <int kDim>
__device__ __forceinline__ void score_rows(const ChoiceShared& shared, const TierLaneView& lane,
                                           uint32_t channels, bool bf16, uint32_t* scores) {
  constexpr uint32_t kAtOnce = 8;  // keys: 16 bytes
  const uint32_t whole = lane.tokens / kTierTile * kTierTile;
  for (uint32_t i = threadIdx.x * kAtOnce; i < whole; i += kChoiceThreads * kAtOnce) {
    const uint32_t tile = i / kTierTile * kTierTile;
    const uint16_t* keys = lane.by_channel + uint64_t{tile} * kDim + (i - tile);
    float sums[kAtOnce] = {};
#pragma unroll 4
    for (uint32_t c = 0; c < channels; ++c) {
      const uint32_t channel = shared.channels[c];
      const float weight = shared.query[channel];
      const uint4 words = *reinterpret_cast<const uint4*>(keys + uint64_t{channel} * kTierTile);
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; j += 2) {
        const float2 key = from_wide(pairs[j / 2], bf16);
        sums[j] = exact_add(sums[j], exact_mul(weight, key.x));
        sums[j + 1] = exact_add(sums[j + 1], exact_mul(weight, key.y));
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < kAtOnce; ++j) scores[i + j] = ordered_bits(sums[j]);
  }
  const uint32_t rest = lane.tokens - whole;
  const uint16_t* keys = lane.by_channel + uint64_t{whole} * kDim;
  for (uint32_t i = threadIdx.x; i < rest; i += kChoiceThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (uint32_t c = 0; c < channels; ++c) {
      const uint32_t channel = shared.channels[c];
      const float key = from_wide(keys[uint64_t{channel} * rest + i], bf16).x;
      sum = exact_add(sum, exact_mul(shared.query[channel], key));
    }
    scores[whole + i] = ordered_bits(sum);
  }
}

// What separates the rows that are chosen: all above `least`, and of those equal to it all but the
// oldest `skipped`.
struct Threshold {
  uint32_t least;
  uint32_t skipped;
};
// Requires: 0 < wanted < tokens.
[[nodiscard]] __device__ __forceinline__ Threshold find_threshold(ChoiceShared& shared,
                                                                  const uint32_t* scores,
                                                                  uint32_t tokens,
                                                                  uint32_t wanted) {
  const uint32_t least =
      least_of_highest<uint32_t>(shared, shared.bins, 32, wanted, [&](const auto& visit) {
        for (uint32_t i = threadIdx.x; i < tokens; i += kChoiceThreads) visit(scores[i]);
        return true;
      });
  if (shared.whole != 0) return {least, 0};
  return {least, shared.bins[least & 255u] - shared.left};
}

// As policy::choose_rows: ascending. Each warp walks a share of the rows of its own, twice.
__device__ __forceinline__ void list_rows(ChoiceShared& shared, const uint32_t* scores,
                                          uint32_t tokens, const Threshold& threshold,
                                          uint32_t wanted, uint32_t* rows) {
  const uint32_t warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const uint32_t share = (tokens + kChoiceThreads - 1) / kChoiceThreads * 32;
  const uint32_t begin = min(warp * share, tokens), end = min(begin + share, tokens);
  const auto ballots = [&](uint32_t base, uint32_t& above, uint32_t& equal) {
    const uint32_t i = base + thread;
    const uint32_t score = i < end ? scores[i] : 0;
    above = __ballot_sync(kAllLanes, i < end && score > threshold.least);
    equal = __ballot_sync(kAllLanes, i < end && score == threshold.least);
  };
  uint32_t all_above = 0, all_equal = 0;
  for (uint32_t base = begin; base < end; base += 32) {
    uint32_t above, equal;
    ballots(base, above, equal);
    all_above += static_cast<uint32_t>(__popc(above));
    all_equal += static_cast<uint32_t>(__popc(equal));
  }
  if (thread == 0) {
    shared.above[warp] = all_above;
    shared.equal[warp] = all_equal;
  }
  __syncthreads();
  uint32_t before_above = 0, before_equal = 0;
  for (uint32_t w = 0; w < warp; ++w) {
    before_above += shared.above[w];
    before_equal += shared.equal[w];
  }
  const uint32_t lower = (1u << thread) - 1;
  for (uint32_t base = begin; base < end; base += 32) {
    uint32_t above, equal;
    ballots(base, above, equal);
    const uint32_t above_here = before_above + static_cast<uint32_t>(__popc(above & lower));
    const uint32_t equal_here = before_equal + static_cast<uint32_t>(__popc(equal & lower));
    const bool is_equal = (equal >> thread & 1u) != 0;
    const bool taken = (above >> thread & 1u) != 0 || (is_equal && equal_here >= threshold.skipped);
    const uint32_t at =
        above_here + (equal_here > threshold.skipped ? equal_here - threshold.skipped : 0);
    if (taken && at < wanted) rows[at] = base + thread;
    before_above += static_cast<uint32_t>(__popc(above));
    before_equal += static_cast<uint32_t>(__popc(equal));
  }
}

}  // namespace tier_detail

// A lane's query, its rows, and where the numbers of all of them go.
struct ChoiceInput {
  const void* q;
  Element element;
  uint64_t first;  // element of q: [group, dim] from there
  uint32_t group;
  bool bf16;
  uint32_t* scores;  // [tokens]
};

// The `wanted` rows that the step fetches, ascending, to `rows`. Whole block. Requires: 0 < wanted
// <= tokens.
template <int kDim>
__device__ __forceinline__ void choose_rows(const TierSequence& tier, const TierLaneView& lane,
                                            const ChoiceInput& input, uint32_t wanted,
                                            ChoiceShared& shared, uint32_t* rows) {
  if (wanted == lane.tokens) {
    for (uint32_t i = threadIdx.x; i < wanted; i += kChoiceThreads) rows[i] = i;
    return;
  }
  if (threadIdx.x < 32) {
    tier_detail::mean_query<kDim>(input.q, input.element, input.first, input.group,
                                  tier.rotates != 0, shared.query);
  }
  __syncthreads();
  const uint32_t channels = tier_detail::choose_channels<kDim>(shared, lane.key_max, tier.channels);
  tier_detail::score_rows<kDim>(shared, lane, channels, input.bf16, input.scores);
  __syncthreads();
  const tier_detail::Threshold threshold =
      tier_detail::find_threshold(shared, input.scores, lane.tokens, wanted);
  tier_detail::list_rows(shared, input.scores, lane.tokens, threshold, wanted, rows);
}

}  // namespace thinkv::cuda
