#include "kernels/stream/huffman.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// Lengths of an unlimited code. Result: the longest.
uint32_t unlimited_lengths(const SymbolCounts& counts, CodeLengths& lengths) {
  std::array<uint16_t, kSymbolCount> leaves{};
  for (uint32_t i = 0; i < kSymbolCount; ++i) leaves[i] = static_cast<uint16_t>(i);
  std::stable_sort(leaves.begin(), leaves.end(),
                   [&](uint16_t a, uint16_t b) { return counts[a] < counts[b]; });
  CodeTree tree;
  for (uint32_t i = 0; i < kSymbolCount; ++i) tree.weight[i] = counts[leaves[i]];
  const uint32_t longest = grow_code_tree(tree);
  for (uint32_t i = 0; i < kSymbolCount; ++i) lengths[leaves[i]] = tree.depth[i];
  return longest;
}

using LengthCounts = std::array<uint32_t, kCodeBitsMax + 1>;

// Requires: lengths of at most kCodeBitsMax.
LengthCounts count_lengths(const CodeLengths& lengths) {
  LengthCounts symbols{};
  for (const uint8_t bits : lengths) symbols[bits] += 1;
  return symbols;
}

// The next bits of a byte string, high end first; zeros behind its end.
class BitReader {
 public:
  explicit BitReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  // At least kCodeBitsMax bits from the top on.
  [[nodiscard]] uint64_t window() {
    if (have_ < kCodeBitsMax) fill();
    return window_;
  }
  // Requires: bits <= what window() just had.
  void skip(uint32_t bits) {
    window_ <<= bits;
    have_ -= bits;
  }
  [[nodiscard]] bool past_end() const { return at_ * 8 - have_ > bytes_.size() * 8; }

 private:
  // At least 56 bits. Bits that lie behind have_ are the stream's own: or-ed again they stay.
  void fill() {
    if (at_ + sizeof(uint64_t) <= bytes_.size()) {
      uint64_t next = 0;
      std::memcpy(&next, bytes_.data() + at_, sizeof next);
      window_ |= __builtin_bswap64(next) >> have_;
      const uint32_t whole = (63 - have_) / 8;
      at_ += whole;
      have_ += 8 * whole;
      return;
    }
    for (; have_ <= 56; have_ += 8, ++at_) {
      const uint64_t next =
          at_ < bytes_.size() ? std::to_integer<uint64_t>(bytes_[at_]) : uint64_t{0};
      window_ |= next << (56 - have_);
    }
  }

  std::span<const std::byte> bytes_;
  uint64_t window_ = 0;
  uint32_t have_ = 0;  // bits in the window, at most 64
  size_t at_ = 0;      // bytes taken, those behind the end included
};
static_assert(std::endian::native == std::endian::little);

}  // namespace

CodeLengths make_code_lengths(SymbolCounts counts) {
  for (uint64_t& count : counts) count = std::max<uint64_t>(count, 1);
  CodeLengths lengths{};
  // Ends: halved often enough all counts are equal, and every code has 8 bits.
  while (unlimited_lengths(counts, lengths) > kCodeBitsMax) {
    for (uint64_t& count : counts) count = halved_count(count);
  }
  return lengths;
}

bool code_lengths_valid(const CodeLengths& lengths) {
  for (const uint8_t bits : lengths) {
    if (bits == 0 || bits > kCodeBitsMax) return false;
  }
  return code_complete(count_lengths(lengths).data());
}

HuffmanEncoder::HuffmanEncoder(const CodeLengths& lengths) : lengths_(lengths) {
  CodeStarts starts = code_starts(count_lengths(lengths).data());
  for (uint32_t symbol = 0; symbol < kSymbolCount; ++symbol) {
    codes_[symbol] = static_cast<uint16_t>(starts.code[lengths[symbol]]++);
  }
}

void HuffmanEncoder::encode(std::span<const uint8_t> symbols, std::vector<std::byte>& out) const {
  uint64_t held = 0;
  uint32_t bits = 0;
  for (const uint8_t symbol : symbols) {
    held = held << lengths_[symbol] | codes_[symbol];
    bits += lengths_[symbol];
    for (; bits >= 8; bits -= 8) out.push_back(static_cast<std::byte>(held >> (bits - 8) & 0xFF));
  }
  if (bits > 0) out.push_back(static_cast<std::byte>(held << (8 - bits) & 0xFF));
}

HuffmanDecoder::HuffmanDecoder(const CodeLengths& lengths) {
  const LengthCounts symbols = count_lengths(lengths);
  const CodeStarts starts = code_starts(symbols.data());
  for (uint32_t bits = 1; bits <= kCodeBitsMax; ++bits) {
    first_[bits] =
        static_cast<int32_t>(starts.before[bits]) - static_cast<int32_t>(starts.code[bits]);
    limit_[bits] = (starts.code[bits] + symbols[bits]) << (kCodeBitsMax - bits);
  }
  CodeStarts next = starts;
  for (uint32_t symbol = 0; symbol < kSymbolCount; ++symbol) {
    order_[next.before[lengths[symbol]]++] = static_cast<uint8_t>(symbol);
  }
  for (uint32_t look = 0; look < fast_.size(); ++look) {
    Entry& entry = fast_[look];
    const uint64_t bits = uint64_t{look} << (64 - kFastBits);
    while (entry.count < kFastSymbols) {
      const Found found = first_of(bits << entry.bits);
      if (entry.bits + found.bits > kFastBits) break;
      entry.symbols[entry.count++] = found.symbol;
      entry.bits = static_cast<uint8_t>(entry.bits + found.bits);
    }
  }
}

HuffmanDecoder::Found HuffmanDecoder::first_of(uint64_t window) const {
  const auto top = static_cast<uint32_t>(window >> (64 - kCodeBitsMax));
  uint32_t bits = 1;
  while (bits < kCodeBitsMax && top >= limit_[bits]) ++bits;
  const auto code = static_cast<int32_t>(top >> (kCodeBitsMax - bits));
  return {order_[static_cast<uint32_t>(first_[bits] + code) % kSymbolCount], bits};
}

bool HuffmanDecoder::decode(std::span<const std::byte> bytes, std::span<uint8_t> symbols) const {
  BitReader reader(bytes);
  uint8_t* at = symbols.data();
  uint8_t* const end = at + symbols.size();
  while (at != end) {
    const uint64_t window = reader.window();
    const Entry& entry = fast_[window >> (64 - kFastBits)];
    if (entry.count == 0 || end - at < static_cast<ptrdiff_t>(kFastSymbols)) {
      const Found found = first_of(window);
      *at++ = found.symbol;
      reader.skip(found.bits);
      continue;
    }
    std::memcpy(at, entry.symbols.data(), kFastSymbols);
    at += entry.count;
    reader.skip(entry.bits);
  }
  return !reader.past_end();
}

}  // namespace thinkv::kernels
