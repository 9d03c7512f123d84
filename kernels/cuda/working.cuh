// working.cuh: the pages that attention reads of a lane behind its own, for one call.
//
// What a policy keeps outside of pages (a tier) comes to attention in 16-bit pages of the batch's
// working memory (sequence.h: WorkingPages), which a kernel writes between the append of a layer
// and its attention. launch_begin lists them at the end of the lane's run, behind the buffer: how
// many tokens they will hold is known then, and where they lie; what is in them is not yet.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/tier.h"

namespace thinkv::cuda {

struct WorkingRun {
  unsigned char* first;  // page
  uint32_t tokens;       // in pages of kBufferPageSlots, the last one as full as they make it
  [[nodiscard]] __device__ __forceinline__ uint32_t pages() const {
    return (tokens + kBufferPageSlots - 1) / kBufferPageSlots;
  }
  [[nodiscard]] __device__ __forceinline__ uint64_t live(uint32_t page) const {
    return low_slots(min(tokens - page * kBufferPageSlots, kBufferPageSlots));
  }
};

// The tier of the row's sequence, or null. Not from the pool: what another process may write leads
// to no address here.
[[nodiscard]] __device__ __forceinline__ const TierSequence* tier_of_row(const BatchView& view,
                                                                         uint32_t row) {
  return view.tiers == nullptr ? nullptr : view.tiers[row];
}

// Nothing is chosen ahead for a step that begins. By one thread a lane of every layer.
__device__ __forceinline__ void forget_choice(const BatchView& view, uint32_t lane_of_all) {
  if (view.tier_memory == nullptr) return;
  const TierMemory memory = *view.tier_memory;
  if (memory.picks == nullptr) return;
  memory.picks[lane_of_all * (uint64_t{1} + memory.picks_max)] = 0;
}

// Tokens that lane `row` (sequence * kv_heads + kv head) of `layer` has in working pages.
[[nodiscard]] __device__ __forceinline__ uint32_t working_tokens(const BatchView& view,
                                                                 uint32_t layer, uint32_t row) {
  const TierSequence* tier = tier_of_row(view, row / view.geometry.kv_heads);
  return tier == nullptr ? 0 : fetched_rows(*tier, layer);
}

// The working pages of a lane of the layer. kListFull where the batch has too few: then there are
// none, as where a list is too small.
[[nodiscard]] __device__ __forceinline__ WorkingRun working_run(const BatchView& view,
                                                                uint32_t layer, uint32_t row) {
  WorkingRun run{nullptr, 0};
  if (view.working == nullptr) return run;
  run.tokens = working_tokens(view, layer, row);
  if (run.tokens == 0) return run;
  const WorkingPages working = *view.working;
  if (run.pages() > working.lane_pages) {
    raise_fault(view.lease, kListFull);
    return {nullptr, 0};
  }
  const uint64_t before = uint64_t{row} * working.lane_pages;
  run.first = working.pages + before * page_bytes(view.geometry.head_dim);
  return run;
}

}  // namespace thinkv::cuda
