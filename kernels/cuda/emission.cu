// emission.cu: the probability of every slot, reduced over the query heads, and the sparsity.
//
// Bound by memory: the scratch is read once, scores are read and written once. So half a warp takes
// a page, a thread two neighbouring slots of it, and several pages are on their way at a time; of a
// page with 32 slots no thread is idle. A lane is one CTA's, or several where lanes are few; lanes
// of sequences that do not emit leave at once. The maximum of the row of elementwise maxima, where
// it is wanted, takes a first pass over the scratch, which the second then finds in the caches.
#include "kernels/cuda/emission.h"

#include <cstdint>

#include "kernels/cuda/attention_emit.cuh"
#include "kernels/cuda/attention_state.cuh"
#include "kernels/kernels.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kPageThreads = 16;  // two slots each; pages of more slots take a second round
constexpr uint32_t kPagesOfCta = kThreads / kPageThreads;
constexpr uint32_t kCtas = 1024;  // about what a large GPU holds at once
constexpr float kScoreMax = 65504.0f;
constexpr uint32_t kNotCounted = 0xFC00FC00u;  // attention_emit.cuh

// The scores of two neighbouring slots by head, in pairs, as the attend kernel left them.
template <int kPairs>
struct SlotPair {
  uint32_t scores[2][kPairs];
  float2 maxima[kPairs];  // of the tile, to which both belong

  // Reads memory that is there for every slot, live or not.
  __device__ __forceinline__ void load(const unsigned char* page, uint32_t slot) {
    const auto* all_maxima = reinterpret_cast<const float2*>(page) + slot / 16 * kPairs;
    const auto* at =
        reinterpret_cast<const uint2*>(page + 8 * kEmitTiles * kPairs + 4 * kPairs * slot);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint2 both = at[i];
      scores[2 * i / kPairs][2 * i % kPairs] = both.x;
      scores[(2 * i + 1) / kPairs][(2 * i + 1) % kPairs] = both.y;
      maxima[i] = all_maxima[i];
    }
  }
  // False where the slot is outside the window.
  [[nodiscard]] __device__ __forceinline__ bool counts(int slot) const {
    return scores[slot][0] != kNotCounted;
  }
  // Calls visit(head, score in log2 units) for every head.
  template <class Visit>
  __device__ __forceinline__ void for_each_head(int slot, uint32_t group,
                                                const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 score = unpack_f16(scores[slot][i]);
      if (2 * i < static_cast<int>(group)) visit(2 * i, maxima[i].x + score.x);
      if (2 * i + 1 < static_cast<int>(group)) visit(2 * i + 1, maxima[i].y + score.y);
    }
  }
  [[nodiscard]] __device__ __forceinline__ float largest(int slot, uint32_t group) const {
    float top = kNegativeInfinity;
    for_each_head(slot, group, [&](int, float score) { top = fmaxf(top, score); });
    return top;
  }
};

// One thread's share of one page.
template <int kPairs>
struct PageShare {
  uint64_t live;    // of the page; 0: no page
  uint32_t* where;  // the fp16 scores of the page's slots in pairs, or their sums, or null
  SlotPair<kPairs> slots;
  uint2 before;  // the two scores in x, or the two sums

  __device__ __forceinline__ void find(const AttendParams& p, uint32_t page, uint32_t end,
                                       uint16_t* const* rows) {
    live = page < end ? p.pages[page].live : 0;
    where = rows == nullptr || page >= end ? nullptr : reinterpret_cast<uint32_t*>(rows[page]);
  }
};

// Calls visit(share, which slots count: bits 0 and 1, place of their scores or null) for the pages
// of the run [begin, end). `rows`: score_rows, or null; `sums`: of fp32.
template <int kPairs, class Visit>
__device__ __forceinline__ void for_each_pair(const AttendParams& p, uint32_t begin, uint32_t end,
                                              uint16_t* const* rows, bool sums,
                                              const Visit& visit) {
  constexpr uint32_t kAtOnce = kPairs <= 2 ? 2 : 1;
  const uint32_t thread = threadIdx.x % kPageThreads;
  PageShare<kPairs> pages[kAtOnce];
  const uint32_t start = begin + threadIdx.x / kPageThreads;
#pragma unroll
  for (uint32_t i = 0; i < kAtOnce; ++i) pages[i].find(p, start + i * kPagesOfCta, end, rows);
  for (uint32_t first = start; first < end; first += kAtOnce * kPagesOfCta) {
    // What says where the next pages' scores are comes while these are read.
    PageShare<kPairs> next[kAtOnce];
    uint64_t any = 0;
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      next[i].find(p, first + (kAtOnce + i) * kPagesOfCta, end, rows);
      any |= pages[i].live;
    }
    for (uint32_t pair = thread; pair < kSlotsPerPageMax / 2; pair += kPageThreads) {
      if ((any >> (pair - thread) * 2) == 0) break;
      uint32_t bits[kAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        bits[i] = static_cast<uint32_t>(pages[i].live >> (2 * pair)) & 3u;
        pages[i].slots.load(emit_page_of(p, min(first + i * kPagesOfCta, end - 1)), 2 * pair);
        pages[i].before = make_uint2(0, 0);
        if (bits[i] == 0 || pages[i].where == nullptr) continue;
        pages[i].before.x = pages[i].where[sums ? 2 * pair : pair];
        if (sums) pages[i].before.y = pages[i].where[2 * pair + 1];
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (!pages[i].slots.counts(0)) bits[i] &= ~1u;
        if (!pages[i].slots.counts(1)) bits[i] &= ~2u;
        uint32_t* place =
            pages[i].where == nullptr ? nullptr : pages[i].where + (sums ? 2 * pair : pair);
        if (bits[i] != 0) visit(pages[i], bits[i], place);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      pages[i].live = next[i].live;
      pages[i].where = next[i].where;
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
__device__ __forceinline__ MaxRow read_max_row(const AttendParams& p, uint32_t begin, uint32_t end,
                                               bool with_sum, float* shared) {
  MaxRow row;
  float top = kNegativeInfinity, sum = 0.0f;
  const auto visit = [&](const PageShare<kPairs>& page, uint32_t bits, const uint32_t*) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (((bits >> i) & 1u) == 0) continue;
      const float score = page.slots.largest(i, p.group);
      const float higher = fmaxf(top, score);
      if (with_sum) sum = sum * exp2f(top - higher) + exp2f(score - higher);
      top = higher;
    }
  };
  for_each_pair<kPairs>(p, begin, end, nullptr, false, visit);
  row.top = reduce_block(top, shared, [](float a, float b) { return fmaxf(a, b); });
  if (row.top == kNegativeInfinity || !with_sum) return row;
  const float scaled = top == kNegativeInfinity ? 0.0f : sum * exp2f(top - row.top);
  const float all = reduce_block(scaled, shared, [](float a, float b) { return a + b; });
  row.log_sum = row.top + log2f(all);
  return row;
}

// How scores become one probability; what does not depend on the slot.
template <int kPairs>
struct Reduction {
  kernels::GqaReduce reduce;
  float share;                 // 1 / heads
  float log_sums[2 * kPairs];  // of the heads
  float row_log_sum;           // of the row of maxima, where that is reduced

  [[nodiscard]] __device__ __forceinline__ float operator()(const SlotPair<kPairs>& slots, int slot,
                                                            uint32_t group) const {
    if (reduce == kernels::GqaReduce::kMaxLogit) {
      return exp2_approx(slots.largest(slot, group) - row_log_sum);
    }
    float sum = 0.0f, top = 0.0f;
    slots.for_each_head(slot, group, [&](int head, float score) {
      const float probability = exp2_approx(score - log_sums[head]);
      sum += probability;
      top = fmaxf(top, probability);
    });
    return reduce == kernels::GqaReduce::kMaxProbability ? top : sum * share;
  }
};

// How many slots count, and how many of them for next to nothing.
struct Tally {
  uint32_t live = 0, near_zero = 0;

  template <int kPairs>
  __device__ __forceinline__ void add(const SlotPair<kPairs>& slots, uint32_t bits, uint32_t group,
                                      float bound) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (((bits >> i) & 1u) == 0) continue;
      ++live;
      if (slots.largest(i, group) < bound) ++near_zero;
    }
  }
  __device__ __forceinline__ void store(LaneSparsity* out, uint32_t* shared) {
    const auto sum = [](uint32_t a, uint32_t b) { return a + b; };
    live = reduce_block(live, shared, sum);
    near_zero = reduce_block(near_zero, shared, sum);
    if (threadIdx.x == 0) *out = {live, near_zero};
  }
};

// What one CTA has to do.
struct Work {
  uint32_t begin, end;              // pages of the lane
  uint32_t share_begin, share_end;  // of them, those whose scores this CTA adds
  bool scores, sparsity;
  bool sums;  // scores are fp32 sums
};

template <int kPairs>
__device__ __forceinline__ void add_scores(const PageShare<kPairs>& page, uint32_t bits,
                                           uint32_t* place, const Reduction<kPairs>& reduction,
                                           uint32_t group) {
  const float2 before = unpack_f16(page.before.x);
  const float low = before.x + reduction(page.slots, 0, group);
  const float high = before.y + reduction(page.slots, 1, group);
  const uint32_t sums = pack_f16(fminf(low, kScoreMax), fminf(high, kScoreMax));
  const uint32_t mine =
      ((bits & 1u) != 0 ? 0x0000FFFFu : 0u) | ((bits & 2u) != 0 ? 0xFFFF0000u : 0u);
  *place = (sums & mine) | (page.before.x & ~mine);
}

template <int kPairs>
__device__ __forceinline__ void add_sums(const PageShare<kPairs>& page, uint32_t bits,
                                         uint32_t* place, const Reduction<kPairs>& reduction,
                                         uint32_t group) {
  if ((bits & 1u) != 0) {
    const float sum = __uint_as_float(page.before.x) + reduction(page.slots, 0, group);
    place[0] = __float_as_uint(sum);
  }
  if ((bits & 2u) != 0) {
    const float sum = __uint_as_float(page.before.y) + reduction(page.slots, 1, group);
    place[1] = __float_as_uint(sum);
  }
}

// Scores of the share and sparsity of the lane: in one pass where both are of the same pages.
template <int kPairs>
__device__ __forceinline__ Tally visit_lane(const AttendParams& p, const Work& work,
                                            const Reduction<kPairs>& reduction, float bound) {
  const bool whole = work.end - work.begin == work.share_end - work.share_begin;
  Tally tally;
  if (work.sparsity && !(work.scores && whole)) {
    for_each_pair<kPairs>(p, work.begin, work.end, nullptr, false,
                          [&](const PageShare<kPairs>& page, uint32_t bits, const uint32_t*) {
                            tally.add(page.slots, bits, p.group, bound);
                          });
  }
  if (!work.scores) return tally;
  const bool tallies = work.sparsity && whole;
  for_each_pair<kPairs>(p, work.share_begin, work.share_end, p.score_rows, work.sums,
                        [&](const PageShare<kPairs>& page, uint32_t bits, uint32_t* place) {
                          if (tallies) tally.add(page.slots, bits, p.group, bound);
                          if (place == nullptr) return;
                          if (work.sums) {
                            add_sums(page, bits, place, reduction, p.group);
                          } else {
                            add_scores(page, bits, place, reduction, p.group);
                          }
                        });
  return tally;
}

// CTA: lane * shares + share of its pages. The first of a lane counts its sparsity.
template <int kPairs>
__global__ void __launch_bounds__(kThreads, kPairs <= 5 ? 6 : 4)
    emission_kernel(const AttendParams p, const float* all_log_sums, uint32_t shares) {
  __shared__ float shared_floats[kThreads / 32];
  __shared__ uint32_t shared_counts[kThreads / 32];
  wait_for_previous();
  let_next_start();
  const uint32_t lane_index = blockIdx.x / shares, share = blockIdx.x % shares;
  const uint8_t wanted = p.emit[lane_index / p.kv_heads];
  const bool sparsity = (wanted & kEmitSparsity) != 0 && p.sparsity != nullptr && share == 0;
  const bool sums = (wanted & kEmitSums) != 0;
  const bool scores = (sums || (wanted & kEmitScores) != 0) && p.score_rows != nullptr;
  if (!sparsity && !scores) return;
  const uint32_t begin = p.lane_begin[lane_index], pages = p.lane_begin[lane_index + 1] - begin;
  const auto edge = [&](uint32_t i) {
    return begin + static_cast<uint32_t>(uint64_t{pages} * i / shares);
  };
  const Work work{begin, begin + pages, edge(share), edge(share + 1), scores, sparsity, sums};
  const bool by_logit =
      scores && static_cast<kernels::GqaReduce>(p.score_reduce) == kernels::GqaReduce::kMaxLogit;
  MaxRow row;
  if (sparsity || by_logit) {
    row = read_max_row<kPairs>(p, work.begin, work.end, by_logit, shared_floats);
  }
  Reduction<kPairs> reduction{static_cast<kernels::GqaReduce>(p.score_reduce),
                              1.0f / static_cast<float>(p.group),
                              {},
                              row.log_sum};
  const float* log_sums = all_log_sums + uint64_t{lane_index} * p.group;
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) {
    if (i < static_cast<int>(p.group)) reduction.log_sums[i] = log_sums[i];
  }
  Tally tally = visit_lane<kPairs>(p, work, reduction, row.top + log2f(p.near_zero));
  if (sparsity) tally.store(p.sparsity + lane_index, shared_counts);
}

template <int kPairs>
cudaError_t launch_pairs(const AttendParams& p, const float* log_sums, cudaStream_t stream) {
  const uint32_t shares = p.lanes >= kCtas ? 1 : kCtas / p.lanes;
  return launch(emission_kernel<kPairs>,
                {.blocks = p.lanes * shares, .threads = kThreads, .overlaps_previous = true},
                stream, p, log_sums, shares);
}

}  // namespace

cudaError_t launch_emission(const AttendParams& p, const float* log_sums, cudaStream_t stream) {
  switch (emit_heads(p.group) / 2) {
    case 1:
      return launch_pairs<1>(p, log_sums, stream);
    case 2:
      return launch_pairs<2>(p, log_sums, stream);
    case 3:
      return launch_pairs<3>(p, log_sums, stream);
    case 4:
      return launch_pairs<4>(p, log_sums, stream);
    case 5:
      return launch_pairs<5>(p, log_sums, stream);
    case 6:
      return launch_pairs<6>(p, log_sums, stream);
    case 7:
      return launch_pairs<7>(p, log_sums, stream);
    default:
      return launch_pairs<8>(p, log_sums, stream);
  }
}

}  // namespace thinkv::cuda
