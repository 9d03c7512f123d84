// medoids_kernel.cuh: select_medoids() alone, one selection a block, for tests with and without a
// GPU.
#pragma once

#include "kernels/cuda/medoids.cuh"

namespace thinkv::testing {

using cuda::dynamic_shared;
using cuda::kMedoidScratchBytes;
using cuda::medoid_place;
using cuda::medoid_stride;
using cuda::select_medoids;

struct MedoidCase {
  const float* keys;     // [n, dim]
  const float* weights;  // [n], or null
  uint32_t n;
  uint32_t dim;
  uint32_t target;
  uint32_t iterations;
  uint8_t* keep;  // [n]
};

// Bytes of shared memory that medoids_kernel() needs.
inline uint32_t medoid_case_bytes(uint32_t n, uint32_t dim, uint32_t target) {
  constexpr uint32_t kRowBytes = sizeof(float) + sizeof(uint16_t) + sizeof(uint8_t);
  constexpr uint32_t kValueBytes = sizeof(float);
  return (n + target) * medoid_stride(dim) * kValueBytes + kMedoidScratchBytes + n * kRowBytes;
}

static __global__ void __launch_bounds__(cuda::kMedoidThreads, 1)
    medoids_kernel(const MedoidCase c) {
  const uint32_t stride = medoid_stride(c.dim);
  unsigned char* const scratch = dynamic_shared();
  auto* const keys = reinterpret_cast<float*>(scratch + kMedoidScratchBytes);
  auto* const centres = keys + c.n * stride;
  auto* const weights = centres + c.target * stride;
  auto* const cluster_of = reinterpret_cast<uint16_t*>(weights + c.n);
  auto* const keep = reinterpret_cast<uint8_t*>(cluster_of + c.n);
  for (uint32_t i = threadIdx.x; i < c.n * stride; i += blockDim.x) {
    const uint32_t row = i / stride, dim = i % stride;
    keys[row * stride + medoid_place(dim)] = dim < c.dim ? c.keys[row * c.dim + dim] : 0.0f;
  }
  for (uint32_t i = threadIdx.x; i < c.n && c.weights != nullptr; i += blockDim.x) {
    weights[i] = c.weights[i];
  }
  __syncthreads();
  select_medoids({.keys = keys,
                  .centres = centres,
                  .weights = c.weights != nullptr ? weights : nullptr,
                  .cluster_of = cluster_of,
                  .keep = keep,
                  .scratch = scratch,
                  .n = c.n,
                  .stride = stride,
                  .target = c.target,
                  .iterations = c.iterations});
  for (uint32_t i = threadIdx.x; i < c.n; i += blockDim.x) c.keep[i] = keep[i];
}

}  // namespace thinkv::testing
