// block_rule.h: how 64 tokens become codes and what their bytes are: the steps that the host and
// the GPU share (coded_block.h has the format).
//
// Everything is rounded once: fp32 additions of products do not occur, and the divisions that codes
// come from are in fp64.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/stream/huffman_rule.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {

inline constexpr uint32_t kBlockTokens = 64;
inline constexpr uint32_t kBlockRuns = 8;  // a side
inline constexpr uint32_t kRunTokens = kBlockTokens / kBlockRuns;

// How one unit was quantised.
struct UnitScale {
  uint16_t step = 0;  // bf16: all exponents of fp32, so no range is too wide or too narrow
  int16_t zero = 0;
};

// |zero| stays below 2^15 with room for the rounding of the step to bf16.
inline constexpr float kZeroMax = 32000.0f;

// A block's bytes before its runs, and those of a raw one.
[[nodiscard]] constexpr uint32_t block_head_bytes(uint32_t dim) {
  return 2 * kBlockRuns * sizeof(uint16_t) +
         static_cast<uint32_t>(sizeof(UnitScale)) * (dim + kBlockTokens);
}
[[nodiscard]] constexpr uint32_t raw_block_bytes(uint32_t dim) {
  return kBlockTokens * dim * 2 * 2;
}

// Codes of at most 15 bits are always shorter than 16-bit values, whatever the codebook was made
// of.
[[nodiscard]] constexpr bool always_shrinks(uint32_t dim) {
  const uint32_t codes = 2 * kBlockRuns * (kRunTokens * dim * kCodeBitsMax / 8);
  return block_head_bytes(dim) + codes < raw_block_bytes(dim);
}
static_assert(always_shrinks(64) && always_shrinks(128) && always_shrinks(256));

// To the nearest integer, halves away from 0. Requires: |x| below 2^52.
[[nodiscard]] constexpr int64_t round_away(double x) {
  const auto whole = static_cast<int64_t>(x);
  const double rest = x - static_cast<double>(whole);
  return whole + (rest >= 0.5 ? 1 : 0) - (rest <= -0.5 ? 1 : 0);
}

// The scale of a unit whose least and greatest value are low and high, both finite. Result: false
// where it has none: its values are too small for a step, or too far from 0.
[[nodiscard]] constexpr bool scale_unit(float low, float high, float share, UnitScale* scale) {
  constexpr float kMax = std::numeric_limits<float>::max();
  const double wide = static_cast<double>(high) - static_cast<double>(low);
  const float range = wide > static_cast<double>(kMax) ? kMax : static_cast<float>(wide);
  const float below = low < 0 ? -low : low, above = high < 0 ? -high : high;
  const float largest = below > above ? below : above;
  const float wanted = share * range, least = largest / kZeroMax;
  *scale = {};
  const uint16_t bits = bf16_from_float(wanted > least ? wanted : least);
  const float step = bf16_to_float(bits);
  if (step == 0.0f || step > kMax) return largest == 0.0f;
  const int64_t zero = round_away(static_cast<double>(low) / static_cast<double>(step));
  *scale = {bits, static_cast<int16_t>(zero)};
  return zero >= std::numeric_limits<int16_t>::min() && zero <= std::numeric_limits<int16_t>::max();
}

// The code of a value of the unit: outside of 0 .. 255 where a step among the bf16 subnormals is
// too far from what was asked for.
[[nodiscard]] constexpr int64_t unit_code(float value, UnitScale scale) {
  if (scale.step == 0) return 0;
  const float step = bf16_to_float(scale.step);
  return round_away(static_cast<double>(value) / static_cast<double>(step)) - scale.zero;
}

// Exact in fp32: 17 bits times the 8 bits of the step.
[[nodiscard]] constexpr float dequantise(uint8_t code, UnitScale scale) {
  return static_cast<float>(int32_t{code} + scale.zero) * bf16_to_float(scale.step);
}

// Blocks begin at multiples of it, so that 32 bits reach 64 GiB.
inline constexpr uint32_t kStreamUnitBytes = 16;

// 64 tokens of a stream (kernels/stream/coded_block.h).
struct StreamBlock {
  uint32_t unit;  // where it begins, in units from the stream's first byte
  uint32_t bytes;
  uint32_t first_position;
  uint32_t raw;  // 1: 16-bit rows
};
static_assert(sizeof(StreamBlock) == 16);

}  // namespace thinkv::kernels
