// emission.cu: the probability of every slot, reduced over the query heads, and the sparsity.
//
// One CTA a lane; lanes of sequences that do not emit leave at once. A thread takes one slot of a
// page at a time. The maximum of the row of elementwise maxima, where it is wanted, takes a first
// pass over the scratch, which the second then finds in the caches.
#include "kernels/cuda/emission.h"

#include <cstdint>

#include "kernels/cuda/attention_emit.cuh"
#include "kernels/cuda/attention_state.cuh"
#include "kernels/kernels.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr float kScoreMax = 65504.0f;
constexpr uint32_t kHeadsMax = 16;

// As kernels::add_score.
[[nodiscard]] __device__ __forceinline__ uint16_t add_probability(uint16_t score, float value) {
  const float sum = unpack_f16(score).x + value;
  return static_cast<uint16_t>(pack_f16(sum < kScoreMax ? sum : kScoreMax, 0.0f));
}

// The scores of one slot by head, in pairs, as the attend kernel left them.
template <int kPairs>
struct SlotScores {
  uint32_t scores[kPairs];
  float2 maxima[kPairs];

  // Reads memory that is there for every slot, live or not.
  __device__ __forceinline__ void load(const AttendParams& p, uint32_t page, uint32_t slot) {
    const uint32_t pairs = emit_heads(p.group) / 2;
    const auto* all_maxima = reinterpret_cast<const float2*>(emit_page_of(p, page));
    const auto* all_scores = reinterpret_cast<const uint32_t*>(all_maxima + kEmitTiles * pairs);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i >= static_cast<int>(pairs)) continue;
      scores[i] = all_scores[slot * pairs + i];
      maxima[i] = all_maxima[slot / 16 * pairs + i];
    }
  }
  // False where the slot is outside the window.
  [[nodiscard]] __device__ __forceinline__ bool counts() const {
    return scores[0] != 0xFC00FC00u;
  }
  // Calls visit(head, score in log2 units) for every head.
  template <class Visit>
  __device__ __forceinline__ void for_each_head(uint32_t group, const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 score = unpack_f16(scores[i]);
      if (2 * i < static_cast<int>(group)) visit(2 * i, maxima[i].x + score.x);
      if (2 * i + 1 < static_cast<int>(group)) visit(2 * i + 1, maxima[i].y + score.y);
    }
  }
  [[nodiscard]] __device__ __forceinline__ float largest(uint32_t group) const {
    float top = kNegativeInfinity;
    for_each_head(group, [&](int, float score) { top = fmaxf(top, score); });
    return top;
  }
};

// One slot's place among the scores of its page, with what is there now; null: nowhere.
struct ScorePlace {
  uint16_t* where;
  uint16_t before;
};

// Calls visit(scores of the slot, place) for the slots of the lane that count, one thread each.
// Several pages are read at a time: a lane is one CTA's, and its loads would wait for each other.
// `rows`: score_rows, or null.
template <int kPairs, class Visit>
__device__ __forceinline__ void for_each_slot(const AttendParams& p, uint32_t lane_index,
                                              uint16_t* const* rows, const Visit& visit) {
  constexpr uint32_t kAtOnce = kPairs <= 2 ? 4 : 8 / kPairs;
  constexpr uint32_t kStride = kThreads / kSlotsPerPageMax;
  const uint32_t begin = p.lane_begin[lane_index], end = p.lane_begin[lane_index + 1];
  const uint32_t slot = threadIdx.x % kSlotsPerPageMax;
  for (uint32_t first = begin + threadIdx.x / kSlotsPerPageMax; first < end;
       first += kAtOnce * kStride) {
    bool live[kAtOnce];
    SlotScores<kPairs> scores[kAtOnce];
    ScorePlace place[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t page = min(first + i * kStride, end - 1);
      live[i] = first + i * kStride < end && ((p.pages[page].live >> slot) & 1u) != 0;
      scores[i].load(p, page, slot);
      place[i].where = rows == nullptr ? nullptr : rows[page];
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (!live[i]) place[i].where = nullptr;
      if (place[i].where == nullptr) continue;
      place[i].where += slot;
      place[i].before = *place[i].where;
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (live[i] && scores[i].counts()) visit(scores[i], place[i]);
    }
  }
}

// Combines one value of every thread; all of them get the result. `shared`: [kThreads / 32].
template <class T, class Combine>
[[nodiscard]] __device__ __forceinline__ T reduce_block(T mine, T* shared, const Combine& combine) {
#pragma unroll
  for (uint32_t x = 1; x < 32; x *= 2) mine = combine(mine, __shfl_xor_sync(kFullWarp, mine, x));
  __syncthreads();  // the last use of `shared` is over
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  T all = shared[0];
  for (uint32_t warp = 1; warp < kThreads / 32; ++warp) all = combine(all, shared[warp]);
  return all;
}

// The row of elementwise maxima over the query heads: its maximum and the log2 of its sum.
struct MaxRow {
  float top = kNegativeInfinity;
  float log_sum = kNegativeInfinity;
};

// with_sum: its sum too, else only its maximum.
template <int kPairs>
__device__ __forceinline__ MaxRow read_max_row(const AttendParams& p, uint32_t lane_index,
                                               bool with_sum, float* shared) {
  MaxRow row;
  float top = kNegativeInfinity, sum = 0.0f;
  for_each_slot<kPairs>(p, lane_index, nullptr, [&](const auto& scores, const ScorePlace&) {
    const float score = scores.largest(p.group);
    const float higher = fmaxf(top, score);
    if (with_sum) sum = sum * exp2f(top - higher) + exp2f(score - higher);
    top = higher;
  });
  row.top = reduce_block(top, shared, [](float a, float b) { return fmaxf(a, b); });
  if (row.top == kNegativeInfinity || !with_sum) return row;
  const float scaled = top == kNegativeInfinity ? 0.0f : sum * exp2f(top - row.top);
  const float all = reduce_block(scaled, shared, [](float a, float b) { return a + b; });
  row.log_sum = row.top + log2f(all);
  return row;
}

template <int kPairs>
[[nodiscard]] __device__ __forceinline__ float reduce_heads(const AttendParams& p,
                                                            const SlotScores<kPairs>& scores,
                                                            const float* log_sums,
                                                            const MaxRow& row) {
  const auto reduce = static_cast<kernels::GqaReduce>(p.score_reduce);
  if (reduce == kernels::GqaReduce::kMaxLogit) {
    return exp2_approx(scores.largest(p.group) - row.log_sum);
  }
  const bool largest = reduce == kernels::GqaReduce::kMaxProbability;
  float value = 0.0f;
  scores.for_each_head(p.group, [&](int head, float score) {
    const float probability = exp2_approx(score - log_sums[head]);
    value = largest ? fmaxf(value, probability) : value + probability;
  });
  return largest ? value : value / static_cast<float>(p.group);
}

template <int kPairs>
__global__ void __launch_bounds__(kThreads)
    emission_kernel(const AttendParams p, const float* all_log_sums) {
  __shared__ float shared_floats[kThreads / 32];
  __shared__ uint32_t shared_counts[kThreads / 32];
  __shared__ float shared_log_sums[kHeadsMax];
  wait_for_previous();
  let_next_start();
  const uint32_t lane_index = blockIdx.x;
  const uint8_t wanted = p.emit[lane_index / p.kv_heads];
  if (wanted == 0) return;
  if (threadIdx.x < p.group) {
    shared_log_sums[threadIdx.x] = all_log_sums[uint64_t{lane_index} * p.group + threadIdx.x];
  }
  __syncthreads();
  const float* log_sums = shared_log_sums;
  const bool sparsity = (wanted & kEmitSparsity) != 0 && p.sparsity != nullptr;
  const bool scores = (wanted & kEmitScores) != 0 && p.score_rows != nullptr;
  const bool by_logit =
      scores && static_cast<kernels::GqaReduce>(p.score_reduce) == kernels::GqaReduce::kMaxLogit;
  MaxRow row;
  if (sparsity || by_logit) row = read_max_row<kPairs>(p, lane_index, by_logit, shared_floats);
  const float bound = row.top + log2f(p.near_zero);
  uint32_t live = 0, near_zero = 0;
  const auto visit = [&](const auto& of_slot, const ScorePlace& place) {
    ++live;
    if (sparsity && of_slot.largest(p.group) < bound) ++near_zero;
    if (place.where == nullptr) return;
    *place.where = add_probability(place.before, reduce_heads(p, of_slot, log_sums, row));
  };
  for_each_slot<kPairs>(p, lane_index, scores ? p.score_rows : nullptr, visit);
  if (!sparsity) return;
  const auto add = [](uint32_t a, uint32_t b) { return a + b; };
  live = reduce_block(live, shared_counts, add);
  near_zero = reduce_block(near_zero, shared_counts, add);
  if (threadIdx.x == 0) p.sparsity[lane_index] = {live, near_zero};
}

}  // namespace

cudaError_t launch_emission(const AttendParams& p, const float* log_sums, cudaStream_t stream) {
  const LaunchSize size{.blocks = p.lanes, .threads = kThreads, .overlaps_previous = true};
  if (p.group <= 4) return launch(emission_kernel<2>, size, stream, p, log_sums);
  if (p.group <= 8) return launch(emission_kernel<4>, size, stream, p, log_sums);
  return launch(emission_kernel<8>, size, stream, p, log_sums);
}

}  // namespace thinkv::cuda
