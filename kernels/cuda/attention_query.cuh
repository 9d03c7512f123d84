// attention_query.cuh: q from the engine's tensor to B fragments, rotated on the way.
//
// Lane (g, c) holds of head g the dims 16 slice + 8 half + 2c + pair, so a butterfly of distance 1
// is inside a pair, 2 and 4 are shuffles across c, 8 is between halves and the rest between slices.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_state.cuh"
#include "thinkv/internal/rotation.h"

namespace thinkv::cuda {

// One fp32 pair of an engine's tensor.
[[nodiscard]] __device__ __forceinline__ float2 load_pair(const void* tensor, Element element,
                                                          uint64_t index) {
  if (element == Element::kF32) {
    return *reinterpret_cast<const float2*>(static_cast<const float*>(tensor) + index);
  }
  const uint32_t raw =
      *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(tensor) + index);
  if (element == Element::kF16) return unpack_f16(raw);
  return make_float2(__uint_as_float(raw << 16), __uint_as_float(raw & 0xFFFF0000u));
}

[[nodiscard]] __device__ __forceinline__ float negate_if(float x, uint64_t bits, int bit) {
  return __uint_as_float(__float_as_uint(x) ^ (static_cast<uint32_t>(bits >> bit) & 1u) << 31);
}
// (a, b) := (a + b, a - b)
__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}
// The same with the thread whose number differs in bit `x`.
[[nodiscard]] __device__ __forceinline__ float butterfly_across(float mine, uint32_t x) {
  const float other = __shfl_xor_sync(kFullWarp, mine, x);
  return (threadIdx.x & x) != 0 ? other - mine : mine + other;
}

// x[slice][2 half + pair] := H D x / sqrt(d)
template <int kHeadDim>
__device__ __forceinline__ void rotate_query(float (&x)[kHeadDim / 16][4]) {
  constexpr int kSlices = kHeadDim / 16;
  const uint32_t c = threadIdx.x % 4;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const uint64_t signs = rotation_word(s / 4) >> (2 * c);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[s][i] = negate_if(x[s][i], signs, 16 * (s % 4) + 8 * (i / 2) + i % 2);
    }
    butterfly(x[s][0], x[s][1]);
    butterfly(x[s][2], x[s][3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[s][i] = butterfly_across(x[s][i], 1);
      x[s][i] = butterfly_across(x[s][i], 2);
    }
    butterfly(x[s][0], x[s][2]);
    butterfly(x[s][1], x[s][3]);
  }
#pragma unroll
  for (int distance = 1; distance < kSlices; distance *= 2) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      if ((s & distance) != 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) butterfly(x[s][i], x[s + distance][i]);
    }
  }
#pragma unroll
  for (auto& slice : x) {
#pragma unroll
    for (float& value : slice) value *= rotation_norm(kHeadDim);
  }
}

// Result: q rounded to fp16, summed over the dims that this thread holds.
template <int kHeadDim>
__device__ __forceinline__ float pack_query(uint32_t (&q)[kHeadDim / 16][2],
                                            const float (&x)[kHeadDim / 16][4], Fold fold) {
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    const uint32_t factor = fold_factor(fold_exponents(fold), s);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t rounded = pack_f16(x[s][2 * half], x[s][2 * half + 1]);
      const float2 value = unpack_f16(rounded);
      sum += value.x + value.y;
      q[s][half] = fold == Fold::kBfloat ? pack_bf16(x[s][2 * half], x[s][2 * half + 1])
                                         : mul_f16x2(rounded, factor);
    }
  }
  return sum;
}

template <int kHeadDim, int kN>
__device__ __forceinline__ void load_query(LaneState<kHeadDim, kN>& s, const AttendParams& p,
                                           uint32_t lane_index, Fold fold) {
  constexpr int kSlices = kHeadDim / 16;
  const uint32_t g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const uint32_t head = 8 * n + g;
    const uint64_t row = (uint64_t{lane_index} * p.group + min(head, p.group - 1)) * kHeadDim;
    float x[kSlices][4];
#pragma unroll
    for (int i = 0; i < 2 * kSlices; ++i) {
      const float2 pair = load_pair(p.q, p.q_element, row + 8 * i + 2 * c);
      x[i / 2][i % 2 * 2] = head < p.group ? pair.x : 0.0f;
      x[i / 2][i % 2 * 2 + 1] = head < p.group ? pair.y : 0.0f;
    }
    if (p.rotate) rotate_query<kHeadDim>(x);
    float sum = pack_query<kHeadDim>(s.q[n], x, fold);
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    s.q_sum[n][0] = __shfl_sync(kFullWarp, sum, 8 * c);
    s.q_sum[n][1] = __shfl_sync(kFullWarp, sum, 8 * c + 4);
  }
}

// Asks for the q of a lane that comes soon, so that load_query() need not wait for it.
template <int kHeadDim>
__device__ __forceinline__ void prefetch_query(const AttendParams& p, uint32_t lane_index) {
  constexpr uint32_t kLine = 128;
  const uint32_t bytes = p.group * kHeadDim * element_bytes(p.q_element);
  const auto* row = static_cast<const unsigned char*>(p.q) + uint64_t{lane_index} * bytes;
  for (uint32_t at = threadIdx.x % 32 * kLine; at < bytes; at += 32 * kLine) prefetch_l1(row + at);
}

// Makes the state fit the next page's format. Among the fp16 forms q changes by powers of two;
// bf16 rounds otherwise, so q comes anew from memory.
template <int kHeadDim, int kN>
__device__ __forceinline__ void change_format(LaneState<kHeadDim, kN>& s, const AttendParams& p,
                                              uint32_t lane_index, Format format) {
  const auto entry = [](uint64_t table, Format f) {
    return static_cast<uint32_t>(table >> (4 * static_cast<uint32_t>(f))) & 15u;
  };
  const Fold from = static_cast<Fold>(entry(kFormatTable.fold, s.format));
  const Fold to = static_cast<Fold>(entry(kFormatTable.fold, format));
  change_value_unit(s, 1u << entry(kFormatTable.value_bits_log2, format));
  if (s.format == Format::kNone || (from != to && (from == Fold::kBfloat || to == Fold::kBfloat))) {
    load_query(s, p, lane_index, to);
  } else if (from != to) {
    // Bytes of 15 + to - from.
    const uint32_t exponents = fold_exponents(to) + 0x0F0F0F0Fu - fold_exponents(from);
#pragma unroll
    for (int slice = 0; slice < kHeadDim / 16; ++slice) {
      const uint32_t factor = fold_factor(exponents, slice);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        s.q[n][slice][0] = mul_f16x2(s.q[n][slice][0], factor);
        s.q[n][slice][1] = mul_f16x2(s.q[n][slice][1], factor);
      }
    }
  }
  s.format = format;
}

}  // namespace thinkv::cuda
