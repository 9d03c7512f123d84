// attention_values.cuh: one page of 8 slots of fp16 or bf16 values.
//
// Slots are rows g of the MMA tile; rows g + 8 stay empty.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_codes.cuh"

namespace thinkv::cuda {

template <Format kFormat>
__device__ __forceinline__ void mma_values(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kFormat == Format::kBf16)
    mma_bf16(d, a0, a1, a2, a3, b0, b1);
  else
    mma_f16(d, a0, a1, a2, a3, b0, b1);
}

// Four independent chains: one tile alone would show the latency of every MMA.
template <int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void score_values(PageScores<kN, 1>& scores,
                                             const LaneState<kHeadDim, kN>& s,
                                             const PageInput& page) {
  constexpr int kChains = kN == 1 ? 4 : 2, kBlocks = kHeadDim / 32;
  float d[kN][kChains][4];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (auto& chain : d[n]) chain[0] = chain[1] = chain[2] = chain[3] = 0.0f;
  }
  uint32_t w[kBlocks][4];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    load_word(w[block], word_address<kHeadDim, kFormat, true>(page.shared, 0, block));
  }
#pragma unroll
  for (int slice = 0; slice < 2 * kBlocks; ++slice) {
    const uint32_t a0 = w[slice / 2][slice % 2 * 2], a2 = w[slice / 2][slice % 2 * 2 + 1];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      mma_values<kFormat>(d[n][slice % kChains], a0, 0, a2, 0, s.q[n][slice][0], s.q[n][slice][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores.d[n][0][i] = d[n][0][i];
      scores.d[n][0][i + 2] = 0.0f;
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) scores.d[n][0][i] += d[n][chain][i];
    }
  }
  scores.scale[0][0] = scores.scale[0][1] = page.scale_log2;
}

// out += V^T p. Masked slots may hold any bits, and 0 x NaN is not 0: `keep` clears them.
template <bool kMasked, int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void weigh_values(LaneState<kHeadDim, kN>& s, uint32_t page,
                                             uint32_t keep, const uint32_t (&b)[kN]) {
#pragma unroll
  for (int block = 0; block < kHeadDim / 32; ++block) {
    uint32_t w[4];
    load_word(w, word_address<kHeadDim, kFormat, false>(page, 0, block));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a0 = kMasked ? w[2 * half] & keep : w[2 * half];
      const uint32_t a1 = kMasked ? w[2 * half + 1] & keep : w[2 * half + 1];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        mma_values<kFormat>(s.out[n][2 * block + half], a0, a1, 0, 0, b[n], 0);
      }
    }
  }
}

template <int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_values(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                              const Emit& emit) {
  constexpr uint64_t kFull = page_layout(kFormat, kHeadDim).full_mask();
  const ValueLive live(page.live);
  PageScores<kN, 1> scores;
  score_values<kHeadDim, kFormat>(scores, s, page);
  float p[kN][1][4];
  soften<0>(scores, s, live, p);
  emit.values_page(scores, s, live);
  uint32_t b[kN];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    b[n] = transpose_8x8(kFormat == Format::kBf16 ? pack_bf16(p[n][0][0], p[n][0][1])
                                                  : pack_f16(p[n][0][0], p[n][0][1]));
  }
  const uint32_t mine = static_cast<uint32_t>(page.live) >> (threadIdx.x % 4 * 2);
  const uint32_t keep = ((mine & 1u) ? 0x0000FFFFu : 0u) | ((mine & 2u) ? 0xFFFF0000u : 0u);
  if (page.live == kFull) {
    weigh_values<false, kHeadDim, kFormat>(s, page.shared, keep, b);
  } else {
    weigh_values<true, kHeadDim, kFormat>(s, page.shared, keep, b);
  }
}

}  // namespace thinkv::cuda
