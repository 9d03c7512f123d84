// rank_rows.cuh: the tokens of a lane in shared memory while a rule is applied to them: places,
// protection and the number of each, as kernels/sequence/rank_rows.cpp makes them (rank.h).
//
// Functions of a whole block; every thread calls them with the same arguments. Sums that the host
// adds in a stated order are added by one thread in that order.
#pragma once

#include <cstdint>

#include "kernels/cuda/codec.cuh"
#include "kernels/cuda/compact.cuh"
#include "kernels/cuda/rank_step.cuh"
#include "kernels/cuda/recode.cuh"
#include "kernels/cuda/select.cuh"
#include "kernels/policy/rank_budget.h"
#include "kernels/policy/rank_signal.h"

namespace thinkv::cuda {

// What becomes of a row; the host's RankFate.
enum RankFate : uint8_t { kRankDrop = 0, kRankKeep = 1, kRankRecode = 2 };

// Shared memory for at most `room` rows, ascending by position. `score` begins at 8 bytes, and
// `number` follows it: together they are the masks of recoding.
struct RankRows {
  uint32_t* place;  // descriptor << 6 | slot
  uint32_t* position;
  float* attention;  // of a layer's heads together: the sum of their scores
  float* score;
  float* number;
  uint8_t* fixed;  // protected
  uint8_t* fate;
  uint32_t room;
};
[[nodiscard]] __device__ __forceinline__ RankRows rank_rows(unsigned char* shared, uint32_t room) {
  auto* words = reinterpret_cast<uint32_t*>(shared);
  return {.place = words,
          .position = words + room,
          .attention = reinterpret_cast<float*>(words + 2 * room),
          .score = reinterpret_cast<float*>(words + 3 * room),
          .number = reinterpret_cast<float*>(words + 4 * room),
          .fixed = shared + 5 * sizeof(uint32_t) * room,
          .fate = shared + 5 * sizeof(uint32_t) * room + room,
          .room = room};
}

// Static shared memory of a block.
struct RankShared {
  uint32_t bins[256];
  uint32_t digit, left, whole;  // of the radix selection
  uint32_t count;
  uint32_t of_prompt;
  uint64_t least[2];  // of the tiers of DiffKV: the lowest row's key
  float sum;
  RowCounts counts;
  union {
    RecodeShared recode;
    CompactShared compact;
  };
};

// A lane's budget. As RankHead of the host.
struct RankLimit {
  uint32_t counted;  // tokens that the budget counts, the buffer's included
  uint32_t limit;    // of them, how many may stay
  bool local;        // of first_fit in decoding: the mask holds the newest tokens
  [[nodiscard]] __device__ __forceinline__ bool over() const { return counted > limit; }
  [[nodiscard]] __device__ __forceinline__ uint32_t surplus() const {
    return over() ? counted - limit : 0;
  }
};

// `heads` lanes from `first_lane` on that are decided together, and the rule at work on them.
struct RankItem {
  const BatchView* batch;
  DeviceSequence* sequence;
  uint32_t first_lane;
  uint32_t heads;
  RankRows rows;
  RankShared* shared;
  [[nodiscard]] __device__ __forceinline__ LaneView lane(uint32_t head) const {
    return lane_view(*batch, sequence, first_lane + head);
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t layer() const {
    return first_lane / batch->geometry.kv_heads;
  }
};

namespace rank_detail {

// How many rows `yes` says yes to. Result: the same for all threads.
template <class Yes>
[[nodiscard]] __device__ __forceinline__ uint32_t count_rows(RankShared& shared, uint32_t n,
                                                             const Yes& yes) {
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (uint32_t base = 0; base < n; base += blockDim.x) {
    const uint32_t i = base + threadIdx.x;
    const uint32_t ballot = __ballot_sync(kAllLanes, i < n && yes(i));
    if (threadIdx.x % 32 == 0 && ballot != 0) {
      atomicAdd(&shared.count, static_cast<uint32_t>(__popc(ballot)));
    }
  }
  __syncthreads();
  const uint32_t count = shared.count;
  __syncthreads();
  return count;
}

// Compares and exchanges rows i and i ^ mask for all i: the smaller position goes first. Rows from
// n on are larger than all and stay where they are.
__device__ __forceinline__ void exchange_rows(const RankRows& rows, uint32_t n, uint32_t mask) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t j = i ^ mask;
    if (j <= i || j >= n) continue;
    const uint32_t mine = rows.position[i], other = rows.position[j];
    if (mine <= other) continue;
    rows.position[i] = other;
    rows.position[j] = mine;
    const uint32_t place = rows.place[i];
    rows.place[i] = rows.place[j];
    rows.place[j] = place;
  }
  __syncthreads();
}

// A bitonic network whose comparisons all point upwards, so that any n will do.
__device__ inline void sort_rows(const RankRows& rows, uint32_t n) {
  for (uint32_t run = 1; run < n; run *= 2) {
    exchange_rows(rows, n, 2 * run - 1);
    for (uint32_t step = run / 2; step > 0; step /= 2) exchange_rows(rows, n, step);
  }
}

// A slot's sum as the policy reads it.
[[nodiscard]] __device__ __forceinline__ float attention_of(const DeviceSequence* s, float sum,
                                                            uint32_t position) {
  if (s->policy.score_kind == ScoreKind::kMean) {
    const policy::Lifetimes lives{
        .tokens = s->tokens, .prompt = s->prompt_tokens, .prompt_queries = s->prompt_queries};
    return exact_div(sum, static_cast<float>(max(policy::lifetime(lives, position), 1u)));
  }
  if (s->policy.score_kind == ScoreKind::kWindow) {
    return exact_div(sum, static_cast<float>(max(s->window_queries, 1u)));
  }
  return sum;
}

__device__ inline void read_attention(const RankItem& item, const LaneView& lane, uint32_t n) {
  const RankRows& rows = item.rows;
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t index = rows.place[i] >> 6;
    DeviceDescriptor* d = descriptor_at(lane, index);
    const float sum = d == nullptr ? 0.0f : sums_of(lane, d, index)[rows.place[i] & 63u];
    rows.number[i] = attention_of(item.sequence, sum, rows.position[i]);
  }
  __syncthreads();
}

// rows.number times the norm of the token's value; eight threads a row (policy::dot).
template <int kDim>
__device__ inline void multiply_by_value_norm(const RankItem& item, const LaneView& lane,
                                              uint32_t n) {
  const RankRows& rows = item.rows;
  for (uint32_t base = 0; base < n; base += blockDim.x / 8) {
    const uint32_t i = base + threadIdx.x / 8;
    float x[kDim / 8] = {};
    const DeviceDescriptor* d = i < n ? descriptor_at(lane, rows.place[i] >> 6) : nullptr;
    unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
    if (page != nullptr) {
      const auto format = static_cast<Format>(d->format);
      const SlotShape shape = slot_shape(kDim, d->format);
      decode_vector<kDim, false>(
          x, format,
          vector_place<kDim, false>(page, shape, coding_of<false>(format), rows.place[i] & 63u));
    }
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c) sum = exact_add(sum, exact_mul(x[c], x[c]));
    for (uint32_t h = 4; h >= 1; h /= 2) {
      sum = exact_add(sum, __shfl_xor_sync(kAllLanes, sum, h));
    }
    if (i < n && threadIdx.x % 8 == 0) {
      rows.number[i] = exact_mul(rows.number[i], exact_sqrt(sum));
    }
  }
  __syncthreads();
}

// policy::pool_rows at row i of the first n numbers.
[[nodiscard]] __device__ __forceinline__ float pooled_number(const RankRule& rule,
                                                             const float* numbers, uint32_t n,
                                                             uint32_t i) {
  const uint32_t half = rule.pool_width / 2;
  const uint32_t first = i < half ? 0 : i - half, end = min(i + half + 1, n);
  float value = 0.0f;
  for (uint32_t j = first; j < end; ++j) {
    const float x = numbers[j];
    if (rule.pool == Pool::kMaximum) {
      value = value < x ? x : value;
    } else {
      value = exact_add(value, x);
    }
  }
  if (rule.pool == Pool::kMaximum) return value;
  return exact_div(value, static_cast<float>(rule.pool_width));
}

// Protected newest tokens of a lane with that limit.
[[nodiscard]] __device__ __forceinline__ uint32_t recent_tokens(const RankItem& item,
                                                                const RankRule& rule,
                                                                const RankLimit& limit) {
  const DeviceSequence& s = *item.sequence;
  uint32_t recent =
      max(uint32_t{rule.recent}, policy::percent_of(limit.limit, rule.recent_percent));
  if (limit.local) recent = max(recent, policy::percent_of(s.prompt_tokens, rule.local_percent));
  return min(recent, s.tokens);
}

// score = attention x its weight. Requires: rows.number from read_attention().
template <int kDim>
__device__ inline void add_attention(const RankItem& item, const RankRule& rule,
                                     const LaneView& lane, const RankLimit& limit, uint32_t n) {
  const RankRows& rows = item.rows;
  if (rule.value_norm != 0) multiply_by_value_norm<kDim>(item, lane, n);
  uint32_t pooled = 0;  // rows that are not among the protected newest
  if (rule.pool != Pool::kNone) {
    const uint32_t first_recent = item.sequence->tokens - recent_tokens(item, rule, limit);
    pooled =
        count_rows(*item.shared, n, [&](uint32_t i) { return rows.position[i] < first_recent; });
  }
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float number = i < pooled ? pooled_number(rule, rows.number, pooled, i) : rows.number[i];
    rows.score[i] = exact_add(rows.score[i], exact_mul(rule.attention, number));
  }
  __syncthreads();
}

__device__ inline void add_position_and_chance(const RankItem& item, const RankRule& rule,
                                               uint32_t lane, uint32_t n) {
  const RankRows& rows = item.rows;
  // Heads that keep one set draw one number.
  const bool alike = item.sequence->policy.grain == SelectGrain::kLayer;
  const uint32_t stream = alike ? item.layer() : lane;
  const auto tokens = static_cast<float>(item.sequence->tokens);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t where = rows.position[i];
    float score = exact_add(rows.score[i],
                            exact_mul(rule.position, exact_div(static_cast<float>(where), tokens)));
    if (rule.random != 0.0f) {
      const float chance = policy::random_score(rule.seed, stream, where);
      score = exact_add(score, exact_mul(rule.random, chance));
    }
    rows.score[i] = score;
  }
  __syncthreads();
}

}  // namespace rank_detail

// The live tokens of a lane that are in pages: place and position, ascending. Result: how many;
// more than there is room for: kRowsFull is raised and nothing is written.
[[nodiscard]] __device__ inline uint32_t gather_lane(const RankItem& item, const LaneView& lane) {
  const RankRows& rows = item.rows;
  const RowSpace space{.position = rows.position,
                       .found = rows.place,
                       .place = rows.place,
                       .weight = nullptr,
                       .keep = nullptr,
                       .room = rows.room};
  RowCounts& counts = item.shared->counts;
  if (threadIdx.x == 0) counts.rows = 0;
  __syncthreads();
  select_detail::gather_unordered(lane, 0, item.sequence->tokens, space, &counts);
  __syncthreads();
  const uint32_t n = counts.rows;
  __syncthreads();
  if (n > rows.room) {
    if (threadIdx.x == 0) raise_fault(lane.batch->lease, kRowsFull);
    return n;
  }
  rank_detail::sort_rows(rows, n);
  return n;
}

// rows.fixed of a lane with that limit. Token classes cannot be given on the device: all are 0.
__device__ inline void protect_rows(const RankItem& item, const RankRule& rule,
                                    const RankLimit& limit, uint32_t n) {
  const DeviceSequence& s = *item.sequence;
  const uint32_t recent = rank_detail::recent_tokens(item, rule, limit);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t where = item.rows.position[i];
    const bool outside = rule.counts == BudgetCount::kGenerated && where < s.prompt_tokens;
    item.rows.fixed[i] = where < rule.sinks || where >= s.tokens - recent || outside ? 1 : 0;
  }
  __syncthreads();
}

// rows.score of a lane; of a lane that decides alone, rows.attention too, where the rule reads it.
// The terms are added in the host's order.
template <int kDim>
__device__ inline void score_rows(const RankItem& item, const RankRule& rule, const LaneView& lane,
                                  uint32_t index, const RankLimit& limit, uint32_t n) {
  const RankRows& rows = item.rows;
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) rows.score[i] = 0.0f;
  if (uses_attention(rule) && lane.score_bytes == 4) {
    rank_detail::read_attention(item, lane, n);
    for (uint32_t i = threadIdx.x; i < n && item.heads == 1; i += blockDim.x) {
      rows.attention[i] = rows.number[i];
    }
    if (rule.attention != 0.0f) rank_detail::add_attention<kDim>(item, rule, lane, limit, n);
  }
  rank_detail::add_position_and_chance(item, rule, index, n);
}

}  // namespace thinkv::cuda
