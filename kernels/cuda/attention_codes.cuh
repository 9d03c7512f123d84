// attention_codes.cuh: one page of uniform codes (k8v8 ... k2v2): scores, probabilities, outputs.
//
// Words are read before the MMAs that need them, and the tiles' MMAs alternate, so that several
// independent chains are under way in a warp.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_emit.cuh"
#include "kernels/cuda/attention_softmax.cuh"
#include "kernels/cuda/attention_state.cuh"

namespace thinkv::cuda {

// A page in shared memory that is ready to be read.
struct PageInput {
  uint32_t shared;
  uint64_t live;     // slots that count
  float scale_log2;  // softmax scale x log2(e)
};

// Reads the 32-bit parts of one lane's word.
template <int kParts>
__device__ __forceinline__ void load_word(uint32_t (&w)[kParts], uint32_t address) {
  if constexpr (kParts == 4) {
    const uint4 v = load_shared_16(address);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  } else {
    const uint2 v = load_shared_8(address);
    w[0] = v.x, w[1] = v.y;
  }
}

// Word (block, row) of a tile for this thread. Of a cut tile the missing rows read other slots'
// codes, which `live` masks off.
template <int kHeadDim, Format kFormat, bool kIsK>
[[nodiscard]] __device__ __forceinline__ uint32_t word_address(uint32_t page, int tile, int block) {
  constexpr PageLayout kLayout = page_layout(kFormat, kHeadDim);
  constexpr CodeSection kSection = kIsK ? kLayout.k : kLayout.v;
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const uint32_t rows = kSection.tile_rows(tile);
  const uint32_t word =
      kIsK ? (block * rows + min(g, rows - 1)) * 4 + c : (block * 8 + g) * rows + min(c, rows - 1);
  return page + kSection.tile_offset(tile) + word * kSection.word_bytes;
}

// d[n][t] = codes . q of tile kFirst + t, from the start value that undoes the codes' bias.
template <int kFirst, int kHeadDim, Format kFormat, int kN, int kTiles>
__device__ __forceinline__ void score_codes(float (&d)[kN][kTiles][4],
                                            const LaneState<kHeadDim, kN>& s, uint32_t page) {
  constexpr CodeSection kK = page_layout(kFormat, kHeadDim).k;
  constexpr int kPerByte = 8 / kK.bits, kParts = kK.word_bytes / 4;
  constexpr uint32_t kMask = ((1u << kK.bits) - 1) * 0x00010001u;
  constexpr int kExponent = kScoreExponent<fold_of(kFormat)>;
  const float unbias = -0.5f * static_cast<float>((1 << kK.bits) - 1) * power_of_2(-kExponent);
  float start[kN][4];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    start[n][0] = start[n][2] = unbias * s.q_sum[n][0];
    start[n][1] = start[n][3] = unbias * s.q_sum[n][1];
  }
#pragma unroll
  for (int block = 0; block < static_cast<int>(kK.blocks()); ++block) {
    uint32_t w[kTiles][kParts];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      load_word(w[t], word_address<kHeadDim, kFormat, true>(page, kFirst + t, block));
    }
#pragma unroll
    for (int j = 0; j < kParts; j += 2) {
#pragma unroll
      for (int i = 0; i < kPerByte; ++i) {
        const int slice = (block * (kParts / 2) + j / 2) * kPerByte + i;
        const uint32_t mask = kMask << (kK.bits * i);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const uint32_t a0 = w[t][j] & mask, a1 = (w[t][j] >> 8) & mask;
          const uint32_t a2 = w[t][j + 1] & mask, a3 = (w[t][j + 1] >> 8) & mask;
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            const uint32_t b0 = s.q[n][slice][0], b1 = s.q[n][slice][1];
            if (slice == 0)
              mma_f16_from(d[n][t], a0, a1, a2, a3, b0, b1, start[n]);
            else
              mma_f16(d[n][t], a0, a1, a2, a3, b0, b1);
          }
        }
      }
    }
  }
}

// out += V codes^T p of one tile; b: p as B fragments, even and odd slots.
template <int kHeadDim, Format kFormat, int kN>
__device__ __forceinline__ void weigh_codes(LaneState<kHeadDim, kN>& s, uint32_t page, int tile,
                                            const uint32_t (&b)[kN][2]) {
  constexpr CodeSection kV = page_layout(kFormat, kHeadDim).v;
  constexpr int kPerByte = 8 / kV.bits, kParts = kV.word_bytes / 4;
  constexpr int kBlocks = kV.blocks();
  constexpr uint32_t kMask = ((1u << kV.bits) - 1) * 0x00010001u;
  uint32_t w[kBlocks][kParts];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    load_word(w[block], word_address<kHeadDim, kFormat, false>(page, tile, block));
  }
  // fp16 of the bias (2^bits - 1) / 2 in all of rows 0..7: what it adds to every dim.
  constexpr uint32_t kBias = kV.bits == 8 ? 0x57F857F8u : kV.bits == 4 ? 0x47804780u : 0x3E003E00u;
#pragma unroll
  for (int n = 0; n < kN; ++n) mma_f16(s.bias[n], kBias, 0, kBias, 0, b[n][0], b[n][1]);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < kParts * kPerByte; i += 2) {
      // Dims 8 i + g and 8 (i + 1) + g of this block: rows g and g + 8 of output tile i / 2.
      const uint32_t low = w[block][i / kPerByte], high = w[block][(i + 1) / kPerByte];
      const uint32_t mask_low = kMask << (kV.bits * (i % kPerByte));
      const uint32_t mask_high = kMask << (kV.bits * ((i + 1) % kPerByte));
      const int m = (block * kParts * kPerByte + i) / 2;
      const uint32_t a0 = low & mask_low, a1 = high & mask_high;
      const uint32_t a2 = (low >> 8) & mask_low, a3 = (high >> 8) & mask_high;
#pragma unroll
      for (int n = 0; n < kN; ++n) mma_f16(s.out[n][m], a0, a1, a2, a3, b[n][0], b[n][1]);
    }
  }
}

// Scales of slots 2g and 2g + 1 of a tile. A slot that is masked may have any bits: it gets 0.
template <bool kMasked>
[[nodiscard]] __device__ __forceinline__ float2 load_scales(uint32_t section, int tile,
                                                            const CodeLive& live) {
  const uint32_t g = threadIdx.x % 32 / 4;
  const uint32_t raw = load_shared_4(section + 2 * (16 * tile + 2 * g));
  return unpack_f16(kMasked ? raw & live.halves(tile) : raw);
}

// Tiles kFirst .. kFirst + kTiles - 1; of those from kMaskFrom on slots may not count.
template <int kFirst, int kTiles, int kMaskFrom, int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_tiles(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                             const CodeLive& all_live, const Emit& emit) {
  constexpr PageLayout kLayout = page_layout(kFormat, kHeadDim);
  constexpr int kMask = kMaskFrom - kFirst;
  const CodeLive live = all_live.from(kFirst);
  const float unit = power_of_2(kScoreExponent<fold_of(kFormat)>) * page.scale_log2;
  PageScores<kN, kTiles> scores;
  score_codes<kFirst, kHeadDim, kFormat>(scores.d, s, page.shared);
  const auto load = [&](uint32_t section, int t) {
    const uint32_t address = page.shared + section + 32 * kFirst;
    return t < kMask ? load_scales<false>(address, t, live) : load_scales<true>(address, t, live);
  };
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const float2 scale = load(kLayout.k_scale_offset, t);
    scores.scale[t][0] = scale.x * unit;
    scores.scale[t][1] = scale.y * unit;
  }
  float p[kN][kTiles][4];
  soften<kMask>(scores, s, live, p);
  emit.template tiles<kMask>(scores, s, live, kFirst);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const float2 scale = load(kLayout.v_scale_offset, t);
    uint32_t b[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      b[n][0] = transpose_8x8(pack_f16(p[n][t][0] * scale.x, p[n][t][1] * scale.x));
      b[n][1] = transpose_8x8(pack_f16(p[n][t][2] * scale.y, p[n][t][3] * scale.y));
    }
    weigh_codes<kHeadDim, kFormat>(s, page.shared, kFirst + t, b);
  }
}

template <int kFirst, int kMaskFrom, int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_from(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                            const CodeLive& live, const Emit& emit) {
  constexpr int kAll = page_layout(kFormat, kHeadDim).k.tiles();
  // Tiles that go through the stages together: what the registers allow.
  constexpr int kMost = kN == 1 ? 4 : kHeadDim == 256 ? 1 : 2;
  if constexpr (kFirst < kAll) {
    constexpr int kTiles = kAll - kFirst < kMost ? kAll - kFirst : kMost;
    attend_tiles<kFirst, kTiles, kMaskFrom, kHeadDim, kFormat>(s, page, live, emit);
    attend_from<kFirst + kTiles, kMaskFrom, kHeadDim, kFormat>(s, page, live, emit);
  }
}

template <int kHeadDim, Format kFormat, int kN, class Emit>
__device__ __forceinline__ void attend_codes(LaneState<kHeadDim, kN>& s, const PageInput& page,
                                             const Emit& emit) {
  constexpr PageLayout kLayout = page_layout(kFormat, kHeadDim);
  constexpr int kWholeTiles = kLayout.slots / 16;
  const CodeLive live(page.live);
  // The largest state spills anyway: one variant of the code is enough for it.
  constexpr bool kPlain = kHeadDim * kN <= 256;
  if (kPlain && page.live == kLayout.full_mask()) {
    attend_from<0, kPlain ? kWholeTiles : 0, kHeadDim, kFormat>(s, page, live, emit);
  } else {
    attend_from<0, 0, kHeadDim, kFormat>(s, page, live, emit);
  }
}

}  // namespace thinkv::cuda
