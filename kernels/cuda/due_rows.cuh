// due_rows.cuh: which rows of a batch have work at the end of a step, as bit maps in
// BatchView::pages; written by the decide kernel of refresh.cu. A block of a later launch reads its
// map, and where bits are set takes (row, lane) pairs in turn.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"
#include "thinkv/internal/limits.h"

namespace thinkv::cuda {

inline constexpr uint32_t kMapWordsMax = limits::kBatchMax / 32;

enum DueMap : uint32_t { kDuePlain = 0, kDueKeys = 1, kDueRank = 2, kDueMaps = 3 };

[[nodiscard]] __host__ __device__ constexpr uint32_t map_words(uint32_t capacity) {
  return (capacity + 31) / 32;
}
[[nodiscard]] __device__ __forceinline__ uint32_t* due_map(const BatchView& view, uint32_t map) {
  return reinterpret_cast<uint32_t*>(view.pages) + map * map_words(view.capacity);
}

// A bit map in shared memory.
struct DueRows {
  uint32_t words[kMapWordsMax];
  uint32_t before[kMapWordsMax];  // bits set in the words before
  uint32_t chosen;
};

// Result: rows that are due; the whole block calls it.
[[nodiscard]] __device__ inline uint32_t load_due(const BatchView& view, DueMap map, DueRows& due) {
  const uint32_t words = map_words(view.capacity);
  uint32_t word = 0;
  if (threadIdx.x < words) {
    word = due_map(view, map)[threadIdx.x];
    const uint32_t rows = view.capacity - 32 * threadIdx.x;
    if (rows < 32) word &= (1u << rows) - 1;
    due.words[threadIdx.x] = word;
  }
  if (__syncthreads_or(word != 0) == 0) return 0;
  if (threadIdx.x < words) {
    uint32_t before = 0;
    for (uint32_t i = 0; i < threadIdx.x; ++i) {
      before += static_cast<uint32_t>(__popc(due.words[i]));
    }
    due.before[threadIdx.x] = before;
  }
  __syncthreads();
  return due.before[words - 1] + static_cast<uint32_t>(__popc(due.words[words - 1]));
}

// The k-th row that is due.
[[nodiscard]] __device__ inline uint32_t due_row(const BatchView& view, uint32_t k, DueRows& due) {
  if (threadIdx.x < map_words(view.capacity)) {
    uint32_t word = due.words[threadIdx.x];
    const uint32_t before = due.before[threadIdx.x];
    if (before <= k && k < before + static_cast<uint32_t>(__popc(word))) {
      for (uint32_t i = before; i < k; ++i) word &= word - 1;
      due.chosen = 32 * threadIdx.x + static_cast<uint32_t>(__ffs(static_cast<int32_t>(word))) - 1;
    }
  }
  __syncthreads();
  const uint32_t row = due.chosen;
  __syncthreads();
  return row;
}

#if defined(THINKV_CUDA_EMULATED)
[[nodiscard]] inline cudaError_t count_multiprocessors(uint32_t& count) {
  count = 1;
  return cudaSuccess;
}
#else
[[nodiscard]] inline cudaError_t count_multiprocessors(uint32_t& count) {
  int device = 0, found = 0;
  cudaError_t done = cudaGetDevice(&device);
  if (done == cudaSuccess) {
    done = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  }
  count = static_cast<uint32_t>(found);
  return done;
}
#endif

}  // namespace thinkv::cuda
