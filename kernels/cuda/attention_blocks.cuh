// attention_blocks.cuh: one page of a block format (block_format.h). Here kivi and pair; think has
// a file of its own.
//
// Their codes lie row after row, so fragments are put together from 8-byte pieces of rows, and
// become fp16 values on the way: zero + code x scale, rounded once. Rows and slots are those of
// codes (attention_codes.cuh): row g is slot 2g of a tile, row g + 8 the next. All slots of a block
// were written, so the values of dead ones are numbers, which a probability of 0 takes out.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_codes.cuh"
#include "kernels/cuda/attention_think.cuh"

namespace thinkv::cuda {

// What q and the outputs must be made for: values, not codes.
[[nodiscard]] __device__ __forceinline__ Format state_format_of(Format format) {
  if (!is_block(format)) return format;
  return format == Format::kThinkBf16 ? Format::kBf16 : Format::kF16;
}

// The codes at bit `low_bit` of `low` and bit `high_bit` of `high`, as fp16: 1024 + code, less
// 1024.
template <int kBits>
[[nodiscard]] __device__ __forceinline__ uint32_t code_pair(uint32_t low, int low_bit,
                                                            uint32_t high, int high_bit) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const uint32_t placed = high_bit < 16 ? high << (16 - high_bit) : high >> (high_bit - 16);
  return add_f16x2(((low >> low_bit) & kMask) | (placed & (kMask << 16)) | 0x64006400u,
                   0xE400E400u);
}

// Eight bytes of a row, moved so that this thread's codes begin at the bits that are fixed.
__device__ __forceinline__ void load_row_piece(uint32_t (&w)[2], uint32_t address, uint32_t bits) {
  const uint2 piece = load_shared_8(address);
  w[0] = piece.x >> bits;
  w[1] = piece.y >> bits;
}

// d[n][t] = K q of tiles first + t. `shift`: to the scales of the second layer of a pair.
template <int kHeadDim, Format kFormat, int kN, int kTiles>
__device__ __forceinline__ void score_affine(float (&d)[kN][kTiles][4],
                                             const LaneState<kHeadDim, kN>& s, uint32_t page,
                                             uint32_t shift, int first) {
  constexpr BlockLayout kLayout = block_layout(kFormat, kHeadDim);
  constexpr int kBits = kLayout.bits, kSlices = 4 / kBits;  // of a piece
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  uint32_t rows[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    rows[t] = page + min(16 * (first + t) + 2 * g, kLayout.slots - 2) * kLayout.k_row_bytes();
#pragma unroll
    for (int n = 0; n < kN; ++n) d[n][t][0] = d[n][t][1] = d[n][t][2] = d[n][t][3] = 0.0f;
  }
#pragma unroll
  for (int piece = 0; piece < static_cast<int>(kLayout.k_row_bytes() / 8); ++piece) {
    uint32_t even[kTiles][2], odd[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      load_row_piece(even[t], rows[t] + 8 * piece, 2 * kBits * c);
      load_row_piece(odd[t], rows[t] + kLayout.k_row_bytes() + 8 * piece, 2 * kBits * c);
    }
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int slice = piece * kSlices + i;
      const uint32_t at = page + shift + 2 * (16 * slice + 2 * c);
      uint32_t zero[2], scale[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        zero[half] = load_shared_4(at + kLayout.k_zero_offset + 16 * half);
        scale[half] = load_shared_4(at + kLayout.k_scale_offset + 16 * half);
      }
      const auto pair = [&](const uint32_t(&w)[2], int half) {
        const int bit = kBits * (16 * i + 8 * half), word = bit / 32;
        const uint32_t codes = code_pair<kBits>(w[word], bit % 32, w[word], bit % 32 + kBits);
        return fma_f16x2(codes, scale[half], zero[half]);
      };
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t a0 = pair(even[t], 0), a1 = pair(odd[t], 0);
        const uint32_t a2 = pair(even[t], 1), a3 = pair(odd[t], 1);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          mma_f16(d[n][t], a0, a1, a2, a3, s.q[n][slice][0], s.q[n][slice][1]);
        }
      }
    }
  }
}

// Zero points and scales of a group of V, of the slots 4c and 4c + 2, or 4c + 1 and 4c + 3.
struct PairScales {
  uint32_t zero, scale;
  __device__ __forceinline__ void load(uint32_t low, uint32_t high) {
    const uint32_t a = load_shared_4(low), b = load_shared_4(high);
    zero = (a & 0xFFFFu) | b << 16;
    scale = a >> 16 | (b & 0xFFFF0000u);
  }
};

// out += V^T p of one tile; b as in weigh_codes().
template <int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void weigh_affine(LaneState<kHeadDim, kN>& s, uint32_t page,
                                             uint32_t shift, int tile, const uint32_t (&b)[kN][2]) {
  constexpr BlockLayout kLayout = block_layout(kFormat, kHeadDim);
  constexpr int kBits = kLayout.bits, kTilesOfPiece = 4 / kBits;
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  uint32_t rows[4], scales[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t slot = min(16 * tile + 4 * c + i, kLayout.slots - 1);
    rows[i] = page + kLayout.v_offset + slot * kLayout.v_row_bytes();
    scales[i] = page + shift + kLayout.v_scale_offset + 4 * slot * kLayout.v_groups();
  }
  PairScales even{}, odd{};
#pragma unroll
  for (int piece = 0; piece < static_cast<int>(kLayout.v_row_bytes() / 8); ++piece) {
    uint32_t w[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_row_piece(w[i], rows[i] + 8 * piece, kBits * g);
#pragma unroll
    for (int i = 0; i < kTilesOfPiece; ++i) {
      const int m = piece * kTilesOfPiece + i, group = 16 * m / kLayout.v_group;
      if (16 * m % kLayout.v_group == 0) {
        even.load(scales[0] + 4 * group, scales[2] + 4 * group);
        odd.load(scales[1] + 4 * group, scales[3] + 4 * group);
      }
      const auto pair = [&](int low, int half, const PairScales& of) {
        const int bit = kBits * (16 * i + 8 * half), word = bit / 32;
        const uint32_t codes = code_pair<kBits>(w[low][word], bit % 32, w[low + 2][word], bit % 32);
        return fma_f16x2(codes, of.scale, of.zero);
      };
      const uint32_t a0 = pair(0, 0, even), a1 = pair(0, 1, even);
      const uint32_t a2 = pair(1, 0, odd), a3 = pair(1, 1, odd);
#pragma unroll
      for (int n = 0; n < kN; ++n) mma_f16(s.out[n][m], a0, a1, a2, a3, b[n][0], b[n][1]);
    }
  }
}

template <int kTiles, int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_affine_tiles(LaneState<kHeadDim, kN>& s,
                                                    const PageInput& page, uint32_t shift,
                                                    int first, const Emit& emit) {
  const CodeLive live(page.live >> (16 * first));
  PageScores<kN, kTiles> scores;
  score_affine<kHeadDim, kFormat>(scores.d, s, page.shared, shift, first);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) scores.scale[t][0] = scores.scale[t][1] = page.scale_log2;
  float p[kN][kTiles][4];
  soften<0>(scores, s, live, p);
  emit.template tiles<0>(scores, s, live, first);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    uint32_t b[kN][2];
    pack_probabilities<false>(b, p, t);
    weigh_affine<kHeadDim, kFormat>(s, page.shared, shift, first + t, b);
  }
}

// kFormat: of the views of one layout the first; `second`: of the pair's second layer.
template <int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_affine(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                              bool second, const Emit& emit) {
  constexpr BlockLayout kLayout = block_layout(kFormat, kHeadDim);
  constexpr uint32_t kSet =
      kLayout.v_scale_offset + 4 * kLayout.slots * kLayout.v_groups() - kLayout.k_zero_offset;
  constexpr int kTiles = (kLayout.slots + 15) / 16;
  constexpr int kTogether = kN == 1 && kHeadDim <= 128 ? 2 : 1;  // what the registers allow
  const uint32_t shift = second ? kSet : 0;
#pragma unroll 1
  for (int t = 0; t + kTogether <= kTiles; t += kTogether) {
    attend_affine_tiles<kTogether, kHeadDim, kFormat>(s, page, shift, t, emit);
  }
  if constexpr (kTiles % kTogether != 0) {
    attend_affine_tiles<1, kHeadDim, kFormat>(s, page, shift, kTiles - 1, emit);
  }
}

// Requires: is_block(format).
template <int kHeadDim, int kN, class Emit>
__device__ __forceinline__ void attend_block_page(LaneState<kHeadDim, kN>& s, Format format,
                                                  const PageInput& page, const Emit& emit) {
  switch (format) {
    case Format::kKivi4:
      return attend_affine<kHeadDim, Format::kKivi4>(s, page, false, emit);
    case Format::kKivi2:
      return attend_affine<kHeadDim, Format::kKivi2>(s, page, false, emit);
    case Format::kPair2:
    case Format::kPair2Second:
      return attend_affine<kHeadDim, Format::kPair2>(s, page, is_second(format), emit);
    case Format::kThink:
      return attend_think<kHeadDim, Format::kThink>(s, page, emit);
    case Format::kThinkBf16:
      return attend_think<kHeadDim, Format::kThinkBf16>(s, page, emit);
    default:  // kivi1 and both views of pair1, which begin alike
      return attend_affine<kHeadDim, Format::kPair1>(s, page, is_second(format), emit);
  }
}
[[nodiscard]] consteval bool kivi1_is_a_pair_of_one() {
  for (const uint32_t dim : kHeadDims) {
    const BlockLayout one = block_layout(Format::kKivi1, dim);
    const BlockLayout pair = block_layout(Format::kPair1, dim);
    if (one.slots != pair.slots || one.v_offset != pair.v_offset ||
        one.v_scale_offset != pair.v_scale_offset) {
      return false;
    }
  }
  return true;
}
static_assert(kivi1_is_a_pair_of_one());

}  // namespace thinkv::cuda
