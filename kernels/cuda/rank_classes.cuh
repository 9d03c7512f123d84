// rank_classes.cuh: classes of tokens as rank rules read them (rank.h).
#pragma once

#include <cstdint>

#include "kernels/cuda/class_table.cuh"
#include "kernels/cuda/rank_rows.cuh"

namespace thinkv::cuda {

// Those that a rule protects; of first_fit in decoding, those of the mask that the lane has.
[[nodiscard]] __device__ __forceinline__ uint32_t protected_classes(const RankRule& rule,
                                                                    uint32_t mask) {
  uint32_t classes = rule.classes;
  if (rule.budget != BudgetRule::kFirstFit || rule.at_prompt_end != 0) return classes;
  classes |= rule.special_classes;
  return mask >= policy::kMaskPunctuation ? classes | rule.punctuation_classes : classes;
}

// How many tokens of a lane have one of the classes, the buffer's included. Whole block, the same
// result for all threads.
[[nodiscard]] __device__ THINKV_OUT_OF_LINE inline uint32_t count_in_classes(const RankItem& item,
                                                                             const LaneView& lane,
                                                                             uint32_t classes) {
  const DeviceSequence* sequence = item.sequence;
  if (classes == 0 || sequence->class_pages == 0) return 0;
  uint32_t& count = item.shared->count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  uint32_t mine = 0;
  const auto look = [&](uint32_t position) {
    mine += (class_of(*item.batch, sequence, position) & classes) != 0 ? 1 : 0;
  };
  rank_detail::for_each_token(lane, [&](uint32_t position, uint32_t) { look(position); });
  if (threadIdx.x < lane.lane->buffer_count && threadIdx.x < sequence->tokens) {
    look(sequence->tokens - 1 - threadIdx.x);
  }
  if (mine != 0) atomicAdd(&count, mine);
  __syncthreads();
  const uint32_t found = count;
  __syncthreads();
  return found;
}

}  // namespace thinkv::cuda
