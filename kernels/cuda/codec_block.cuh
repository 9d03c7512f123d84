// codec_block.cuh: one vector out of a page of a block format, bit for bit as codec_rule.h says.
//
// Eight threads hold a vector, as in codec.cuh: thread l owns the dims l + 8 i as x[i]. Codes lie
// row after row, so what a thread needs of a row are bytes that are `bits` apart.
#pragma once

#include <cstdint>

#include "kernels/cuda/platform.cuh"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda {

struct BlockLayouts {
  BlockLayout of[kPageClassCount][kAllFormatCount - kFormatCount];
};
[[nodiscard]] constexpr BlockLayouts make_block_layouts() {
  BlockLayouts all{};
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    for (uint32_t f = kFormatCount; f < kAllFormatCount; ++f) {
      all.of[c][f - kFormatCount] = block_layout(static_cast<Format>(f), kHeadDims[c]);
    }
  }
  return all;
}
// block_layout() of a format that is known only when the kernel runs. Requires: is_block(format).
[[nodiscard]] __device__ __forceinline__ BlockLayout block_shape(uint32_t head_dim, Format format) {
  static constexpr BlockLayouts kLayouts = make_block_layouts();
  return kLayouts.of[page_class(head_dim)][static_cast<uint32_t>(format) - kFormatCount];
}

namespace codec_detail {

[[nodiscard]] __device__ __forceinline__ uint16_t half_at(const unsigned char* where) {
  return *reinterpret_cast<const uint16_t*>(where);
}
[[nodiscard]] __device__ __forceinline__ float scale_at(const unsigned char* where) {
  return fp16_to_float(half_at(where));
}

// Bits of a think page's mask below `dim`, in 32-bit words; the channel itself in `kept`.
[[nodiscard]] __device__ __forceinline__ uint32_t channel_rank(const unsigned char* mask,
                                                               uint32_t dim, bool& kept) {
  const auto* words = reinterpret_cast<const uint32_t*>(mask);
  uint32_t rank = 0;
  for (uint32_t i = 0; i < dim / 32; ++i) rank += static_cast<uint32_t>(__popc(words[i]));
  const uint32_t word = words[dim / 32], bit = dim % 32;
  kept = ((word >> bit) & 1u) != 0;
  return rank + static_cast<uint32_t>(__popc(word & ((1u << bit) - 1)));
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void decode_think(float (&x)[kDim / 8], const unsigned char* page,
                                             const BlockLayout& layout, uint32_t slot) {
  const unsigned char* row = page + (kIsK ? layout.k_offset + slot * layout.k_row_bytes()
                                          : layout.v_offset + slot * layout.v_row_bytes());
  const bool bf16 = layout.format == Format::kThinkBf16;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const uint32_t dim = threadIdx.x % 8 + 8 * i;
    bool kept = true;
    const uint32_t at = kIsK ? channel_rank(page + layout.channel_offset, dim, kept) : dim;
    const uint16_t half = kept ? half_at(row + 2 * at) : uint16_t{0};
    x[i] = bf16 ? bf16_to_float(half) : fp16_to_float(half);
  }
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void decode_affine(float (&x)[kDim / 8], const unsigned char* page,
                                              const BlockLayout& layout, uint32_t slot) {
  const unsigned char* row = page + (kIsK ? layout.k_offset + slot * layout.k_row_bytes()
                                          : layout.v_offset + slot * layout.v_row_bytes());
  const uint32_t first_bit = threadIdx.x % 8 * layout.bits, mask = (1u << layout.bits) - 1;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const uint32_t dim = threadIdx.x % 8 + 8 * i;
    const uint32_t code = (row[i * layout.bits + first_bit / 8] >> (first_bit % 8)) & mask;
    const unsigned char* zero = page + layout.k_zero_offset + 2 * dim;
    const unsigned char* scale = page + layout.k_scale_offset + 2 * dim;
    if constexpr (!kIsK) {
      zero = page + layout.v_scale_offset + 4 * (slot * layout.v_groups() + dim / layout.v_group);
      scale = zero + 2;
    }
    x[i] = exact_add(scale_at(zero), exact_mul(static_cast<float>(code), scale_at(scale)));
  }
}

}  // namespace codec_detail

// K or V of a slot. No shuffles: threads may call it one by one. Requires: is_block(layout.format).
template <int kDim, bool kIsK>
__device__ __forceinline__ void decode_block_vector(float (&x)[kDim / 8], const unsigned char* page,
                                                    const BlockLayout& layout, uint32_t slot) {
  if (is_think(layout.format)) return codec_detail::decode_think<kDim, kIsK>(x, page, layout, slot);
  codec_detail::decode_affine<kDim, kIsK>(x, page, layout, slot);
}

}  // namespace thinkv::cuda
