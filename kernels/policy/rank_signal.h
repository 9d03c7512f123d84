// rank_signal.h: numbers a token, from which a rank policy chooses.
//
// Plain loops over rows that ascend by position. Orders of addition are stated where a sum is made,
// so that every implementation ranks alike. fp32, no contraction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "kernels/policy/exact_exp.h"
#include "kernels/policy/prompt_sample.h"
#include "thinkv/internal/rank_rule.h"

namespace thinkv::policy {

// How many measured queries saw the token at `position`: those of the decode steps from its own on,
// and of the prompt's that count those not before it.
struct Lifetimes {
  uint32_t tokens;  // positions so far
  uint32_t prompt;
  PromptSample queries;
};
[[nodiscard]] constexpr uint32_t lifetime(const Lifetimes& l, uint32_t position) {
  if (position >= l.prompt) return l.tokens - position;
  const uint32_t later = l.prompt - position, given = l.queries.given;
  const uint32_t seen = later >= given ? l.queries.used : sampled_from(l.queries, given - later);
  return l.tokens - l.prompt + seen;
}

// The mean or maximum over `width` neighbours; beyond the ends is 0, and counts in the mean (as in
// SnapKV). Neighbours are added in ascending order. Requires: in and out do not overlap.
inline void pool_rows(Pool kind, uint32_t width, std::span<const float> in, std::span<float> out) {
  const auto n = static_cast<int64_t>(in.size());
  const int64_t half = width / 2;
  for (int64_t i = 0; i < n; ++i) {
    float value = 0.0f;
    for (int64_t j = std::max<int64_t>(i - half, 0); j <= std::min(i + half, n - 1); ++j) {
      const float x = in[static_cast<size_t>(j)];
      value = kind == Pool::kMaximum ? std::max(value, x) : value + x;
    }
    out[static_cast<size_t>(i)] =
        kind == Pool::kAverage ? value / static_cast<float>(width) : value;
  }
}

// 64 bits that depend on nothing else (splitmix64).
[[nodiscard]] constexpr uint64_t random_bits(uint32_t seed, uint32_t stream, uint32_t position) {
  uint64_t z = (uint64_t{seed} << 32 | stream) * 0xD1342543DE82EF95u + position;
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
// The same as a number in [0, 1).
[[nodiscard]] constexpr float random_score(uint32_t seed, uint32_t stream, uint32_t position) {
  return static_cast<float>(random_bits(seed, stream, position) >> 40) * 0x1p-24f;
}

// Eight partial sums over dims l, l + 8, ..; then folded by halves, as the medoids' distance.
[[nodiscard]] inline float dot(const float* a, const float* b, uint32_t dim) {
  float sums[8] = {};
  for (uint32_t d = 0; d < dim; d += 8) {
    for (uint32_t l = 0; l < 8; ++l) sums[l] += a[d + l] * b[d + l];
  }
  for (uint32_t h = 4; h >= 1; h /= 2) {
    for (uint32_t l = 0; l < h; ++l) sums[l] += sums[l + h];
  }
  return sums[0];
}

inline void normalise_row(float* row, uint32_t dim) {
  const float norm = std::sqrt(dot(row, row, dim));
  const float factor = norm > 0.0f ? 1.0f / norm : 0.0f;
  for (uint32_t d = 0; d < dim; ++d) row[d] *= factor;
}

// In place. The sum runs in ascending order.
inline void softmax_rows(std::span<float> x) {
  float most = -INFINITY;
  for (const float value : x) most = std::max(most, value);
  float sum = 0.0f;
  for (float& value : x) {
    value = exact_exp(value - most);
    sum += value;
  }
  for (float& value : x) value /= sum;
}

// Columns that one pass over a row's channels takes.
inline constexpr uint32_t kCosineBlock = 32;
[[nodiscard]] constexpr size_t redundancy_scratch(uint32_t n, uint32_t dim) {
  const size_t blocks = (size_t{n} + kCosineBlock - 1) / kCosineBlock;
  return blocks * kCosineBlock * (size_t{dim} + 1);
}

// R-KV's redundancy (arXiv 2505.24133): the softmax over tokens of the mean cosine to all keys.
// A row forgives its newest near-duplicate, the last j with a cosine above `above`; their own
// column is 0. (Their code forgives column 0 where a row has no near-duplicate: an accident that
// is not kept.) A cosine is added by ascending channels, a mean by ascending rows.
// keys [n, dim] unit rows; scratch [redundancy_scratch(n, dim)]; out [n].
inline void redundancy(std::span<const float> keys, uint32_t dim, float above,
                       std::span<float> scratch, std::span<float> out) {
  const auto n = static_cast<uint32_t>(out.size());
  // Channel after channel of a block of columns, so that the inner loop is over columns.
  const std::span<float> columns = scratch.subspan(0, scratch.size() / (dim + 1) * dim);
  const std::span<float> cosines = scratch.subspan(columns.size());
  std::fill(columns.begin(), columns.end(), 0.0f);
  for (size_t i = 0; i < n; ++i) {
    float* block = columns.data() + i / kCosineBlock * kCosineBlock * dim + i % kCosineBlock;
    for (uint32_t d = 0; d < dim; ++d) block[d * kCosineBlock] = keys[i * dim + d];
  }
  std::fill(out.begin(), out.end(), 0.0f);
  for (uint32_t i = 0; i < n; ++i) {
    const float* row = keys.data() + size_t{i} * dim;
    for (size_t first = 0; first < n; first += kCosineBlock) {
      float sums[kCosineBlock] = {};
      const float* block = columns.data() + first * dim;
      for (uint32_t d = 0; d < dim; ++d, block += kCosineBlock) {
        for (uint32_t c = 0; c < kCosineBlock; ++c) sums[c] += row[d] * block[c];
      }
      std::copy_n(sums, kCosineBlock, cosines.data() + first);
    }
    cosines[i] = 0.0f;
    uint32_t forgiven = n;
    while (forgiven > 0 && !(forgiven - 1 != i && cosines[forgiven - 1] > above)) --forgiven;
    if (forgiven > 0) cosines[forgiven - 1] = 0.0f;
    for (uint32_t j = 0; j < n; ++j) out[j] += cosines[j];
  }
  for (float& value : out) value /= static_cast<float>(n);
  softmax_rows(out);
}

}  // namespace thinkv::policy
