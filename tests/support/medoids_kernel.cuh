// medoids_kernel.cuh: select_medoids() or stream_medoids() alone, one selection a block, for tests
// with and without a GPU.
#pragma once

#include "kernels/cuda/medoid_stream.cuh"

namespace thinkv::testing {

using cuda::dynamic_shared;
using cuda::kMedoidCentresTogether;
using cuda::kMedoidScratchBytes;
using cuda::medoid_place;
using cuda::medoid_stride;
using cuda::Medoids;

struct MedoidCase {
  const float* keys;     // [n, dim]
  const float* weights;  // [n], or null
  uint32_t n;
  uint32_t dim;
  uint32_t target;
  uint32_t iterations;
  uint8_t* keep;   // [n]
  uint32_t width;  // dims at a time, a divisor of medoid_stride(dim); 0: all keys stay
};

// Bytes of shared memory that medoids_kernel() needs.
inline uint32_t medoid_case_bytes(const MedoidCase& c) {
  constexpr uint32_t kRowBytes = sizeof(float) + sizeof(uint16_t) + sizeof(uint8_t);
  const uint32_t centres = c.width == 0 ? c.target : kMedoidCentresTogether;
  const uint32_t stride = c.width == 0 ? medoid_stride(c.dim) : c.width;
  const uint32_t streamed = c.width == 0 ? 0 : c.n * c.iterations * 2 + c.target;
  return (c.n + centres) * stride * static_cast<uint32_t>(sizeof(float)) + kMedoidScratchBytes +
         c.n * kRowBytes + streamed + 16;
}

// Dims first .. first + stride - 1 of all keys.
static __device__ void load_dims(const MedoidCase& c, const Medoids& m, uint32_t first) {
  for (uint32_t i = threadIdx.x; i < c.n * m.stride; i += blockDim.x) {
    const uint32_t row = i / m.stride, at = i % m.stride, dim = first + at;
    m.keys[row * m.stride + medoid_place(at)] = dim < c.dim ? c.keys[row * c.dim + dim] : 0.0f;
  }
}

static __global__ void __launch_bounds__(cuda::kMedoidThreads, 1)
    medoids_kernel(const MedoidCase c) {
  const uint32_t stride = c.width == 0 ? medoid_stride(c.dim) : c.width;
  unsigned char* const scratch = dynamic_shared();
  auto* const keys = reinterpret_cast<float*>(scratch + kMedoidScratchBytes);
  auto* const centres = keys + c.n * stride;
  auto* const weights = centres + (c.width == 0 ? c.target : kMedoidCentresTogether) * stride;
  auto* const cluster_of = reinterpret_cast<uint16_t*>(weights + c.n);
  auto* const keep = reinterpret_cast<uint8_t*>(cluster_of + c.n);
  auto* const made_in = keep + c.n;
  auto* const clusters = reinterpret_cast<uint16_t*>(made_in + c.target + (c.n + c.target) % 2);
  for (uint32_t i = threadIdx.x; i < c.n && c.weights != nullptr; i += blockDim.x) {
    weights[i] = c.weights[i];
  }
  const Medoids m{.keys = keys,
                  .centres = centres,
                  .weights = c.weights != nullptr ? weights : nullptr,
                  .cluster_of = cluster_of,
                  .keep = keep,
                  .scratch = scratch,
                  .scratch_bytes = kMedoidScratchBytes,
                  .n = c.n,
                  .stride = stride,
                  .target = c.target,
                  .iterations = c.iterations};
  if (c.width == 0) {
    load_dims(c, m, 0);
    __syncthreads();
    cuda::select_medoids(m);
  } else {
    __syncthreads();
    cuda::stream_medoids(
        {.m = m, .tiles = medoid_stride(c.dim) / stride, .clusters = clusters, .made_in = made_in},
        [&](uint32_t tile) { load_dims(c, m, tile * stride); });
  }
  for (uint32_t i = threadIdx.x; i < c.n; i += blockDim.x) c.keep[i] = keep[i];
}

}  // namespace thinkv::testing
