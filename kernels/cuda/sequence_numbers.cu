// sequence_numbers.cu: what a sequence holds and has done, for the host.
#include "kernels/cuda/lane.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 256;

// Sums and maxima over the lanes of a sequence.
struct LaneTotals {
  uint64_t live;
  uint32_t live_max;
  uint32_t pages_max;
};

__device__ LaneTotals warp_totals(LaneTotals t) {
  for (uint32_t x = 16; x > 0; x /= 2) {
    t.live += __shfl_xor_sync(kAllLanes, t.live, x);
    t.live_max = max(t.live_max, __shfl_xor_sync(kAllLanes, t.live_max, x));
    t.pages_max = max(t.pages_max, __shfl_xor_sync(kAllLanes, t.pages_max, x));
  }
  return t;
}

__device__ SequenceNumbers numbers_of(const DeviceSequence* s, const LaneTotals& lanes) {
  SequenceNumbers n{};
  n.tokens = s->tokens;
  n.prompt_tokens = s->prompt_tokens;
  n.live_slots = lanes.live;
  n.live_tokens_max = lanes.live_max;
  n.data_pages = s->data_pages;
  n.metadata_pages = s->metadata_pages;
  n.evicted_slots = s->counters.evicted_slots;
  n.reused_slots = s->counters.reused_slots;
  n.recoded_slots = s->counters.recoded_slots;
  n.recoded_bytes = s->counters.recoded_bytes;
  n.demotions = s->counters.demotions;
  n.merges = s->counters.merges;
  n.over_budget_steps = s->counters.over_budget_steps;
  n.refreshes = s->counters.refreshes;
  n.steps = s->counters.steps;
  for (uint32_t i = 0; i < kThoughtCount; ++i) n.segments[i] = s->counters.segments[i];
  n.budget_tokens = s->policy.evict == EvictRule::kNone || s->budget_tokens == kRankBudgetNone
                        ? 0
                        : s->budget_tokens;
  n.lane_pages_max = lanes.pages_max;
  n.gathered_bytes = s->gathered_bytes;
  return n;
}

__global__ void numbers_kernel(const __grid_constant__ BatchView view, uint32_t root,
                               SequenceNumbers* out) {
  __shared__ LaneTotals warps[kThreads / 32];
  DeviceSequence* sequence = sequence_at(view, root);
  if (sequence == nullptr) {
    if (threadIdx.x == 0) *out = {};
    return;
  }
  LaneTotals totals{};
  for (uint32_t i = threadIdx.x; i < view.geometry.lanes(); i += kThreads) {
    const LaneView lane = lane_view(view, sequence, i);
    if (lane.lane == nullptr) continue;
    totals.live += lane.lane->live;
    totals.live_max = max(totals.live_max, lane.lane->live);
    totals.pages_max = max(totals.pages_max, lane.lane->pages);
  }
  totals = warp_totals(totals);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = totals;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t w = 1; w < kThreads / 32; ++w) {
    totals.live += warps[w].live;
    totals.live_max = max(totals.live_max, warps[w].live_max);
    totals.pages_max = max(totals.pages_max, warps[w].pages_max);
  }
  *out = numbers_of(sequence, totals);
}

// The mean over kv heads, as collect_sparsity() of the host; NaN where one was not measured.
__device__ float layer_sparsity(const BatchView& view, uint32_t row, uint32_t layer) {
  const float unknown = __uint_as_float(0x7FC0'0000u);
  if ((view.emit[uint64_t{layer} * view.capacity + row] & kEmitSparsity) == 0) return unknown;
  const uint32_t heads = view.geometry.kv_heads;
  const LaneSparsity* counts = view.sparsity + (uint64_t{layer} * view.capacity + row) * heads;
  float sum = 0.0f;
  for (uint32_t head = 0; head < heads; ++head) {
    if (counts[head].live == 0) return unknown;
    sum = exact_add(sum, exact_div(static_cast<float>(counts[head].near_zero),
                                   static_cast<float>(counts[head].live)));
  }
  return exact_div(sum, static_cast<float>(heads));
}

// The row of the batch in which the sequence made its last step, or `capacity`. What the row holds
// is that step's only while its position is the sequence's newest.
__device__ uint32_t row_of(const BatchView& view, uint32_t root, const DeviceSequence* sequence) {
  for (uint32_t row = 0; row < view.capacity; ++row) {
    if (view.roots[row] != root) continue;
    const bool last = sequence->counters.steps > 0 && view.positions[row] + 1 == sequence->tokens;
    return last ? row : view.capacity;
  }
  return view.capacity;
}

__global__ void sparsity_kernel(const __grid_constant__ BatchView view, uint32_t root, float* out) {
  const DeviceSequence* sequence = sequence_at(view, root);
  const uint32_t row = sequence == nullptr ? view.capacity : row_of(view, root, sequence);
  for (uint32_t layer = threadIdx.x; layer < view.geometry.layers; layer += kThreads) {
    out[layer] =
        row < view.capacity ? layer_sparsity(view, row, layer) : __uint_as_float(0x7FC0'0000u);
  }
}

}  // namespace

cudaError_t launch_numbers(const BatchView& view, uint32_t root, SequenceNumbers* out,
                           cudaStream_t stream) {
  return launch(numbers_kernel, {.blocks = 1, .threads = kThreads}, stream, view, root, out);
}

cudaError_t launch_sparsity(const BatchView& view, uint32_t root, float* out, cudaStream_t stream) {
  return launch(sparsity_kernel, {.blocks = 1, .threads = kThreads}, stream, view, root, out);
}

}  // namespace thinkv::cuda
