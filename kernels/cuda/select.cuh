// select.cuh: the live tokens of one segment in one lane, which of them survive, and their drop.
//
// Functions of a whole block, in shared memory of the block; every thread calls them with the same
// arguments. As kernels/sequence/{lane,survivors}.cpp do it, ties included.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/refresh.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda {

// The smallest fp16: a token that was never attended still weighs something.
inline constexpr float kWeightFloor = 0x1p-24f;

// Shared memory for at most `room` rows.
struct RowSpace {
  uint32_t* position;  // [room + 3] as found, 16-byte aligned
  uint32_t* found;     // [room] places as found
  uint32_t* place;     // [room] places, ascending by position: descriptor << 6 | slot
  float* weight;       // [room]
  uint8_t* keep;       // [room]
  uint32_t room;
};
static_assert(kSlotsPerPageMax == 1u << 6);

// Numbers that the threads of a block add up.
struct RowCounts {
  uint32_t rows;
  uint32_t freed[kFormatCount];
};

namespace select_detail {

// Descriptor `d` of the lane, already read; by one warp.
__device__ __forceinline__ void gather_page(const LaneView& lane, uint32_t index, uint32_t raw,
                                            uint32_t format, uint64_t live, uint32_t first,
                                            uint32_t end, const RowSpace& rows, RowCounts* counts) {
  const unsigned char* page = page_at(*lane.batch, raw);
  if (page == nullptr) return;
  const SlotShape shape = slot_shape(lane.head_dim, format);
  const uint32_t thread = threadIdx.x % 32;
  uint32_t position[2];
  bool wanted[2];
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t slot = 32 * half + thread;
    wanted[half] = slot < shape.slots && ((live >> slot) & 1u) != 0;
    position[half] = wanted[half] ? position_of(page, shape.position_offset, slot) : 0;
  }
  uint32_t ballots[2];
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    wanted[half] = wanted[half] && position[half] >= first && position[half] < end;
    ballots[half] = __ballot_sync(kAllLanes, wanted[half]);
  }
  const auto in_low = static_cast<uint32_t>(__popc(ballots[0]));
  const uint32_t count = in_low + static_cast<uint32_t>(__popc(ballots[1]));
  if (count == 0) return;
  uint32_t at = 0;
  if (thread == 0) at = atomicAdd(&counts->rows, count);
  at = __shfl_sync(kAllLanes, at, 0);
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const auto before = static_cast<uint32_t>(__popc(ballots[half] & ((1u << thread) - 1)));
    const uint32_t row = at + half * in_low + before;
    if (!wanted[half] || row >= rows.room) continue;
    rows.position[row] = position[half];
    rows.found[row] = index << 6 | (32 * half + thread);
  }
}

// Warp w of W looks at descriptors w, w + W, ..: 32 at a time.
__device__ inline void gather_unordered(const LaneView& lane, uint32_t first, uint32_t end,
                                        const RowSpace& rows, RowCounts* counts) {
  const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, thread = threadIdx.x % 32;
  for (uint32_t base = warp; base < lane.lane->pages; base += 32 * warps) {
    const uint32_t mine = base + thread * warps;
    const DeviceDescriptor* d = mine < lane.lane->pages ? descriptor_at(lane, mine) : nullptr;
    const uint64_t live = d != nullptr ? d->live : 0;
    const uint32_t raw = d != nullptr ? d->page : 0, format = d != nullptr ? d->format : 0;
    const bool overlaps = live != 0 && d->last_position >= first && d->first_position < end;
    for (uint32_t todo = __ballot_sync(kAllLanes, overlaps); todo != 0; todo &= todo - 1) {
      const auto holder = static_cast<uint32_t>(__ffs(static_cast<int32_t>(todo))) - 1;
      gather_page(lane, base + holder * warps, __shfl_sync(kAllLanes, raw, holder),
                  __shfl_sync(kAllLanes, format, holder), __shfl_sync(kAllLanes, live, holder),
                  first, end, rows, counts);
    }
  }
}

// How many of `n` positions come before row i: positions are distinct, rows break ties of bad ones.
[[nodiscard]] __device__ __forceinline__ uint32_t rank_of(const uint32_t* position, uint32_t n,
                                                          uint32_t i) {
  const uint32_t mine = position[i];
  uint32_t rank = 0;
  for (uint32_t j = 0; j < n; j += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(position + j);
    rank += four.x < mine || (four.x == mine && j < i) ? 1u : 0u;
    rank += four.y < mine || (four.y == mine && j + 1 < i) ? 1u : 0u;
    rank += four.z < mine || (four.z == mine && j + 2 < i) ? 1u : 0u;
    rank += four.w < mine || (four.w == mine && j + 3 < i) ? 1u : 0u;
  }
  return rank;
}

}  // namespace select_detail

// Live slots with first <= position < end: rows.place, ascending by position. The buffer is not in
// the table. Result: how many; more than rows.room: nothing is written.
[[nodiscard]] __device__ inline uint32_t gather_rows(const LaneView& lane, uint32_t first,
                                                     uint32_t end, const RowSpace& rows,
                                                     RowCounts* counts) {
  if (threadIdx.x == 0) counts->rows = 0;
  __syncthreads();
  select_detail::gather_unordered(lane, first, end, rows, counts);
  __syncthreads();
  const uint32_t n = counts->rows;
  if (n > rows.room) return n;
  if (threadIdx.x < 3) rows.position[n + threadIdx.x] = 0xFFFF'FFFFu;  // the last four are whole
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    rows.place[select_detail::rank_of(rows.position, n, i)] = rows.found[i];
  }
  __syncthreads();
  return n;
}

// Adds the scores of the rows to rows.weight; `begin`: sets them.
__device__ inline void add_scores(const LaneView& lane, const RowSpace& rows, uint32_t n,
                                  bool begin) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t index = rows.place[i] >> 6;
    DeviceDescriptor* d = lane.scored() ? descriptor_at(lane, index) : nullptr;
    const float score =
        d == nullptr ? 0.0f : fp16_to_float(scores_of(lane, d, index)[rows.place[i] & 63u]);
    rows.weight[i] = exact_add(begin ? 0.0f : rows.weight[i], score);
  }
  __syncthreads();
}

// The `target` newest.
__device__ inline void keep_newest(const RowSpace& rows, uint32_t n, uint32_t target) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) rows.keep[i] = i >= n - target ? 1 : 0;
  __syncthreads();
}

// The `target` of most weight; ties go to the newer.
__device__ inline void keep_heaviest(const RowSpace& rows, uint32_t n, uint32_t target) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const float mine = rows.weight[i];
    uint32_t before = 0;
    for (uint32_t j = 0; j < n; ++j) {
      const float other = rows.weight[j];
      before += other > mine || (other == mine && j > i) ? 1u : 0u;
    }
    rows.keep[i] = before < target ? 1 : 0;
  }
  __syncthreads();
}

// Drops the rows that are not kept. Requires: `dropped` of them are not; no other block works on
// the lane.
__device__ inline void drop_rows(const LaneView& lane, const RowSpace& rows, uint32_t n,
                                 uint32_t dropped, RowCounts* counts) {
  if (threadIdx.x < kFormatCount) counts->freed[threadIdx.x] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (rows.keep[i] != 0) continue;
    DeviceDescriptor* d = descriptor_at(lane, rows.place[i] >> 6);
    if (d == nullptr) continue;
    // The bit is set, so taking its value away clears it and touches no other.
    add_64(&d->live, ~(uint64_t{1} << (rows.place[i] & 63u)) + 1);
    if (d->format < kFormatCount) atomicAdd(&counts->freed[d->format], 1u);
  }
  __syncthreads();
  if (threadIdx.x < kFormatCount && counts->freed[threadIdx.x] != 0) {
    lane.lane->free_slots[threadIdx.x] += counts->freed[threadIdx.x];
  }
  if (threadIdx.x == 0) {
    lane.lane->live -= dropped;
    add_64(&lane.sequence->counters.evicted_slots, dropped);
  }
  __syncthreads();
}

}  // namespace thinkv::cuda
