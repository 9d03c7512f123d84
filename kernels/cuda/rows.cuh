// rows.cuh: an engine's K and V vectors as eight threads hold them (codec.cuh).
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/platform.cuh"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda {

// Thread l gets the dims l + 8 i of the vector at element `first`; zeros where not active.
template <int kDim>
__device__ __forceinline__ void load_row(float (&x)[kDim / 8], const void* rows, Element element,
                                         uint64_t first, bool active) {
  const uint64_t at = first + threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) x[i] = 0.0f;
  if (!active) return;
  if (element == Element::kF32) {
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) x[i] = static_cast<const float*>(rows)[at + 8 * i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const uint16_t raw = static_cast<const uint16_t*>(rows)[at + 8 * i];
    x[i] = element == Element::kF16 ? fp16_to_float(raw) : bf16_to_float(raw);
  }
}

}  // namespace thinkv::cuda
