// huffman.h: a canonical Huffman code over bytes.
//
// A codebook is its 256 code lengths; codes follow from them (shorter first, then by symbol).
// Bits go from the high end of each byte to the low one. Every symbol has a code, whether it was
// counted or not, so a codebook can be made once and kept. Decoding is safe on any bytes.
// Threads: values; const functions may overlap.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/stream/huffman_rule.h"

namespace thinkv::kernels {

using CodeLengths = std::array<uint8_t, kSymbolCount>;
using SymbolCounts = std::array<uint64_t, kSymbolCount>;

// The best lengths for symbols counted so; counts of 0 are taken as 1. Where a code would be longer
// than kCodeBitsMax, counts are halved until it is not. The same counts give the same lengths.
[[nodiscard]] CodeLengths make_code_lengths(SymbolCounts counts);

// A complete code: every length in 1..kCodeBitsMax, and no bits that mean nothing. Any bytes.
[[nodiscard]] bool code_lengths_valid(const CodeLengths& lengths);

class HuffmanEncoder {
 public:
  // Requires: code_lengths_valid(lengths).
  explicit HuffmanEncoder(const CodeLengths& lengths);
  // Appends the code of `symbols` to `out`, filled up to a whole byte with zeros.
  void encode(std::span<const uint8_t> symbols, std::vector<std::byte>& out) const;

 private:
  std::array<uint16_t, kSymbolCount> codes_{};
  CodeLengths lengths_;
};

class HuffmanDecoder {
 public:
  // Requires: code_lengths_valid(lengths).
  explicit HuffmanDecoder(const CodeLengths& lengths);
  // Exactly symbols.size() symbols. Result: false where `bytes` ends before them.
  [[nodiscard]] bool decode(std::span<const std::byte> bytes, std::span<uint8_t> symbols) const;

 private:
  // Bits of one look, and how many symbols whose codes lie in them it finds at most: 16 KiB stay in
  // the first-level cache.
  static constexpr uint32_t kFastBits = 11, kFastSymbols = 6;
  struct Entry {
    std::array<uint8_t, kFastSymbols> symbols;
    uint8_t count;  // 0: the first code is longer
    uint8_t bits;   // of all of them
  };
  static_assert(sizeof(Entry) == 8);
  struct Found {
    uint8_t symbol;
    uint32_t bits;
  };
  // The first symbol of at least kCodeBitsMax bits from the top of `window` on.
  [[nodiscard]] Found first_of(uint64_t window) const;

  std::array<Entry, 1u << kFastBits> fast_{};
  // By length n: codes of n bits, from the left of kCodeBitsMax bits, are below limit_[n].
  std::array<uint32_t, kCodeBitsMax + 1> limit_{};
  std::array<int32_t, kCodeBitsMax + 1> first_{};  // index in order_ of a code of n bits, less it
  std::array<uint8_t, kSymbolCount> order_{};      // symbols in the order of their codes
};

}  // namespace thinkv::kernels
