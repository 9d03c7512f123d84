// rank_step.cuh: when the rules of a rank policy run on the device: kernels/policy/rank_trigger.h
// with the counts of a DeviceSequence.
#pragma once

#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/rank.h"

namespace thinkv::cuda {

// The end of the step that makes `more` tokens more.
[[nodiscard]] __device__ __forceinline__ policy::Moment rank_moment(const DeviceSequence* sequence,
                                                                    uint32_t more) {
  return {.generated = sequence->tokens + more - sequence->prompt_tokens,
          .waiting = sequence->query_wait != 0};
}

// That of the rules that run now.
[[nodiscard]] __device__ __forceinline__ policy::Moment moment_of_step(
    const DeviceSequence* sequence) {
  return {.generated = sequence->tokens - sequence->prompt_tokens,
          .waiting = (sequence->rank_step & kRankWaiting) != 0};
}

// By one thread, at the end of a step of a rank policy and before its rules. Result: whether they
// have something to do.
[[nodiscard]] __device__ __forceinline__ bool count_rank_step(DeviceSequence* sequence) {
  if (sequence->emitting != 0) sequence->window_queries += 1;
  if ((sequence->rank_step & kRankCompacts) != 0) sequence->query_wait = 0;
  return (sequence->rank_step & (kRankRules | kRankCompacts)) != 0;
}

}  // namespace thinkv::cuda
