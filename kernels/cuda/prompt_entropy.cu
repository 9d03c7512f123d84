// prompt_entropy.cu: the truncated entropy of each lane's queries or keys at a prompt's end, a
// block a lane (matrix_entropy.cuh). Budgets of groups rank the heads of a layer by it.
#include <cstdint>

#include "kernels/cuda/codec_token.cuh"
#include "kernels/cuda/matrix_entropy.cuh"
#include "kernels/cuda/prompt_pages.cuh"
#include "kernels/cuda/prompt_queries.h"
#include "kernels/cuda/rows.cuh"

namespace thinkv::cuda {
namespace {

// Of the newest queries of kv head blockIdx.x.
template <int kDim>
__global__ void __launch_bounds__(kEntropyThreads)
    query_kernel(const __grid_constant__ BatchView view,
                 const __grid_constant__ QueryParams params) {
  __shared__ EntropyShared shared;
  const ModelGeometry& g = view.geometry;
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr) return;
  const LaneView lane = lane_view(view, sequence, params.layer * g.kv_heads + blockIdx.x);
  if (lane.lane == nullptr) return;
  const uint32_t group = g.group(), queries = policy::entropy_queries(params.count, group);
  const auto load = [&](float(&x)[kDim / 8], uint32_t row) {
    const uint32_t query = params.count - queries + row / group;
    const uint64_t at = uint64_t{query} * g.q_heads + blockIdx.x * group + row % group;
    load_row<kDim>(x, params.q, params.element, at * kDim, true);
  };
  const float entropy = truncated_entropy<kDim>(shared, queries * group, load);
  if (threadIdx.x == 0) lane.lane->head_signal = entropy;
}

// Of the newest keys of lane blockIdx.x.
template <int kDim>
__global__ void __launch_bounds__(kEntropyThreads)
    key_kernel(const __grid_constant__ BatchView view, uint32_t root, uint32_t tokens) {
  __shared__ EntropyShared shared;
  DeviceSequence* sequence = sequence_at(view, root);
  if (sequence == nullptr) return;
  const PromptPages split =
      split_prompt(view, sequence, blockIdx.x / view.geometry.kv_heads, tokens);
  const LaneView lane = prompt_lane(view, sequence, blockIdx.x, split, tokens);
  if (lane.lane == nullptr) return;
  const uint32_t n = min(tokens, policy::kEntropyRowsMax);
  const auto load = [&](float(&x)[kDim / 8], uint32_t row) {
    const PromptSlot where = prompt_slot(split, tokens - n + row);
    const DeviceDescriptor* d = prompt_descriptor(lane, where);
    unsigned char* page = d == nullptr ? nullptr : page_at(view, d->page);
    if (page != nullptr) decode_token<kDim, true>(x, page, where.format, where.slot);
  };
  const float entropy = truncated_entropy<kDim>(shared, n, load);
  if (threadIdx.x == 0) lane.lane->head_signal = entropy;
}

template <int kDim>
[[nodiscard]] LaunchSize entropy_size(uint32_t blocks) {
  return {.blocks = blocks, .threads = kEntropyThreads, .shared_bytes = kEntropyBytes<kDim>};
}

}  // namespace

cudaError_t launch_query_entropy(const BatchView& view, const QueryParams& params,
                                 cudaStream_t stream) {
  const uint32_t heads = view.geometry.kv_heads;
  switch (view.geometry.head_dim) {
    case 64:
      return launch(query_kernel<64>, entropy_size<64>(heads), stream, view, params);
    case 128:
      return launch(query_kernel<128>, entropy_size<128>(heads), stream, view, params);
    case 256:
      return launch(query_kernel<256>, entropy_size<256>(heads), stream, view, params);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_key_entropy(const BatchView& view, uint32_t root, uint32_t tokens,
                               cudaStream_t stream) {
  const uint32_t lanes = view.geometry.lanes();
  switch (view.geometry.head_dim) {
    case 64:
      return launch(key_kernel<64>, entropy_size<64>(lanes), stream, view, root, tokens);
    case 128:
      return launch(key_kernel<128>, entropy_size<128>(lanes), stream, view, root, tokens);
    case 256:
      return launch(key_kernel<256>, entropy_size<256>(lanes), stream, view, root, tokens);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
