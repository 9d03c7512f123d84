// small_float.h: fp16, bf16, e4m3 and e2m1 as bits, rounded to nearest even.
//
// constexpr and bit-exact with the hardware conversions (F16C, cvt.rn, cvt.rn.satfinite), so the
// CPU oracle, the fast host path and the GPU write the same bytes. NaN apart: machines
// differ in it; here it is quiet with the sign of the input, and only bf16 keeps a payload.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace thinkv {

[[nodiscard]] constexpr uint16_t fp16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFF'FFFFu;
  if (magnitude > 0x7F80'0000u) return static_cast<uint16_t>(sign | 0x7E00u);   // NaN
  if (magnitude >= 0x4780'0000u) return static_cast<uint16_t>(sign | 0x7C00u);  // >= 65536, inf
  if (magnitude < 0x3880'0000u) {  // below 2^-14: subnormal, in units of 2^-24
    if (magnitude < 0x3300'0000u) return static_cast<uint16_t>(sign);  // below half a unit
    const uint32_t exponent = magnitude >> 23;
    const uint32_t mantissa = (magnitude & 0x7F'FFFFu) | 0x80'0000u;
    const uint32_t shift = 126 - exponent;  // 14..24
    const uint32_t kept = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1);
    const uint32_t half = 1u << (shift - 1);
    const uint32_t up = (rest > half || (rest == half && (kept & 1u))) ? 1u : 0u;
    return static_cast<uint16_t>(sign | (kept + up));
  }
  const uint32_t rebased = magnitude - 0x3800'0000u;  // exponent 127 -> 15
  const uint32_t rest = rebased & 0x1FFFu;
  uint32_t kept = rebased >> 13;
  if (rest > 0x1000u || (rest == 0x1000u && (kept & 1u))) ++kept;  // may carry into infinity
  return static_cast<uint16_t>(sign | kept);
}

[[nodiscard]] constexpr float fp16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // inf or NaN
    return std::bit_cast<float>(sign | 0x7F80'0000u | ((magnitude & 0x3FFu) << 13));
  }
  if (magnitude >= 0x0400u) {
    return std::bit_cast<float>(sign | ((magnitude << 13) + 0x3800'0000u));
  }
  const float scaled = static_cast<float>(magnitude) * 0x1p-24f;  // exact
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

[[nodiscard]] constexpr uint16_t bf16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFF'FFFFu) > 0x7F80'0000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

[[nodiscard]] constexpr float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// e4m3 (OCP "fn"): bias 7, largest 448, no infinity, 0x7F and 0xFF are NaN.
[[nodiscard]] constexpr float e4m3_to_float(uint8_t code) {
  const uint32_t exponent = (code >> 3) & 0xFu;
  const uint32_t mantissa = code & 0x7u;
  float value = 0.0f;
  if (exponent == 15 && mantissa == 7) {
    value = std::bit_cast<float>(0x7FC0'0000u);
  } else if (exponent == 0) {
    value = static_cast<float>(mantissa) * 0x1p-9f;
  } else {
    value = std::bit_cast<float>(((exponent + 120) << 23) | (mantissa << 20));
  }
  return (code & 0x80u) ? -value : value;
}

// Saturates to +-448; NaN stays NaN.
[[nodiscard]] constexpr uint8_t e4m3_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  const uint32_t magnitude = bits & 0x7FFF'FFFFu;
  if (magnitude > 0x7F80'0000u) return static_cast<uint8_t>(sign | 0x7Fu);
  if (magnitude >= 0x43E0'0000u) return static_cast<uint8_t>(sign | 0x7Eu);  // >= 448
  if (magnitude < 0x3C80'0000u) {  // below 2^-6: subnormal, in units of 2^-9
    const float units = std::bit_cast<float>(magnitude) * 0x1p9f;  // exact, < 8
    const uint32_t floor_units = static_cast<uint32_t>(units);
    const float rest = units - static_cast<float>(floor_units);
    const uint32_t up = (rest > 0.5f || (rest == 0.5f && (floor_units & 1u))) ? 1u : 0u;
    return static_cast<uint8_t>(sign | (floor_units + up));
  }
  const uint32_t rebased = magnitude - (120u << 23);
  const uint32_t rest = rebased & 0xF'FFFFu;
  uint32_t kept = rebased >> 20;
  if (rest > 0x8'0000u || (rest == 0x8'0000u && (kept & 1u))) ++kept;
  if (kept > 0x7Eu) kept = 0x7Eu;
  return static_cast<uint8_t>(sign | kept);
}

// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code = sign << 3 | magnitude.
inline constexpr float kE2m1Magnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

[[nodiscard]] constexpr float e2m1_to_float(uint8_t code) {
  const float magnitude = kE2m1Magnitudes[code & 7u];
  return (code & 8u) ? -magnitude : magnitude;
}

// Ties go to the even code, as in cvt.rn.satfinite.e2m1x2.
[[nodiscard]] constexpr uint8_t e2m1_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const float m = std::bit_cast<float>(bits & 0x7FFF'FFFFu);
  uint8_t code = 0;
  if (m > 5.0f)
    code = 7;
  else if (m >= 3.5f)
    code = 6;
  else if (m > 2.5f)
    code = 5;
  else if (m >= 1.75f)
    code = 4;
  else if (m > 1.25f)
    code = 3;
  else if (m >= 0.75f)
    code = 2;
  else if (m > 0.25f)
    code = 1;
  return static_cast<uint8_t>(code | ((bits >> 28) & 8u));
}

static_assert(fp16_from_float(1.0f) == 0x3C00 && fp16_to_float(0x0001) == 0x1p-24f);
static_assert(fp16_from_float(65504.0f) == 0x7BFF && fp16_from_float(65520.0f) == 0x7C00);
static_assert(bf16_from_float(1.0f) == 0x3F80 && e4m3_from_float(1.0f) == 0x38);
static_assert(e4m3_to_float(0x7E) == 448.0f && e4m3_from_float(1000.0f) == 0x7E);
static_assert(e2m1_from_float(-6.0f) == 15 && e2m1_from_float(2.5f) == 4);

}  // namespace thinkv
