// codec_block_encode.cuh: a page of a block format from the rows of its tokens, bit for bit as
// codec_rule.h says, by one block of threads.
//
// Of K a thread finds the range of one channel over all tokens; then, as of V, a thread makes the
// codes of eight neighbouring channels of a token, which are whole bytes.
#pragma once

#include <cstdint>

#include "kernels/codec_rule.h"
#include "kernels/cuda/codec_block.cuh"

namespace thinkv::cuda {

// Whole rows, in shared or global memory that all threads see; one for each slot of the page.
struct BlockRows {
  const float* k;             // [slots, head_dim]
  const float* v;             // [slots, head_dim]
  const uint32_t* positions;  // [slots]
  const float* second_k;      // of a pair
  const float* second_v;
  const uint32_t* channels;  // think: bits [head_dim], think_channels(head_dim) set
};

// The ranges of the channels of K.
struct BlockRanges {
  float low[256];
  float inverse[256];  // codes per unit
};

namespace codec_detail {

struct Range {
  float low;
  float width;  // never -0
};
// Of every `stride`-th of values.
[[nodiscard]] __device__ __forceinline__ Range range_of(const float* values, uint32_t stride,
                                                        uint32_t count) {
  float low = kernels::finite_input(values[0]), high = low;
  for (uint32_t i = 1; i < count; ++i) {
    const float x = kernels::finite_input(values[i * stride]);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  return {low, exact_add(exact_sub(high, low), 0.0f)};
}

[[nodiscard]] __device__ __forceinline__ float levels_of(uint32_t bits) {
  return static_cast<float>((1u << bits) - 1);
}
[[nodiscard]] __device__ __forceinline__ float inverse_of(const Range& range, uint32_t bits) {
  return range.width < kernels::kRangeMin ? 0.0f : exact_div(levels_of(bits), range.width);
}
[[nodiscard]] __device__ __forceinline__ uint32_t code_of(float x, float low, float inverse,
                                                          uint32_t bits) {
  const float above = exact_sub(kernels::finite_input(x), low);
  const float level = floorf(exact_add(exact_mul(above, inverse), 0.5f));
  const float most = levels_of(bits);
  return static_cast<uint32_t>(level < most ? level : most);
}

__device__ __forceinline__ void put_half(unsigned char* where, float x) {
  const float most = kernels::kFp16Max;
  const float within = x < -most ? -most : x > most ? most : x;
  *reinterpret_cast<uint16_t*>(where) = fp16_from_float(within);
}
__device__ __forceinline__ void put_scale(unsigned char* zero, unsigned char* scale,
                                          const Range& range, uint32_t bits, float eta) {
  const float inner = exact_sub(1.0f, exact_mul(2.0f, eta));
  put_half(zero, exact_add(range.low, exact_mul(eta, range.width)));
  put_half(scale, exact_div(exact_mul(inner, range.width), levels_of(bits)));
}

// The codes of eight values, `bits` bytes.
template <class CodeOf>
__device__ __forceinline__ void put_eight(unsigned char* where, uint32_t bits,
                                          const CodeOf& code_at) {
  uint32_t word = 0;
  for (uint32_t i = 0; i < 8; ++i) word |= code_at(i) << (bits * i);
  for (uint32_t i = 0; i < bits; ++i) where[i] = static_cast<unsigned char>(word >> (8 * i));
}

// Scales of one layer's view, and its codes where `codes`. Whole block.
__device__ inline void encode_keys(unsigned char* page, const BlockLayout& layout, const float* k,
                                   float eta, bool codes, BlockRanges& ranges) {
  const uint32_t dims = layout.head_dim;
  for (uint32_t dim = threadIdx.x; dim < dims; dim += blockDim.x) {
    const Range range = range_of(k + dim, dims, layout.slots);
    put_scale(page + layout.k_zero_offset + 2 * dim, page + layout.k_scale_offset + 2 * dim, range,
              layout.bits, eta);
    ranges.low[dim] = range.low;
    ranges.inverse[dim] = inverse_of(range, layout.bits);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; codes && i < layout.slots * dims / 8; i += blockDim.x) {
    const uint32_t slot = i / (dims / 8), first = i % (dims / 8) * 8;
    unsigned char* row = page + layout.k_offset + slot * layout.k_row_bytes();
    put_eight(row + first * layout.bits / 8, layout.bits, [&](uint32_t d) {
      const uint32_t dim = first + d;
      return code_of(k[slot * dims + dim], ranges.low[dim], ranges.inverse[dim], layout.bits);
    });
  }
  __syncthreads();  // the ranges of the next call
}

__device__ inline void encode_values(unsigned char* page, const BlockLayout& layout, const float* v,
                                     float eta, bool codes) {
  const uint32_t groups = layout.v_groups();
  for (uint32_t i = threadIdx.x; i < layout.slots * groups; i += blockDim.x) {
    const uint32_t slot = i / groups, first = i % groups * layout.v_group;
    const float* values = v + slot * layout.head_dim + first;
    const Range range = range_of(values, 1, layout.v_group);
    unsigned char* scales = page + layout.v_scale_offset + 4 * i;
    put_scale(scales, scales + 2, range, layout.bits, eta);
    const float inverse = inverse_of(range, layout.bits);
    unsigned char* row = page + layout.v_offset + slot * layout.v_row_bytes();
    for (uint32_t d = 0; codes && d < layout.v_group; d += 8) {
      put_eight(row + (first + d) * layout.bits / 8, layout.bits, [&](uint32_t n) {
        return code_of(values[d + n], range.low, inverse, layout.bits);
      });
    }
  }
}

__device__ inline void encode_think(unsigned char* page, const BlockLayout& layout,
                                    const BlockRows& rows) {
  const uint32_t dims = layout.head_dim;
  auto* mask = page + layout.channel_offset;
  for (uint32_t i = threadIdx.x; i < dims / 32; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(mask)[i] = rows.channels[i];
  }
  const bool bf16 = layout.format == Format::kThinkBf16;
  const auto half_of = [&](float x) { return bf16 ? bf16_from_float(x) : fp16_from_float(x); };
  const auto* channels = reinterpret_cast<const unsigned char*>(rows.channels);
  for (uint32_t i = threadIdx.x; i < layout.slots * dims; i += blockDim.x) {
    const uint32_t slot = i / dims, dim = i % dims;
    auto* v = reinterpret_cast<uint16_t*>(page + layout.v_offset + slot * layout.v_row_bytes());
    v[dim] = half_of(rows.v[i]);
    bool kept = false;
    const uint32_t rank = channel_rank(channels, dim, kept);
    if (!kept || rank >= layout.key_dims) continue;
    auto* k = reinterpret_cast<uint16_t*>(page + layout.k_offset + slot * layout.k_row_bytes());
    k[rank] = half_of(rows.k[i]);
  }
}

}  // namespace codec_detail

// Writes the page whole, of a pair both views. `layout`: of a pair the first layer's. Whole block.
__device__ inline void encode_block(unsigned char* page, const BlockLayout& layout,
                                    const BlockRows& rows, float eta, BlockRanges& ranges) {
  auto* positions = reinterpret_cast<uint32_t*>(page + layout.position_offset);
  for (uint32_t i = threadIdx.x; i < layout.slots; i += blockDim.x) {
    positions[i] = rows.positions[i];
  }
  if (is_think(layout.format)) {
    codec_detail::encode_think(page, layout, rows);
  } else {
    codec_detail::encode_keys(page, layout, rows.k, eta, true, ranges);
    codec_detail::encode_values(page, layout, rows.v, eta, true);
  }
  if (is_pair(layout.format)) {
    const BlockLayout second = block_shape(layout.head_dim, second_of(layout.format));
    codec_detail::encode_keys(page, second, rows.second_k, eta, false, ranges);
    codec_detail::encode_values(page, second, rows.second_v, eta, false);
  }
  __syncthreads();
}

}  // namespace thinkv::cuda
