// sequence_step.cu: the end of a step. Before it are sequence_list.cu (begin), sequence_append.cu
// and attention; in it sequence_flush.cu and the refresh.
#include "kernels/cuda/lane_write.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rank.h"
#include "kernels/cuda/refresh.h"
#include "kernels/cuda/step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kFinishThreads = 256;
constexpr uint32_t kFinishBlocks = 264;

__device__ void tell_progress(const BatchView& view, const StepTotals* totals) {
  Progress* progress = view.progress;
  progress->used_total = __ldcg(&view.lease->used_total);
  progress->faults = view.lease->faults;
  progress->lane_pages_max = __ldcg(&totals->pages_max);
  progress->live_slots = __ldcg(&totals->live);
  const uint64_t steps = progress->steps + 1;
  __threadfence_system();  // a host that sees the step sees its numbers
  *const_cast<volatile uint64_t*>(&progress->steps) = steps;
}

__global__ void finish_kernel(const __grid_constant__ BatchView view) {
  const uint32_t lanes = view.geometry.lanes();
  const uint64_t all = uint64_t{view.capacity} * lanes;
  uint64_t live = 0;
  uint32_t pages_max = 0;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < all;
       i += uint64_t{gridDim.x} * blockDim.x) {
    const LaneView lane =
        lane_of_root(view, view.roots[i / lanes], static_cast<uint32_t>(i % lanes));
    if (lane.lane == nullptr) continue;
    live += lane.lane->live;
    pages_max = max(pages_max, lane.lane->pages);
    if (lane.lane->pending != 0) give_aside(lane);
  }
  for (uint32_t x = 16; x > 0; x /= 2) {
    live += __shfl_xor_sync(kAllLanes, live, x);
    pages_max = max(pages_max, __shfl_xor_sync(kAllLanes, pages_max, x));
  }
  auto* totals = reinterpret_cast<StepTotals*>(view.pages);
  if (threadIdx.x % 32 == 0) {
    add_64(&totals->live, live);
    atomicMax(&totals->pages_max, pages_max);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(&totals->done, 1u) + 1 < gridDim.x) return;
  __threadfence();
  tell_progress(view, totals);
}

}  // namespace

cudaError_t launch_end(const BatchView& view, cudaStream_t stream) {
  cudaError_t error = launch_flush(view, FlushWhen::kFirst, stream);
  if (error == cudaSuccess) error = launch_refresh(view, stream);
  if (error == cudaSuccess) error = launch_rank(view, stream);
  if (error == cudaSuccess && view.stream_pages != nullptr) error = launch_code_step(view, stream);
  if (error == cudaSuccess) error = launch_flush(view, FlushWhen::kFull, stream);
  if (error != cudaSuccess) return error;
  const uint64_t lanes = uint64_t{view.capacity} * view.geometry.lanes();
  const uint64_t wanted = (lanes + kFinishThreads - 1) / kFinishThreads;
  const auto blocks = static_cast<uint32_t>(wanted < kFinishBlocks ? wanted : kFinishBlocks);
  return launch(finish_kernel, {.blocks = blocks, .threads = kFinishThreads}, stream, view);
}

}  // namespace thinkv::cuda
