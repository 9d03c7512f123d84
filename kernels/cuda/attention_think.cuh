// attention_think.cuh: one page of think: 16-bit values row after row, keys with some channels
// only.
//
// Rows and slots are those of codes (attention_codes.cuh): row g is slot 2g of the tile, row g + 8
// the next.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_codes.cuh"
#include "kernels/cuda/attention_values.cuh"

namespace thinkv::cuda {

// The probabilities of a tile as B fragments.
template <bool kBfloat, int kN, int kTiles>
__device__ __forceinline__ void pack_probabilities(uint32_t (&b)[kN][2],
                                                   const float (&p)[kN][kTiles][4], int t) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float low = p[n][t][2 * row], high = p[n][t][2 * row + 1];
      b[n][row] = transpose_8x8(kBfloat ? pack_bf16(low, high) : pack_f16(low, high));
    }
  }
}

// Where the keys of the dims of a thread lie in a row: the rank of their channel.
template <int kHeadDim>
struct KeptChannels {
  uint32_t masks[kHeadDim / 32], before[kHeadDim / 32];
  __device__ __forceinline__ explicit KeptChannels(uint32_t address) {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      masks[i] = load_shared_4(address + 4 * i);
      before[i] = count;
      count += __popc(masks[i]);
    }
  }
  // Channels 32 word + bit and the next of a row; a channel that is not kept is 0.
  [[nodiscard]] __device__ __forceinline__ uint32_t pair(uint32_t row, int word,
                                                         uint32_t bit) const {
    const uint32_t rank = before[word] + __popc(masks[word] & ((1u << bit) - 1));
    const bool first = ((masks[word] >> bit) & 1u) != 0, second = ((masks[word] >> bit) & 2u) != 0;
    const uint32_t low = first ? load_shared_2(row + 2 * rank) : 0u;
    const uint32_t high = second ? load_shared_2(row + 2 * (rank + (first ? 1 : 0))) : 0u;
    return low | high << 16;
  }
};

template <int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void score_think(float (&d)[kN][1][4], const LaneState<kHeadDim, kN>& s,
                                            uint32_t page) {
  constexpr BlockLayout kLayout = block_layout(kFormat, kHeadDim);
  constexpr Format kValues = kFormat == Format::kThinkBf16 ? Format::kBf16 : Format::kF16;
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const uint32_t even = page + min(2 * g, kLayout.slots - 2) * kLayout.k_row_bytes();
  const uint32_t odd = even + kLayout.k_row_bytes();
  const KeptChannels<kHeadDim> kept(page + kLayout.channel_offset);
#pragma unroll
  for (int n = 0; n < kN; ++n) d[n][0][0] = d[n][0][1] = d[n][0][2] = d[n][0][3] = 0.0f;
#pragma unroll
  for (int slice = 0; slice < kHeadDim / 16; ++slice) {
    const uint32_t bit = 16 * (slice % 2) + 2 * c;
    const uint32_t a0 = kept.pair(even, slice / 2, bit), a1 = kept.pair(odd, slice / 2, bit);
    const uint32_t a2 = kept.pair(even, slice / 2, bit + 8);
    const uint32_t a3 = kept.pair(odd, slice / 2, bit + 8);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      mma_values<kValues>(d[n][0], a0, a1, a2, a3, s.q[n][slice][0], s.q[n][slice][1]);
    }
  }
}

template <int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void weigh_think(LaneState<kHeadDim, kN>& s, uint32_t page,
                                            const uint32_t (&b)[kN][2]) {
  constexpr BlockLayout kLayout = block_layout(kFormat, kHeadDim);
  constexpr Format kValues = kFormat == Format::kThinkBf16 ? Format::kBf16 : Format::kF16;
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  uint32_t rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t slot = min(4 * c + i, kLayout.slots - 1);
    rows[i] = page + kLayout.v_offset + slot * kLayout.v_row_bytes() + 2 * g;
  }
#pragma unroll
  for (int m = 0; m < kHeadDim / 16; ++m) {
    const auto pair = [&](int low, int half) {
      const uint32_t at = 2 * (16 * m + 8 * half);
      return load_shared_2(rows[low] + at) | load_shared_2(rows[low + 2] + at) << 16;
    };
    const uint32_t a0 = pair(0, 0), a1 = pair(0, 1), a2 = pair(1, 0), a3 = pair(1, 1);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      mma_values<kValues>(s.out[n][m], a0, a1, a2, a3, b[n][0], b[n][1]);
    }
  }
}

template <int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_think(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                             const Emit& emit) {
  static_assert(block_layout(kFormat, kHeadDim).slots <= 16);
  const CodeLive live(page.live);
  PageScores<kN, 1> scores;
  score_think<kHeadDim, kFormat>(scores.d, s, page.shared);
  scores.scale[0][0] = scores.scale[0][1] = page.scale_log2;
  float p[kN][1][4];
  soften<0>(scores, s, live, p);
  emit.template tiles<0>(scores, s, live, 0);
  uint32_t b[kN][2];
  pack_probabilities<kFormat == Format::kThinkBf16>(b, p, 0);
  weigh_think<kHeadDim, kFormat>(s, page.shared, b);
}

}  // namespace thinkv::cuda
