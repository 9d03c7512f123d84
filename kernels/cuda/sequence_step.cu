// sequence_step.cu: the first and the last kernel of a step. Between them are sequence_append.cu,
// attention, sequence_flush.cu and the refresh.
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/refresh.h"
#include "kernels/cuda/step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kBeginThreadsMax = 1024;
constexpr uint32_t kFinishThreads = 256;
constexpr uint32_t kFinishBlocks = 264;

// ---- begin ----

struct StepFlags {
  bool closing;
  bool emitting;
};

__device__ StepFlags flags_of(const BatchView& view, DeviceSequence* sequence) {
  const policy::Segment* open = open_segment(view, sequence);
  const PolicyParams& p = sequence->policy;
  const uint32_t every = p.score_every == 0 ? 1 : p.score_every;
  return {open != nullptr && sequence->tokens + 1 - open->start >= p.segment_tokens,
          sequence->scored != 0 && sequence->counters.steps % every == 0};
}

__device__ bool is_label_layer(const PolicyParams& policy, uint32_t layer) {
  for (uint32_t i = 0; i < kLabelLayersMax; ++i) {
    if (i < policy.label_layer_count && policy.label_layers[i] == layer) return true;
  }
  return false;
}

// One row of the batch in one layer; the first layer's block also notes it in the sequence.
__device__ void begin_row(const BatchView& view, uint32_t row, uint32_t layer) {
  DeviceSequence* sequence = sequence_at(view, view.roots[row]);
  uint8_t emit = 0;
  uint32_t position = 0;
  if (sequence != nullptr) {
    position = sequence->tokens;
    const StepFlags flags = flags_of(view, sequence);
    if (flags.emitting) emit |= kEmitScores;
    if (sequence->trace_sparsity != 0 ||
        (flags.closing && is_label_layer(sequence->policy, layer))) {
      emit |= kEmitSparsity;
    }
    if (layer == 0) {
      const LaneView first = lane_view(view, sequence, 0);
      const bool full = first.lane != nullptr && first.lane->buffer_count + 1 >= kBufferTokens;
      sequence->closing = flags.closing ? 1 : 0;
      sequence->emitting = flags.emitting ? 1 : 0;
      sequence->flushing = flags.closing || full ? 1 : 0;
    }
  }
  view.emit[uint64_t{layer} * view.capacity + row] = emit;
  if (layer == 0) view.positions[row] = position;
}

// Entries that a lane will have in the list once this step's token is in its buffer.
__device__ uint32_t count_pages(const BatchView& view, uint32_t row, uint32_t layer,
                                uint32_t head) {
  const LaneView lane = lane_of_root(view, view.roots[row], layer * view.geometry.kv_heads + head);
  if (lane.lane == nullptr) return 0;
  return lane.lane->pages + buffer_pages(lane.lane->buffer_count + 1);
}

// The sum of all earlier threads' values, and the total.
struct BlockScan {
  uint32_t before;
  uint32_t total;
};
__device__ BlockScan block_scan(uint32_t value, uint32_t (&warp_sums)[32]) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
  for (uint32_t x = 1; x < 32; x *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, sum, x);
    if (lane >= x) sum += left;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  uint32_t warps = lane < blockDim.x / 32 ? warp_sums[lane] : 0;
  for (uint32_t x = 1; x < 32; x *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, warps, x);
    if (lane >= x) warps += left;
  }
  const uint32_t below = __shfl_sync(kAllLanes, warps, warp == 0 ? 0 : warp - 1);
  const uint32_t total = __shfl_sync(kAllLanes, warps, 31);
  __syncthreads();  // the sums are read before the next round writes them
  return {(warp == 0 ? 0 : below) + sum - value, total};
}

// A block a layer.
__global__ void __launch_bounds__(kBeginThreadsMax)
    begin_kernel(const __grid_constant__ BatchView view) {
  __shared__ uint32_t warp_sums[32];
  wait_for_previous();
  const uint32_t layer = blockIdx.x, heads = view.geometry.kv_heads;
  const uint32_t lanes = view.capacity * heads;
  for (uint32_t row = threadIdx.x; row < view.capacity; row += blockDim.x) {
    begin_row(view, row, layer);
  }
  uint32_t* begin = view.lane_begin + uint64_t{layer} * (lanes + 1);
  uint32_t done = 0;
  for (uint32_t base = 0; base < lanes; base += blockDim.x) {
    const uint32_t lane = base + threadIdx.x;
    const uint32_t count = lane < lanes ? count_pages(view, lane / heads, layer, lane % heads) : 0;
    const BlockScan scan = block_scan(count, warp_sums);
    if (lane < lanes) begin[lane] = min(done + scan.before, view.pages_max);
    done += scan.total;
  }
  if (threadIdx.x != 0) return;
  begin[lanes] = min(done, view.pages_max);
  if (done > view.pages_max) raise_fault(view.lease, kListFull);
}

// ---- the last kernel of a step ----

__device__ void tell_progress(const BatchView& view, const StepTotals* totals) {
  Progress* progress = view.progress;
  progress->used_total = view.lease->used_total;
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
  }
  for (uint32_t x = 16; x > 0; x /= 2) {
    live += __shfl_xor_sync(kAllLanes, live, x);
    pages_max = max(pages_max, __shfl_xor_sync(kAllLanes, pages_max, x));
  }
  auto* totals = reinterpret_cast<StepTotals*>(view.pages);
  if (threadIdx.x % 32 == 0) {
    add_64(&totals->live, live);
    atomicMax(&totals->pages_max, pages_max);
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(&totals->done, 1u) + 1 < gridDim.x) return;
  __threadfence();
  tell_progress(view, totals);
}

}  // namespace

cudaError_t launch_begin(const BatchView& view, cudaStream_t stream) {
  const uint32_t lanes = view.capacity * view.geometry.kv_heads;
  const uint32_t threads = lanes < kBeginThreadsMax ? (lanes + 31) / 32 * 32 : kBeginThreadsMax;
  return launch(begin_kernel,
                {.blocks = view.geometry.layers, .threads = threads, .overlaps_previous = true},
                stream, view);
}

cudaError_t launch_end(const BatchView& view, cudaStream_t stream) {
  cudaError_t error = launch_flush(view, FlushWhen::kClosing, stream);
  if (error == cudaSuccess) error = launch_refresh(view, stream);
  if (error == cudaSuccess) error = launch_flush(view, FlushWhen::kFull, stream);
  if (error != cudaSuccess) return error;
  const uint64_t lanes = uint64_t{view.capacity} * view.geometry.lanes();
  const uint64_t wanted = (lanes + kFinishThreads - 1) / kFinishThreads;
  const auto blocks = static_cast<uint32_t>(wanted < kFinishBlocks ? wanted : kFinishBlocks);
  return launch(finish_kernel, {.blocks = blocks, .threads = kFinishThreads}, stream, view);
}

}  // namespace thinkv::cuda
