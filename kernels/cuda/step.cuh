// step.cuh: what the kernels of a step share.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_format.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/sequence.h"

namespace thinkv::cuda {

inline constexpr uint32_t kBufferTokens = 2 * kBufferPageSlots;
[[nodiscard]] constexpr uint32_t buffer_pages(uint32_t tokens) {
  return (tokens + kBufferPageSlots - 1) / kBufferPageSlots;
}

// Sums over all lanes of a batch, in BatchView::pages, which nobody needs once the refresh is over:
// cleared by the flush after it, added up by the last kernel of the step.
struct StepTotals {
  uint64_t live;
  uint32_t pages_max;
  uint32_t done;  // blocks
};
static_assert(sizeof(StepTotals) <= sizeof(PageView));

// The two flushes of launch_end(). The host flushes a sequence before its refresh where a segment
// closes or rank rules fire, and a buffer that is merely full when the next token comes, which is
// after the budget was enforced.
enum class FlushWhen : uint32_t {
  kFirst,  // before the refresh; counts the step in tokens, steps and segments
  kFull,   // after the refresh
};
[[nodiscard]] cudaError_t launch_flush(const BatchView& view, FlushWhen when, cudaStream_t stream);

// Blocks of tokens that leave the pages of their lanes for streams, between the two flushes.
[[nodiscard]] cudaError_t launch_code_step(const BatchView& view, cudaStream_t stream);

}  // namespace thinkv::cuda
