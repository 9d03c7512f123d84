// refresh.cu: the three kernels of refresh.h and their launch.
//
// decide leaves two bit maps of the batch's rows in BatchView::pages: what is due by a rule without
// keys, and by one with keys. A block of reduce reads its map, and where bits are set takes (row,
// lane) pairs in turn; so a launch has as many blocks as the GPU holds at once, whatever is due.
#include "kernels/cuda/refresh.h"

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/refresh_decide.cuh"
#include "kernels/cuda/refresh_reduce.cuh"
#include "thinkv/internal/limits.h"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kDecideWarps = 8;  // a byte of a bit map
constexpr uint32_t kPlainThreads = 128;
constexpr uint32_t kPlainBlocksEach = 8;  // of a multiprocessor
constexpr uint32_t kMapWordsMax = limits::kBatchMax / 32;
static_assert(kMapWordsMax <= kPlainThreads && kPlainThreads <= kMedoidThreads);

enum DueMap : uint32_t { kDuePlain = 0, kDueKeys = 1, kDueMaps = 2 };

[[nodiscard]] __host__ __device__ constexpr uint32_t map_words(uint32_t capacity) {
  return (capacity + 31) / 32;
}
[[nodiscard]] __device__ __forceinline__ uint32_t* due_map(const BatchView& view, uint32_t map) {
  return reinterpret_cast<uint32_t*>(view.pages) + map * map_words(view.capacity);
}

__global__ void __launch_bounds__(kDecideWarps * 32)
    decide_kernel(const __grid_constant__ BatchView view) {
  __shared__ uint32_t due[kDecideWarps];  // bit m: of map m
  let_next_start();
  wait_for_previous();
  const uint32_t warp = threadIdx.x / 32, row = blockIdx.x * kDecideWarps + warp;
  DeviceSequence* sequence = row < view.capacity ? sequence_at(view, view.roots[row]) : nullptr;
  uint32_t mine = 0;
  if (sequence != nullptr && decide(view, sequence, row)) {
    mine = 1u << (selects_by_keys(sequence->policy.select) ? kDueKeys : kDuePlain);
  }
  if (threadIdx.x % 32 == 0) due[warp] = mine;
  __syncthreads();
  if (threadIdx.x < kDueMaps) {
    uint32_t byte = 0;
    for (uint32_t w = 0; w < kDecideWarps; ++w) byte |= ((due[w] >> threadIdx.x) & 1u) << w;
    reinterpret_cast<uint8_t*>(due_map(view, threadIdx.x))[blockIdx.x] = static_cast<uint8_t>(byte);
  }
}

// A bit map in shared memory.
struct DueRows {
  uint32_t words[kMapWordsMax];
  uint32_t before[kMapWordsMax];  // bits set in the words before
  uint32_t chosen;
};

// Result: rows that are due; the whole block calls it.
[[nodiscard]] __device__ uint32_t load_due(const BatchView& view, DueMap map, DueRows& due) {
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
[[nodiscard]] __device__ uint32_t due_row(const BatchView& view, uint32_t k, DueRows& due) {
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

// kDim: 0 for the rules that need no keys.
template <int kDim>
__device__ __forceinline__ void reduce_all(const BatchView& view, DueRows& due, RowCounts* counts) {
  wait_for_previous();
  const uint32_t rows = load_due(view, kDim == 0 ? kDuePlain : kDueKeys, due);
  KeySpace keys{};
  const RowSpace space =
      kDim == 0 ? plain_rows(dynamic_shared()) : key_rows(dynamic_shared(), keys);
  const uint32_t lanes = view.geometry.lanes();
  for (uint64_t item = blockIdx.x; item < uint64_t{rows} * lanes; item += gridDim.x) {
    const uint32_t row = due_row(view, static_cast<uint32_t>(item / lanes), due);
    DeviceSequence* sequence = sequence_at(view, view.roots[row]);
    if (sequence == nullptr) continue;
    reduce_lane<kDim>(view, sequence, static_cast<uint32_t>(item % lanes), space, keys, counts);
  }
}

__global__ void __launch_bounds__(kPlainThreads, kPlainBlocksEach)
    reduce_plain_kernel(const __grid_constant__ BatchView view) {
  __shared__ DueRows due;
  __shared__ RowCounts counts;
  let_next_start();
  reduce_all<0>(view, due, &counts);
}

template <int kDim>
__global__ void __launch_bounds__(kMedoidThreads, 1)
    reduce_keys_kernel(const __grid_constant__ BatchView view) {
  __shared__ DueRows due;
  __shared__ RowCounts counts;
  reduce_all<kDim>(view, due, &counts);
}

#if defined(THINKV_CUDA_EMULATED)
cudaError_t count_multiprocessors(uint32_t& count) {
  count = 1;
  return cudaSuccess;
}
#else
cudaError_t count_multiprocessors(uint32_t& count) {
  int device = 0, found = 0;
  cudaError_t done = cudaGetDevice(&device);
  if (done == cudaSuccess) {
    done = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  }
  count = static_cast<uint32_t>(found);
  return done;
}
#endif

cudaError_t launch_keys(const BatchView& view, uint32_t blocks, cudaStream_t stream) {
  const LaunchSize size{.blocks = blocks,
                        .threads = kMedoidThreads,
                        .shared_bytes = key_shared_bytes(running_code()),
                        .overlaps_previous = true};
  switch (view.geometry.head_dim) {
    case 64:
      return launch(reduce_keys_kernel<64>, size, stream, view);
    case 128:
      return launch(reduce_keys_kernel<128>, size, stream, view);
    case 256:
      return launch(reduce_keys_kernel<256>, size, stream, view);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_refresh(const BatchView& view, cudaStream_t stream) {
  const uint64_t map_bytes = uint64_t{kDueMaps} * map_words(view.capacity) * sizeof(uint32_t);
  if (view.capacity > limits::kBatchMax || map_bytes > view.pages_max * sizeof(PageView)) {
    return cudaErrorInvalidValue;
  }
  uint32_t multiprocessors = 0;
  cudaError_t done = count_multiprocessors(multiprocessors);
  if (done != cudaSuccess) return done;
  done = launch(decide_kernel,
                {.blocks = (view.capacity + kDecideWarps - 1) / kDecideWarps,
                 .threads = kDecideWarps * 32,
                 .shared_bytes = 0,
                 .overlaps_previous = true},
                stream, view);
  if (done != cudaSuccess) return done;
  done = launch(reduce_plain_kernel,
                {.blocks = kPlainBlocksEach * multiprocessors,
                 .threads = kPlainThreads,
                 .shared_bytes = kPlainSharedBytes,
                 .overlaps_previous = true},
                stream, view);
  if (done != cudaSuccess) return done;
  return launch_keys(view, multiprocessors, stream);
}

}  // namespace thinkv::cuda
