// rank_sizes.h: how many tokens of a lane the rank rules of a moment can recode, and how many pages
// these take.
#pragma once

#include <cstdint>

#include "kernels/cuda/sequence.h"
#include "kernels/policy/rank_trigger.h"

namespace thinkv::cuda {

// A lane when rules fire at the end of a step or of the prompt.
struct RankedLane {
  Prompt prompt;
  uint32_t pages_max;     // a bound of those in its table
  uint32_t budget;        // as launch_open's
  uint32_t settled_from;  // as StepSequence's
};

// Without the prompt's queries rules of its end wait for the first steps.
[[nodiscard]] policy::Moment rank_moment_at(const PolicyParams& policy, const Prompt& prompt,
                                            uint32_t generated);

// An upper bound of the pages that the rules of a moment take in one lane; free slots and the pages
// that evictions empty are not relied on.
[[nodiscard]] uint32_t rule_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                                  const policy::Moment& moment, const RankedLane& lane);

}  // namespace thinkv::cuda
