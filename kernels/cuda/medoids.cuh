// medoids.cuh: the k-means of kernels::ref::medoids by one block, with the same bits.
//
// Distances come from medoid_tiles.cuh. Every other step either has one thread a number, in the
// oracle's order, or is a minimum, which knows no order.
#pragma once

#include <cstdint>

#include "kernels/cuda/medoid_tiles.cuh"

namespace thinkv::cuda {
namespace medoids_detail {

// A distance and the centre it belongs to, as one number: smaller is nearer, ties to the lower
// centre. Distances are not negative, so their bits are in order; NaN and infinity never win.
__device__ __forceinline__ uint64_t nearness(float distance, uint32_t centre) {
  return uint64_t{__float_as_uint(distance)} << 32 | centre;
}
inline constexpr uint64_t kNowhere = uint64_t{0x7F800000u} << 32;  // centre 0

// The nearest centre of each row, in `splits` parts of the centres so that all groups have work.
__device__ inline void find_nearest(const Medoids& m) {
  auto* const best = reinterpret_cast<uint64_t*>(m.scratch);
  const uint32_t groups = blockDim.x / kMedoidGroup, group = threadIdx.x / kMedoidGroup;
  const uint32_t row_tiles = tiles_of(m.n), centre_tiles = tiles_of(m.target);
  const uint32_t splits = max(min(groups / row_tiles, centre_tiles), 1u);
  const uint32_t each = (centre_tiles + splits - 1) / splits, items = row_tiles * splits;
  for (uint32_t base = 0; base < items; base += groups) {
    // Groups without an item of their own repeat the last: shuffles want whole warps.
    const uint32_t item = min(base + group, items - 1);
    const uint32_t row = item % row_tiles * kMedoidTile, split = item / row_tiles;
    uint64_t nearest = kNowhere;
    for (uint32_t i = 0; i < each; ++i) {
      const uint32_t centre = min(split * each + i, centre_tiles - 1) * kMedoidTile;
      float distance[2];
      tile_distances(m, row, centre, distance);
#pragma unroll
      for (uint32_t k = 0; k < 2; ++k) {
        const uint32_t j = centre + fold_centre() + k;
        const uint64_t found = nearness(distance[k], j);
        if (j < m.target && found < nearest) nearest = found;
      }
    }
    const uint64_t other = __shfl_xor_sync(0xFFFFFFFFu, nearest, 1);
    best[split * row_tiles * kMedoidTile + row + fold_row()] = min(nearest, other);
  }
  __syncthreads();
  for (uint32_t row = threadIdx.x; row < m.n; row += blockDim.x) {
    uint64_t nearest = kNowhere;
    for (uint32_t s = 0; s < splits; ++s) {
      nearest = min(nearest, best[s * row_tiles * kMedoidTile + row]);
    }
    m.cluster_of[row] = static_cast<uint16_t>(nearest);
  }
  __syncthreads();
}

__device__ __forceinline__ void add_weighted(float4& sum, float w, const float4& key) {
  sum.x = exact_add(sum.x, exact_mul(w, key.x));
  sum.y = exact_add(sum.y, exact_mul(w, key.y));
  sum.z = exact_add(sum.z, exact_mul(w, key.z));
  sum.w = exact_add(sum.w, exact_mul(w, key.w));
}

// The weighted mean of the rows of cluster `j`, rows in ascending order, by one warp. An empty
// cluster keeps its centre.
__device__ __forceinline__ void write_mean(const Medoids& m, const uint16_t* cluster_of, uint32_t j,
                                           float* centre) {
  const uint32_t lane = threadIdx.x % 32, units = m.stride / 4;
  for (uint32_t first_unit = 0; first_unit < units; first_unit += 32) {
    const uint32_t unit = min(first_unit + lane, units - 1);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float total = 0.0f;
    for (uint32_t first = 0; first < m.n; first += 32) {
      const uint32_t row = first + lane;
      uint32_t members = __ballot_sync(0xFFFFFFFFu, row < m.n && cluster_of[row] == j);
      for (; members != 0; members &= members - 1) {
        const uint32_t member = first + static_cast<uint32_t>(__ffs(members)) - 1;
        const float w = weight(m, member);
        add_weighted(sum, w, reinterpret_cast<const float4*>(m.keys + member * m.stride)[unit]);
        total = exact_add(total, w);
      }
    }
    if (total == 0.0f) continue;
    reinterpret_cast<float4*>(centre)[unit] =
        make_float4(exact_div(sum.x, total), exact_div(sum.y, total), exact_div(sum.z, total),
                    exact_div(sum.w, total));
  }
}

__device__ inline void move_centres(const Medoids& m) {
  for (uint32_t j = threadIdx.x / 32; j < m.target; j += blockDim.x / 32) {
    write_mean(m, m.cluster_of, j, m.centres + j * m.stride);
  }
  __syncthreads();
}

// costs[c * n + row] for the centres first .. first + count - 1.
__device__ inline void find_costs(const Medoids& m, uint32_t first, uint32_t count, float* costs) {
  const uint32_t groups = blockDim.x / kMedoidGroup, group = threadIdx.x / kMedoidGroup;
  const uint32_t row_tiles = tiles_of(m.n), items = row_tiles * tiles_of(count);
  for (uint32_t base = 0; base < items; base += groups) {
    const uint32_t item = min(base + group, items - 1);
    const uint32_t row = item % row_tiles * kMedoidTile, centre = item / row_tiles * kMedoidTile;
    float distance[2];
    tile_distances(m, row, first + centre, distance);
#pragma unroll
    for (uint32_t k = 0; k < 2; ++k) {
      const uint32_t c = centre + fold_centre() + k, r = row + fold_row();
      if (c < count && r < m.n) costs[c * m.n + r] = exact_div(distance[k], weight(m, r));
    }
  }
  __syncthreads();
}

__device__ __forceinline__ uint64_t warp_min(uint64_t value) {
#pragma unroll
  for (uint32_t step = 16; step > 0; step /= 2) {
    value = min(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
  }
  return value;
}

// Bit b of a lane's `taken` is row 32 b + lane, by one warp.
[[nodiscard]] __device__ __forceinline__ bool is_taken(uint32_t taken, uint32_t row) {
  return ((__shfl_sync(0xFFFFFFFFu, taken, row % 32) >> row / 32) & 1u) != 0;
}
inline constexpr uint32_t kUnsure = 0xFFFF'FFFFu;

// The free row of least cost, ties to the lower; the first free row where its cost is NaN. With
// `sure_only` kUnsure where a cost is NaN, so that the answer stays right while other rows are
// taken.
[[nodiscard]] __device__ __forceinline__ uint32_t pick_row(const float* costs, uint32_t n,
                                                           uint32_t taken, bool sure_only) {
  const uint32_t lane = threadIdx.x % 32;
  uint64_t best = ~uint64_t{0};
  uint32_t first_free = n;
  bool unknown = false;  // of a free row, a cost is NaN
  for (uint32_t row = lane, b = 0; row < n; row += 32, ++b) {
    if (((taken >> b) & 1u) != 0) continue;
    const float cost = costs[row];
    first_free = min(first_free, row);
    unknown = unknown || cost != cost;
    const uint64_t found = nearness(cost, row);
    if (cost == cost && found < best) best = found;
  }
  if (__any_sync(0xFFFFFFFFu, unknown)) {
    if (sure_only) return kUnsure;
    const auto first = static_cast<uint32_t>(warp_min(first_free));
    if (costs[first] != costs[first]) return first;
  }
  return static_cast<uint32_t>(warp_min(best));
}

// The picks of `count` <= 32 centres, in order. Each warp has looked for the best row of some
// centres; warp 0 goes through them, and looks again only where an earlier centre took the row.
__device__ __forceinline__ void pick_in_order(const float* costs, uint32_t n, uint32_t count,
                                              const uint32_t* wanted, uint32_t& taken) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t mine = lane < count ? wanted[lane] : kUnsure;
  for (uint32_t j = 0; j < count; ++j) {
    uint32_t row = __shfl_sync(0xFFFFFFFFu, mine, j);
    if (row == kUnsure || is_taken(taken, row)) row = pick_row(costs + j * n, n, taken, false);
    if (row % 32 == lane) taken |= 1u << row / 32;
  }
}

// find_costs(first, count, costs): as above.
template <class FindCosts>
__device__ __forceinline__ void pick(const Medoids& m, const FindCosts& find_costs) {
  auto* const wanted = reinterpret_cast<uint32_t*>(m.scratch);  // [32]
  auto* const costs = reinterpret_cast<float*>(wanted + 32);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t fits = (m.scratch_bytes - 128) / (static_cast<uint32_t>(sizeof(float)) * m.n);
  const uint32_t room = min(fits / kMedoidTile * kMedoidTile, kMedoidCentresTogether);
  uint32_t taken = 0;
  for (uint32_t row = threadIdx.x; row < m.n; row += blockDim.x) m.keep[row] = 0;
  __syncthreads();
  for (uint32_t first = 0; first < m.target; first += room) {
    const uint32_t count = min(room, m.target - first);
    find_costs(first, count, costs);
    taken = 0;
    for (uint32_t row = lane, b = 0; row < m.n; row += 32, ++b) {
      taken |= m.keep[row] != 0 ? 1u << b : 0u;
    }
    for (uint32_t j = warp; j < count; j += blockDim.x / 32) {
      const uint32_t row = pick_row(costs + j * m.n, m.n, taken, true);
      if (lane == 0) wanted[j] = row;
    }
    __syncthreads();
    if (warp == 0) {
      pick_in_order(costs, m.n, count, wanted, taken);
      for (uint32_t row = lane, b = 0; row < m.n; row += 32, ++b) {
        m.keep[row] = static_cast<uint8_t>((taken >> b) & 1u);
      }
    }
    __syncthreads();
  }
}

}  // namespace medoids_detail

static_assert(kernels::kMedoidRowsMax <= 32 * 32, "`taken` has 32 bits");
static_assert(kMedoidCentresTogether <= 32, "a thread for each of the picks in order");

// All threads of the block. Requires: keys and weights are written and seen.
__device__ inline void select_medoids(const Medoids& m) {
  for (uint32_t j = threadIdx.x / 32; j < m.target; j += blockDim.x / 32) {
    const float* const row = m.keys + kernels::medoid_start_row(j, m.n, m.target) * m.stride;
    for (uint32_t d = threadIdx.x % 32; d < m.stride; d += 32) m.centres[j * m.stride + d] = row[d];
  }
  __syncthreads();
  for (uint32_t i = 0; i < m.iterations; ++i) {
    medoids_detail::find_nearest(m);
    medoids_detail::move_centres(m);
  }
  medoids_detail::pick(m, [&m](uint32_t first, uint32_t count, float* costs) {
    medoids_detail::find_costs(m, first, count, costs);
  });
}

}  // namespace thinkv::cuda
