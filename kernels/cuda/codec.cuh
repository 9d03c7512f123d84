// codec.cuh: one vector to codes and back, bit for bit as codec_rule.h says.
//
// Eight threads of a warp hold a vector: thread l owns the dims l + 8 i as x[i]. So the four
// quarters of a warp work on four vectors at once; a byte of a page holds codes of one thread alone
// (all dims of a byte are equal modulo 8); and the fold of codec_rule.h is register additions and
// three shuffles. All 32 threads call these functions with the same formats; a quarter without a
// vector passes active = false and stores nothing.
#pragma once

#include <cstdint>

#include "kernels/codec_rule.h"
#include "kernels/cuda/codec_groups.cuh"
#include "kernels/cuda/codec_uniform.cuh"
#include "kernels/cuda/rows.cuh"

namespace thinkv::cuda {

// x to its place, in `format`.
template <int kDim, bool kIsK>
__device__ __forceinline__ void encode_vector(const float (&x)[kDim / 8], Format format,
                                              const VectorPlace& to, bool active) {
  const VectorCoding coding = coding_of<kIsK>(format);
  if (coding.bits == 16) {
    uint32_t raw[kDim / 8];
    to_16_bits(raw, x, coding.coding == Coding::kBfloat);
    if (active) put_halves<kDim, kIsK>(to.codes, to.slot, raw);
    return;
  }
  float finite[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) finite[i] = kernels::finite_input(x[i]);
  if (coding.coding == Coding::kE2m1)
    return codec_detail::encode_e2m1<kDim, kIsK>(finite, to, active);
  if (coding.coding == Coding::kTernary)
    return codec_detail::encode_ternary<kDim, kIsK>(finite, to, active);
  if (coding.bits == 8) return codec_detail::encode_uniform<kDim, 8, kIsK>(finite, to, active);
  if (coding.bits == 4) return codec_detail::encode_uniform<kDim, 4, kIsK>(finite, to, active);
  codec_detail::encode_uniform<kDim, 2, kIsK>(finite, to, active);
}

// The vector at a place. No shuffles: threads may call it one by one.
template <int kDim, bool kIsK>
__device__ __forceinline__ void decode_vector(float (&x)[kDim / 8], Format format,
                                              const VectorPlace& from) {
  const VectorCoding coding = coding_of<kIsK>(format);
  if (coding.bits == 16) {
    uint32_t raw[kDim / 8];
    get_halves<kDim, kIsK>(from.codes, from.slot, raw);
    from_16_bits(x, raw, coding.coding == Coding::kBfloat);
    return;
  }
  if (coding.coding == Coding::kE2m1) return codec_detail::decode_groups<kDim, 4, kIsK>(x, from);
  if (coding.coding == Coding::kTernary) return codec_detail::decode_groups<kDim, 2, kIsK>(x, from);
  if (coding.bits == 8) return codec_detail::decode_uniform<kDim, 8, kIsK>(x, from);
  if (coding.bits == 4) return codec_detail::decode_uniform<kDim, 4, kIsK>(x, from);
  codec_detail::decode_uniform<kDim, 2, kIsK>(x, from);
}

}  // namespace thinkv::cuda
