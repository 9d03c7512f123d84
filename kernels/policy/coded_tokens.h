// coded_tokens.h: which tokens of a policy with entropy belong into coded blocks.
#pragma once

#include <cstdint>

#include "thinkv/internal/placement.h"

namespace thinkv::policy {

// How many of a sequence's first `tokens` tokens: whole blocks behind the newest. The open block
// counts as if it were whole.
[[nodiscard]] constexpr uint32_t coded_tokens(const EntropyParams& entropy, uint32_t tokens) {
  const uint32_t end = (tokens / kStreamBlockTokens + 1) * kStreamBlockTokens;
  return end > entropy.recent ? end - entropy.recent : 0;
}

}  // namespace thinkv::policy
