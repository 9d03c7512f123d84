// attention_lane.cuh: what one warp computes for one lane: scores, probabilities, outputs.
//
// The page is already in fragment order (page_format.h), and a masked code is an fp16 subnormal, so
// unpacking is one AND a register. What that leaves to undo:
//   code n of a byte counts 2^(b n) too much: K, folded into that k-slice of Q; V, constant for an
//     output row, undone once at the end;
//   codes are unsigned: the K bias x sum(Q) is the accumulator's start value, the V bias x sum(P)
//     is subtracted at the end;
//   the scale of a token multiplies its score, and its probability before it is packed to fp16.
// The running maximum moves only when a score exceeds it by 2^8 (P <= 256 fits fp16).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/ptx.cuh"
#include "thinkv/internal/page_format.h"

namespace thinkv::cuda {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;
constexpr float kNegativeInfinity = -__builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLazySlack = 8.0f;  // log2: how far a score may exceed the running maximum

// Everything one warp keeps about the lane that it works on.
template <int kHeadDim>
struct LaneState {
  static constexpr int kSlices = kHeadDim / 16;
  uint32_t q[kSlices][2];  // fp16 pairs of head g, slice factors of q_bits folded in
  float q_sum[2];          // sum of the fp16 q of heads 2c, 2c + 1
  float out[kSlices][4];   // rows 16 m + g (0, 1) and + 8 (2, 3); heads 2c, 2c + 1
  float maximum[2], sum[2], bias[2];
  uint32_t q_bits, v_bits;
};

// log2 of what an output row of dim 8 i + g carries too much, while V codes have `bits`.
__device__ __forceinline__ float v_unit(uint32_t bits, int i) {
  if (bits == 16) return 1.0f;
  const uint32_t position = bits == 8 ? 0u : bits == 4 ? i % 2 : i % 4;
  return exp2f(24.0f - static_cast<float>(bits * position));
}

template <int kHeadDim>
__device__ __forceinline__ void load_q(LaneState<kHeadDim>& s, const AttendParams& p,
                                       uint32_t lane_index, uint32_t bits) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const bool head = g < p.group;
  const uint32_t* row = reinterpret_cast<const uint32_t*>(
      p.q + (uint64_t{lane_index} * p.group + (head ? g : 0)) * kHeadDim);
  const uint32_t per_byte = bits == 16 ? 1 : 8 / bits;
  float sum = 0.0f;
#pragma unroll
  for (int slice = 0; slice < LaneState<kHeadDim>::kSlices; ++slice) {
    // Exact: a power of two.
    const float factor = exp2f(static_cast<float>(bits * (per_byte - 1 - slice % per_byte)));
    const __half2 factor2 = __float2half2_rn(bits == 16 ? 1.0f : factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t raw = head ? row[slice * 8 + half * 4 + c] : 0u;
      const __half2 value = *reinterpret_cast<const __half2*>(&raw);
      sum += __low2float(value) + __high2float(value);
      const __half2 scaled = __hmul2(value, factor2);
      s.q[slice][half] = *reinterpret_cast<const uint32_t*>(&scaled);
    }
  }
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  s.q_sum[0] = __shfl_sync(kFullWarp, sum, 8 * c);
  s.q_sum[1] = __shfl_sync(kFullWarp, sum, 8 * c + 4);
  s.q_bits = bits;
}

template <int kHeadDim>
__device__ __forceinline__ void begin_lane(LaneState<kHeadDim>& s) {
#pragma unroll
  for (auto& tile : s.out) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    s.maximum[h] = kNegativeInfinity;
    s.sum[h] = 0.0f;
    s.bias[h] = 0.0f;
  }
  s.q_bits = 0;  // loaded when the first page says for which format
  s.v_bits = 4;
}

template <int kHeadDim>
__device__ __forceinline__ void change_v_unit(LaneState<kHeadDim>& s, uint32_t bits) {
#pragma unroll
  for (int m = 0; m < LaneState<kHeadDim>::kSlices; ++m) {
    const float low = v_unit(s.v_bits, 2 * m) / v_unit(bits, 2 * m);
    const float high = v_unit(s.v_bits, 2 * m + 1) / v_unit(bits, 2 * m + 1);
    s.out[m][0] *= low;
    s.out[m][1] *= low;
    s.out[m][2] *= high;
    s.out[m][3] *= high;
  }
  s.v_bits = bits;
}

// Scores of one tile of 16 slots: K codes of `kBits`. d: rows g = slot 2g, g + 8 = slot 2g + 1.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void score_codes(float (&d)[4], const LaneState<kHeadDim>& s,
                                            uint32_t tile, uint32_t rows) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kParts = kHeadDim * kBits * 2 / 128 >= 4 ? 4 : 2;  // 32-bit parts of a word
  constexpr int kBlocks = kHeadDim * kBits * 2 / (128 * 4) >= 1 ? kHeadDim * kBits / 256 : 1;
  constexpr uint32_t kWord = kParts * 4;
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u;
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const float unit = exp2f(static_cast<float>(-24 + kBits * (kPerByte - 1)));
  const float start = -0.5f * static_cast<float>((1 << kBits) - 1) * unit;
  d[0] = d[2] = start * s.q_sum[0];
  d[1] = d[3] = start * s.q_sum[1];
  const uint32_t row = g < rows ? g : 0;  // a cut tile: rows past its end are masked by `live`
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const uint32_t address = tile + ((block * rows + row) * 4 + c) * kWord;
    uint32_t w[4];
    if constexpr (kParts == 4) {
      const uint4 v = load_shared_16(address);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
      const uint2 v = load_shared_8(address);
      w[0] = v.x, w[1] = v.y;
    }
#pragma unroll
    for (int j = 0; j < kParts; j += 2) {
      const uint32_t odd0 = w[j] >> 8, odd1 = w[j + 1] >> 8;
#pragma unroll
      for (int n = 0; n < kPerByte; ++n) {
        const int slice = block * (kParts / 2) * kPerByte + (j / 2) * kPerByte + n;
        const uint32_t mask = kMask << (kBits * n);
        mma_f16(d, w[j] & mask, odd0 & mask, w[j + 1] & mask, odd1 & mask, s.q[slice][0],
                s.q[slice][1]);
      }
    }
  }
}

// O^T += V^T P of one tile of 16 slots.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void weigh_codes(LaneState<kHeadDim>& s, uint32_t tile, uint32_t rows,
                                            uint32_t b0, uint32_t b1) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kParts = kHeadDim * kBits * 4 / 256 >= 4 ? 4 : 2;
  constexpr int kBlocks = kHeadDim * kBits / 256 >= 1 ? kHeadDim * kBits / 256 : 1;
  constexpr uint32_t kWord = kParts * 4;
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u;
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t column = c < rows ? c : 0;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const uint32_t address = tile + ((block * 8 + g) * rows + column) * kWord;
    uint32_t w[4];
    if constexpr (kParts == 4) {
      const uint4 v = load_shared_16(address);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
      const uint2 v = load_shared_8(address);
      w[0] = v.x, w[1] = v.y;
    }
#pragma unroll
    for (int i = 0; i < kParts * kPerByte; i += 2) {
      // Dims 8 i + g and 8 (i + 1) + g of this block: rows g and g + 8 of output tile i / 2.
      const int low = i / kPerByte, high = (i + 1) / kPerByte;
      const uint32_t mask_low = kMask << (kBits * (i % kPerByte));
      const uint32_t mask_high = kMask << (kBits * ((i + 1) % kPerByte));
      const int m = block * kParts * kPerByte / 2 + i / 2;
      mma_f16(s.out[m], w[low] & mask_low, w[high] & mask_high, (w[low] >> 8) & mask_low,
              (w[high] >> 8) & mask_high, b0, b1);
    }
  }
}

// Turns the scores of a page's tiles into probabilities relative to the running maximum (raising
// it when it must), and masks dead slots: bit 2g of a tile's 16 is row g, bit 2g + 1 row g + 8.
template <int kHeadDim, int kTiles>
__device__ __forceinline__ void soften(float (&d)[kTiles][4], LaneState<kHeadDim>& s, uint64_t live,
                                       bool all_live) {
  const uint32_t g = (threadIdx.x % 32) / 4;
  if (!all_live) {
    const uint64_t mine = live >> (2 * g);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (!((mine >> (16 * t)) & 1u)) d[t][0] = d[t][1] = kNegativeInfinity;
      if (!((mine >> (16 * t + 1)) & 1u)) d[t][2] = d[t][3] = kNegativeInfinity;
    }
  }
  float top[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = fmaxf(d[0][h], d[0][h + 2]);
#pragma unroll
    for (int t = 1; t < kTiles; ++t) top[h] = fmaxf(top[h], fmaxf(d[t][h], d[t][h + 2]));
  }
  const bool exceeds = top[0] > s.maximum[0] + kLazySlack || top[1] > s.maximum[1] + kLazySlack;
  if (__any_sync(kFullWarp, exceeds)) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = top[h];
#pragma unroll
      for (int x = 4; x < 32; x *= 2) m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, x));
      m = fmaxf(m, s.maximum[h]);
      // All dead so far: keep -inf out of the subtraction.
      const float factor = m == kNegativeInfinity ? 1.0f : exp2_approx(s.maximum[h] - m);
      s.maximum[h] = m;
      s.sum[h] *= factor;
      s.bias[h] *= factor;
#pragma unroll
      for (int t = 0; t < LaneState<kHeadDim>::kSlices; ++t) {
        s.out[t][h] *= factor;
        s.out[t][h + 2] *= factor;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float m = s.maximum[h] == kNegativeInfinity ? 0.0f : s.maximum[h];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      d[t][h] = exp2_approx(d[t][h] - m);
      d[t][h + 2] = exp2_approx(d[t][h + 2] - m);
      s.sum[h] += d[t][h] + d[t][h + 2];
    }
  }
}

// One page of uniform codes. All tiles go through each stage together: their MMA chains are
// independent, which hides the latency that a single warp's chain of k-slices would show.
template <int kHeadDim, Format kFormat>
__device__ void attend_codes(LaneState<kHeadDim>& s, const AttendParams& p, uint32_t lane_index,
                             uint32_t page, uint64_t live) {
  static constexpr PageLayout kLayout = page_layout(kFormat, kHeadDim);
  constexpr int kKBits = kLayout.k.bits, kVBits = kLayout.v.bits;
  constexpr int kTiles = static_cast<int>(kLayout.k.tiles());
  const uint32_t g = (threadIdx.x % 32) / 4;
  // The last tile may be cut: its missing rows read other slots' codes and are masked off.
  const bool all_live = kLayout.slots % 16 == 0 && live == kLayout.full_mask();
  if (s.q_bits != kKBits) load_q(s, p, lane_index, kKBits);
  if (s.v_bits != kVBits) change_v_unit(s, kVBits);
  const float k_unit = exp2f(static_cast<float>(24 - kKBits * (8 / kKBits - 1))) * p.scale_log2;
  constexpr float kVBias = 0.5f * static_cast<float>((1 << kVBits) - 1);
  float d[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    score_codes<kHeadDim, kKBits>(d[t], s, page + kLayout.k.tile_offset(t), kLayout.k.tile_rows(t));
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const uint32_t scales = load_shared_4(page + kLayout.k_scale_offset + 2 * (16 * t + 2 * g));
    const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&scales));
    const float even = scale.x * k_unit, odd = scale.y * k_unit;
    d[t][0] *= even;
    d[t][1] *= even;
    d[t][2] *= odd;
    d[t][3] *= odd;
  }
  soften<kHeadDim, kTiles>(d, s, live, all_live);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const uint32_t scales = load_shared_4(page + kLayout.v_scale_offset + 2 * (16 * t + 2 * g));
    const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(&scales));
    float w[4] = {d[t][0] * scale.x, d[t][1] * scale.x, d[t][2] * scale.y, d[t][3] * scale.y};
    if (!all_live) {  // the scale of a dead slot may be any bits: 0 x NaN
      const uint64_t mine = live >> (16 * t + 2 * g);
      if (!(mine & 1u)) w[0] = w[1] = 0.0f;
      if (!(mine & 2u)) w[2] = w[3] = 0.0f;
    }
    const uint32_t even = pack_f16(w[0], w[1]), odd = pack_f16(w[2], w[3]);
    const float2 e = __half22float2(*reinterpret_cast<const __half2*>(&even));
    const float2 o = __half22float2(*reinterpret_cast<const __half2*>(&odd));
    s.bias[0] += kVBias * (e.x + o.x);
    s.bias[1] += kVBias * (e.y + o.y);
    weigh_codes<kHeadDim, kVBits>(s, page + kLayout.v.tile_offset(t), kLayout.v.tile_rows(t),
                                  transpose_8x8(even), transpose_8x8(odd));
  }
}

// One page of 8 slots of fp16 values: rows g of the tile; rows g + 8 stay empty.
template <int kHeadDim>
__device__ void attend_f16(LaneState<kHeadDim>& s, const AttendParams& p, uint32_t lane_index,
                           uint32_t page, uint64_t live_mask) {
  static constexpr PageLayout kLayout = page_layout(Format::kF16, kHeadDim);
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  if (s.q_bits != 16) load_q(s, p, lane_index, 16);
  if (s.v_bits != 16) change_v_unit(s, 16);
  const uint32_t live8 = static_cast<uint32_t>(live_mask) & 0xFFu;
  // soften() wants bit 2g for row g.
  uint32_t live = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) live |= ((live8 >> i) & 1u) << (2 * i);
  float d[1][4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
  for (int block = 0; block < kHeadDim / 32; ++block) {
    const uint4 w = load_shared_16(page + kLayout.k.offset + ((block * 8 + g) * 4 + c) * 16);
    mma_f16(d[0], w.x, 0, w.y, 0, s.q[2 * block][0], s.q[2 * block][1]);
    mma_f16(d[0], w.z, 0, w.w, 0, s.q[2 * block + 1][0], s.q[2 * block + 1][1]);
  }
  d[0][0] *= p.scale_log2;
  d[0][1] *= p.scale_log2;
  soften<kHeadDim, 1>(d, s, live, false);
  const uint32_t b0 = transpose_8x8(pack_f16(d[0][0], d[0][1]));
  // Dead slots may hold any bits: 0 x NaN.
  const uint32_t keep = (((live8 >> (2 * c)) & 1u) ? 0x0000FFFFu : 0u) |
                        (((live8 >> (2 * c + 1)) & 1u) ? 0xFFFF0000u : 0u);
#pragma unroll
  for (int block = 0; block < kHeadDim / 32; ++block) {
    const uint4 w = load_shared_16(page + kLayout.v.offset + ((block * 8 + g) * 4 + c) * 16);
    mma_f16(s.out[2 * block], w.x & keep, w.y & keep, 0, 0, b0, 0);
    mma_f16(s.out[2 * block + 1], w.z & keep, w.w & keep, 0, 0, b0, 0);
  }
}

// The sums of all threads of a column; afterwards every thread has them.
template <int kHeadDim>
__device__ void finish_lane(LaneState<kHeadDim>& s) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int x = 4; x < 32; x *= 2) {
      s.sum[h] += __shfl_xor_sync(kFullWarp, s.sum[h], x);
      s.bias[h] += __shfl_xor_sync(kFullWarp, s.bias[h], x);
    }
  }
}

// Writes scale x (weighted sum of V) of this thread's heads: values [group, head_dim].
template <int kHeadDim>
__device__ __forceinline__ void write_values(const LaneState<kHeadDim>& s, uint32_t group,
                                             float* values, const float (&scale)[2]) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (2 * c + h >= group) continue;
    float* row = values + (2 * c + h) * kHeadDim;
#pragma unroll
    for (int m = 0; m < LaneState<kHeadDim>::kSlices; ++m) {
      row[16 * m + g] = (s.out[m][h] * v_unit(s.v_bits, 2 * m) - s.bias[h]) * scale[h];
      row[16 * m + 8 + g] = (s.out[m][h + 2] * v_unit(s.v_bits, 2 * m + 1) - s.bias[h]) * scale[h];
    }
  }
}

[[nodiscard]] __device__ __forceinline__ float log_sum_exp(float maximum_log2, float sum) {
  return sum > 0.0f ? (maximum_log2 + log2f(sum)) * kLn2 : kNegativeInfinity;
}

}  // namespace thinkv::cuda
