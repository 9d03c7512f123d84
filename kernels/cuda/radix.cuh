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
// rows in it) and .whole (all of them). By the first warp.
template <class Shared>
__device__ inline void find_bin(Shared& shared, const uint32_t (&bins)[256], uint32_t left) {
  const uint32_t thread = threadIdx.x % 32, top = 255 - 8 * thread;
  uint32_t mine = 0;
  for (uint32_t b = 0; b < 8; ++b) mine += bins[top - b];
  uint32_t through = mine;
  for (uint32_t x = 1; x < 32; x *= 2) {
    const uint32_t above = __shfl_up_sync(kAllLanes, through, x);
    if (thread >= x) through += above;
  }
  uint32_t before = through - mine;
  if (before >= left || through < left) return;
  for (uint32_t b = 0; b < 8; ++b) {
    const uint32_t rows = bins[top - b];
    if (before + rows >= left) {
      shared.digit = top - b;
      shared.left = left - before;
      shared.whole = before + rows == left ? 1 : 0;
      return;
    }
    before += rows;
  }
}

// The least of the `left` highest keys of the block's threads, of `bits` bits. for_each(visit)
// calls visit(key) for every key, once for each byte, and says whether it could; where it could
// not, the result has all bits set. Afterwards shared.whole says that all keys of this beginning
// are among the highest; else the key is exact, shared.left of those equal to it are, and bins has
// their number. Requires: there are so many keys, and left > 0; bits: a multiple of 8.
template <class Key, class Shared, class ForEach>
[[nodiscard]] __device__ inline Key least_of_highest(Shared& shared, uint32_t (&bins)[256],
                                                     uint32_t bits, uint32_t left,
                                                     const ForEach& for_each) {
  Key prefix = 0;
  for (uint32_t shift = bits; shift > 0;) {
    shift -= 8;
    for (uint32_t b = threadIdx.x; b < 256; b += blockDim.x) bins[b] = 0;
    __syncthreads();
    const bool seen = for_each([&](Key key) {
      const uint32_t above = shift + 8;
      if (above < 8 * sizeof(Key) && ((key ^ prefix) >> above) != 0) return;
      atomicAdd(&bins[static_cast<uint32_t>(key >> shift) & 255u], 1u);
    });
    if (!seen) return static_cast<Key>(~Key{0});
    __syncthreads();
    if (threadIdx.x < 32) find_bin(shared, bins, left);
    __syncthreads();
    prefix |= Key{shared.digit} << shift;
    left = shared.left;
    if (shared.whole != 0) break;
  }
  __syncthreads();
  return prefix;
}

}  // namespace thinkv::cuda
