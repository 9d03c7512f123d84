// slot_copy.h: one token from a slot to another of the same format, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "thinkv/internal/page_format.h"

namespace thinkv::kernels {

namespace slot_copy_detail {

inline void copy_codes(const CodeSection& section, const std::byte* from, uint32_t from_slot,
                       std::byte* to, uint32_t to_slot) {
  const auto mask = static_cast<uint8_t>((1u << (section.bits % 16)) - 1);
  for (uint32_t dim = 0; dim < section.head_dim; ++dim) {
    const CodeSite source = section.site(from_slot, dim), target = section.site(to_slot, dim);
    if (section.bits == 16) {
      std::memcpy(to + target.byte, from + source.byte, sizeof(uint16_t));
      continue;
    }
    const auto code = static_cast<uint32_t>(from[source.byte]) >> source.shift & mask;
    const auto others = static_cast<uint32_t>(to[target.byte]) & ~(uint32_t{mask} << target.shift);
    to[target.byte] = static_cast<std::byte>(others | code << target.shift);
  }
}

inline void copy_field(const std::byte* from, uint32_t from_slot, std::byte* to, uint32_t to_slot,
                       uint32_t offset, uint32_t bytes) {
  std::memcpy(to + offset + size_t{to_slot} * bytes, from + offset + size_t{from_slot} * bytes,
              bytes);
}

}  // namespace slot_copy_detail

// Codes, scales and position. from and to: two pages of that layout.
inline void copy_slot(const PageLayout& layout, const std::byte* from, uint32_t from_slot,
                      std::byte* to, uint32_t to_slot) {
  using slot_copy_detail::copy_codes;
  using slot_copy_detail::copy_field;
  const FormatInfo& info = format_info(layout.format);
  copy_codes(layout.k, from, from_slot, to, to_slot);
  copy_codes(layout.v, from, from_slot, to, to_slot);
  copy_field(from, from_slot, to, to_slot, layout.k_scale_offset,
             info.k.scale_bytes(layout.head_dim));
  copy_field(from, from_slot, to, to_slot, layout.v_scale_offset,
             info.v.scale_bytes(layout.head_dim));
  copy_field(from, from_slot, to, to_slot, layout.position_offset, kPositionBytes);
}

}  // namespace thinkv::kernels
