// page_format.h: where every bit of a KV page lies.
//
// A page is 36 x head_dim bytes and holds K and V of ONE kv head of ONE layer for `slots` tokens,
// all in one format. A slot is one token: its codes, its scales, its position; nothing in it is
// shared with another slot, so an evicted slot can be overwritten alone. (Pages of a block format
// are another matter, and all but this comment's end: block_format.h.)
//
//   [ K codes | V codes | K scales | V scales | positions u32[slots] | spare ]
//
// The codes are in the order in which a warp's mma.sync.m16n8k16 fragments want them, tokens on
// M for K (S^T = K Q^T) and dims on M for V (O^T = V^T P^T). Lane (g, c) = (lane / 4, lane % 4).
// Codes are grouped in tiles of 16 slots (8 in the 16-bit formats); the last tile may be cut.
//
//   K, b bits: one word of a lane holds slots 2g and 2g + 1 of the tile; the four lanes c of a
//     row cover one block of dims (words are 16 bytes, or 8 where head_dim is smaller than such a
//     block). In each 32-bit part j of the word the bytes are (even slot, column 2c), (odd slot,
//     column 2c), (even, 2c + 1), (odd, 2c + 1); a byte holds 8 / b codes at bit b * n:
//         dim = block + 16 * ((8 / b) * (j / 2) + n) + 8 * (j % 2) + 2c + column
//     so `w & mask(n)` is fragment register a[2 * (j % 2)] of k-slice (8/b)(j/2) + n for the even
//     slots, and the same of `w >> 8` for the odd slots (rows g + 8).
//   V, b bits: one word of lane (g, c) holds slots 4c .. 4c + 3, one byte of each 32-bit part a
//     slot, dims g + 8i; with i = (8 / b) * j + n:   dim = block + 8 * i + g
//     so `w & mask(n)` is (slot 4c, slot 4c + 2) of dim row 8i + g: even slots are k 0..7.
//   16 bits, K: lane (g, c) holds slot g; part j:
//         dim = block + 16 * (j / 2) + 8 * (j % 2) + 2c + half
//   16 bits, V: lane (g, c) holds slots 2c, 2c + 1 as the halves of part j: dim = block + 8j + g
//   Within a tile words are ordered [block][g][c], so a warp's 32 words are contiguous (no bank
//   conflicts). A code left in place in a half, all else masked off, is an fp16 subnormal:
//   2^-24 x code x 2^(b n): no dequantisation in the kernel.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "thinkv/internal/block_format.h"
#include "thinkv/internal/format.h"

namespace thinkv {

inline constexpr std::array<uint32_t, 3> kHeadDims = {64, 128, 256};
inline constexpr uint32_t kSlotsPerPageMax = 64;  // the live mask is one 64-bit word
inline constexpr uint32_t kPositionBytes = 4;

[[nodiscard]] constexpr bool head_dim_supported(uint32_t head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}
// The page class: pages of one head_dim are interchangeable, others are not.
inline constexpr uint32_t kPageClassCount = 3;
[[nodiscard]] constexpr uint32_t page_class(uint32_t head_dim) {
  return head_dim == 64 ? 0 : head_dim == 128 ? 1 : 2;
}
[[nodiscard]] constexpr uint32_t page_bytes(uint32_t head_dim) {
  return 36 * head_dim;
}

// Where one code lies: `bits` bits at bit `shift` of byte `byte` (little-endian for 16 bits).
struct CodeSite {
  uint32_t byte;
  uint32_t shift;
};

// The codes of all slots of one side (K or V) of a page.
struct CodeSection {
  uint32_t bits;
  uint32_t offset;  // bytes from the start of the page
  uint32_t slots;
  uint32_t head_dim;
  uint32_t tile_slots;  // 16, or 8 for 16-bit values
  uint32_t word_slots;  // slots that share a word: K 2 (1 at 16 bits), V 4 (2)
  uint32_t word_bytes;  // 16 or 8
  uint32_t block_dims;  // dims covered by the words of all lanes of a row (K) or column (V)
  bool is_k;

  [[nodiscard]] constexpr uint32_t blocks() const { return head_dim / block_dims; }
  // Words along the slot axis in tile `t`: the last tile may be cut.
  [[nodiscard]] constexpr uint32_t tile_rows(uint32_t t) const {
    const uint32_t left = slots - t * tile_slots;
    const uint32_t here = left < tile_slots ? left : tile_slots;
    return (here + word_slots - 1) / word_slots;
  }
  [[nodiscard]] constexpr uint32_t words_per_row() const { return is_k ? 4 : 8; }
  [[nodiscard]] constexpr uint32_t tile_bytes(uint32_t t) const {
    return blocks() * tile_rows(t) * words_per_row() * word_bytes;
  }
  [[nodiscard]] constexpr uint32_t tile_offset(uint32_t t) const {
    return offset + t * tile_bytes(0);
  }
  [[nodiscard]] constexpr uint32_t tiles() const { return (slots + tile_slots - 1) / tile_slots; }
  [[nodiscard]] constexpr uint32_t bytes() const {
    return (tiles() - 1) * tile_bytes(0) + tile_bytes(tiles() - 1);
  }

  [[nodiscard]] constexpr CodeSite site(uint32_t slot, uint32_t dim) const {
    return is_k ? k_site(slot, dim) : v_site(slot, dim);
  }

 private:
  [[nodiscard]] constexpr uint32_t word_offset(uint32_t tile, uint32_t block, uint32_t g,
                                               uint32_t c, uint32_t c_count,
                                               uint32_t g_count) const {
    return tile_offset(tile) + ((block * g_count + g) * c_count + c) * word_bytes;
  }
  [[nodiscard]] constexpr CodeSite k_site(uint32_t slot, uint32_t dim) const {
    const uint32_t tile = slot / tile_slots, in_tile = slot % tile_slots;
    const uint32_t block = dim / block_dims, d = dim % block_dims;
    const uint32_t slice = d / 16, half = (d / 8) % 2, c = (d % 8) / 2, column = d % 2;
    const uint32_t g = in_tile / word_slots;
    const uint32_t word = word_offset(tile, block, g, c, 4, tile_rows(tile));
    if (bits == 16) return {word + 4 * (2 * slice + half) + 2 * column, 0};
    const uint32_t per_byte = 8 / bits;
    const uint32_t part = 2 * (slice / per_byte) + half;
    return {word + 4 * part + 2 * column + in_tile % 2, bits * (slice % per_byte)};
  }
  [[nodiscard]] constexpr CodeSite v_site(uint32_t slot, uint32_t dim) const {
    const uint32_t tile = slot / tile_slots, in_tile = slot % tile_slots;
    const uint32_t block = dim / block_dims, d = dim % block_dims;
    const uint32_t g = d % 8, i = d / 8, c = in_tile / word_slots;
    const uint32_t word = word_offset(tile, block, g, c, tile_rows(tile), 8);
    if (bits == 16) return {word + 4 * i + 2 * (in_tile % 2), 0};
    const uint32_t per_byte = 8 / bits;
    return {word + 4 * (i / per_byte) + in_tile % 4, bits * (i % per_byte)};
  }
};

struct PageLayout {
  Format format;
  uint32_t head_dim;
  uint32_t slots;
  CodeSection k;  // of block formats, only what walks the slots in tiles
  CodeSection v;
  uint32_t k_scale_offset;  // [slots] fp16, or [slots][head_dim / 16] e4m3, or absent
  uint32_t v_scale_offset;
  uint32_t position_offset;  // u32 [slots]
  uint32_t bytes_used;

  [[nodiscard]] constexpr uint64_t full_mask() const {
    return slots == 64 ? ~uint64_t{0} : (uint64_t{1} << slots) - 1;
  }
  // Codes and scales of one slot (of a block, its share); what "useful bytes" counts.
  [[nodiscard]] constexpr uint32_t slot_payload_bytes() const {
    if (is_block(format)) return position_offset / slots;
    return head_dim * (k.bits + v.bits) / 8 + format_info(format).k.scale_bytes(head_dim) +
           format_info(format).v.scale_bytes(head_dim);
  }
};

namespace page_format_detail {

[[nodiscard]] constexpr CodeSection section(uint32_t bits, uint32_t slots, uint32_t head_dim,
                                            uint32_t offset, bool is_k) {
  const uint32_t word_slots = bits == 16 ? (is_k ? 1 : 2) : (is_k ? 2 : 4);
  // 16-byte words of 4 (K) or 8 (V) lanes cover this many dims.
  const uint32_t wide = (128 / (bits * word_slots)) * (is_k ? 4 : 8);
  const uint32_t block = wide < head_dim ? wide : head_dim;
  return {.bits = bits,
          .offset = offset,
          .slots = slots,
          .head_dim = head_dim,
          .tile_slots = bits == 16 ? 8u : 16u,
          .word_slots = word_slots,
          .word_bytes = 16 * block / wide,
          .block_dims = block,
          .is_k = is_k};
}

[[nodiscard]] constexpr PageLayout layout_with(Format format, uint32_t head_dim, uint32_t slots) {
  const FormatInfo& info = format_info(format);
  PageLayout layout{};
  layout.format = format;
  layout.head_dim = head_dim;
  layout.slots = slots;
  layout.k = section(info.k.bits, slots, head_dim, 0, true);
  layout.v = section(info.v.bits, slots, head_dim, layout.k.bytes(), false);
  layout.k_scale_offset = layout.v.offset + layout.v.bytes();
  layout.v_scale_offset = layout.k_scale_offset + slots * info.k.scale_bytes(head_dim);
  const uint32_t end = layout.v_scale_offset + slots * info.v.scale_bytes(head_dim);
  layout.position_offset = (end + 3) / 4 * 4;
  layout.bytes_used = layout.position_offset + slots * kPositionBytes;
  return layout;
}

}  // namespace page_format_detail

namespace page_format_detail {

[[nodiscard]] constexpr PageLayout layout_of_block(const BlockLayout& block) {
  const CodeSection rows{.bits = block.bits,
                         .offset = block.k_offset,
                         .slots = block.slots,
                         .head_dim = block.head_dim,
                         .tile_slots = 16,
                         .word_slots = 1,
                         .word_bytes = 1,
                         .block_dims = block.head_dim,
                         .is_k = true};
  PageLayout layout{};
  layout.format = block.format;
  layout.head_dim = block.head_dim;
  layout.slots = block.slots;
  layout.k = layout.v = rows;
  layout.v.offset = block.v_offset;
  layout.v.is_k = false;
  layout.k_scale_offset = block.k_scale_offset;
  layout.v_scale_offset = block.v_scale_offset;
  layout.position_offset = block.position_offset;
  layout.bytes_used = block.bytes_used;
  return layout;
}

}  // namespace page_format_detail

// The largest even number of slots that fits: pairs share K words, and 64 is the mask's width.
// Requires: head_dim_supported(head_dim), format != kNone.
[[nodiscard]] constexpr PageLayout make_page_layout(Format format, uint32_t head_dim) {
  if (is_block(format)) return page_format_detail::layout_of_block(block_layout(format, head_dim));
  for (uint32_t slots = kSlotsPerPageMax; slots > 0; slots -= 2) {
    const PageLayout layout = page_format_detail::layout_with(format, head_dim, slots);
    if (layout.bytes_used <= page_bytes(head_dim)) return layout;
  }
  return {};
}

// All layouts, made once at compile time.
[[nodiscard]] constexpr const PageLayout& page_layout(Format format, uint32_t head_dim);

namespace page_format_detail {
consteval auto make_all() {
  std::array<std::array<PageLayout, kAllFormatCount>, kPageClassCount> all{};
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    for (uint32_t f = 1; f < kAllFormatCount; ++f) {
      all[c][f] = make_page_layout(static_cast<Format>(f), kHeadDims[c]);
    }
  }
  return all;
}
inline constexpr auto kAll = make_all();
}  // namespace page_format_detail

[[nodiscard]] constexpr const PageLayout& page_layout(Format format, uint32_t head_dim) {
  return page_format_detail::kAll[page_class(head_dim)][static_cast<size_t>(format)];
}

// The table of the design, proven. (slots at head_dim 64, 128, 256)
consteval bool slots_are(Format format, uint32_t at64, uint32_t at128, uint32_t at256) {
  return page_layout(format, 64).slots == at64 && page_layout(format, 128).slots == at128 &&
         page_layout(format, 256).slots == at256;
}
static_assert(slots_are(Format::kF16, 8, 8, 8) && slots_are(Format::kBf16, 8, 8, 8));
static_assert(slots_are(Format::kK8V8, 16, 16, 16));
static_assert(slots_are(Format::kK8V4, 20, 22, 22));
static_assert(slots_are(Format::kK4V4, 32, 32, 32));
static_assert(slots_are(Format::kK4V2, 40, 44, 44));
static_assert(slots_are(Format::kK2V2, 56, 64, 64));
static_assert(slots_are(Format::kNvfp4, 28, 30, 30));
static_assert(slots_are(Format::kTernary, 52, 54, 56));

// A block fits in a page of every class.
consteval bool blocks_fit() {
  for (const uint32_t head_dim : kHeadDims) {
    for (uint32_t f = kFormatCount; f < kAllFormatCount; ++f) {
      const PageLayout& layout = page_layout(static_cast<Format>(f), head_dim);
      if (layout.bytes_used > page_bytes(head_dim) || layout.position_offset % 4 != 0) return false;
    }
  }
  return true;
}
static_assert(blocks_fit());

}  // namespace thinkv
