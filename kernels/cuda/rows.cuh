// rows.cuh: an engine's K and V vectors as eight threads hold them (codec.cuh), and their values as
// 16 bits, as small_float.h has them: by the machine's conversions, which differ from it in NaN
// alone, in a tenth of the instructions.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/ptx.cuh"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda {

// True where all values are finite: a sum of zeros, else NaN.
template <int kCount>
[[nodiscard]] __device__ __forceinline__ bool all_finite(const float (&x)[kCount]) {
  float probe = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) probe = fmaf(x[i], 0.0f, probe);
  return probe == 0.0f;
}

// fp16 or bf16 bits of every value, in the low half.
template <int kCount>
__device__ __forceinline__ void to_16_bits(uint32_t (&raw)[kCount], const float (&x)[kCount],
                                           bool bf16) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint32_t pair = bf16 ? pack_bf16(x[i], x[i + 1]) : pack_f16(x[i], x[i + 1]);
    raw[i] = pair & 0xFFFFu;
    raw[i + 1] = pair >> 16;
  }
  if (all_finite(x)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw[i] = bf16 ? bf16_from_float(x[i]) : fp16_from_float(x[i]);
}
// The values again; what is above the low half does not matter.
template <int kCount>
__device__ __forceinline__ void from_16_bits(float (&x)[kCount], const uint32_t (&raw)[kCount],
                                             bool bf16) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = bf16 ? __uint_as_float(raw[i] << 16) : unpack_f16(raw[i]).x;
  }
  if (bf16 || all_finite(x)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = fp16_to_float(static_cast<uint16_t>(raw[i]));
}

// One element.
[[nodiscard]] __device__ __forceinline__ float value_at(const void* rows, Element element,
                                                        uint64_t at) {
  if (element == Element::kF32) return static_cast<const float*>(rows)[at];
  const uint16_t bits = static_cast<const uint16_t*>(rows)[at];
  return element == Element::kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

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
  uint32_t raw[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) raw[i] = static_cast<const uint16_t*>(rows)[at + 8 * i];
  from_16_bits(x, raw, element == Element::kBf16);
}

}  // namespace thinkv::cuda
