// Entropy-coded blocks with hostile bytes: the decoder answers, and never reads or writes beyond.
//
// Input: a head_dim, a flag and 512 code lengths, then the block. Lengths that are no code become
// counts, so that every input reaches the decoder. Properties: no memory error; symbols that were
// read, written again, are no longer than they were and read the same.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/stream/coded_block.h"
#include "thinkv/internal/check.h"

namespace {

using thinkv::kernels::BlockDecoders;
using thinkv::kernels::BlockOutput;
using thinkv::kernels::CodeLengths;
using thinkv::kernels::HuffmanDecoder;
using thinkv::kernels::HuffmanEncoder;
using thinkv::kernels::kBlockTokens;
using thinkv::kernels::kSymbolCount;
using thinkv::kernels::SymbolCounts;

CodeLengths lengths_of(const uint8_t* bytes) {
  CodeLengths lengths;
  std::memcpy(lengths.data(), bytes, lengths.size());
  if (thinkv::kernels::code_lengths_valid(lengths)) return lengths;
  SymbolCounts counts{};
  for (uint32_t i = 0; i < kSymbolCount; ++i) counts[i] = uint64_t{1} << (bytes[i] % 40);
  const CodeLengths made = thinkv::kernels::make_code_lengths(counts);
  THINKV_CHECK(thinkv::kernels::code_lengths_valid(made));
  return made;
}

void check_round_trip(const CodeLengths& lengths, std::span<const std::byte> bytes) {
  std::vector<uint8_t> symbols(bytes.size() / 2);
  if (!HuffmanDecoder(lengths).decode(bytes, symbols)) return;
  std::vector<std::byte> again;
  HuffmanEncoder(lengths).encode(symbols, again);
  THINKV_CHECK(again.size() <= bytes.size());
  std::vector<uint8_t> back(symbols.size());
  THINKV_CHECK(HuffmanDecoder(lengths).decode(again, back));
  THINKV_CHECK(back == symbols);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr size_t kHead = 2 + 2 * kSymbolCount;
  if (size < kHead) return 0;
  constexpr std::array<uint32_t, 3> kDims = {64, 128, 256};
  const uint32_t dim = kDims[data[0] % kDims.size()];
  const CodeLengths key = lengths_of(data + 2);
  const CodeLengths value = lengths_of(data + 2 + kSymbolCount);
  const BlockDecoders decoders{HuffmanDecoder(key), HuffmanDecoder(value)};
  // A copy of its own size: the address sanitizer sees a read behind it.
  const std::vector<std::byte> bytes(reinterpret_cast<const std::byte*>(data + kHead),
                                     reinterpret_cast<const std::byte*>(data + size));
  std::vector<float> k(size_t{kBlockTokens} * dim), v(k.size());
  const BlockOutput out{k.data(), v.data(), dim, thinkv::Format::kF16};
  std::vector<uint8_t> codes;
  if ((data[1] & 1) != 0) {
    static_cast<void>(thinkv::kernels::decode_raw_block(bytes, out));
  } else {
    static_cast<void>(thinkv::kernels::decode_block(bytes, decoders, codes, out));
  }
  check_round_trip(key, bytes);
  return 0;
}
