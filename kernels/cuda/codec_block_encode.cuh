// codec_block_encode.cuh: a page of a block format from the rows of its tokens, bit for bit as
// codec_rule.h says, by one block of threads.
//
// The tokens come in parts that fit shared memory: of K some channels of all tokens, of V whole
// tokens. Of K a thread finds the range of one channel; then, as of V, a thread makes the codes of
// eight neighbouring channels of a token, which are whole bytes.
#pragma once

#include <cstdint>

#include "kernels/codec_rule.h"
#include "kernels/cuda/codec_block.cuh"

namespace thinkv::cuda {

inline constexpr uint32_t kTileValues = 2048;
inline constexpr uint32_t kTileDims = 32;  // of K
static_assert(kSlotsPerPageMax * kTileDims <= kTileValues);

// Shared memory.
struct BlockTile {
  float values[kTileValues];  // of a part
  float low[kTileDims];       // the ranges of the channels of K
  float inverse[kTileDims];   // codes per unit
};

// Some channels of some tokens of a block: rows [slots][dims].
struct BlockPart {
  bool is_k;
  bool second;  // of the second layer of a pair
  uint32_t first_slot;
  uint32_t slots;
  uint32_t first_dim;
  uint32_t dims;
};

// What a page gets beside the values of its tokens.
struct BlockNotes {
  const uint32_t* positions;  // [slots]
  const uint32_t* channels;   // think: bits [head_dim], think_channels(head_dim) set
  float eta;
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

// The part, by the whole block, to tile.values.
template <class Load>
__device__ __forceinline__ void load_part(const Load& load, const BlockPart& part,
                                          BlockTile& tile) {
  __syncthreads();  // what was there before is read
  load(part, tile.values);
  __syncthreads();
}

// Scales of one layer's view, and its codes where it is the first. Whole block.
template <class Load>
__device__ inline void encode_keys(unsigned char* page, const BlockLayout& layout, const Load& load,
                                   float eta, BlockTile& tile) {
  const bool second = is_second(layout.format);
  constexpr uint32_t kEights = kTileDims / 8;
  for (uint32_t first = 0; first < layout.head_dim; first += kTileDims) {
    load_part(load, {true, second, 0, layout.slots, first, kTileDims}, tile);
    if (threadIdx.x < kTileDims) {
      const Range range = range_of(tile.values + threadIdx.x, kTileDims, layout.slots);
      const uint32_t at = 2 * (first + threadIdx.x);
      put_scale(page + layout.k_zero_offset + at, page + layout.k_scale_offset + at, range,
                layout.bits, eta);
      tile.low[threadIdx.x] = range.low;
      tile.inverse[threadIdx.x] = inverse_of(range, layout.bits);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; !second && i < layout.slots * kEights; i += blockDim.x) {
      const uint32_t slot = i / kEights, from = i % kEights * 8;
      unsigned char* row = page + layout.k_offset + slot * layout.k_row_bytes();
      put_eight(row + (first + from) * layout.bits / 8, layout.bits, [&](uint32_t n) {
        const uint32_t d = from + n;
        return code_of(tile.values[slot * kTileDims + d], tile.low[d], tile.inverse[d],
                       layout.bits);
      });
    }
  }
}

// One group of channels of a token.
__device__ inline void encode_group(unsigned char* page, const BlockLayout& layout, uint32_t slot,
                                    uint32_t group, const float* values, float eta) {
  const Range range = range_of(values, 1, layout.v_group);
  unsigned char* scales = page + layout.v_scale_offset + 4 * (slot * layout.v_groups() + group);
  put_scale(scales, scales + 2, range, layout.bits, eta);
  if (is_second(layout.format)) return;
  const float inverse = inverse_of(range, layout.bits);
  unsigned char* row = page + layout.v_offset + slot * layout.v_row_bytes();
  for (uint32_t d = 0; d < layout.v_group; d += 8) {
    put_eight(row + (group * layout.v_group + d) * layout.bits / 8, layout.bits,
              [&](uint32_t n) { return code_of(values[d + n], range.low, inverse, layout.bits); });
  }
}

template <class Load>
__device__ inline void encode_values(unsigned char* page, const BlockLayout& layout,
                                     const Load& load, float eta, BlockTile& tile) {
  const uint32_t groups = layout.v_groups(), most = kTileValues / layout.head_dim;
  for (uint32_t first = 0; first < layout.slots; first += most) {
    const uint32_t count = min(most, layout.slots - first);
    load_part(load, {false, is_second(layout.format), first, count, 0, layout.head_dim}, tile);
    for (uint32_t i = threadIdx.x; i < count * groups; i += blockDim.x) {
      const uint32_t slot = i / groups, group = i % groups;
      encode_group(page, layout, first + slot, group,
                   tile.values + slot * layout.head_dim + group * layout.v_group, eta);
    }
  }
}

template <class Load>
__device__ inline void encode_think(unsigned char* page, const BlockLayout& layout,
                                    const Load& load, const BlockNotes& notes, BlockTile& tile) {
  auto* mask = page + layout.channel_offset;
  for (uint32_t i = threadIdx.x; i < layout.head_dim / 32; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(mask)[i] = notes.channels[i];
  }
  const bool bf16 = layout.format == Format::kThinkBf16;
  const auto half_of = [&](float x) { return bf16 ? bf16_from_float(x) : fp16_from_float(x); };
  const auto* channels = reinterpret_cast<const unsigned char*>(notes.channels);
  for (uint32_t first = 0; first < layout.head_dim; first += kTileDims) {
    for (const bool is_k : {false, true}) {
      load_part(load, {is_k, false, 0, layout.slots, first, kTileDims}, tile);
      for (uint32_t i = threadIdx.x; i < layout.slots * kTileDims; i += blockDim.x) {
        const uint32_t slot = i / kTileDims, dim = first + i % kTileDims;
        bool kept = true;
        const uint32_t at = is_k ? channel_rank(channels, dim, kept) : dim;
        if (!kept || (is_k && at >= layout.key_dims)) continue;
        unsigned char* row = page + (is_k ? layout.k_offset + slot * layout.k_row_bytes()
                                          : layout.v_offset + slot * layout.v_row_bytes());
        reinterpret_cast<uint16_t*>(row)[at] = half_of(tile.values[i]);
      }
    }
  }
}

}  // namespace codec_detail

// Writes the page whole, of a pair both views. `layout`: of a pair the first layer's. `load(part,
// rows)` writes the rows of a part; the whole block calls it. Whole block.
template <class Load>
__device__ inline void encode_block(unsigned char* page, const BlockLayout& layout,
                                    const BlockNotes& notes, const Load& load, BlockTile& tile) {
  auto* positions = reinterpret_cast<uint32_t*>(page + layout.position_offset);
  for (uint32_t i = threadIdx.x; i < layout.slots; i += blockDim.x) {
    positions[i] = notes.positions[i];
  }
  if (is_think(layout.format)) {
    codec_detail::encode_think(page, layout, load, notes, tile);
  } else {
    codec_detail::encode_keys(page, layout, load, notes.eta, tile);
    codec_detail::encode_values(page, layout, load, notes.eta, tile);
  }
  if (is_pair(layout.format)) {
    const BlockLayout second = block_shape(layout.head_dim, second_of(layout.format));
    codec_detail::encode_keys(page, second, load, notes.eta, tile);
    codec_detail::encode_values(page, second, load, notes.eta, tile);
  }
  __syncthreads();
}

}  // namespace thinkv::cuda
