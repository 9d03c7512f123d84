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
    const uint64_t signs = rotation_word(static_cast<uint32_t>(i) / 8);
    if (((signs >> (l + 8 * (i % 8))) & 1u) != 0) x[i] = -x[i];
  }
#pragma unroll
  for (uint32_t h = 1; h < 8; h *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], h);
      x[i] = (l & h) != 0 ? exact_sub(other, x[i]) : exact_add(x[i], other);
    }
  }
  rotate_detail::butterflies<1>(x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = exact_mul(x[i], rotation_norm(kDim));
}

}  // namespace thinkv::cuda
