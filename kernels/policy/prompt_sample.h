// prompt_sample.h: which of a prompt's queries count, of those that the engine gave.
//
// The newest ones see what the next tokens will ask for; ones from all over the prompt see what
// has ever been asked for, so that a part of the prompt that the end does not mention is not lost.
#pragma once

#include <algorithm>
#include <cstdint>

#include "thinkv/internal/policy_params.h"

namespace thinkv::policy {

struct PromptSample {
  uint32_t given;  // the newest queries of the prompt, from which it is drawn evenly
  uint32_t used;
};
// given: of each layer.
[[nodiscard]] constexpr PromptSample prompt_sample(const PolicyParams& p, uint32_t given) {
  const uint32_t most = p.prompt_queries != 0 ? p.prompt_queries : p.score_window;
  const uint32_t used = std::min(given, most);
  return {p.prompt_spread != 0 ? given : used, used};
}

// The place of the i-th one among the given ones; the newest is always in it. Requires: i < used.
[[nodiscard]] constexpr uint32_t sampled_query(const PromptSample& s, uint32_t i) {
  return static_cast<uint32_t>(uint64_t{i + 1} * s.given / s.used) - 1;
}
// How many of them are at place `at` or later. Requires: at < given.
[[nodiscard]] constexpr uint32_t sampled_from(const PromptSample& s, uint32_t at) {
  return s.used - static_cast<uint32_t>((uint64_t{at + 1} * s.used - 1) / s.given);
}

}  // namespace thinkv::policy
