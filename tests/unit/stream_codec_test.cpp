// The coder of entropy-coded blocks: numbers of the method on normal values, and bytes of any kind.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <utility>

#include "gtest/gtest.h"

#include "kernels/stream/coded_block.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

std::vector<float> normal(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> draw;
  std::vector<float> x(n);
  for (float& value : x) value = draw(random);
  return x;
}

struct Coded {
  double bits;  // a value, of the bitstream
  double error_steps;
  uint32_t levels;
};

// Units of `unit` normal values under one codebook of their own.
Coded code_units(size_t unit, size_t units, float share) {
  const auto x = normal(unit * units, 7);
  std::vector<uint8_t> codes(x.size());
  SymbolCounts counts{};
  double worst = 0.0;
  uint32_t levels = 0;
  for (size_t u = 0; u < units; ++u) {
    UnitScale scale;
    EXPECT_TRUE(quantise_unit(&x[u * unit], unit, 1, share, &codes[u * unit], &scale));
    const double step = bf16_to_float(scale.step);
    for (size_t i = u * unit; i < (u + 1) * unit; ++i) {
      worst = std::max(worst, std::fabs(x[i] - double{dequantise(codes[i], scale)}) / step);
      levels = std::max(levels, codes[i] + 1u);
      counts[codes[i]] += 1;
    }
  }
  const CodeLengths lengths = make_code_lengths(counts);
  EXPECT_TRUE(code_lengths_valid(lengths));
  std::vector<std::byte> bytes;
  HuffmanEncoder(lengths).encode(codes, bytes);
  std::vector<uint8_t> back(codes.size());
  EXPECT_TRUE(HuffmanDecoder(lengths).decode(bytes, back));
  EXPECT_EQ(back, codes);
  return {8.0 * static_cast<double>(bytes.size()) / static_cast<double>(x.size()), worst, levels};
}

struct Expected {
  float share;
  double bits_4096, bits_128;
  uint32_t levels;
};

// Bits against a simulation of one unit: the range of 4096 (128) normal values, and with it the
// step, varies by 6 (10) % from draw to draw, which is 0.09 (0.14) bits; here it is the mean of
// many.
TEST(MethodKvComp, BitsLevelsAndErrorOfNormalValues) {
  for (const Expected& e : {Expected{0.01f, 5.90, 6.35, 101}, Expected{0.05f, 3.59, 4.07, 21},
                            Expected{0.1f, 2.59, 3.11, 11}, Expected{0.2f, 1.93, 2.28, 6}}) {
    const Coded large = code_units(4096, 128, e.share);
    const Coded small = code_units(128, 2048, e.share);
    EXPECT_NEAR(large.bits, e.bits_4096, 0.15) << e.share;
    EXPECT_NEAR(small.bits, e.bits_128, 0.15) << e.share;
    for (const Coded& coded : {large, small}) {
      EXPECT_LE(coded.error_steps, 0.5001) << e.share;
      EXPECT_GT(coded.error_steps, 0.49) << e.share;
      EXPECT_NEAR(coded.levels, e.levels, 1.0) << e.share;
    }
  }
}

TEST(Huffman, IsWithinABitOfTheEntropyAndTheShortestForItsCounts) {
  SymbolCounts counts{};
  std::mt19937_64 random(3);
  std::vector<uint8_t> symbols;
  for (uint32_t i = 0; i < 50'000; ++i) {
    symbols.push_back(static_cast<uint8_t>(std::countl_zero(random()) * 3));
  }
  for (const uint8_t s : symbols) counts[s] += 1;
  double entropy = 0.0, coded = 0.0;
  const CodeLengths lengths = make_code_lengths(counts);
  for (uint32_t s = 0; s < kSymbolCount; ++s) {
    if (counts[s] == 0) continue;
    const double p = static_cast<double>(counts[s]) / 50'000;
    entropy -= p * std::log2(p);
    coded += p * lengths[s];
  }
  EXPECT_GE(coded, entropy);
  EXPECT_LT(coded, entropy + 0.05);  // powers of two have codes of exactly their entropy
}

TEST(Huffman, ASymbolThatWasNeverCountedHasACode) {
  SymbolCounts counts{};
  counts[7] = 1'000'000'000;
  const CodeLengths lengths = make_code_lengths(counts);
  ASSERT_TRUE(code_lengths_valid(lengths));
  EXPECT_EQ(lengths[7], 1);
  std::vector<uint8_t> all(kSymbolCount), back(kSymbolCount);
  std::iota(all.begin(), all.end(), uint8_t{0});
  std::vector<std::byte> bytes;
  HuffmanEncoder(lengths).encode(all, bytes);
  ASSERT_TRUE(HuffmanDecoder(lengths).decode(bytes, back));
  EXPECT_EQ(back, all);
}

// Fibonacci counts make the deepest tree: 256 of them would need codes of 255 bits.
TEST(Huffman, CodesStayWithinTheirLimit) {
  SymbolCounts counts{};
  uint64_t a = 1, b = 1;
  for (uint32_t s = 0; s < 80; ++s) {
    counts[s] = a;
    b = std::exchange(a, b) + b;
  }
  const CodeLengths lengths = make_code_lengths(counts);
  EXPECT_TRUE(code_lengths_valid(lengths));
  EXPECT_EQ(*std::max_element(lengths.begin(), lengths.end()), kCodeBitsMax);
  std::vector<uint8_t> symbols(5000), back(5000);
  std::mt19937_64 random(9);
  for (uint8_t& s : symbols) s = static_cast<uint8_t>(random());
  std::vector<std::byte> bytes;
  HuffmanEncoder(lengths).encode(symbols, bytes);
  ASSERT_TRUE(HuffmanDecoder(lengths).decode(bytes, back));
  EXPECT_EQ(back, symbols);
}

TEST(Huffman, LengthsThatAreNoCodeAreSeen) {
  CodeLengths lengths;
  lengths.fill(8);
  EXPECT_TRUE(code_lengths_valid(lengths));
  lengths[3] = 7;  // too many codes
  EXPECT_FALSE(code_lengths_valid(lengths));
  lengths[3] = 9;  // bits that mean nothing
  EXPECT_FALSE(code_lengths_valid(lengths));
  lengths[3] = 0;
  EXPECT_FALSE(code_lengths_valid(lengths));
  lengths[3] = 16;
  EXPECT_FALSE(code_lengths_valid(lengths));
}

TEST(Huffman, AStringThatEndsEarlyIsSeen) {
  CodeLengths lengths;
  lengths.fill(8);
  const HuffmanDecoder decoder(lengths);
  std::vector<std::byte> bytes(10, std::byte{0xA5});
  std::vector<uint8_t> symbols(10);
  EXPECT_TRUE(decoder.decode(bytes, symbols));
  symbols.resize(11);
  EXPECT_FALSE(decoder.decode(bytes, symbols));
  EXPECT_FALSE(decoder.decode({}, symbols));
}

constexpr uint32_t kDim = 64;
constexpr StepShares kShares{0.05f, 0.1f};

struct Block {
  std::vector<float> k = normal(size_t{kBlockTokens} * kDim, 1);
  std::vector<float> v = normal(size_t{kBlockTokens} * kDim, 2);
  BlockCodes codes;
  CodeLengths lengths{};
  std::vector<std::byte> bytes;
  bool raw = false;
  std::vector<float> k_back = std::vector<float>(k.size());
  std::vector<float> v_back = std::vector<float>(v.size());

  void encode() {
    quantise_block(k.data(), v.data(), kDim, kShares, codes);
    BlockCounts counts;
    count_codes(codes, counts);
    for (uint32_t s = 0; s < kSymbolCount; ++s) counts.key[s] += counts.value[s];
    lengths = make_code_lengths(counts.key);
    const BlockEncoders encoders{HuffmanEncoder(lengths), HuffmanEncoder(lengths)};
    raw = encode_block(codes, {k.data(), v.data(), kDim, Format::kF16}, encoders, bytes);
  }
  bool decode(std::span<const std::byte> from) {
    const BlockDecoders decoders{HuffmanDecoder(lengths), HuffmanDecoder(lengths)};
    const BlockOutput out{k_back.data(), v_back.data(), kDim, Format::kF16};
    std::vector<uint8_t> scratch;
    return raw ? decode_raw_block(from, out) : decode_block(from, decoders, scratch, out);
  }
};

TEST(CodedBlock, RowsComeBackWithinHalfAStep) {
  Block block;
  for (uint32_t t = 0; t < kBlockTokens; ++t) block.k[t * kDim + 5] += 40.0f;  // one far channel
  block.encode();
  ASSERT_FALSE(block.raw);
  EXPECT_LT(block.bytes.size(), raw_block_bytes(kDim) / 3);
  ASSERT_TRUE(block.decode(block.bytes));
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    for (uint32_t c = 0; c < kDim; ++c) {
      const size_t i = t * kDim + c;
      const float k_step = bf16_to_float(block.codes.k_scales[c].step);
      const float v_step = bf16_to_float(block.codes.v_scales[t].step);
      ASSERT_LE(std::fabs(block.k[i] - block.k_back[i]), 0.5001f * k_step);
      ASSERT_LE(std::fabs(block.v[i] - block.v_back[i]), 0.5001f * v_step);
    }
  }
}

TEST(CodedBlock, ConstantAndZeroUnitsComeBack) {
  Block block;
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    block.k[t * kDim + 1] = 1000.0f;
    block.k[t * kDim + 2] = 0.0f;
    block.k[t * kDim + 3] = 512.0f + (t % 2 == 0 ? 0.0f : 0.5f);  // neighbours in fp16
  }
  std::fill_n(block.v.begin() + 9 * kDim, kDim, 0.0f);
  block.encode();
  ASSERT_FALSE(block.raw);
  ASSERT_TRUE(block.decode(block.bytes));
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    EXPECT_EQ(fp16_from_float(block.k_back[t * kDim + 1]), fp16_from_float(1000.0f));
    EXPECT_EQ(block.k_back[t * kDim + 2], 0.0f);
    EXPECT_NEAR(block.k_back[t * kDim + 3], block.k[t * kDim + 3], 0.02f);
  }
  EXPECT_EQ(block.v_back[9 * kDim], 0.0f);
}

TEST(CodedBlock, WhatHasNoCodesIsRawAndExact) {
  for (const float bad : {std::numeric_limits<float>::infinity(), 1e-41f}) {
    Block block;
    std::fill_n(block.v.begin() + 3 * kDim, kDim, bad);
    block.encode();
    ASSERT_TRUE(block.raw) << bad;
    ASSERT_EQ(block.bytes.size(), raw_block_bytes(kDim));
    ASSERT_TRUE(block.decode(block.bytes));
    for (size_t i = 0; i < block.k.size(); ++i) {
      ASSERT_EQ(block.k_back[i], fp16_to_float(fp16_from_float(block.k[i])));
      ASSERT_EQ(block.v_back[i], fp16_to_float(fp16_from_float(block.v[i])));
    }
    EXPECT_FALSE(block.decode(std::span(block.bytes).first(block.bytes.size() - 1)));
  }
}

// A codebook frozen on other values: the longest codes there are.
TEST(CodedBlock, NoCodebookMakesABlockLongerThanARawOne) {
  Block block;
  block.encode();
  SymbolCounts counts{};
  for (uint32_t s = 0; s < 80; ++s) counts[176 + s] = uint64_t{1} << std::min(s, 62u);
  block.lengths = make_code_lengths(counts);
  std::fill(block.codes.k.begin(), block.codes.k.end(), uint8_t{3});
  std::fill(block.codes.v.begin(), block.codes.v.end(), uint8_t{3});
  ASSERT_EQ(block.lengths[3], kCodeBitsMax);
  const BlockEncoders encoders{HuffmanEncoder(block.lengths), HuffmanEncoder(block.lengths)};
  EXPECT_FALSE(encode_block(block.codes, {block.k.data(), block.v.data(), kDim, Format::kF16},
                            encoders, block.bytes));
  EXPECT_GT(block.bytes.size(), raw_block_bytes(kDim) * 15 / 16);
  EXPECT_LT(block.bytes.size(), raw_block_bytes(kDim));
  EXPECT_TRUE(block.decode(block.bytes));
}

TEST(CodedBlock, CutOrChangedBytesNeverReadBeyond) {
  Block block;
  block.encode();
  std::vector<std::byte> bytes;
  for (size_t n = 0; n < block.bytes.size(); n += 37) {
    bytes.assign(block.bytes.begin(), block.bytes.begin() + static_cast<std::ptrdiff_t>(n));
    EXPECT_FALSE(block.decode(bytes)) << n;
  }
  std::mt19937_64 random(4);
  for (uint32_t i = 0; i < 300; ++i) {
    bytes = block.bytes;
    for (uint32_t j = 0; j < 8; ++j) bytes[random() % bytes.size()] = std::byte(random() % 256);
    static_cast<void>(block.decode(bytes));  // any answer; the sanitizers watch
  }
  bytes = block.bytes;
  bytes.push_back(std::byte{0});
  EXPECT_FALSE(block.decode(bytes));
}

}  // namespace
}  // namespace thinkv::kernels
