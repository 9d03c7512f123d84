// centring_check.h: which settings go with centred keys, each refusal with its reason.
#pragma once

#include "thinkv/internal/placement_check.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv {

// Centring adds one number to all scores of a query head: probabilities stay, but not what looks at
// scores before the softmax.
[[nodiscard]] constexpr PolicyProblem centring_problem(const PolicyParams& p) {
  if (p.centre == 0) return {};
  if (p.centre > 1) return {"centring", "must be prompt or none"};
  constexpr uint8_t kMaxLogit = 2;  // kernels::GqaReduce
  if (p.score_reduce == kMaxLogit) {
    return {"scores.reduce",
            "must not be max-logit with centring: logits of different query heads move apart"};
  }
  if (p.label_layer_count > 0) {
    return {"labels", "must be one class with centring: sparsity compares logits of query heads"};
  }
  if (p.entropy.on() || p.tier.on()) {
    return {"centring", "does not go with entropy or tier: their keys come back bit by bit"};
  }
  for (uint32_t i = 0; i < p.rule_count && i < kRulesMax; ++i) {
    if (!writes_blocks(p.rules[i])) continue;
    return {"centring", "does not go with block formats: their keys have zero points of their own"};
  }
  return {};
}

}  // namespace thinkv
