// codec_groups.cuh: nvfp4 and ternary codes with one e4m3 scale per 16 values. See codec.cuh for
// who holds what.
#pragma once

#include <cstdint>

#include "kernels/cuda/codec_uniform.cuh"

namespace thinkv::cuda::codec_detail {

template <int kDim, bool kIsK>
__device__ __forceinline__ void encode_e2m1(const float (&x)[kDim / 8], const VectorPlace& to,
                                            bool active) {
  Codes<kDim, 4> codes;
#pragma unroll
  for (int s = 0; s < kDim / 16; ++s) {  // a group of 16 dims is x[2 s] and x[2 s + 1] of eight
    const float largest = max_of_eight(fmaxf(fabsf(x[2 * s]), fabsf(x[2 * s + 1])));
    const uint8_t scale = e4m3_from_float(exact_div(largest, kernels::kE2m1Max));
    const float inv = inverse(e4m3_to_float(scale));
    codes.set(2 * s, e2m1_from_float(exact_mul(x[2 * s], inv)));
    codes.set(2 * s + 1, e2m1_from_float(exact_mul(x[2 * s + 1], inv)));
    if (active && threadIdx.x % 8 == static_cast<uint32_t>(s) % 8) to.scales[s] = scale;
  }
  if (active) put_codes<kDim, 4, kIsK>(to.codes, to.slots, to.slot, codes);
}

// Descending; a bitonic network, so that the values stay in registers.
template <int kSize, int kStep>
__device__ __forceinline__ void sort_step(float (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if ((i & kStep) != 0) continue;
    const int j = i | kStep;
    const float high = fmaxf(v[i], v[j]), low = fminf(v[i], v[j]);
    const bool descending = (i & kSize) == 0;
    v[i] = descending ? high : low;
    v[j] = descending ? low : high;
  }
  if constexpr (kStep > 1) sort_step<kSize, kStep / 2>(v);
}
__device__ __forceinline__ void sort_16(float (&v)[16]) {
  sort_step<2, 1>(v);
  sort_step<4, 2>(v);
  sort_step<8, 4>(v);
  sort_step<16, 8>(v);
}

// The e4m3 scale of a group of 16, two values a thread.
[[nodiscard]] __device__ __forceinline__ uint8_t ternary_scale(float a, float b) {
  float v[16];
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const uint32_t from = threadIdx.x % 32 / 8 * 8 + t;
    v[2 * t] = __shfl_sync(kAllLanes, fabsf(a), from);
    v[2 * t + 1] = __shfl_sync(kAllLanes, fabsf(b), from);
  }
  sort_16(v);
  float sum = 0.0f, best_gain = 0.0f, best_scale = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    sum = exact_add(sum, v[i]);
    const float count = static_cast<float>(i + 1);
    const float gain = exact_div(exact_mul(sum, sum), count);
    if (!(gain > best_gain)) continue;
    best_gain = gain;
    best_scale = exact_div(sum, count);
  }
  return e4m3_from_float(best_scale);
}
[[nodiscard]] __device__ __forceinline__ uint32_t ternary_code(float x, float scale) {
  if (scale == 0.0f || fabsf(x) <= exact_mul(scale, 0.5f)) return kernels::kTernaryZero;
  return x > 0.0f ? kernels::kTernaryZero + 1 : kernels::kTernaryZero - 1;
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void encode_ternary(const float (&x)[kDim / 8], const VectorPlace& to,
                                               bool active) {
  uint64_t packed = 0;
  // One group's code, not sixteen copies of it: the pair is picked out of the registers.
#pragma unroll 1
  for (int s = 0; s < kDim / 16; ++s) {
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      if (i == s) a = x[2 * i], b = x[2 * i + 1];
    }
    const uint8_t code = ternary_scale(a, b);
    const float scale = e4m3_to_float(code);
    packed |= uint64_t{ternary_code(a, scale) | ternary_code(b, scale) << 2} << (4 * s);
    if (active && threadIdx.x % 8 == 0) to.scales[s] = code;
  }
  Codes<kDim, 2> codes;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) codes.set(i, static_cast<uint32_t>(packed >> (2 * i)) & 3u);
  if (active) put_codes<kDim, 2, kIsK>(to.codes, to.slots, to.slot, codes);
}

[[nodiscard]] __device__ __forceinline__ float e2m1_value(uint32_t code) {
  const uint32_t exponent = (code >> 1) & 3u, mantissa = code & 1u;
  const float magnitude = exponent == 0 ? 0.5f * static_cast<float>(mantissa)
                                        : __uint_as_float((exponent + 126) << 23 | mantissa << 22);
  return (code & 8u) != 0 ? -magnitude : magnitude;
}

template <int kDim, int kBits, bool kIsK>
__device__ __forceinline__ void decode_groups(float (&x)[kDim / 8], const VectorPlace& from) {
  Codes<kDim, kBits> codes;
  get_codes<kDim, kBits, kIsK>(from.codes, from.slots, from.slot, codes);
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const float scale = e4m3_to_float(from.scales[i / 2]);
    const float value =
        kBits == 4 ? e2m1_value(codes.get(i))
                   : static_cast<float>(codes.get(i)) - static_cast<float>(kernels::kTernaryZero);
    x[i] = exact_mul(value, scale);
  }
}

}  // namespace thinkv::cuda::codec_detail
