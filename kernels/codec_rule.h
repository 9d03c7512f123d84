// codec_rule.h: the one place that says how a vector becomes codes and scales.
//
// Every implementation (reference/, host/, cuda/) follows these steps literally, in fp32, rounding
// each operation to nearest even and contracting none, and so writes the same bytes.
//
// Input. 16-bit formats take x as it is: one rounding to nearest even; too large becomes infinity,
//   NaN the quiet NaN with the sign of x. All others see finite_input(x): NaN becomes 0 and
//   everything else is clamped to +-kFiniteMax, so no sum below can overflow.
//
// Uniform, b bits (k8v8 .. k2v2). value = (code - (2^b - 1) / 2) * scale, fp16 scale of the vector.
//   code(x, s) = clamp(floor(x * inv), -2^(b-1), 2^(b-1) - 1) + 2^(b-1), inv = 1 / s (0 if s = 0)
//   h(s) below is s rounded to fp16 and re-read, saturating at 65504; c = code - (2^b - 1) / 2.
//   8 bits: s = h(max|x| / 127.5).
//   4 bits: the best of three clippings. For f in kClipFactors, in this order: s0 = h(max|x| / 7.5
//     * f); codes at s0; s = h(fold(x c) / fold(c c)), or 0 if s0 = 0; error = fold((x - c s)^2).
//     The codes (not computed anew) and s of the first least error.
//   2 bits: s = h(kRmsFactor * sqrt(fold(x x) / d)): the scale of the best 4-level quantiser of
//     Gaussian values. No refit: it would shrink the energy of V, whose errors average out.
//   The rules are the best of those measured on a real model (KL of k4v4 0.014 against 0.018 for
//   max|x| / 7.5; of k4v2 0.054 against 0.069).
//
// NVFP4. Per 16 values: s = e4m3(max|x| / 6), saturating; code = e2m1(x * inv); value = e2m1 * s.
//
// Ternary. Per 16 values: |x| sorted in descending order, S_m = the sum of the first m, added in
//   that order; the first m of the largest S_m * S_m / m is the least-squares optimum;
//   s = e4m3(S_m / m); t = sign(x) if |x| > s * 0.5, else 0 (0 if s = 0); code = t + 1.
//
// Affine, b bits (block formats; a group is one channel of K over the tokens of the block, or a run
//   of channels of one token's V). With lo, hi the least and greatest finite_input of the group and
//   range = hi - lo + 0 (so never -0), L = 2^b - 1:
//     code = min(floor((x - lo) * inv + 0.5), L), inv = L / range (0 if range < kRangeMin)
//     zero = h(lo + eta * range), scale = h((1 - 2 eta) * range / L); value = zero + code * scale
//   (evaluated from left to right; h as above, at both ends). eta 0 is KIVI; above it the end
//   points move inwards, which lowers the error at 1 and 2 bits (XQuant). Of a pair of layers the
//   codes are the first layer's; each layer has its own zero and scale.
//
// Think. 16 bits as they are; of K the channels of the page's mask, ascending. The others are 0.
//
// Fold. A sum over d values: v[i] += v[i + h] for i < h, with h = d/2, d/4, .., 1; the sum is v[0].
//   A warp whose lane l owns the dims l + 32 i gets the same bits from registers and shuffles.
#pragma once

#include <cstdint>

namespace thinkv::kernels {

inline constexpr float kFiniteMax = 0x1p24f;
inline constexpr float kClipFactors[3] = {1.0f, 0.92f, 0.84f};
inline constexpr float kRmsFactor = 0.9957f;
inline constexpr float kFp16Max = 65504.0f;
inline constexpr float kE2m1Max = 6.0f;
inline constexpr float kRangeMin = 0x1p-100f;
inline constexpr uint8_t kTernaryZero = 1;  // code of t = 0

[[nodiscard]] constexpr float finite_input(float x) {
  if (x > kFiniteMax) return kFiniteMax;
  if (x < -kFiniteMax) return -kFiniteMax;
  return x == x ? x : 0.0f;
}

// (2^b - 1) / 2: the offset of the codes and, in steps, the largest magnitude.
[[nodiscard]] constexpr float uniform_bias(uint32_t bits) {
  return static_cast<float>((1u << bits) - 1) * 0.5f;
}

}  // namespace thinkv::kernels
