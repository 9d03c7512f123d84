#include "kernels/stream/huffman.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

constexpr uint32_t kNodes = 2 * kSymbolCount - 1;

// Lengths of an unlimited code: two queues, leaves by (count, symbol) and sums in their order.
CodeLengths unlimited_lengths(const SymbolCounts& counts) {
  std::array<uint16_t, kSymbolCount> leaves{};
  for (uint32_t i = 0; i < kSymbolCount; ++i) leaves[i] = static_cast<uint16_t>(i);
  std::stable_sort(leaves.begin(), leaves.end(),
                   [&](uint16_t a, uint16_t b) { return counts[a] < counts[b]; });
  std::array<uint64_t, kNodes> weight{};
  std::array<uint16_t, kNodes> parent{};
  for (uint32_t i = 0; i < kSymbolCount; ++i) weight[i] = counts[leaves[i]];
  uint32_t leaf = 0;
  uint32_t inner = kSymbolCount;
  for (uint32_t next = kSymbolCount; next < kNodes; ++next) {
    for (uint32_t child = 0; child < 2; ++child) {
      const bool take_leaf =
          leaf < kSymbolCount && (inner >= next || weight[leaf] <= weight[inner]);
      const uint32_t node = take_leaf ? leaf++ : inner++;
      weight[next] += weight[node];
      parent[node] = static_cast<uint16_t>(next);
    }
  }
  std::array<uint8_t, kNodes> depth{};
  CodeLengths lengths{};
  for (uint32_t node = kNodes - 1; node-- > 0;) {
    depth[node] = static_cast<uint8_t>(depth[parent[node]] + 1);
  }
  for (uint32_t i = 0; i < kSymbolCount; ++i) lengths[leaves[i]] = depth[i];
  return lengths;
}

// Symbols by (length, symbol): the order of their codes.
std::array<uint8_t, kSymbolCount> code_order(const CodeLengths& lengths) {
  std::array<uint8_t, kSymbolCount> order{};
  for (uint32_t i = 0; i < kSymbolCount; ++i) order[i] = static_cast<uint8_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint8_t a, uint8_t b) { return lengths[a] < lengths[b]; });
  return order;
}

// Calls visit(symbol, code) in the order of codes.
template <class Visit>
void for_each_code(const CodeLengths& lengths, Visit visit) {
  uint32_t code = 0;
  uint32_t bits = 0;
  for (const uint8_t symbol : code_order(lengths)) {
    code <<= lengths[symbol] - bits;
    bits = lengths[symbol];
    visit(symbol, code);
    ++code;
  }
}

// The next bits of a byte string, high end first; zeros behind its end.
class BitReader {
 public:
  explicit BitReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  // At least kCodeBitsMax bits from the top on.
  [[nodiscard]] uint64_t window() {
    while (have_ <= 56) {
      const uint64_t next =
          at_ < bytes_.size() ? std::to_integer<uint64_t>(bytes_[at_]) : uint64_t{0};
      window_ |= next << (56 - have_);
      have_ += 8;
      ++at_;
    }
    return window_;
  }
  // Requires: bits <= what window() just had.
  void skip(uint32_t bits) {
    window_ <<= bits;
    have_ -= bits;
  }
  [[nodiscard]] bool past_end() const { return at_ * 8 - have_ > bytes_.size() * 8; }

 private:
  std::span<const std::byte> bytes_;
  uint64_t window_ = 0;
  uint32_t have_ = 0;  // bits in the window
  size_t at_ = 0;      // bytes taken, those behind the end included
};

}  // namespace

CodeLengths make_code_lengths(SymbolCounts counts) {
  for (uint64_t& count : counts) count = std::max<uint64_t>(count, 1);
  for (;;) {
    const CodeLengths lengths = unlimited_lengths(counts);
    // Ends: halved often enough all counts are equal, and every code has 8 bits.
    if (*std::max_element(lengths.begin(), lengths.end()) <= kCodeBitsMax) return lengths;
    for (uint64_t& count : counts) count = (count + 1) / 2;
  }
}

bool code_lengths_valid(const CodeLengths& lengths) {
  uint32_t used = 0;
  for (const uint8_t bits : lengths) {
    if (bits == 0 || bits > kCodeBitsMax) return false;
    used += 1u << (kCodeBitsMax - bits);
  }
  return used == 1u << kCodeBitsMax;
}

HuffmanEncoder::HuffmanEncoder(const CodeLengths& lengths) : lengths_(lengths) {
  for_each_code(lengths, [&](uint8_t symbol, uint32_t code) {
    codes_[symbol] = static_cast<uint16_t>(code);
  });
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

HuffmanDecoder::HuffmanDecoder(const CodeLengths& lengths) : order_(code_order(lengths)) {
  int32_t index = 0;
  for_each_code(lengths, [&](uint8_t symbol, uint32_t code) {
    const uint32_t bits = lengths[symbol];
    // Codes of one length follow each other, so each of them says the same for its length.
    first_[bits] = index - static_cast<int32_t>(code);
    limit_[bits] = (code + 1) << (kCodeBitsMax - bits);
    ++index;
    if (bits > kFastBits) return;
    const uint32_t begin = code << (kFastBits - bits);
    const uint32_t count = 1u << (kFastBits - bits);
    std::fill_n(fast_.begin() + begin, count, Entry{symbol, static_cast<uint8_t>(bits)});
  });
}

bool HuffmanDecoder::decode(std::span<const std::byte> bytes, std::span<uint8_t> symbols) const {
  BitReader reader(bytes);
  for (uint8_t& symbol : symbols) {
    const uint64_t window = reader.window();
    const Entry entry = fast_[window >> (64 - kFastBits)];
    if (entry.bits != 0) {
      symbol = entry.symbol;
      reader.skip(entry.bits);
      continue;
    }
    const auto top = static_cast<uint32_t>(window >> (64 - kCodeBitsMax));
    uint32_t bits = kFastBits + 1;
    while (bits < kCodeBitsMax && top >= limit_[bits]) ++bits;
    const auto code = static_cast<int32_t>(top >> (kCodeBitsMax - bits));
    symbol = order_[static_cast<uint32_t>(first_[bits] + code) % kSymbolCount];
    reader.skip(bits);
  }
  return !reader.past_end();
}

}  // namespace thinkv::kernels
