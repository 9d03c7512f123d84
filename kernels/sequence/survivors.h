// survivors.h: which rows of a segment stay when it is demoted.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/kernels.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::kernels {

[[nodiscard]] constexpr bool selects_by_keys(SelectRule rule) {
  return rule == SelectRule::kMedoids || rule == SelectRule::kWeightedMedoids;
}
[[nodiscard]] constexpr bool selects_by_scores(SelectRule rule) {
  return rule == SelectRule::kWeightedMedoids || rule == SelectRule::kAttention;
}

// Rows are ascending by position.
struct SurvivorParams {
  SelectRule rule;
  uint32_t target;              // 1..n
  uint32_t iterations;          // of the k-means
  uint32_t dim;                 // of a key
  const float* keys;            // [n, dim] where selects_by_keys
  std::span<float> scores;      // [n] where selects_by_scores; overwritten
  std::span<uint32_t> scratch;  // [n]
  std::span<uint8_t> keep;      // [n] out: 1 for exactly `target` rows
};

// kAttention: ties go to the newer token. Deterministic; allocates nothing itself.
void select_survivors(const KernelSet& kernels, const SurvivorParams& params);

}  // namespace thinkv::kernels
