// distinct.h: how far a key points away from the mean of its prompt's keys, beside attention.
//
// A key like all others stands for what the lane has many of; one that points elsewhere is found
// by the queries that look for just it, also by those that nobody has asked yet (KeyDiff, arXiv
// 2504.15364, keeps by this alone). The numbers of a lane are scaled so that they are together a
// given share of its attention. fp32, each step rounded once, sums in a stated order.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "kernels/policy/rank_signal.h"

namespace thinkv::policy {

// Partial sums of a lane's numbers: that of rows i, i + 256, ..
inline constexpr uint32_t kShareSums = 256;

// 256 partial sums in ascending order, folded by halves.
[[nodiscard]] inline float sum_of_rows(std::span<const float> x) {
  std::array<float, kShareSums> sums{};
  for (size_t i = 0; i < x.size(); ++i) sums[i % kShareSums] += x[i];
  for (uint32_t half = kShareSums / 2; half >= 1; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// 1 - cos(key, mean); 1 where one of them is nothing, 0 for what is not a number.
// key: as the model made it, not centred. mean_norm: sqrt(dot(mean, mean)).
[[nodiscard]] inline float key_distance(const float* key, const float* mean, float mean_norm,
                                        uint32_t dim) {
  const float norms = std::sqrt(dot(key, key, dim)) * mean_norm;
  const float distance = norms == 0.0f ? 1.0f : 1.0f - dot(key, mean, dim) / norms;
  return distance > 0.0f ? distance : 0.0f;
}

// What distances are multiplied with, so that their sum is that of the attention. 1 where nothing
// has been looked at so far, 0 where the distances have no sum.
[[nodiscard]] constexpr float distance_scale(float attention, float distances) {
  constexpr float kMost = std::numeric_limits<float>::max();
  if (!(distances > 0.0f && distances <= kMost)) return 0.0f;
  return attention > 0.0f && attention <= kMost ? attention / distances : 1.0f;
}

}  // namespace thinkv::policy
