// centre.h: the mean of a prompt's keys, which may be taken off every key of their lane.
//
// A vector c added to all keys of a lane adds q . c to all their scores: the softmax does not see
// it. So keys can be kept as k - c, and codes of k - c have smaller steps (SageAttention, arXiv
// 2410.02367, section 4.2, smooths K so before it is quantised for one call; here it lasts as long
// as the lane). The order of additions is stated, so that every implementation has the same bits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "thinkv/internal/small_float.h"

namespace thinkv::policy {

// Partial sums of one channel: that of rows i, i + 32, ..
inline constexpr uint32_t kCentreSums = 32;

// The mean of `rows` rows of a channel, `stride` floats from one to the next: 32 partial sums in
// ascending order, folded by halves, then divided. 0 for no rows.
[[nodiscard]] inline float channel_mean(const float* x, size_t stride, uint32_t rows) {
  if (rows == 0) return 0.0f;
  std::array<float, kCentreSums> sums{};
  for (uint32_t i = 0; i < rows; ++i) sums[i % kCentreSums] += x[i * stride];
  for (uint32_t half = kCentreSums / 2; half >= 1; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0] / static_cast<float>(rows);
}

// A channel of the centre as it is kept: fp16. What no fp16 can hold is no centre.
[[nodiscard]] constexpr uint16_t centre_bits(float mean) {
  constexpr float kMost = 65504.0f;
  return mean >= -kMost && mean <= kMost ? fp16_from_float(mean) : uint16_t{0};
}

}  // namespace thinkv::policy
