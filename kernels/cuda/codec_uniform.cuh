// codec_uniform.cuh: uniform codes of 8, 4 and 2 bits with one fp16 scale a vector. See codec.cuh
// for who holds what.
#pragma once

#include <cstdint>

#include "kernels/codec_rule.h"
#include "kernels/cuda/codec_place.cuh"
#include "kernels/cuda/codec_sites.cuh"
#include "kernels/cuda/ptx.cuh"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda::codec_detail {

[[nodiscard]] __device__ __forceinline__ float inverse(float scale) {
  return scale == 0.0f ? 0.0f : exact_div(1.0f, scale);
}
[[nodiscard]] __device__ __forceinline__ uint16_t fp16_scale(float scale) {
  return static_cast<uint16_t>(
      pack_f16(kernels::kFp16Max < scale ? kernels::kFp16Max : scale, 0.0f));
}

// Recursive, so that every index is known at compile time and v stays in registers.
template <int kHalf, int kCount>
__device__ __forceinline__ void fold_halves(float (&v)[kCount]) {
  if constexpr (kHalf > 0) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) v[i] = exact_add(v[i], v[i + kHalf]);
    fold_halves<kHalf / 2>(v);
  }
}
// Consumes v; all eight threads get the sum.
template <int kCount>
[[nodiscard]] __device__ __forceinline__ float fold(float (&v)[kCount]) {
  fold_halves<kCount / 2>(v);
  float sum = v[0];
#pragma unroll
  for (int x = 4; x > 0; x >>= 1) sum = exact_add(sum, __shfl_xor_sync(kAllLanes, sum, x));
  return sum;
}
[[nodiscard]] __device__ __forceinline__ float max_of_eight(float m) {
  for (int x = 4; x > 0; x /= 2) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, x));
  return m;
}
template <int kCount>
[[nodiscard]] __device__ __forceinline__ float abs_max(const float (&x)[kCount]) {
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) m = fmaxf(m, fabsf(x[i]));
  return max_of_eight(m);
}

// The code as a float, less 2^(b - 1). Conversions to and from integers take four times the time of
// an addition, so codes stay floats until they are stored.
template <int kBits>
[[nodiscard]] __device__ __forceinline__ float uniform_step(float x, float inv) {
  constexpr float kHalf = static_cast<float>(1 << (kBits - 1));
  const float step = floorf(exact_mul(x, inv));
  return fminf(fmaxf(step, -kHalf), kHalf - 1.0f);
}
template <int kBits>
[[nodiscard]] __device__ __forceinline__ uint32_t uniform_code(float x, float inv) {
  constexpr float kHalf = static_cast<float>(1 << (kBits - 1));
  // The code moves into the lowest bits of the mantissa.
  constexpr float kUnitInLastPlace = 0x1p23f;
  const float moved = exact_add(uniform_step<kBits>(x, inv), kHalf + kUnitInLastPlace);
  return __float_as_uint(moved) & ((1u << kBits) - 1);
}

// One clipping factor: 1 / s0, the least-squares scale of the codes at s0, and its error.
struct Clipping {
  float inv;
  uint16_t scale;
  float error;
};

template <int kDim>
[[nodiscard]] __device__ __forceinline__ Clipping clip_at(const float (&x)[kDim / 8], float start) {
  constexpr int kCount = kDim / 8;
  constexpr float kHalfStep = 0.5f;  // a step less the bias: step + 2^3 - 7.5, exact
  const float start_scale = fp16_to_float(fp16_scale(start));
  Clipping result{inverse(start_scale), 0, 0.0f};
  float c[kCount], products[kCount], squares[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    c[i] = exact_add(uniform_step<4>(x[i], result.inv), kHalfStep);
    products[i] = exact_mul(x[i], c[i]);
    squares[i] = exact_mul(c[i], c[i]);
  }
  const float product = fold(products), square = fold(squares);
  if (start_scale != 0.0f) result.scale = fp16_scale(exact_div(product, square));
  const float scale = fp16_to_float(result.scale);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float difference = exact_sub(x[i], exact_mul(c[i], scale));
    products[i] = exact_mul(difference, difference);
  }
  result.error = fold(products);
  return result;
}

template <int kDim>
__device__ __forceinline__ uint16_t best_clipping(const float (&x)[kDim / 8],
                                                  Codes<kDim, 4>& codes) {
  constexpr float kFirst = kernels::kClipFactors[0], kSecond = kernels::kClipFactors[1],
                  kThird = kernels::kClipFactors[2];
  const float widest = exact_div(abs_max(x), kernels::uniform_bias(4));
  Clipping best = clip_at<kDim>(x, exact_mul(widest, kFirst));
#pragma unroll 1
  for (int f = 1; f < 3; ++f) {
    const Clipping next = clip_at<kDim>(x, exact_mul(widest, f == 1 ? kSecond : kThird));
    if (next.error < best.error) best = next;
  }
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) codes.set(i, uniform_code<4>(x[i], best.inv));
  return best.scale;
}

template <int kDim, int kBits>
__device__ __forceinline__ uint16_t uniform_codes(const float (&x)[kDim / 8],
                                                  Codes<kDim, kBits>& codes) {
  constexpr int kCount = kDim / 8;
  uint16_t scale;
  if constexpr (kBits == 2) {
    float squares[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) squares[i] = exact_mul(x[i], x[i]);
    const float mean = exact_div(fold(squares), static_cast<float>(kDim));
    scale = fp16_scale(exact_mul(kernels::kRmsFactor, exact_sqrt(mean)));
  } else {
    scale = fp16_scale(exact_div(abs_max(x), kernels::uniform_bias(kBits)));
  }
  const float inv = inverse(fp16_to_float(scale));
#pragma unroll
  for (int i = 0; i < kCount; ++i) codes.set(i, uniform_code<kBits>(x[i], inv));
  return scale;
}

template <int kDim, int kBits, bool kIsK>
__device__ __forceinline__ void encode_uniform(const float (&x)[kDim / 8], const VectorPlace& to,
                                               bool active) {
  Codes<kDim, kBits> codes;
  uint16_t scale;
  if constexpr (kBits == 4) {
    scale = best_clipping<kDim>(x, codes);
  } else {
    scale = uniform_codes<kDim, kBits>(x, codes);
  }
  if (!active) return;
  put_codes<kDim, kBits, kIsK>(to.codes, to.slots, to.slot, codes);
  if (threadIdx.x % 8 == 0) *reinterpret_cast<uint16_t*>(to.scales) = scale;
}

template <int kDim, int kBits, bool kIsK>
__device__ __forceinline__ void decode_uniform(float (&x)[kDim / 8], const VectorPlace& from) {
  Codes<kDim, kBits> codes;
  get_codes<kDim, kBits, kIsK>(from.codes, from.slots, from.slot, codes);
  const float scale = fp16_to_float(*reinterpret_cast<const uint16_t*>(from.scales));
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const float c = static_cast<float>(codes.get(i)) - kernels::uniform_bias(kBits);
    x[i] = exact_mul(c, scale);
  }
}

}  // namespace thinkv::cuda::codec_detail
