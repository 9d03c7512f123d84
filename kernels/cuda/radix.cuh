// radix.cuh: selecting by a digit at a time, from the highest number down. Functions of a block.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"

namespace thinkv::cuda {

// Numbers as integers of the same order: 0 and -0 are equal, what is not a number is the lowest.
[[nodiscard]] __device__ __forceinline__ uint32_t ordered_bits(float x) {
  const float number = x != x ? __uint_as_float(0xFF80'0000u) : exact_add(x, 0.0f);
  const uint32_t bits = __float_as_uint(number);
  return (bits & 0x8000'0000u) != 0 ? ~bits : bits | 0x8000'0000u;
}

// The bin, from the highest down, in which the left-th row lies: into shared.digit, .left (of the
// rows in it) and .whole (all of them). By the first warp. Shared has bins[256].
template <class Shared>
__device__ inline void find_bin(Shared& shared, uint32_t left) {
  const uint32_t thread = threadIdx.x % 32, top = 255 - 8 * thread;
  uint32_t mine = 0;
  for (uint32_t b = 0; b < 8; ++b) mine += shared.bins[top - b];
  uint32_t through = mine;
  for (uint32_t x = 1; x < 32; x *= 2) {
    const uint32_t above = __shfl_up_sync(kAllLanes, through, x);
    if (thread >= x) through += above;
  }
  uint32_t before = through - mine;
  if (before >= left || through < left) return;
  for (uint32_t b = 0; b < 8; ++b) {
    const uint32_t rows = shared.bins[top - b];
    if (before + rows >= left) {
      shared.digit = top - b;
      shared.left = left - before;
      shared.whole = before + rows == left ? 1 : 0;
      return;
    }
    before += rows;
  }
}

}  // namespace thinkv::cuda
