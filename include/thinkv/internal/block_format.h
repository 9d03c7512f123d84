// block_format.h: pages that hold one block of tokens each, written together.
//
// The tokens of a block share the scales of their keys (KIVI, XQuant) or the channels that their
// keys keep (ThinK), so a slot is never written again alone. A slot can be dead, and attention does
// not read it; the page goes back when all are. As published, keys and values are not rotated.
//
//   kivi<b>: K: zero point and scale a channel, over all tokens of the block. V: zero point and
//     scale a token and group of channels. b bits a code.
//   pair<b>: the same for two layers of one kv head: codes of the first, scales of both.
//   think: 16 bits; keys with the 5/8 of the channels whose bits are set in the page, V whole.
//
//   [ K codes | V codes | scales | scales of the second layer | channels | positions u32[slots] ]
//     codes   row after row: value i of a slot at bit `bits` * i of its row, little-endian
//     scales  fp16: K zero points [dim], K scales [dim], then V {zero point, scale} [slots][groups]
//
// A block fills its page: 24 tokens at 4 bits, 44 at 2, 64 at 1 (the mask's width), 10 of think; of
// a pair 32 at 2 bits, 64 at 1.
#pragma once

#include <cstdint>

#include "thinkv/internal/format.h"

namespace thinkv {

struct BlockLayout {
  Format format;
  uint32_t head_dim;
  uint32_t slots;     // tokens of the block
  uint32_t bits;      // a code
  uint32_t key_dims;  // channels of K that are stored
  uint32_t v_group;   // channels under one scale of V
  uint32_t k_offset;
  uint32_t v_offset;
  uint32_t k_zero_offset;  // of the layer whose view this is
  uint32_t k_scale_offset;
  uint32_t v_scale_offset;
  uint32_t channel_offset;  // think: bits [head_dim]
  uint32_t position_offset;
  uint32_t bytes_used;

  [[nodiscard]] constexpr uint32_t k_row_bytes() const { return key_dims * bits / 8; }
  [[nodiscard]] constexpr uint32_t v_row_bytes() const { return head_dim * bits / 8; }
  [[nodiscard]] constexpr uint32_t v_groups() const { return head_dim / v_group; }
};

[[nodiscard]] constexpr uint32_t think_channels(uint32_t head_dim) {
  return head_dim * 5 / 8;
}

namespace block_format_detail {

[[nodiscard]] constexpr uint32_t tokens_of(Format format) {
  if (is_think(format)) return 10;
  if (format == Format::kKivi4) return 24;
  if (format == Format::kKivi2) return 44;
  return format_info(format).k.bits == 1 ? 64 : 32;
}

}  // namespace block_format_detail

// Requires: is_block(format), a supported head_dim.
[[nodiscard]] constexpr BlockLayout block_layout(Format format, uint32_t head_dim) {
  BlockLayout layout{};
  layout.format = format;
  layout.head_dim = head_dim;
  layout.slots = block_format_detail::tokens_of(format);
  layout.bits = format_info(format).k.bits;
  layout.key_dims = is_think(format) ? think_channels(head_dim) : head_dim;
  layout.v_group = layout.bits == 1 ? 64 : 32;
  layout.v_offset = layout.slots * layout.k_row_bytes();
  const uint32_t scales = layout.v_offset + layout.slots * layout.v_row_bytes();
  const uint32_t set = is_think(format) ? 0 : 4 * head_dim + 4 * layout.slots * layout.v_groups();
  layout.k_zero_offset = scales + (is_second(format) ? set : 0);
  layout.k_scale_offset = layout.k_zero_offset + 2 * head_dim;
  layout.v_scale_offset = layout.k_scale_offset + 2 * head_dim;
  layout.channel_offset = scales + (is_pair(format) || is_second(format) ? 2 * set : set);
  layout.position_offset = layout.channel_offset + (is_think(format) ? head_dim / 8 : 0);
  layout.bytes_used = layout.position_offset + layout.slots * 4;
  return layout;
}

}  // namespace thinkv
