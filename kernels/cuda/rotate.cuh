// rotate.cuh: the randomised Hadamard rotation (rotation.h) of a vector that eight threads hold as
// codec.cuh says: thread l owns the dims l + 8 i. Bit-exact with kernels/reference/rotate.cpp: the
// butterflies in ascending distance, then one multiplication.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"
#include "thinkv/internal/rotation.h"

namespace thinkv::cuda {

namespace rotate_detail {

// Butterflies of distance 8 h and above. Recursive: every index is known at compile time.
template <int kHalf, int kCount>
__device__ __forceinline__ void butterflies(float (&x)[kCount]) {
  if constexpr (kHalf < kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((i & kHalf) != 0) continue;
      const float a = x[i], b = x[i + kHalf];
      x[i] = exact_add(a, b);
      x[i + kHalf] = exact_sub(a, b);
    }
    butterflies<2 * kHalf>(x);
  }
}

}  // namespace rotate_detail

// In place. All threads of the warp call it.
template <int kDim>
__device__ __forceinline__ void rotate_vector(float (&x)[kDim / 8]) {
  constexpr int kCount = kDim / 8;
  const uint32_t l = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint64_t signs = rotation_word(static_cast<uint32_t>(i) / 8) >> l;
    const auto sign = static_cast<uint32_t>(signs >> (8 * (i % 8))) << 31;
    x[i] = __uint_as_float(__float_as_uint(x[i]) ^ sign);
  }
#pragma unroll
  for (uint32_t h = 1; h < 8; h *= 2) {
    // The upper one of two gets the difference: its own value counts negative.
    const uint32_t sign = (l & h) != 0 ? 0x8000'0000u : 0u;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], h);
      x[i] = exact_add(other, __uint_as_float(__float_as_uint(x[i]) ^ sign));
    }
  }
  rotate_detail::butterflies<1>(x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = exact_mul(x[i], rotation_norm(kDim));
}

}  // namespace thinkv::cuda
