// softmax.h: rows of scores, eight at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host/vec.h"

#include "kernels/host/isa_begin.inc"

// e^x for x <= 0, within 2 ulp; 0 below -87. Cephes: x = n ln 2 + r, a degree-5 polynomial of r,
// then n goes into the exponent.
THINKV_LANE_INLINE F8 exp_nonpositive(F8 x) {
  constexpr float kLowest = -87.0f;
  const F8 clamped = max(x, splat(kLowest));
  const F8 n = floor(fused(clamped, splat(1.44269504088896341f), splat(0.5f)));
  const F8 r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), clamped));
  F8 y = splat(1.9875691500e-4f);
  y = fused(y, r, splat(1.3981999507e-3f));
  y = fused(y, r, splat(8.3334519073e-3f));
  y = fused(y, r, splat(4.1665795894e-2f));
  y = fused(y, r, splat(1.6666665459e-1f));
  y = fused(y, r, splat(5.0000001201e-1f));
  y = fused(y, r * r, r + 1.0f);
  const U8 power = reinterpret_cast<U8>(truncate(n) + 127) << 23;
  return select(x < kLowest, splat(0.0f), y * as_float(power));
}

// Lanes of the last vector of a row that are not part of it become `value`.
THINKV_LANE_INLINE void pad_row(float* row, uint32_t count, float value) {
  for (uint32_t e = count; e % kLanes != 0; ++e) row[e] = value;
}

THINKV_LANE_INLINE float row_max(const float* row, uint32_t count) {
  F8 top = splat(-std::numeric_limits<float>::infinity());
  for (uint32_t e = 0; e < count; e += kLanes) top = max(load(row + e), top);
  return largest(top);
}

// Turns logits into probabilities in place and returns the log of the sum of exp.
// Requires: count > 0, room for whole vectors.
inline float softmax(float* row, uint32_t count) {
  pad_row(row, count, -std::numeric_limits<float>::infinity());
  const float top = row_max(row, count);
  if (top == -std::numeric_limits<float>::infinity()) {
    for (uint32_t e = 0; e < count; ++e) row[e] = 0.0f;
    return top;
  }
  F8 sums = splat(0.0f);
  for (uint32_t e = 0; e < count; e += kLanes) {
    const F8 p = exp_nonpositive(load(row + e) - top);
    store(row + e, p);
    sums += p;
  }
  const float sum = fold(sums);
  const F8 inv = splat(1.0f / sum);
  for (uint32_t e = 0; e < count; e += kLanes) store(row + e, load(row + e) * inv);
  return top + std::log(sum);
}

// How many entries have exp(logit) below `fraction` of the row's maximum.
inline uint32_t count_below(const float* row, uint32_t count, float fraction) {
  float top = row[0];
  for (uint32_t e = 1; e < count; ++e) top = row[e] > top ? row[e] : top;
  const float bound = top + std::log(fraction);
  uint32_t below = 0;
  for (uint32_t e = 0; e < count; ++e) below += row[e] < bound ? 1 : 0;
  return below;
}

#include "kernels/host/isa_end.inc"
