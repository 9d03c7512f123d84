// tier_select.h: which rows a step fetches from a tier, and which layers can live with that.
//
// TailorKV (arXiv 2505.19586): rows are ranked by the few channels in which query and keys are
// large; layers whose attention is spread out keep all rows near instead. Pure functions with a
// stated order of addition; equal numbers: the lower channel, the newer row; what is not a number
// is the lowest. The cuda backend chooses the same (kernels/cuda/tier_choice.cuh).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

namespace thinkv::policy {

inline constexpr float kTopMassShare = 0.05f;
// Layers with a larger error are dense ("quantization-friendly").
inline constexpr double kTopMassErrorMax = 0.2;

// What the largest `share` of each row's weights leave out, on average. weights [rows, n], each row
// a softmax. Requires: rows of n > 0 weights; at least one weight of each row counts.
[[nodiscard]] inline double top_mass_error(std::span<const float> weights, size_t n,
                                           float share = kTopMassShare) {
  const auto top = std::max<size_t>(1, static_cast<size_t>(static_cast<float>(n) * share));
  const size_t rows = weights.size() / n;
  std::vector<float> row(n);
  double sum = 0.0;
  for (size_t r = 0; r < rows; ++r) {
    std::copy_n(weights.begin() + static_cast<std::ptrdiff_t>(r * n), n, row.begin());
    std::partial_sort(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(top), row.end(),
                      std::greater<>());
    sum += 1.0 - std::accumulate(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(top), 0.0);
  }
  return sum / static_cast<double>(rows);
}

// q [group, dim] to its mean over the query heads of a kv head.
inline void mean_query(const float* q, uint32_t group, std::span<float> mean) {
  const size_t dim = mean.size();
  for (size_t c = 0; c < dim; ++c) {
    float sum = 0.0f;
    for (uint32_t g = 0; g < group; ++g) sum += q[g * dim + c];
    mean[c] = sum / static_cast<float>(group);
  }
}

[[nodiscard]] inline float or_lowest(float x) {
  return std::isnan(x) ? -std::numeric_limits<float>::infinity() : x;
}

// The `count` channels with the largest |query| x key_max, ascending.
inline void choose_channels(std::span<const float> query, std::span<const float> key_max,
                            uint32_t count, std::vector<uint32_t>& chosen) {
  chosen.resize(query.size());
  std::iota(chosen.begin(), chosen.end(), 0u);
  const auto end = chosen.begin() + std::min<std::ptrdiff_t>(count, std::ssize(chosen));
  std::partial_sort(chosen.begin(), end, chosen.end(), [&](uint32_t a, uint32_t b) {
    const float wa = or_lowest(std::fabs(query[a]) * key_max[a]);
    const float wb = or_lowest(std::fabs(query[b]) * key_max[b]);
    return wa != wb ? wa > wb : a < b;
  });
  chosen.erase(end, chosen.end());
  std::sort(chosen.begin(), chosen.end());
}

// The `count` rows with the highest scores, ascending.
inline void choose_rows(std::span<const float> scores, uint32_t count,
                        std::vector<uint32_t>& chosen) {
  chosen.resize(scores.size());
  std::iota(chosen.begin(), chosen.end(), 0u);
  if (count >= scores.size()) return;
  std::nth_element(chosen.begin(), chosen.begin() + count, chosen.end(),
                   [&](uint32_t a, uint32_t b) {
                     const float sa = or_lowest(scores[a]), sb = or_lowest(scores[b]);
                     return sa != sb ? sa > sb : a > b;
                   });
  chosen.resize(count);
  std::sort(chosen.begin(), chosen.end());
}

}  // namespace thinkv::policy
