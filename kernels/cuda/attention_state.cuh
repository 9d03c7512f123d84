// attention_state.cuh: what one warp keeps in registers about the lane that it works on.
//
// The page is already in fragment order (page_format.h), and a masked code is an fp16 subnormal, so
// unpacking is one AND a register. What that leaves to undo:
//   code n of a byte counts 2^(b n) too much: K, folded into that k-slice of q; V, constant for an
//     output row, undone once at the end;
//   codes are unsigned: the K bias x sum(q) is the accumulator's start value, the V bias x sum(P)
//     comes from one more MMA, whose A rows are all the bias, and is subtracted at the end;
//   the scale of a token multiplies its score, and its probability before that is packed to fp16.
// The running maximum moves only when a score exceeds it by 2^8 (P <= 256 fits fp16).
// Fragment coordinates: lane (g, c) = (thread / 4, thread % 4). Query heads are columns: 8 a tile
// of MMA columns, kN such tiles.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/ptx.cuh"
#include "thinkv/internal/page_format.h"

namespace thinkv::cuda {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;
constexpr float kNegativeInfinity = -__builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLazyLimit = 256.0f;  // largest P relative to the running maximum

// How q lies in the registers: as the K codes of a format want it.
enum class Fold : uint32_t {
  kPlain = 0,  // fp16
  kBfloat = 1,
  kTwoBits = 2,   // fp16, slices scaled against the position of 2-bit codes in a byte
  kFourBits = 4,  // the same for 4 bits
};
[[nodiscard]] __host__ __device__ constexpr Fold fold_of(Format format) {
  const VectorCoding k = format_info(format).k;
  if (k.coding == Coding::kBfloat) return Fold::kBfloat;
  if (k.coding != Coding::kUniform || k.bits == 8) return Fold::kPlain;
  return k.bits == 4 ? Fold::kFourBits : Fold::kTwoBits;
}
// Bits of V codes that stay where they are in a half; 16: values as they are.
[[nodiscard]] __host__ __device__ constexpr uint32_t value_bits_of(Format format) {
  const VectorCoding v = format_info(format).v;
  return v.coding == Coding::kUniform ? v.bits : 16;
}
// Both of them for a format that is known only when the kernel runs: four bits each a format.
struct FormatTable {
  uint64_t fold = 0, value_bits_log2 = 0;
};
[[nodiscard]] __host__ __device__ consteval FormatTable make_format_table() {
  FormatTable table;
  for (uint32_t f = 1; f < kFormatCount; ++f) {
    const uint32_t bits = value_bits_of(static_cast<Format>(f));
    const uint64_t log2 = bits == 16 ? 4 : bits == 8 ? 3 : bits == 4 ? 2 : 1;
    table.fold |= static_cast<uint64_t>(fold_of(static_cast<Format>(f))) << (4 * f);
    table.value_bits_log2 |= log2 << (4 * f);
  }
  return table;
}
inline constexpr FormatTable kFormatTable = make_format_table();

// 2^exponent, exactly.
[[nodiscard]] __host__ __device__ __forceinline__ constexpr float power_of_2(int exponent) {
  return exponent < 0 ? 1.0f / power_of_2(-exponent) : static_cast<float>(uint32_t{1} << exponent);
}
// log2 of the factors of k-slices of q, one byte for each of slice % 4, plus 15: as fp16 exponents.
// Centred: fp16 has room on both sides.
[[nodiscard]] __device__ __forceinline__ uint32_t fold_exponents(Fold fold) {
  return fold == Fold::kFourBits ? 0x0D110D11u : fold == Fold::kTwoBits ? 0x0C0E1012u : 0x0F0F0F0Fu;
}
// The fp16 pair of 2^(byte - 15).
[[nodiscard]] __device__ __forceinline__ uint32_t fold_factor(uint32_t exponents, int slice) {
  return ((exponents >> (8 * (slice % 4))) & 0xFFu) * 0x04000400u;
}
// log2 of what a score's accumulator counts for in true units of the codes.
template <Fold kFold>
constexpr int kScoreExponent = kFold == Fold::kFourBits  ? 22
                               : kFold == Fold::kTwoBits ? 21
                                                         : 24;
// log2 of what an output row of dim 8 i + g counts for, while V codes have `bits`: a byte for each
// of i % 4.
[[nodiscard]] __device__ __forceinline__ uint32_t value_exponents(uint32_t bits) {
  return bits == 2 ? 0x12141618u : bits == 4 ? 0x14181418u : bits == 8 ? 0x18181818u : 0u;
}

template <int kHeadDim, int kN>
struct LaneState {
  static constexpr int kSlices = kHeadDim / 16;
  uint32_t q[kN][kSlices][2];  // B fragments of head g
  float q_sum[kN][2];          // sum over dims of the fp16 q of heads 2c, 2c + 1
  float out[kN][kSlices][4];   // rows 16 m + g (0, 1) and + 8 (2, 3); heads 2c, 2c + 1
  float bias[kN][4];           // (0, 1): what the codes' bias adds to every dim
  float maximum[kN][2], sum[kN][2];
  Format format;  // what q and out are made for; kNone: q is not loaded
  uint32_t value_bits;
};

template <int kHeadDim, int kN>
__device__ __forceinline__ void begin_lane(LaneState<kHeadDim, kN>& s) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (auto& tile : s.out[n]) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
    s.bias[n][0] = s.bias[n][1] = s.bias[n][2] = s.bias[n][3] = 0.0f;
    s.maximum[n][0] = s.maximum[n][1] = kNegativeInfinity;
    s.sum[n][0] = s.sum[n][1] = 0.0f;
  }
  s.format = Format::kNone;
  s.value_bits = 16;
}

// Every output row in the unit of V codes of `bits`.
template <int kHeadDim, int kN>
__device__ __forceinline__ void change_value_unit(LaneState<kHeadDim, kN>& s, uint32_t bits) {
  if (s.value_bits == bits) return;
  const uint32_t from = value_exponents(s.value_bits), to = value_exponents(bits);
  float factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t up = (from >> (8 * i)) & 0xFFu, down = (to >> (8 * i)) & 0xFFu;
    factor[i] = __uint_as_float((127 + up - down) << 23);
  }
#pragma unroll
  for (int m = 0; m < LaneState<kHeadDim, kN>::kSlices; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      s.out[n][m][0] *= factor[m % 2 * 2];
      s.out[n][m][1] *= factor[m % 2 * 2];
      s.out[n][m][2] *= factor[m % 2 * 2 + 1];
      s.out[n][m][3] *= factor[m % 2 * 2 + 1];
    }
  }
  s.value_bits = bits;
}

// The outputs in true units, not yet divided by the sum, which every thread has afterwards.
template <int kHeadDim, int kN>
__device__ __forceinline__ void finish_lane(LaneState<kHeadDim, kN>& s) {
  change_value_unit(s, 16);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int x = 4; x < 32; x *= 2) s.sum[n][h] += __shfl_xor_sync(kFullWarp, s.sum[n][h], x);
#pragma unroll
      for (auto& tile : s.out[n]) {
        tile[h] -= s.bias[n][h];
        tile[h + 2] -= s.bias[n][h];
      }
    }
  }
}

[[nodiscard]] __device__ __forceinline__ float log_sum_exp_2(float maximum, float sum) {
  return sum > 0.0f ? maximum + log2f(sum) : kNegativeInfinity;
}

}  // namespace thinkv::cuda
