// Codecs and rotation: known error figures, bounds, hostile input, and bit-exactness of all sets.
#include "unit/kernels_support.h"

#include "kernels/codec_rule.h"
#include "thinkv/internal/rotation.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Encodes rows into the first slots of fresh pages of a set and decodes them again.
struct Trip {
  std::vector<TestPage> pages;
  std::vector<float> k;
  std::vector<float> v;
};
Trip round_trip(const KernelSet& set, Format format, uint32_t head_dim, const std::vector<float>& k,
                const std::vector<float>& v) {
  const PageLayout& layout = page_layout(format, head_dim);
  const size_t rows = k.size() / head_dim;
  Trip trip;
  trip.k.resize(k.size());
  trip.v.resize(v.size());
  for (size_t first = 0; first < rows; first += layout.slots) {
    const size_t n = std::min<size_t>(layout.slots, rows - first);
    std::vector<uint8_t> slots = all_slots(layout);
    slots.resize(n);
    const std::vector<uint32_t> positions(n, 17);
    TestPage& page = trip.pages.emplace_back(head_dim);
    set.encode({.page = page.bytes(),
                .format = format,
                .head_dim = head_dim,
                .slots = slots,
                .k = k.data() + first * head_dim,
                .v = v.data() + first * head_dim,
                .positions = positions.data()});
    set.decode({.page = page.bytes(),
                .format = format,
                .head_dim = head_dim,
                .slots = slots,
                .k = trip.k.data() + first * head_dim,
                .v = trip.v.data() + first * head_dim});
  }
  return trip;
}

double relative_error(const std::vector<float>& exact, const std::vector<float>& approx) {
  double error = 0, energy = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(double{exact[i]} - double{approx[i]}, 2);
    energy += std::pow(double{exact[i]}, 2);
  }
  return error / energy;
}

// Relative squared error of V on N(0, 1).
double gaussian_error(Format format, uint32_t head_dim) {
  Rng rng(11);
  const std::vector<float> x = gaussian(rng, size_t{4096} * head_dim);
  return relative_error(x, round_trip(host(), format, head_dim, x, x).v);
}

TEST(Codec, Nvfp4ErrorOnGaussianData) {
  EXPECT_NEAR(gaussian_error(Format::kNvfp4, 128), 0.009, 0.001);
}

TEST(Codec, TernaryErrorIsTheOptimumAndHalfOfTheAbsmaxRule) {
  EXPECT_NEAR(gaussian_error(Format::kTernary, 128), 0.166, 0.005);
  Rng rng(12);
  const std::vector<float> x = gaussian(rng, 65536);
  std::vector<float> absmax(x.size());
  for (size_t g = 0; g < x.size(); g += kScaleGroup) {
    float top = 0;
    for (size_t i = g; i < g + kScaleGroup; ++i) top = std::max(top, std::fabs(x[i]));
    const float s = e4m3_to_float(e4m3_from_float(top));
    for (size_t i = g; i < g + kScaleGroup; ++i) {
      absmax[i] = std::fabs(x[i]) > s / 2 ? std::copysign(s, x[i]) : 0.0f;
    }
  }
  EXPECT_NEAR(relative_error(x, absmax), 0.339, 0.01);
}

// The best uniform quantiser of N(0, 1) has error 0.1188 at 4 levels and 0.01154 at 16 (Max 1960).
// At 2 bits the scale is its step times the vector's own rms; at 4 bits the clipping adapts to the
// vector, but knows three factors only.
TEST(Codec, UniformErrorOnGaussianData) {
  for (const uint32_t head_dim : kHeadDims) {
    EXPECT_NEAR(gaussian_error(Format::kK2V2, head_dim), 0.1188, 0.004) << head_dim;
    EXPECT_NEAR(gaussian_error(Format::kK4V4, head_dim), 0.01154, 0.003) << head_dim;
  }
}

// 8 bits: half a step, plus what fp16 takes from the scale: the largest code is 127.5 steps, so
// 127.5 * 2^-11 = 0.0623 of a step; 0.57 covers both and the roundings in fp32.
TEST(Codec, EightBitErrorIsWithinHalfAStep) {
  Rng rng(13);
  for (const uint32_t d : kHeadDims) {
    const std::vector<float> x = gaussian(rng, 200 * d, 3.0f);
    const Trip trip = round_trip(host(), Format::kK8V8, d, x, x);
    for (size_t row = 0; row < x.size(); row += d) {
      float top = 0;
      for (uint32_t i = 0; i < d; ++i) top = std::max(top, std::fabs(x[row + i]));
      for (uint32_t i = 0; i < d; ++i) {
        ASSERT_LE(std::fabs(x[row + i] - trip.k[row + i]), 0.57f * top / 127.5f);
      }
    }
  }
}

// The clipping search may only win: its error is at most that of plain max|x| / 7.5, the first of
// its candidates (whose refit is optimal up to the rounding of the scale to fp16).
TEST(Codec, FourBitSearchIsNeverWorseThanAbsmax) {
  Rng rng(14);
  for (const uint32_t d : kHeadDims) {
    std::vector<float> x = gaussian(rng, 300 * d);
    for (size_t row = 0; row < x.size(); row += 3 * d) x[row + below(rng, d)] *= 20.0f;
    const Trip trip = round_trip(host(), Format::kK4V4, d, x, x);
    for (size_t row = 0; row < x.size(); row += d) {
      double top = 0, plain = 0, ours = 0;
      for (uint32_t i = 0; i < d; ++i) top = std::max(top, std::fabs(double{x[row + i]}));
      const double s = top / 7.5;
      for (uint32_t i = 0; i < d; ++i) {
        const double step = std::clamp(std::floor(double{x[row + i]} / s), -8.0, 7.0) + 0.5;
        plain += std::pow(double{x[row + i]} - step * s, 2);
        ours += std::pow(double{x[row + i]} - double{trip.k[row + i]}, 2);
      }
      ASSERT_LE(ours, plain * 1.001 + 1e-12);
    }
  }
}

TEST(Codec, SixteenBitValuesAreTheRoundedOnes) {
  Rng rng(15);
  const std::vector<float> x = gaussian(rng, 64 * 40, 100.0f);
  const Trip half = round_trip(host(), Format::kF16, 64, x, x);
  const Trip brain = round_trip(host(), Format::kBf16, 64, x, x);
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_EQ(half.k[i], fp16_to_float(fp16_from_float(x[i])));
    ASSERT_EQ(half.v[i], half.k[i]);
    ASSERT_EQ(brain.k[i], bf16_to_float(bf16_from_float(x[i])));
  }
}

// Not so at 2 bits uniform: the rms of the decoded values is another scale.
TEST(Codec, EncodingDecodedValuesChangesNothing) {
  Rng rng(16);
  for (const Format format : {Format::kF16, Format::kBf16, Format::kK8V8, Format::kK8V4,
                              Format::kK4V4, Format::kNvfp4, Format::kTernary}) {
    for (const uint32_t d : kHeadDims) {
      const std::vector<float> k = gaussian(rng, 100 * d), v = gaussian(rng, 100 * d);
      const Trip once = round_trip(host(), format, d, k, v);
      const Trip twice = round_trip(host(), format, d, once.k, once.v);
      EXPECT_TRUE(same_bits(once.k, twice.k)) << format_info(format).name << " " << d;
      EXPECT_TRUE(same_bits(once.v, twice.v)) << format_info(format).name << " " << d;
    }
  }
}

TEST(Codec, ZerosStaySmallAndPositionsAreWritten) {
  for (const PageLayout* layout : all_layouts()) {
    const std::vector<float> zeros(layout->head_dim, 0.0f);
    const Trip trip = round_trip(host(), layout->format, layout->head_dim, zeros, zeros);
    for (const float value : trip.k) ASSERT_EQ(value, 0.0f) << describe(*layout);
    uint32_t position = 0;
    std::memcpy(&position, trip.pages[0].bytes() + layout->position_offset, sizeof(position));
    EXPECT_EQ(position, 17u);
  }
}

class FastSet : public testing::TestWithParam<const KernelSet*> {};

TEST_P(FastSet, CodecsMatchTheReferenceBitForBit) {
  Rng rng(17);
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    const uint32_t d = layout->head_dim;
    for (uint32_t trial = 0; trial < 60; ++trial) {
      std::vector<uint8_t> slots = all_slots(*layout);
      std::shuffle(slots.begin(), slots.end(), rng);
      slots.resize(1 + below(rng, layout->slots));
      std::vector<float> k, v;
      std::vector<uint32_t> positions;
      for (size_t i = 0; i < slots.size(); ++i) {
        const std::vector<float> k_row = hard_row(rng, d, below(rng, 10));
        const std::vector<float> v_row = hard_row(rng, d, below(rng, 10));
        k.insert(k.end(), k_row.begin(), k_row.end());
        v.insert(v.end(), v_row.begin(), v_row.end());
        positions.push_back(below(rng, ~0u));
      }
      TestPage expected(d, 0x5A), actual(d, 0x5A);
      EncodeParams params{.page = expected.bytes(),
                          .format = layout->format,
                          .head_dim = d,
                          .slots = slots,
                          .k = k.data(),
                          .v = v.data(),
                          .positions = positions.data()};
      reference().encode(params);
      params.page = actual.bytes();
      GetParam()->encode(params);
      ASSERT_TRUE(expected.same(actual)) << "trial " << trial;

      std::vector<float> k1(k.size()), v1(k.size()), k2(k.size()), v2(k.size());
      DecodeParams reading{.page = expected.bytes(),
                           .format = layout->format,
                           .head_dim = d,
                           .slots = slots,
                           .k = k1.data(),
                           .v = v1.data()};
      reference().decode(reading);
      reading.k = k2.data();
      reading.v = v2.data();
      GetParam()->decode(reading);
      ASSERT_TRUE(agree(k1, k2)) << "trial " << trial;
      ASSERT_TRUE(agree(v1, v2)) << "trial " << trial;
      if (layout->k.bits != 16) {
        ASSERT_TRUE(all_finite(k1) && all_finite(v1)) << "trial " << trial;
      }
    }
  }
}

TEST_P(FastSet, DecodesOnlyWhatIsAskedFor) {
  Rng rng(18);
  const PageLayout& layout = page_layout(Format::kK4V4, 64);
  const std::vector<float> x = gaussian(rng, 64);
  const Trip trip = round_trip(reference(), Format::kK4V4, 64, x, x);
  const uint8_t slot = 0;
  std::vector<float> k(64, 7.0f);
  GetParam()->decode({.page = trip.pages[0].bytes(),
                      .format = layout.format,
                      .head_dim = 64,
                      .slots = {&slot, 1},
                      .k = k.data(),
                      .v = nullptr});
  EXPECT_TRUE(same_bits(k, trip.k));
}

TEST_P(FastSet, RotationsMatchTheReferenceBitForBit) {
  Rng rng(19);
  for (const uint32_t d : kHeadDims) {
    std::vector<float> expected = gaussian(rng, 37 * d, 5.0f), actual = expected;
    reference().rotate(expected.data(), 37, d);
    GetParam()->rotate(actual.data(), 37, d);
    ASSERT_TRUE(same_bits(expected, actual));
    reference().rotate_back(expected.data(), 37, d);
    GetParam()->rotate_back(actual.data(), 37, d);
    ASSERT_TRUE(same_bits(expected, actual));
  }
}

INSTANTIATE_TEST_SUITE_P(Sets, FastSet, testing::ValuesIn(fast_sets()), [](const auto& param) {
  std::string name = param.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

// NaN counts as 0, infinity as the largest value: neighbours keep their own codes' signs.
TEST(Codec, NotANumberBecomesZeroAndInfinitySaturates) {
  for (const Format format :
       {Format::kK8V8, Format::kK4V4, Format::kK2V2, Format::kNvfp4, Format::kTernary}) {
    std::vector<float> with_nan(64, 1.0f), with_zero(64, 1.0f);
    with_nan[5] = std::nanf("");
    with_zero[5] = 0.0f;
    const Trip a = round_trip(host(), format, 64, with_nan, with_nan);
    const Trip b = round_trip(host(), format, 64, with_zero, with_zero);
    EXPECT_TRUE(a.pages[0].same(b.pages[0])) << format_info(format).name;

    std::vector<float> infinite(64, 0.0f);
    infinite[3] = -kInfinity;
    const Trip c = round_trip(host(), format, 64, infinite, infinite);
    EXPECT_LT(c.k[3], 0.0f);
    for (const float value : c.k) {
      EXPECT_TRUE(std::isfinite(value));
      EXPECT_GE(std::fabs(c.k[3]), std::fabs(value));
    }
  }
}

TEST(Codec, SixteenBitFormatsKeepInfinityAndNaN) {
  std::vector<float> x(64, 0.0f);
  x[0] = kInfinity;
  x[1] = std::nanf("");
  x[2] = 1e30f;
  const Trip half = round_trip(host(), Format::kF16, 64, x, x);
  EXPECT_EQ(half.k[0], kInfinity);
  EXPECT_TRUE(std::isnan(half.k[1]));
  EXPECT_EQ(half.k[2], kInfinity);
  EXPECT_TRUE(std::isnan(round_trip(host(), Format::kBf16, 64, x, x).v[1]));
}

TEST(CodecDeathTest, RefusesWhatNoCallerMayAsk) {
  TestPage page(64);
  const std::vector<float> x(128, 1.0f);
  const uint32_t position = 0;
  const uint8_t slot = 32;  // k4v4 has 32 slots
  for (const KernelSet* set : all_sets()) {
    EncodeParams params{.page = page.bytes(),
                        .format = Format::kK4V4,
                        .head_dim = 64,
                        .slots = {&slot, 1},
                        .k = x.data(),
                        .v = x.data(),
                        .positions = &position};
    EXPECT_DEATH(set->encode(params), "slot < layout.slots");
    params.head_dim = 96;
    EXPECT_DEATH(set->encode(params), "head_dim_supported");
    params.head_dim = 64;
    params.format = Format::kNone;
    EXPECT_DEATH(set->encode(params), "Format::kNone");
  }
}

// Row `i` of H D / sqrt(d): the parity of the common bits gives the sign.
TEST(Rotation, IsTheSignedHadamardMatrixAndItsInverse) {
  Rng rng(20);
  for (const uint32_t d : kHeadDims) {
    const std::vector<float> x = gaussian(rng, d);
    std::vector<float> y = x;
    reference().rotate(y.data(), 1, d);
    for (uint32_t i = 0; i < d; ++i) {
      double sum = 0;
      for (uint32_t j = 0; j < d; ++j) {
        const bool minus = (std::popcount(i & j) % 2 == 1) != rotation_negates(j);
        sum += minus ? -double{x[j]} : double{x[j]};
      }
      // log2(d) + 1 roundings of numbers of size <= |x|
      ASSERT_NEAR(y[i], sum / std::sqrt(double(d)), 1e-5);
    }
    reference().rotate_back(y.data(), 1, d);
    for (uint32_t i = 0; i < d; ++i) ASSERT_NEAR(y[i], x[i], 1e-5);
  }
}

TEST(Rotation, SignsAreBalancedAndFixedForEver) {
  uint32_t negated = 0;
  for (uint32_t dim = 0; dim < 256; ++dim) negated += rotation_negates(dim) ? 1 : 0;
  EXPECT_GT(negated, 96u);
  EXPECT_LT(negated, 160u);
  // Pages outlive builds: this word is part of the page format.
  EXPECT_EQ(rotation_word(0), 0xAC94'CD59'CB83'9427u);
}

}  // namespace
}  // namespace thinkv::kernels
