// vec.h: eight fp32 lanes, written once for AVX2 and once for any machine.
//
// The element-wise operators are the compiler's own vector extension, so both builds round alike;
// what differs by instruction set is listed here. The fused multiply-add is for attention only:
// codecs and rotations must not contract.
#pragma once

#include <cstdint>
#include <cstring>

#if THINKV_HOST_AVX2
#include <immintrin.h>
#endif

#include "kernels/codec_rule.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
}  // namespace thinkv::kernels

#define THINKV_LANE_INLINE inline __attribute__((always_inline))

#include "kernels/host/isa_begin.inc"

inline constexpr uint32_t kLanes = 8;

THINKV_LANE_INLINE F8 load(const float* p) {
  F8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
THINKV_LANE_INLINE void store(float* p, F8 v) {
  std::memcpy(p, &v, sizeof(v));
}
THINKV_LANE_INLINE F8 splat(float x) {
  return F8{x, x, x, x, x, x, x, x};
}
THINKV_LANE_INLINE U8 bits_of(F8 v) {
  return reinterpret_cast<U8>(v);
}
THINKV_LANE_INLINE F8 as_float(U8 v) {
  return reinterpret_cast<F8>(v);
}
THINKV_LANE_INLINE F8 abs(F8 v) {
  return as_float(bits_of(v) & 0x7FFF'FFFFu);
}
// Exact: every lane is below 2^24.
THINKV_LANE_INLINE F8 small_to_float(U8 v) {
  return __builtin_convertvector(reinterpret_cast<I8>(v), F8);
}
// Every lane is in the range of int32.
THINKV_LANE_INLINE I8 truncate(F8 v) {
  return __builtin_convertvector(v, I8);
}
// all-ones where `mask` is set
THINKV_LANE_INLINE F8 select(I8 mask, F8 a, F8 b) {
  const U8 m = reinterpret_cast<U8>(mask);
  return as_float((bits_of(a) & m) | (bits_of(b) & ~m));
}
// b where a lane of a is NaN, as minps and maxps.
THINKV_LANE_INLINE F8 min(F8 a, F8 b) {
#if THINKV_HOST_AVX2
  return reinterpret_cast<F8>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a < b, a, b);
#endif
}
THINKV_LANE_INLINE F8 max(F8 a, F8 b) {
#if THINKV_HOST_AVX2
  return reinterpret_cast<F8>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a > b, a, b);
#endif
}
// finite_input of codec_rule.h.
THINKV_LANE_INLINE F8 finite(F8 x) {
  const F8 number = select(x == x, x, splat(0.0f));
  return min(max(number, splat(-kFiniteMax)), splat(kFiniteMax));
}

// Every lane is in the range of int32.
THINKV_LANE_INLINE F8 floor(F8 v) {
#if THINKV_HOST_AVX2
  return reinterpret_cast<F8>(_mm256_floor_ps(reinterpret_cast<__m256>(v)));
#else
  const F8 whole = __builtin_convertvector(truncate(v), F8);
  return whole - select(whole > v, splat(1.0f), splat(0.0f));
#endif
}
// a * b + c, rounded once where the machine can.
THINKV_LANE_INLINE F8 fused(F8 a, F8 b, F8 c) {
#if THINKV_HOST_AVX2
  return reinterpret_cast<F8>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
THINKV_LANE_INLINE float fused(float a, float b, float c) {
#if THINKV_HOST_AVX2
  return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
#else
  return a * b + c;
#endif
}

// The eight lanes added by halves: 4, 2, 1 (the fold of codec_rule.h).
THINKV_LANE_INLINE float fold(F8 v) {
  const float a0 = v[0] + v[4], a1 = v[1] + v[5], a2 = v[2] + v[6], a3 = v[3] + v[7];
  return (a0 + a2) + (a1 + a3);
}
THINKV_LANE_INLINE float largest(F8 v) {
  const F8 a = max(v, F8{v[4], v[5], v[6], v[7], v[4], v[5], v[6], v[7]});
  const F8 b = max(a, F8{a[2], a[3], a[2], a[3], a[2], a[3], a[2], a[3]});
  return b[0] > b[1] ? b[0] : b[1];
}

// Eight halves, one in the low 16 bits of each lane (the rest is 0), to fp32.
THINKV_LANE_INLINE F8 halves_to_float(U8 halves) {
#if THINKV_HOST_AVX2
  const __m256i v = reinterpret_cast<__m256i>(halves);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return reinterpret_cast<F8>(_mm256_cvtph_ps(packed));
#else
  F8 out;
  for (uint32_t i = 0; i < kLanes; ++i) out[i] = fp16_to_float(static_cast<uint16_t>(halves[i]));
  return out;
#endif
}

#include "kernels/host/isa_end.inc"
