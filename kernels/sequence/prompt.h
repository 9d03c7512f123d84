// prompt.h: where the tokens of a prompt go in one layer: a stream, pages, a tier.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/sequence/sequence_state.h"

namespace thinkv::kernels {

// K and V of a prompt: [tokens, kv_heads, head_dim].
struct PromptRows {
  const float* k;
  const float* v;
};

struct PromptRange {
  uint32_t first = 0;
  uint32_t count = 0;
  Format format = Format::kF16;
};

// All tokens of the prompt are in exactly one of them.
struct PromptPlan {
  uint32_t coded = 0;                // the first ones, whole blocks: into the stream
  std::array<PromptRange, 2> pages;  // in the order in which they are written
  PromptRange tier;
};

// Tokens first .. first + count - 1 of a lane to k, v [count, head_dim], as the lane keeps them.
void load_prompt(const SequenceState& state, const PromptRows& rows, uint32_t lane, uint32_t first,
                 uint32_t count, float* k, float* v);

[[nodiscard]] PromptPlan plan_prompt(const SequenceState& state, uint32_t layer, uint32_t tokens);

}  // namespace thinkv::kernels
