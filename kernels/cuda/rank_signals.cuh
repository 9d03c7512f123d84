// rank_signals.cuh: the number of each token of a lane, from which a rule chooses, as
// kernels/sequence/rank_rows.cpp makes it (rank.h). Functions of a whole block.
//
// Sums that the host adds in a stated order are added in that order.
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_rows.cuh"
#include "kernels/cuda/rank_similarity.cuh"
#include "kernels/cuda/rank_weigh.cuh"

namespace thinkv::cuda {
namespace rank_detail {

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

// score = attention and distinctness x their weights. Requires: rows.number from read_attention().
template <int kDim>
__device__ inline void add_attention(const RankItem& item, const RankRule& rule,
                                     const LaneView& lane, const RankLimit& limit, uint32_t n) {
  const RankRows& rows = item.rows;
  if (rule.value_norm != 0 || rule.distinct != 0.0f) weigh_rows<kDim>(item, rule, lane, n);
  uint32_t pooled = 0;  // rows that are not among the protected newest
  if (rule.pool != Pool::kNone) {
    const uint32_t first_recent = item.sequence->tokens - recent_tokens(item, rule, limit);
    pooled =
        count_rows(*item.shared, n, [&](uint32_t i) { return rows.position[i] < first_recent; });
  }
  const auto number = [&](uint32_t i) {
    return i < pooled ? pooled_number(rule, rows.number, pooled, i) : rows.number[i];
  };
  float weight = 0.0f;  // of the distances that are in rows.score
  if (rule.distinct != 0.0f) {
    const float attention = sum_of_rows(*item.shared, n, number);
    const float distances = sum_of_rows(*item.shared, n, [&](uint32_t i) { return rows.score[i]; });
    weight = exact_mul(rule.distinct, policy::distance_scale(attention, distances));
  }
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float score = exact_add(0.0f, exact_mul(rule.attention, number(i)));
    rows.score[i] =
        rule.distinct == 0.0f ? score : exact_add(score, exact_mul(weight, rows.score[i]));
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
    __syncthreads();  // other threads change the numbers next
    if (rule.attention != 0.0f) rank_detail::add_attention<kDim>(item, rule, lane, limit, n);
  }
  if (rule.similarity != 0.0f) add_similarity<kDim>(item, rule, lane, n);
  rank_detail::add_position_and_chance(item, rule, index, n);
}

}  // namespace thinkv::cuda
