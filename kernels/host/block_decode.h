// block_decode.h: rows of a block page (block_format.h) as fp32, in natural order of dims.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/host/vec.h"
#include "thinkv/internal/block_format.h"
#include "thinkv/internal/small_float.h"

#include "kernels/host/isa_begin.inc"

THINKV_LANE_INLINE uint16_t load_half(const std::byte* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof(half));
  return half;
}

// Eight neighbouring halves.
THINKV_LANE_INLINE U8 load_halves(const std::byte* p) {
  uint16_t h[kLanes];
  std::memcpy(h, p, sizeof(h));
  return U8{h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]};
}

// The same as fp32.
THINKV_LANE_INLINE F8 load_fp16(const std::byte* p) {
#if THINKV_HOST_AVX2
  return reinterpret_cast<F8>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return halves_to_float(load_halves(p));
#endif
}

// Eight neighbouring codes of `kBits`, from the kBits bytes that hold them.
template <uint32_t kBits>
THINKV_LANE_INLINE F8 load_codes(const std::byte* p) {
  const U8 shift = U8{0, 1, 2, 3, 4, 5, 6, 7} * kBits;
  uint32_t word = 0;
  std::memcpy(&word, p, kBits);
  const U8 all = {word, word, word, word, word, word, word, word};
  return small_to_float((all >> shift) & ((1u << kBits) - 1));
}

template <uint32_t kBits>
void decode_affine_k(const std::byte* page, const BlockLayout& layout, uint32_t slot, float* out) {
  const std::byte* const row = page + layout.k_offset + slot * layout.k_row_bytes();
  for (uint32_t d = 0; d < layout.head_dim; d += kLanes) {
    const F8 zero = load_fp16(page + layout.k_zero_offset + 2 * d);
    const F8 scale = load_fp16(page + layout.k_scale_offset + 2 * d);
    store(out + d, zero + load_codes<kBits>(row + d * kBits / 8) * scale);
  }
}

template <uint32_t kBits>
void decode_affine_v(const std::byte* page, const BlockLayout& layout, uint32_t slot, float* out) {
  const std::byte* const row = page + layout.v_offset + slot * layout.v_row_bytes();
  const std::byte* scales = page + layout.v_scale_offset + 4 * slot * layout.v_groups();
  for (uint32_t first = 0; first < layout.head_dim; first += layout.v_group, scales += 4) {
    const F8 zero = splat(fp16_to_float(load_half(scales)));
    const F8 scale = splat(fp16_to_float(load_half(scales + 2)));
    for (uint32_t d = first; d < first + layout.v_group; d += kLanes) {
      store(out + d, zero + load_codes<kBits>(row + d * kBits / 8) * scale);
    }
  }
}

THINKV_LANE_INLINE F8 load_wide(const std::byte* p, bool bfloat) {
  return bfloat ? as_float(load_halves(p) << 16) : load_fp16(p);
}

inline void decode_think_v(const std::byte* page, const BlockLayout& layout, uint32_t slot,
                           float* out) {
  const std::byte* const row = page + layout.v_offset + slot * layout.v_row_bytes();
  const bool bfloat = layout.format == Format::kThinkBf16;
  for (uint32_t d = 0; d < layout.head_dim; d += kLanes) {
    store(out + d, load_wide(row + 2 * d, bfloat));
  }
}

// Channels that the page does not keep are 0: their part of q then does not matter.
inline void decode_think_k(const std::byte* page, const BlockLayout& layout, uint32_t slot,
                           float* out) {
  const std::byte* const row = page + layout.k_offset + slot * layout.k_row_bytes();
  const bool bfloat = layout.format == Format::kThinkBf16;
  alignas(32) float kept[256];
  for (uint32_t i = 0; i < layout.key_dims; i += kLanes) {
    store(kept + i, load_wide(row + 2 * i, bfloat));
  }
  std::fill_n(out, layout.head_dim, 0.0f);
  uint32_t next = 0;
  for (uint32_t first = 0; first < layout.head_dim; first += 64) {
    uint64_t mask;
    std::memcpy(&mask, page + layout.channel_offset + first / 8, sizeof(mask));
    for (; mask != 0 && next < layout.key_dims; mask &= mask - 1) {
      out[first + static_cast<uint32_t>(std::countr_zero(mask))] = kept[next++];
    }
  }
}

// One row of K or V.
inline void decode_block_row(const std::byte* page, const BlockLayout& layout, uint32_t slot,
                             bool k_side, float* out) {
  if (is_think(layout.format)) {
    return k_side ? decode_think_k(page, layout, slot, out)
                  : decode_think_v(page, layout, slot, out);
  }
  if (layout.bits == 4) {
    return k_side ? decode_affine_k<4>(page, layout, slot, out)
                  : decode_affine_v<4>(page, layout, slot, out);
  }
  if (layout.bits == 2) {
    return k_side ? decode_affine_k<2>(page, layout, slot, out)
                  : decode_affine_v<2>(page, layout, slot, out);
  }
  return k_side ? decode_affine_k<1>(page, layout, slot, out)
                : decode_affine_v<1>(page, layout, slot, out);
}

#include "kernels/host/isa_end.inc"
