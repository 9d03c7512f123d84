// prompt_attention.h: the attention that the tokens of a prompt receive from its newest queries,
// for rules that fire at the prompt's end; the same bits on the host and on a GPU.
//
// The tokens are rows 0, 1, .. by position, and a query sees those up to its own. A logit is
// policy::dot of query and key, then times the scale. A row of logits is a query head's, or under
// kMaxLogit the largest of the heads that share a kv head, in ascending order of heads. Its softmax
// is made in chunks of 32 rows: what was summed so far is scaled to the new maximum, then the
// chunk's terms are added, folded by halves. fp32, each step rounded once (exact_exp.h).
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "kernels/policy/exact_exp.h"

namespace thinkv::policy {

inline constexpr uint32_t kAttentionChunk = 32;

// A row's softmax over the rows so far. The maximum starts at a number, so that logits of minus
// infinity count nothing, even if all are.
struct RowSoftmax {
  float most = std::numeric_limits<float>::lowest();
  float sum = 0.0f;
};

// The larger one; what is not a number is passed over, unless it came first.
[[nodiscard]] constexpr float larger(float so_far, float other) {
  return other > so_far ? other : so_far;
}

// What a logit adds to the sum.
template <class Steps = PlainSteps>
[[nodiscard]] constexpr float softmax_term(float logit, float most) {
  return exact_exp<Steps>(Steps::add(logit, -most));
}

// A chunk with the maximum `most`, which is at least that of the rows before, and the terms' sum.
template <class Steps = PlainSteps>
constexpr void add_chunk(RowSoftmax& row, float most, float terms) {
  row.sum = Steps::add(Steps::mul(row.sum, softmax_term<Steps>(row.most, most)), terms);
  row.most = most;
}

// What terms are multiplied with; 0 where no logit counts or some is not a number. `divided`: 1 by
// the sum, rounded.
[[nodiscard]] constexpr float softmax_factor(const RowSoftmax& row, float divided) {
  return row.sum > 0.0f ? divided : 0.0f;
}

// Logits become probabilities.
inline void softmax_by_chunks(std::span<float> logits) {
  RowSoftmax row;
  const auto n = static_cast<uint32_t>(logits.size());
  for (uint32_t first = 0; first < n; first += kAttentionChunk) {
    const uint32_t count = n - first < kAttentionChunk ? n - first : kAttentionChunk;
    float most = row.most;
    for (uint32_t i = 0; i < count; ++i) most = larger(most, logits[first + i]);
    float terms[kAttentionChunk] = {};
    for (uint32_t i = 0; i < count; ++i) terms[i] = softmax_term(logits[first + i], most);
    for (uint32_t half = kAttentionChunk / 2; half >= 1; half /= 2) {
      for (uint32_t i = 0; i < half; ++i) terms[i] += terms[i + half];
    }
    add_chunk(row, most, terms[0]);
  }
  const float factor = softmax_factor(row, 1.0f / row.sum);
  for (float& logit : logits) logit = softmax_term(logit, row.most) * factor;
}

}  // namespace thinkv::policy
