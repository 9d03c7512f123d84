// refresh.cu: the three kernels of refresh.h and their launch.
//
// decide leaves bit maps of the batch's rows in BatchView::pages (due_rows.cuh): what is due by a
// rule without keys, by one with keys, and by rank rules (rank.cu). A block of reduce takes (row,
// lane) pairs of its map in turn; so a launch has as many blocks as the GPU holds at once, whatever
// is due.
#include "kernels/cuda/refresh.h"

#include <cstdint>

#include "kernels/cuda/due_rows.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rank_step.cuh"
#include "kernels/cuda/refresh_decide.cuh"
#include "kernels/cuda/refresh_reduce.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kDecideWarps = 8;  // a byte of a bit map
constexpr uint32_t kPlainThreads = 128;
constexpr uint32_t kPlainBlocksEach = 8;  // of a multiprocessor
static_assert(kMapWordsMax <= kPlainThreads && kPlainThreads <= kMedoidThreads);

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
  if (threadIdx.x % 32 == 0) {
    const bool ranked = sequence != nullptr && sequence->policy.evict == EvictRule::kRank;
    if (ranked && count_rank_step(sequence)) mine |= 1u << kDueRank;
    due[warp] = mine;
  }
  __syncthreads();
  if (threadIdx.x < kDueMaps) {
    uint32_t byte = 0;
    for (uint32_t w = 0; w < kDecideWarps; ++w) byte |= ((due[w] >> threadIdx.x) & 1u) << w;
    reinterpret_cast<uint8_t*>(due_map(view, threadIdx.x))[blockIdx.x] = static_cast<uint8_t>(byte);
  }
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
