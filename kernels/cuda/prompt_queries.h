// prompt_queries.h: what rank rules learn from the newest queries of a prompt, for one layer
// (kernels/sequence/rank_prompt.cpp, bit for bit). Parts of launch_prefill_queries() and
// launch_prefill_end().
//
// Nothing of the queries is kept: attention goes into the sums of the slots, an entropy into each
// lane, and what ThinK needs of channels into room of the lane's buffer pages that nothing else
// uses where tokens go into blocks.
#pragma once

#include "kernels/cuda/sequence.h"
#include "kernels/policy/prompt_sample.h"

namespace thinkv::cuda {

// Queries of one layer, and which of them a kernel takes.
struct QueryParams {
  const void* q;  // [count, q_heads, head_dim]
  Element element;
  uint32_t root;
  uint32_t layer;
  uint32_t tokens;  // of the prompt
  uint32_t count;
  uint32_t window;              // the newest ones, whose energy counts
  policy::PromptSample sample;  // whose attention counts
};

// Adds the attention of the sample to the sums. Requires: a policy that keeps sums.
[[nodiscard]] cudaError_t launch_query_attention(const BatchView& view, const PolicyParams& policy,
                                                 const QueryParams& params, cudaStream_t stream);
// The energy of each channel of the window (channel_energy.cuh).
[[nodiscard]] cudaError_t launch_query_energy(const BatchView& view, const QueryParams& params,
                                              cudaStream_t stream);
// DeviceLane.head_signal of the layer's lanes, from the newest queries.
[[nodiscard]] cudaError_t launch_query_entropy(const BatchView& view, const QueryParams& params,
                                               cudaStream_t stream);
// The same of all lanes, from the prompt's newest keys.
[[nodiscard]] cudaError_t launch_key_entropy(const BatchView& view, uint32_t root, uint32_t tokens,
                                             cudaStream_t stream);

}  // namespace thinkv::cuda
