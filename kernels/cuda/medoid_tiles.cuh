// medoid_tiles.cuh: squared distances of keys and centres, with the oracle's bits.
//
// Eight neighbouring threads share a tile of 4 keys and 4 centres; thread l has the oracle's
// partial sum l of all 16 distances, so that a sum is made by one thread in the oracle's order and
// folded by halves with three shuffles.
#pragma once

#include <cstdint>

#include "kernels/cuda/medoid_limits.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/kernels.h"

namespace thinkv::cuda {

inline constexpr uint32_t kMedoidThreads = 512;
inline constexpr uint32_t kMedoidTile = 4;
inline constexpr uint32_t kMedoidGroup = 8;  // threads of a tile, the oracle's partial sums
inline constexpr float kInfinity = __builtin_huge_valf();

// All in shared memory, or in global memory that is the block's alone.
struct Medoids {
  float* keys;             // [n, stride]
  float* centres;          // [target, stride]
  const float* weights;    // [n] > 0, or null
  uint16_t* cluster_of;    // [n]
  uint8_t* keep;           // [n] out: 1 for exactly `target` rows
  unsigned char* scratch;  // 8-byte aligned
  uint32_t scratch_bytes;  // at least medoid_scratch_bytes(n)
  uint32_t n;              // 1 .. kernels::kMedoidRowsMax
  uint32_t stride;         // medoid_stride(dim); dims beyond `dim` are 0
  uint32_t target;         // 1 .. n
  uint32_t iterations;
};
// Of it four costs a row, and 128 bytes: what is beyond holds the costs of more centres at a time.
[[nodiscard]] constexpr uint32_t medoid_scratch_bytes(uint32_t rows) {
  return rows * 16 + 128;
}
inline constexpr uint32_t kMedoidScratchBytes = medoid_scratch_bytes(kMedoidRowsHeld);

// Dim d of a vector: thread d % 8 of a group loads its dims d, d + 8, d + 16, d + 24 as 16 bytes,
// the group 128 neighbouring bytes.
[[nodiscard]] __host__ __device__ constexpr uint32_t medoid_place(uint32_t dim) {
  return dim / 32 * 32 + dim % 8 * 4 + dim / 8 % 4;
}
[[nodiscard]] __host__ __device__ constexpr uint32_t medoid_stride(uint32_t dim) {
  return (dim + 31) / 32 * 32;
}

namespace medoids_detail {

__device__ __forceinline__ float weight(const Medoids& m, uint32_t row) {
  return m.weights != nullptr ? m.weights[row] : 1.0f;
}

__device__ __forceinline__ float add_square(float sum, float a, float b) {
  const float difference = exact_sub(a, b);
  return exact_add(sum, exact_mul(difference, difference));
}

// Folds the partial sums of a group. Each thread keeps what fold_row() and fold_centre() say.
__device__ __forceinline__ void fold(const float (&sums)[4][4], float (&distance)[2]) {
  const uint32_t l = threadIdx.x % kMedoidGroup;
  const bool upper = (l & 4) != 0, odd_row = (l & 2) != 0, right = (l & 1) != 0;
  float half[2][4];
#pragma unroll
  for (uint32_t r = 0; r < 2; ++r) {
#pragma unroll
    for (uint32_t c = 0; c < 4; ++c) {
      const float given = upper ? sums[r][c] : sums[r + 2][c];
      half[r][c] =
          exact_add(upper ? sums[r + 2][c] : sums[r][c], __shfl_xor_sync(0xFFFFFFFFu, given, 4));
    }
  }
  float row[4];
#pragma unroll
  for (uint32_t c = 0; c < 4; ++c) {
    const float given = odd_row ? half[0][c] : half[1][c];
    row[c] = exact_add(odd_row ? half[1][c] : half[0][c], __shfl_xor_sync(0xFFFFFFFFu, given, 2));
  }
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    const float given = right ? row[i] : row[i + 2];
    distance[i] = exact_add(right ? row[i + 2] : row[i], __shfl_xor_sync(0xFFFFFFFFu, given, 1));
  }
}
// Which of the tile's 4 x 4 distances a thread has after fold(): one row, two centres.
__device__ __forceinline__ uint32_t fold_row() {
  return (threadIdx.x % kMedoidGroup) / 2;
}
__device__ __forceinline__ uint32_t fold_centre() {
  return threadIdx.x % 2 * 2;
}

// Adds to the sums of keys row .. row + 3 and centres centre .. centre + 3 of `centres` what the
// dims that are there are apart. Rows beyond the last repeat it.
__device__ __forceinline__ void add_distances(const Medoids& m, uint32_t row, uint32_t centre,
                                              uint32_t centres, float (&sums)[4][4]) {
  const uint32_t first = threadIdx.x % kMedoidGroup * 4;
  uint32_t key_at[4], centre_at[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    key_at[i] = min(row + i, m.n - 1) * m.stride + first;
    centre_at[i] = min(centre + i, centres - 1) * m.stride + first;
  }
  for (uint32_t d = 0; d < m.stride; d += 32) {
    float4 keys[4];
#pragma unroll
    for (uint32_t r = 0; r < 4; ++r) {
      keys[r] = *reinterpret_cast<const float4*>(m.keys + key_at[r] + d);
    }
#pragma unroll
    for (uint32_t c = 0; c < 4; ++c) {
      const float4 to = *reinterpret_cast<const float4*>(m.centres + centre_at[c] + d);
#pragma unroll
      for (uint32_t r = 0; r < 4; ++r) {
        float sum = add_square(sums[r][c], keys[r].x, to.x);
        sum = add_square(sum, keys[r].y, to.y);
        sum = add_square(sum, keys[r].z, to.z);
        sums[r][c] = add_square(sum, keys[r].w, to.w);
      }
    }
  }
}

// Squared distances of keys row .. row + 3 and centres centre .. centre + 3. All threads of the
// warp call it.
__device__ __forceinline__ void tile_distances(const Medoids& m, uint32_t row, uint32_t centre,
                                               float (&distance)[2]) {
  float sums[4][4] = {};
  add_distances(m, row, centre, m.target, sums);
  fold(sums, distance);
}

__device__ __forceinline__ uint32_t tiles_of(uint32_t count) {
  return (count + kMedoidTile - 1) / kMedoidTile;
}

}  // namespace medoids_detail
}  // namespace thinkv::cuda
