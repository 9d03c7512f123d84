// medoid_stream.cuh: the k-means of medoids.cuh, with the same bits, where keys and centres do not
// fit shared memory: all heads of a layer side by side are up to 16,384 dims.
//
// Some dims of all keys are in shared memory at a time, and whoever has the keys brings them again
// for every pass. A centre is kept as what it is made of: the round whose clusters it is the mean
// of, so those dims of it are made anew from the keys beside it. The partial sums of a distance
// stay in registers from the first dims to the last, in the oracle's order.
#pragma once

#include <cstdint>

#include "kernels/cuda/medoids.cuh"

namespace thinkv::cuda {

struct StreamedMedoids {
  // keys: [n, stride] and centres: [kMedoidCentresTogether, stride] of the dims that are there;
  // stride divides the dims of a key; cluster_of: unused.
  Medoids m;
  uint32_t tiles;      // dims / stride
  uint16_t* clusters;  // [iterations, n] after each round
  uint8_t* made_in;    // [target] round + 1 that made the centre; 0: it is its start row
};

namespace medoids_detail {

// Of distances whose sums a thread holds.
inline constexpr uint32_t kTilesEach = 4;

// The dims that are there of centres first .. first + count - 1.
__device__ __forceinline__ void make_centres(const StreamedMedoids& s, uint32_t first,
                                             uint32_t count) {
  const Medoids& m = s.m;
  for (uint32_t i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
    float* const centre = m.centres + i * m.stride;
    const uint32_t j = first + i, made_in = s.made_in[j];
    if (made_in != 0) {
      write_mean(m, s.clusters + (made_in - 1) * m.n, j, centre);
      continue;
    }
    const float* const row = m.keys + kernels::medoid_start_row(j, m.n, m.target) * m.stride;
    for (uint32_t d = threadIdx.x % 32; d < m.stride; d += 32) centre[d] = row[d];
  }
}

// Calls use(row, c, distance) for the tiles of all rows and centres first .. first + count - 1,
// count <= kMedoidCentresTogether: `row` of thread and `c`, counted from `first`, the first of its
// two centres; beyond the last both repeat. load(tile): see stream_medoids().
template <class Load, class Use>
__device__ __forceinline__ void stream_distances(const StreamedMedoids& s, const Load& load,
                                                 uint32_t first, uint32_t count, const Use& use) {
  const Medoids& m = s.m;
  const uint32_t groups = blockDim.x / kMedoidGroup, group = threadIdx.x / kMedoidGroup;
  const uint32_t row_tiles = tiles_of(m.n), items = row_tiles * tiles_of(count);
  for (uint32_t base = 0; base < items; base += kTilesEach * groups) {
    float sums[kTilesEach][4][4] = {};
    const auto row_of = [&](uint32_t e) {
      return min(base + e * groups + group, items - 1) % row_tiles * kMedoidTile;
    };
    const auto centre_of = [&](uint32_t e) {
      return min(base + e * groups + group, items - 1) / row_tiles * kMedoidTile;
    };
    for (uint32_t tile = 0; tile < s.tiles; ++tile) {
      load(tile);
      __syncthreads();
      make_centres(s, first, count);
      __syncthreads();
#pragma unroll
      for (uint32_t e = 0; e < kTilesEach; ++e) {
        if (base + e * groups >= items) continue;
        add_distances(m, row_of(e), centre_of(e), count, sums[e]);
      }
      __syncthreads();  // the next dims take the place of these
    }
#pragma unroll
    for (uint32_t e = 0; e < kTilesEach; ++e) {
      if (base + e * groups >= items) continue;
      float distance[2];
      fold(sums[e], distance);
      use(row_of(e) + fold_row(), centre_of(e) + fold_centre(), distance);
    }
  }
  __syncthreads();
}

template <class Load>
__device__ __forceinline__ void stream_round(const StreamedMedoids& s, const Load& load,
                                             uint32_t round) {
  const Medoids& m = s.m;
  auto* const best = reinterpret_cast<unsigned long long*>(m.scratch);  // [n]
  for (uint32_t row = threadIdx.x; row < m.n; row += blockDim.x) best[row] = kNowhere;
  for (uint32_t first = 0; first < m.target; first += kMedoidCentresTogether) {
    const uint32_t count = min(kMedoidCentresTogether, m.target - first);
    stream_distances(s, load, first, count,
                     [&](uint32_t row, uint32_t c, const float(&distance)[2]) {
#pragma unroll
                       for (uint32_t k = 0; k < 2; ++k) {
                         if (row >= m.n || c + k >= count) continue;
                         atomicMin(&best[row], nearness(distance[k], first + c + k));
                       }
                     });
  }
  for (uint32_t row = threadIdx.x; row < m.n; row += blockDim.x) {
    const auto cluster = static_cast<uint16_t>(best[row]);
    s.clusters[round * m.n + row] = cluster;
    s.made_in[cluster] = static_cast<uint8_t>(round + 1);  // an empty one keeps its centre
  }
  __syncthreads();
}

}  // namespace medoids_detail

// All threads of the block. load(tile): writes dims tile * stride .. of all rows to keys, each dim
// d at medoid_place(d). Requires: weights are written and seen.
template <class Load>
__device__ __forceinline__ void stream_medoids(const StreamedMedoids& s, const Load& load) {
  const Medoids& m = s.m;
  for (uint32_t j = threadIdx.x; j < m.target; j += blockDim.x) s.made_in[j] = 0;
  __syncthreads();
  for (uint32_t i = 0; i < m.iterations; ++i) medoids_detail::stream_round(s, load, i);
  medoids_detail::pick(m, [&](uint32_t first, uint32_t count, float* costs) {
    medoids_detail::stream_distances(
        s, load, first, count, [&](uint32_t row, uint32_t c, const float(&distance)[2]) {
#pragma unroll
          for (uint32_t k = 0; k < 2; ++k) {
            if (row >= m.n || c + k >= count) continue;
            costs[(c + k) * m.n + row] = exact_div(distance[k], medoids_detail::weight(m, row));
          }
        });
  });
}

}  // namespace thinkv::cuda
