// sequence_open.cu: the pages that a sequence has before its first token.
#include "kernels/cuda/coded_lane.cuh"
#include "kernels/cuda/prompt_queries.h"
#include "kernels/cuda/rank_step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 256;

struct OpenParams {
  uint32_t root;
  uint32_t budget_tokens;
  uint32_t trace_sparsity;
  PolicyParams policy;
};

// Everything of the root page but the page ids behind the DeviceSequence. No magic yet.
__device__ void write_header(const BatchView& view, const OpenParams& params,
                             DeviceSequence* sequence) {
  const ModelGeometry& g = view.geometry;
  sequence->version = kDeviceLayoutVersion;
  sequence->layers = g.layers;
  sequence->q_heads = g.q_heads;
  sequence->kv_heads = g.kv_heads;
  sequence->head_dim = g.head_dim;
  sequence->value_type = static_cast<uint32_t>(g.value_type);
  sequence->softmax_scale = g.softmax_scale;
  sequence->budget_tokens = params.budget_tokens;
  sequence->trace_sparsity = params.trace_sparsity;
  sequence->score_bytes = score_bytes(params.policy);
  sequence->policy = params.policy;
  for (uint32_t& page : sequence->segment_page) page = PageId::kNoneRaw;
  sequence->segment_page[0] = take_page(view.lease);
  sequence->work_page = take_page(view.lease);
  sequence->segment_pages = 1;
  sequence->segments = 1;
  sequence->lane_pages = (g.lanes() + lanes_per_page(g.head_dim) - 1) / lanes_per_page(g.head_dim);
  sequence->data_pages = 2 * g.lanes();
  const uint32_t of_a_lane = params.policy.entropy.on() ? 2 : 1;
  sequence->metadata_pages = 3 + sequence->lane_pages + of_a_lane * g.lanes();
  auto* segment = segment_at(view, sequence, 0);
  if (segment == nullptr) return;
  *segment = {};
  segment->end = policy::kOpenEnd;
  segment->label = static_cast<uint8_t>(Thought::kReasoning);
}

// An empty stream. Result: false where a page was missing.
__device__ bool write_stream(const BatchView& view, DeviceLane* lane) {
  lane->stream_page = take_page(view.lease);
  auto* stream = lane->stream_page == PageId::kNoneRaw
                     ? nullptr
                     : reinterpret_cast<DeviceStream*>(page_at(view, lane->stream_page));
  if (stream == nullptr) return false;
  *stream = {};
  for (uint32_t& page : stream->block_page) page = PageId::kNoneRaw;
  for (uint32_t& page : stream->list_page) page = PageId::kNoneRaw;
  return true;
}

// Result: false where a page was missing.
__device__ bool write_lane(const BatchView& view, DeviceLane* lane, bool streams) {
  *lane = {};
  for (uint32_t& page : lane->table) page = PageId::kNoneRaw;
  lane->mask = policy::kMaskFull;
  lane->head_signal = __uint_as_float(0x7FC0'0000u);
  lane->buffer_page[0] = take_page(view.lease);
  lane->buffer_page[1] = take_page(view.lease);
  lane->table[0] = take_page(view.lease);
  lane->table_pages = 1;
  lane->stream_page = PageId::kNoneRaw;
  if (streams && !write_stream(view, lane)) return false;
  return lane->buffer_page[0] != PageId::kNoneRaw && lane->buffer_page[1] != PageId::kNoneRaw &&
         lane->table[0] != PageId::kNoneRaw;
}

// One block. The magic comes last and only if no page was missing: otherwise nothing will ever
// follow what was written here.
__global__ void open_kernel(const __grid_constant__ BatchView view,
                            const __grid_constant__ OpenParams params) {
  auto* page = page_at(view, params.root);
  if (page == nullptr) return;
  auto* sequence = reinterpret_cast<DeviceSequence*>(page);
  const uint32_t bytes = page_bytes(view.geometry.head_dim);
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(page)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  if (threadIdx.x == 0) write_header(view, params, sequence);
  __syncthreads();
  uint32_t* ids = lane_page_ids(sequence);
  for (uint32_t i = threadIdx.x; i < sequence->lane_pages; i += blockDim.x) {
    ids[i] = take_page(view.lease);
  }
  __syncthreads();
  const uint32_t per_page = lanes_per_page(view.geometry.head_dim);
  bool good =
      sequence->segment_page[0] != PageId::kNoneRaw && sequence->work_page != PageId::kNoneRaw;
  for (uint32_t i = threadIdx.x; i < view.geometry.lanes(); i += blockDim.x) {
    auto* lanes = reinterpret_cast<DeviceLane*>(page_at(view, ids[i / per_page]));
    const bool streams = params.policy.entropy.on();
    good = lanes != nullptr && write_lane(view, lanes + i % per_page, streams) && good;
  }
  const bool failed = __syncthreads_or(good ? 0 : 1) != 0;
  if (threadIdx.x != 0 || failed) return;
  sequence->magic = kDeviceSequenceMagic;
  add_64(&view.lease->used_total, 1);  // the root: the close gives it to the lease
}

__global__ void prefill_end_kernel(const __grid_constant__ BatchView view, uint32_t root,
                                   const __grid_constant__ Prompt prompt) {
  DeviceSequence* sequence = sequence_at(view, root);
  if (sequence == nullptr) return;
  sequence->tokens = prompt.tokens;
  sequence->prompt_tokens = prompt.tokens;
  const PolicyParams& p = sequence->policy;
  if (p.evict == EvictRule::kRank) {
    sequence->prompt_queries = prompt.queries;
    sequence->window_queries = policy::prompt_sample(p, prompt.queries).used;
    // Without the prompt's queries the rules that look at them wait.
    sequence->query_wait = prompt.queries == 0 && policy::any_waits_for_queries(p) ? 1 : 0;
    sequence->rank_step = rank_plan(p, rank_moment(sequence, 0));
    sequence->over_budget = 0;
  }
  policy::Segment* first = segment_at(view, sequence, 0);
  if (first != nullptr) first->start = prompt.tokens;
}

__global__ void budget_kernel(const __grid_constant__ BatchView view, uint32_t root,
                              uint32_t budget_tokens) {
  DeviceSequence* sequence = sequence_at(view, root);
  if (sequence != nullptr) sequence->budget_tokens = budget_tokens;
}

}  // namespace

cudaError_t launch_open(const BatchView& view, uint32_t root, const PolicyParams& policy,
                        uint32_t budget_tokens, bool trace_sparsity, cudaStream_t stream) {
  const OpenParams params{.root = root,
                          .budget_tokens = budget_tokens,
                          .trace_sparsity = trace_sparsity ? 1u : 0u,
                          .policy = policy};
  return launch(open_kernel, {.blocks = 1, .threads = kThreads}, stream, view, params);
}

cudaError_t launch_prefill_queries(const BatchView& view, uint32_t root, const PolicyParams& policy,
                                   uint32_t layer, const void* q, Element element,
                                   const Prompt& prompt, cudaStream_t stream) {
  if (layer >= view.geometry.layers || prompt.queries == 0 || prompt.queries > prompt.tokens) {
    return cudaErrorInvalidValue;
  }
  if (policy.evict != EvictRule::kRank) return cudaSuccess;
  const QueryParams params{
      .q = q,
      .element = element,
      .root = root,
      .layer = layer,
      .tokens = prompt.tokens,
      .count = prompt.queries,
      .window = prompt.queries < policy.score_window ? prompt.queries : policy.score_window,
      .sample = policy::prompt_sample(policy, prompt.queries)};
  cudaError_t error = cudaSuccess;
  if (policy::reads_entropy(policy)) error = launch_query_entropy(view, params, stream);
  if (error != cudaSuccess) return error;
  if (policy::leaves_channels_out(policy)) error = launch_query_energy(view, params, stream);
  if (error != cudaSuccess || !policy::keeps_sums(policy)) return error;
  return launch_query_attention(view, policy, params, stream);
}

cudaError_t launch_prefill_end(const BatchView& view, uint32_t root, const PolicyParams& policy,
                               const Prompt& prompt, cudaStream_t stream) {
  const bool ranks = policy.evict == EvictRule::kRank;
  if (ranks && prompt.queries == 0 && policy::reads_entropy(policy)) {
    const cudaError_t measured = launch_key_entropy(view, root, prompt.tokens, stream);
    if (measured != cudaSuccess) return measured;
  }
  const cudaError_t ended =
      launch(prefill_end_kernel, {.blocks = 1, .threads = 1}, stream, view, root, prompt);
  if (ended != cudaSuccess) return ended;
  return launch_prompt_rules(view, root, stream);
}

cudaError_t launch_budget(const BatchView& view, uint32_t root, uint32_t budget_tokens,
                          cudaStream_t stream) {
  return launch(budget_kernel, {.blocks = 1, .threads = 1}, stream, view, root, budget_tokens);
}

}  // namespace thinkv::cuda
