// coded_block.h: 64 tokens of one kv head as an entropy-coded block (KVComp, arXiv 2509.00579).
//
// Lossy first: step = share of (max - min) over a unit, zero = round(min / step), code =
// round(x / step) - zero in a byte, and x is read as (code + zero) * step: off by step / 2 at most.
// A unit is one channel of the block for K and one token for V. Then lossless: Huffman over the
// codes, with a codebook a side that the caller keeps. The bytes of a block:
//
//   [ run bytes u16[16] | K step bf16[dim] | K zero i16[dim] | V step bf16[64] | V zero i16[64] |
//     8 runs of K | 8 runs of V ]                       a run: the codes of 8 tokens, [8, dim]
//
// Runs start at whole bytes, so they can be decoded side by side. Where the rows have no such codes
// the block is raw: K [64, dim], then V, in the 16-bit type. No block is longer than a raw one.
// Decoding is safe on any bytes. Threads: values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/stream/block_rule.h"
#include "kernels/stream/huffman.h"
#include "thinkv/internal/format.h"

namespace thinkv::kernels {

// n values, x[i * stride], to codes[i * stride]. The step is `share` of their range, or larger
// where `zero` would need more than 16 bits: for values that differ by less than their rounding.
// Result: false where they have no codes: one is not finite, or all are too small for a step.
[[nodiscard]] bool quantise_unit(const float* x, size_t n, size_t stride, float share,
                                 uint8_t* codes, UnitScale* scale);

struct StepShares {
  float key;
  float value;
};

// A block between the two stages: K and V rows as codes.
struct BlockCodes {
  bool representable = false;       // false: the block will be raw
  std::vector<UnitScale> k_scales;  // [dim]
  std::vector<UnitScale> v_scales;  // [64]
  std::vector<uint8_t> k;           // [64, dim]
  std::vector<uint8_t> v;
};

// k, v [64, dim].
void quantise_block(const float* k, const float* v, uint32_t dim, StepShares shares,
                    BlockCodes& block);

struct BlockCounts {
  SymbolCounts key{};
  SymbolCounts value{};
};
void count_codes(const BlockCodes& block, BlockCounts& counts);

// Both codebooks of a layer, to write and to read with.
struct BlockEncoders {
  HuffmanEncoder key;
  HuffmanEncoder value;
};
struct BlockDecoders {
  HuffmanDecoder key;
  HuffmanDecoder value;
};

struct BlockRows {
  const float* k;  // [64, dim], as quantise_block had them
  const float* v;
  uint32_t dim;
  Format wide;  // the 16-bit type of a raw block
};
// Replaces `out`. Result: true where the block is raw.
[[nodiscard]] bool encode_block(const BlockCodes& block, const BlockRows& rows,
                                const BlockEncoders& encoders, std::vector<std::byte>& out);

struct BlockOutput {
  float* k;  // [64, dim]
  float* v;
  uint32_t dim;
  Format wide;
};
// Result: false where the bytes are not a block; then k and v hold anything.
[[nodiscard]] bool decode_block(std::span<const std::byte> bytes, const BlockDecoders& decoders,
                                std::vector<uint8_t>& codes, const BlockOutput& out);
[[nodiscard]] bool decode_raw_block(std::span<const std::byte> bytes, const BlockOutput& out);

}  // namespace thinkv::kernels
