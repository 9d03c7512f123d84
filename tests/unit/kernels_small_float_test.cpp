// The small floats against their definitions. Conversion from fp32 rounds monotonically, so it is
// right everywhere if it is right at every representable value, at every midpoint between two
// neighbours, and one fp32 step to either side of each midpoint: that is what is enumerated.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/host/host_set.h"
#include "thinkv/internal/small_float.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace thinkv {
namespace {

// Sign, exponent and mantissa read off by hand.
double definition(uint32_t code, int exponent_bits, int mantissa_bits, int bias) {
  const uint32_t mantissa = code & ((1u << mantissa_bits) - 1);
  const uint32_t exponent = (code >> mantissa_bits) & ((1u << exponent_bits) - 1);
  const bool negative = ((code >> (mantissa_bits + exponent_bits)) & 1u) != 0;
  const double magnitude = exponent == 0
                               ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                               : std::ldexp(mantissa + (1u << mantissa_bits),
                                            static_cast<int>(exponent) - bias - mantissa_bits);
  return negative ? -magnitude : magnitude;
}

// Checks every boundary between the non-negative codes 0 .. last, for both signs.
template <class Encode, class Decode>
void check_boundaries(uint32_t last, uint32_t sign_bit, Encode encode, Decode decode) {
  for (uint32_t code = 0; code <= last; ++code) {
    const float value = decode(code);
    ASSERT_EQ(encode(value), code);
    ASSERT_EQ(encode(-value), code | sign_bit);
    if (code == last) break;
    const float middle = static_cast<float>((double{value} + double{decode(code + 1)}) / 2);
    const uint32_t even = code % 2 == 0 ? code : code + 1;
    const float inf = std::numeric_limits<float>::infinity();
    ASSERT_EQ(encode(std::nextafter(middle, 0.0f)), code) << code;
    ASSERT_EQ(encode(middle), even) << code;
    ASSERT_EQ(encode(std::nextafter(middle, inf)), code + 1) << code;
    ASSERT_EQ(encode(-middle), even | sign_bit) << code;
  }
}

TEST(SmallFloat, Fp16DecodesEveryFiniteCode) {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    if ((code & 0x7C00u) == 0x7C00u) continue;
    ASSERT_EQ(fp16_to_float(static_cast<uint16_t>(code)), definition(code, 5, 10, 15)) << code;
  }
}

TEST(SmallFloat, Fp16RoundsToNearestEvenAtEveryBoundary) {
  check_boundaries(
      0x7BFF, 0x8000, [](float v) { return uint32_t{fp16_from_float(v)}; },
      [](uint32_t c) { return fp16_to_float(static_cast<uint16_t>(c)); });
}

TEST(SmallFloat, Fp16SpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(fp16_from_float(65519.996f), 0x7BFF);
  EXPECT_EQ(fp16_from_float(65520.0f), 0x7C00);
  EXPECT_EQ(fp16_from_float(std::numeric_limits<float>::max()), 0x7C00);
  EXPECT_EQ(fp16_from_float(-inf), 0xFC00);
  EXPECT_EQ(fp16_from_float(std::nanf("0x123")), 0x7E00);
  EXPECT_EQ(fp16_from_float(-0.0f), 0x8000);
  EXPECT_EQ(fp16_from_float(0x1p-25f), 0);
  EXPECT_TRUE(std::isnan(fp16_to_float(0x7C01)));
  EXPECT_EQ(fp16_to_float(0xFC00), -inf);
}

TEST(SmallFloat, Bf16RoundsToNearestEvenAtEveryBoundary) {
  check_boundaries(
      0x7F7F, 0x8000, [](float v) { return uint32_t{bf16_from_float(v)}; },
      [](uint32_t c) { return bf16_to_float(static_cast<uint16_t>(c)); });
  EXPECT_EQ(bf16_from_float(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_TRUE(std::isnan(bf16_to_float(bf16_from_float(std::nanf("")))));
}

TEST(SmallFloat, E4m3DecodesEveryCodeAndRoundsAtEveryBoundary) {
  for (uint32_t code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(static_cast<uint8_t>(code));
    if ((code & 0x7Fu) == 0x7Fu) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      EXPECT_EQ(value, definition(code, 4, 3, 7)) << code;
    }
  }
  check_boundaries(
      0x7E, 0x80, [](float v) { return uint32_t{e4m3_from_float(v)}; },
      [](uint32_t c) { return e4m3_to_float(static_cast<uint8_t>(c)); });
}

TEST(SmallFloat, E4m3SaturatesAndKeepsNaN) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(e4m3_from_float(449.0f), 0x7E);
  EXPECT_EQ(e4m3_from_float(1e30f), 0x7E);
  EXPECT_EQ(e4m3_from_float(-inf), 0xFE);
  EXPECT_EQ(e4m3_from_float(std::nanf("")) & 0x7F, 0x7F);
}

TEST(SmallFloat, E2m1DecodesEveryCodeAndRoundsAtEveryBoundary) {
  for (uint32_t code = 0; code < 16; ++code) {
    EXPECT_EQ(e2m1_to_float(static_cast<uint8_t>(code)), definition(code, 2, 1, 1)) << code;
  }
  check_boundaries(
      7, 8, [](float v) { return uint32_t{e2m1_from_float(v)}; },
      [](uint32_t c) { return e2m1_to_float(static_cast<uint8_t>(c)); });
  EXPECT_EQ(e2m1_from_float(1e30f), 7);
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) uint16_t hardware_from_float(float value) {
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}
__attribute__((target("f16c"))) float hardware_to_float(uint16_t half) {
  return _cvtsh_ss(half);
}

TEST(SmallFloat, Fp16AgreesWithTheProcessor) {
  if (kernels::host_avx2_set() == nullptr) GTEST_SKIP() << "this processor lacks AVX2 or F16C";
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const uint16_t half = static_cast<uint16_t>(code);
    if ((code & 0x7FFFu) > 0x7C00u) continue;  // NaN: see small_float.h
    ASSERT_EQ(fp16_to_float(half), hardware_to_float(half)) << code;
  }
  // A prime stride visits all exponents and all low bits.
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1021) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (value != value) continue;
    ASSERT_EQ(fp16_from_float(value), hardware_from_float(value)) << bits;
  }
}
#endif

}  // namespace
}  // namespace thinkv
