// attention_groups.cuh: one page of codes with an e4m3 scale per 16 dims (nvfp4, ternary).
//
// A scale group is one k-slice of K and one row tile of V, so codes become fp16 values in the
// fragments: for comparison with the uniform formats, not tuned.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_codes.cuh"

namespace thinkv::cuda {

// e4m3 codes in the low bytes of the halves, as fp16.
[[nodiscard]] __device__ __forceinline__ uint32_t scales_f16(uint32_t pair) {
  const uint32_t shifted = ((pair & 0x007F007Fu) << 7) | ((pair & 0x00800080u) << 8);
  return mul_f16x2(shifted, 0x5C005C00u);  // the biases differ by 8
}

// Code `i` of each half's low byte as fp16, exact.
template <Coding kCoding>
[[nodiscard]] __device__ __forceinline__ uint32_t codes_f16(uint32_t w, int i) {
  if constexpr (kCoding == Coding::kE2m1) {
    const uint32_t x = w >> (4 * i);
    const uint32_t small = ((x & 0x00080008u) << 12) | ((x & 0x00070007u) << 9);
    return mul_f16x2(small, 0x74007400u);  // the biases differ by 14
  } else {
    // 1024 + code, then minus 1024 + the code of 0.
    return add_f16x2(((w >> (2 * i)) & 0x00030003u) | 0x64006400u, 0xE401E401u);
  }
}

// The scales of one slot, 4 groups a word; 0 where the slot is masked, whose bits may be NaN.
template <int kHeadDim>
__device__ __forceinline__ void load_group_scales(uint32_t (&words)[kHeadDim / 64],
                                                  uint32_t section, uint32_t slot, uint64_t live) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 64; ++i) {
    const uint32_t raw = load_shared_4(section + slot * (kHeadDim / 16) + 4 * i);
    words[i] = ((live >> slot) & 1u) != 0 ? raw : 0u;
  }
}
[[nodiscard]] __device__ __forceinline__ uint32_t byte_of(uint32_t word, int i) {
  return (word >> (8 * i)) & 0xFFu;
}

template <int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void score_groups(float (&d)[kN][1][4], const LaneState<kHeadDim, kN>& s,
                                             const PageInput& page, int tile) {
  constexpr PageLayout kLayout = page_layout(kFormat, kHeadDim);
  constexpr Coding kCoding = format_info(kFormat).k.coding;
  constexpr int kPerByte = 8 / kLayout.k.bits, kParts = kLayout.k.word_bytes / 4;
  const uint32_t slot = min(16 * tile + threadIdx.x % 32 / 4 * 2, kLayout.slots - 2);
  uint32_t scales[2][kHeadDim / 64];
  load_group_scales<kHeadDim>(scales[0], page.shared + kLayout.k_scale_offset, slot, page.live);
  load_group_scales<kHeadDim>(scales[1], page.shared + kLayout.k_scale_offset, slot + 1, page.live);
#pragma unroll
  for (int n = 0; n < kN; ++n) d[n][0][0] = d[n][0][1] = d[n][0][2] = d[n][0][3] = 0.0f;
#pragma unroll
  for (int block = 0; block < static_cast<int>(kLayout.k.blocks()); ++block) {
    uint32_t w[kParts];
    load_word(w, word_address<kHeadDim, kFormat, true>(page.shared, tile, block));
#pragma unroll
    for (int j = 0; j < kParts; j += 2) {
#pragma unroll
      for (int i = 0; i < kPerByte; ++i) {
        const int slice = (block * (kParts / 2) + j / 2) * kPerByte + i;
        const uint32_t even = scales_f16(byte_of(scales[0][slice / 4], slice % 4) * 0x10001u);
        const uint32_t odd = scales_f16(byte_of(scales[1][slice / 4], slice % 4) * 0x10001u);
        const uint32_t a0 = mul_f16x2(codes_f16<kCoding>(w[j], i), even);
        const uint32_t a1 = mul_f16x2(codes_f16<kCoding>(w[j] >> 8, i), odd);
        const uint32_t a2 = mul_f16x2(codes_f16<kCoding>(w[j + 1], i), even);
        const uint32_t a3 = mul_f16x2(codes_f16<kCoding>(w[j + 1] >> 8, i), odd);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          mma_f16(d[n][0], a0, a1, a2, a3, s.q[n][slice][0], s.q[n][slice][1]);
        }
      }
    }
  }
}

template <int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void weigh_groups(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                             int tile, const uint32_t (&b)[kN][2]) {
  constexpr PageLayout kLayout = page_layout(kFormat, kHeadDim);
  constexpr Coding kCoding = format_info(kFormat).v.coding;
  constexpr int kPerByte = 8 / kLayout.v.bits, kParts = kLayout.v.word_bytes / 4;
  const uint32_t c = min(threadIdx.x % 4, kLayout.v.tile_rows(tile) - 1);
  uint32_t scales[4][kHeadDim / 64];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t slot = min(16 * tile + 4 * c + i, kLayout.slots - 1);
    load_group_scales<kHeadDim>(scales[i], page.shared + kLayout.v_scale_offset, slot, page.live);
  }
#pragma unroll
  for (int block = 0; block < static_cast<int>(kLayout.v.blocks()); ++block) {
    uint32_t w[kParts];
    load_word(w, word_address<kHeadDim, kFormat, false>(page.shared, tile, block));
#pragma unroll
    for (int i = 0; i < kParts * kPerByte; i += 2) {
      const int m = (block * kParts * kPerByte + i) / 2, part = i / kPerByte;
      const auto pair = [&](int first) {
        return scales_f16(byte_of(scales[first][m / 4], m % 4) |
                          byte_of(scales[first + 2][m / 4], m % 4) << 16);
      };
      const uint32_t even = pair(0), odd = pair(1);
      const int low = i % kPerByte;
      const uint32_t a0 = mul_f16x2(codes_f16<kCoding>(w[part], low), even);
      const uint32_t a1 = mul_f16x2(codes_f16<kCoding>(w[part], low + 1), even);
      const uint32_t a2 = mul_f16x2(codes_f16<kCoding>(w[part] >> 8, low), odd);
      const uint32_t a3 = mul_f16x2(codes_f16<kCoding>(w[part] >> 8, low + 1), odd);
#pragma unroll
      for (int n = 0; n < kN; ++n) mma_f16(s.out[n][m], a0, a1, a2, a3, b[n][0], b[n][1]);
    }
  }
}

template <int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_groups(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                              const Emit& emit) {
  constexpr int kTiles = page_layout(kFormat, kHeadDim).k.tiles();
#pragma unroll 1
  for (int t = 0; t < kTiles; ++t) {
    const CodeLive live(page.live >> (16 * t));
    PageScores<kN, 1> scores;
    score_groups<kHeadDim, kFormat>(scores.d, s, page, t);
    scores.scale[0][0] = scores.scale[0][1] = page.scale_log2;
    float p[kN][1][4];
    soften<0>(scores, s, live, p);
    emit.template tiles<0>(scores, s, live, t);
    uint32_t b[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      b[n][0] = transpose_8x8(pack_f16(p[n][0][0], p[n][0][1]));
      b[n][1] = transpose_8x8(pack_f16(p[n][0][2], p[n][0][3]));
    }
    weigh_groups<kHeadDim, kFormat>(s, page, t, b);
  }
}

}  // namespace thinkv::cuda
