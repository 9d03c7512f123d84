// coded_prompt.cu: of a prompt's layer, the tokens that belong into streams: coded from the rows
// that were given, without pages of their own.
//
// A block of 64 tokens is quantised by every pass that needs its codes (count, measure, write):
// its rows are read again, but no working memory grows with the prompt. Counts of codes lie in the
// sequence's work page. Six launches.
#include "kernels/cuda/coded_block.cuh"
#include "kernels/cuda/rotate.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kBlocksMax = 132 * 8;
constexpr uint32_t kLayoutThreads = 256;

struct PromptParams {
  const void* k;
  const void* v;
  Element element;
  uint32_t root;
  uint32_t layer;
  uint32_t tokens;
};

// Rows of one block as the engine gave them.
template <int kDim>
struct PromptSource {
  const PromptParams* params;
  uint32_t heads;
  uint32_t head;
  uint32_t first;  // token
  bool rotate;
  template <bool kIsK>
  __device__ __forceinline__ void load(float (&x)[kDim / 8], uint32_t token) const {
    const uint64_t row = (uint64_t{first + token} * heads + head) * uint64_t{kDim};
    load_row<kDim>(x, kIsK ? params->k : params->v, params->element, row, true);
    if (rotate) rotate_vector<kDim>(x);
  }
};

// What of the prompt is coded; all threads find the same.
struct CodedPrompt {
  DeviceSequence* sequence;  // null: nothing is
  uint32_t blocks;           // of a lane
};
[[nodiscard]] __device__ __forceinline__ CodedPrompt coded_prompt(const BatchView& view,
                                                                  const PromptParams& params) {
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr || !sequence->policy.entropy.on()) return {nullptr, 0};
  const uint32_t tokens = policy::coded_tokens(sequence->policy.entropy, params.tokens);
  const uint32_t blocks = min(tokens, params.tokens) / kBlockTokens;
  return {blocks == 0 ? nullptr : sequence, blocks};
}
[[nodiscard]] __device__ __forceinline__ StreamView stream_of_head(const BatchView& view,
                                                                   const PromptParams& params,
                                                                   const CodedPrompt& prompt,
                                                                   uint32_t head) {
  const uint32_t lane = params.layer * view.geometry.kv_heads + head;
  return stream_of(lane_view(view, prompt.sequence, lane));
}
[[nodiscard]] __device__ __forceinline__ uint32_t* counts_of(const BatchView& view,
                                                             const CodedPrompt& prompt) {
  return reinterpret_cast<uint32_t*>(page_at(view, prompt.sequence->work_page));
}
[[nodiscard]] __device__ __forceinline__ StepShares shares_of(const CodedPrompt& prompt) {
  return {prompt.sequence->policy.entropy.key_step, prompt.sequence->policy.entropy.value_step};
}

// Calls work(head, block, source) for every block of the layer that is this block of threads'.
template <int kDim, class Work>
__device__ __forceinline__ void for_each_block(const BatchView& view, const PromptParams& params,
                                               const CodedPrompt& prompt, Work work) {
  const uint32_t heads = view.geometry.kv_heads;
  const uint32_t total = heads * prompt.blocks;
  for (uint32_t i = blockIdx.x; i < total; i += gridDim.x) {
    const uint32_t head = i / prompt.blocks, block = i % prompt.blocks;
    work(head, block,
         PromptSource<kDim>{&params, heads, head, block * kBlockTokens,
                            prompt.sequence->policy.rotate != 0});
  }
}

// A block of threads a lane: the table has room. The first one clears the counts.
__global__ void prepare_kernel(const __grid_constant__ BatchView view,
                               const __grid_constant__ PromptParams params) {
  const CodedPrompt prompt = coded_prompt(view, params);
  if (prompt.sequence == nullptr) return;
  uint32_t* counts = blockIdx.x == 0 ? counts_of(view, prompt) : nullptr;
  if (counts != nullptr) {
    for (uint32_t i = threadIdx.x; i < 2 * kSymbolCount; i += blockDim.x) counts[i] = 0;
  }
  if (threadIdx.x != 0) return;
  const StreamView s = stream_of_head(view, params, prompt, blockIdx.x);
  if (s.stream == nullptr) return;
  if (s.stream->blocks != 0 || s.stream->end_position != 0) {
    raise_fault(view.lease, kBadMetadata);
    return;
  }
  static_cast<void>(grow_blocks(s, prompt.blocks));
}

template <int kDim>
__global__ void __launch_bounds__(kCodingThreads)
    count_kernel(const __grid_constant__ BatchView view,
                 const __grid_constant__ PromptParams params) {
  __shared__ uint32_t counts[2][kSymbolCount];
  const CodedPrompt prompt = coded_prompt(view, params);
  if (prompt.sequence == nullptr) return;
  uint32_t* total = counts_of(view, prompt);
  if (total == nullptr) return;
  counts[0][threadIdx.x] = counts[1][threadIdx.x] = 0;
  CodingShared<kDim>& shared = coding_shared<kDim>();
  for_each_block<kDim>(view, params, prompt,
                       [&](uint32_t, uint32_t, const PromptSource<kDim>& source) {
                         if (quantise_block(shared, source, shares_of(prompt))) {
                           count_codes(shared, counts);
                         }
                       });
  __syncthreads();
  for (uint32_t side = 0; side < 2; ++side) {
    const uint32_t count = counts[side][threadIdx.x];
    if (count != 0) atomicAdd(&total[side * kSymbolCount + threadIdx.x], count);
  }
}

// One block of threads.
__global__ void __launch_bounds__(kCodingThreads)
    codes_kernel(const __grid_constant__ BatchView view,
                 const __grid_constant__ PromptParams params) {
  __shared__ CodeMaking making;
  const CodedPrompt prompt = coded_prompt(view, params);
  if (prompt.sequence == nullptr) return;
  const uint32_t* counts = counts_of(view, prompt);
  const StreamView first = stream_of_head(view, params, prompt, 0);
  if (counts == nullptr || first.stream == nullptr) return;
  for (uint32_t side = 0; side < 2; ++side) {
    make_lengths(making, counts[side * kSymbolCount + threadIdx.x], first.stream->codes[side]);
  }
}

// The blocks of a lane, less where they begin.
template <int kDim>
__global__ void __launch_bounds__(kCodingThreads)
    measure_kernel(const __grid_constant__ BatchView view,
                   const __grid_constant__ PromptParams params) {
  __shared__ LayerTables tables;
  const CodedPrompt prompt = coded_prompt(view, params);
  if (prompt.sequence == nullptr) return;
  const StreamView first = stream_of_head(view, params, prompt, 0);
  if (first.stream == nullptr || !load_tables(tables, first)) return;
  CodingShared<kDim>& shared = coding_shared<kDim>();
  for_each_block<kDim>(
      view, params, prompt, [&](uint32_t head, uint32_t index, const PromptSource<kDim>& source) {
        const bool coded = quantise_block(shared, source, shares_of(prompt));
        if (coded) static_cast<void>(measure_runs(shared, tables));
        if (threadIdx.x != 0) return;
        const StreamView s = stream_of_head(view, params, prompt, head);
        if (s.stream == nullptr || index >= s.stream->block_pages * s.blocks_each) return;
        StreamBlock* block = block_at(s, index);
        if (block == nullptr) return;
        *block = {.unit = 0,
                  .bytes = coded ? bytes_before(shared, kAllRuns) : kernels::raw_block_bytes(kDim),
                  .first_position = index * kBlockTokens,
                  .raw = coded ? 0u : 1u};
      });
}

// Where the blocks of a lane begin, by one warp. Result: units in all.
[[nodiscard]] __device__ uint64_t place_blocks(const StreamView& s, uint32_t blocks) {
  uint64_t done = 0;
  for (uint32_t base = 0; base < blocks; base += 32) {
    const uint32_t index = base + threadIdx.x;
    StreamBlock* block = index < blocks ? block_at(s, index) : nullptr;
    const uint32_t bytes = block == nullptr ? 0 : block->bytes;
    const uint32_t units = units_of(min(bytes, kernels::raw_block_bytes(s.lane.head_dim)));
    uint32_t sum = units;
    for (uint32_t x = 1; x < 32; x *= 2) {
      const uint32_t left = __shfl_up_sync(kAllLanes, sum, x);
      if (threadIdx.x >= x) sum += left;
    }
    if (block != nullptr) block->unit = static_cast<uint32_t>(done + sum - units);
    done += __shfl_sync(kAllLanes, sum, 31);
  }
  return done;
}

// A block of threads a lane: where its blocks begin, and the pages for them.
__global__ void __launch_bounds__(kLayoutThreads)
    layout_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ PromptParams params) {
  __shared__ uint64_t units;
  __shared__ uint32_t pages;
  const CodedPrompt prompt = coded_prompt(view, params);
  if (prompt.sequence == nullptr) return;
  const StreamView s = stream_of_head(view, params, prompt, blockIdx.x);
  if (s.stream == nullptr || s.stream->blocks != 0) return;
  const bool room = uint64_t{s.stream->block_pages} * s.blocks_each >= prompt.blocks;
  if (__syncthreads_or(room ? 0 : 1) != 0) return;  // said before: a page was missing
  if (threadIdx.x < 32) {
    const uint64_t placed = place_blocks(s, prompt.blocks);
    if (threadIdx.x == 0) {
      units = placed;
      const uint64_t wanted = (placed * kStreamUnitBytes + s.page - 1) / s.page;
      const bool fits = wanted <= uint64_t{kStreamListPagesMax} * s.ids_each &&
                        grow_list(s, static_cast<uint32_t>(wanted));
      pages = fits ? static_cast<uint32_t>(wanted) : 0;
    }
  }
  __syncthreads();
  bool good = pages != 0;
  for (uint32_t i = threadIdx.x; i < pages; i += kLayoutThreads) good = fill_listed(s, i) && good;
  if (__syncthreads_or(good ? 0 : 1) != 0 || threadIdx.x != 0) return;
  s.stream->end_unit = static_cast<uint32_t>(units);
  s.stream->end_position = prompt.blocks * kBlockTokens;
  s.stream->blocks = prompt.blocks;
}

template <int kDim>
__global__ void __launch_bounds__(kCodingThreads)
    write_kernel(const __grid_constant__ BatchView view,
                 const __grid_constant__ PromptParams params) {
  __shared__ LayerTables tables;
  const CodedPrompt prompt = coded_prompt(view, params);
  if (prompt.sequence == nullptr) return;
  const StreamView first = stream_of_head(view, params, prompt, 0);
  if (first.stream == nullptr || !load_tables(tables, first)) return;
  CodingShared<kDim>& shared = coding_shared<kDim>();
  for_each_block<kDim>(view, params, prompt,
                       [&](uint32_t head, uint32_t index, const PromptSource<kDim>& source) {
                         const StreamView s = stream_of_head(view, params, prompt, head);
                         if (s.stream == nullptr || index >= s.stream->blocks) return;
                         const StreamBlock* block = block_at(s, index);
                         if (block == nullptr) return;
                         uint32_t bytes = kernels::raw_block_bytes(kDim);
                         if (quantise_block(shared, source, shares_of(prompt))) {
                           const CodePart part = measure_runs(shared, tables);
                           bytes = bytes_before(shared, kAllRuns);
                           encode_block(shared, part);
                         } else {
                           encode_raw_block(shared, source, wide_format(view));
                         }
                         store_block(shared, s, block->unit, bytes);
                       });
}

template <int kDim>
cudaError_t launch_all(const BatchView& view, const PromptParams& params, cudaStream_t stream) {
  const uint32_t heads = view.geometry.kv_heads;
  const uint64_t blocks = uint64_t{heads} * (params.tokens / kBlockTokens);
  if (blocks == 0) return cudaSuccess;
  const LaunchSize lanes{.blocks = heads, .threads = kLayoutThreads};
  const LaunchSize each{.blocks = static_cast<uint32_t>(blocks < kBlocksMax ? blocks : kBlocksMax),
                        .threads = kCodingThreads,
                        .shared_bytes = sizeof(CodingShared<kDim>)};
  cudaError_t error = launch(prepare_kernel, lanes, stream, view, params);
  if (error == cudaSuccess) error = launch(count_kernel<kDim>, each, stream, view, params);
  if (error == cudaSuccess) {
    error = launch(codes_kernel, {.blocks = 1, .threads = kCodingThreads}, stream, view, params);
  }
  if (error == cudaSuccess) error = launch(measure_kernel<kDim>, each, stream, view, params);
  if (error == cudaSuccess) error = launch(layout_kernel, lanes, stream, view, params);
  if (error == cudaSuccess) error = launch(write_kernel<kDim>, each, stream, view, params);
  return error;
}

}  // namespace

cudaError_t launch_code_prompt(const BatchView& view, uint32_t root, uint32_t layer, const void* k,
                               const void* v, Element element, uint32_t tokens,
                               cudaStream_t stream) {
  if (layer >= view.geometry.layers || tokens == 0) return cudaErrorInvalidValue;
  const PromptParams params{k, v, element, root, layer, tokens};
  switch (view.geometry.head_dim) {
    case 64:
      return launch_all<64>(view, params, stream);
    case 128:
      return launch_all<128>(view, params, stream);
    case 256:
      return launch_all<256>(view, params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
