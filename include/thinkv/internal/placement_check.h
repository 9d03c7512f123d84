// placement_check.h: which settings of streams and tiers go together, each refusal with its reason.
//
// As rank_check.h: the policy file's reader turns a problem into a message about the key,
// policy_params_valid() into false. Any bytes may be checked.
#pragma once

#include <cstdint>

#include "thinkv/internal/policy_params.h"

namespace thinkv {

// Both null: no problem. `key` as in the policy file.
struct PolicyProblem {
  const char* key = nullptr;
  const char* what = nullptr;
  [[nodiscard]] constexpr bool any() const { return what != nullptr; }
};

namespace detail {

[[nodiscard]] constexpr bool step_share_valid(float share) {
  return share >= kStepShareMin && share <= kStepShareMax;  // false for what is not a number
}

[[nodiscard]] constexpr bool every_format_16bit(const PolicyParams& p) {
  bool wide = is_16bit(p.prompt_format) && is_16bit(p.sink_format);
  for (const Format format : p.thought_format) wide = wide && is_16bit(format);
  return wide;
}

[[nodiscard]] constexpr PolicyProblem entropy_problem(const PolicyParams& p) {
  const EntropyParams& e = p.entropy;
  if (!e.on()) {
    if (e.value_step == 0.0f) return {};
    return {"entropy.key_step", "is needed beside value_step"};
  }
  if (!step_share_valid(e.key_step)) return {"entropy.key_step", "must be 0.005 to 0.5"};
  if (!step_share_valid(e.value_step)) return {"entropy.value_step", "must be 0.005 to 0.5"};
  if (e.recent < 2 * kStreamBlockTokens || e.recent % kStreamBlockTokens != 0 ||
      e.recent > kEntropyRecentMax) {
    return {"entropy.recent", "must be a multiple of 64 from 128 to 4096: whole blocks leave"};
  }
  if (p.evict != EvictRule::kNone) {
    return {"evict.rule",
            "must be none with entropy: a token of a block cannot be evicted alone, because the "
            "codes behind it could not be found"};
  }
  if (!every_format_16bit(p)) {
    return {"formats", "must all be f16 with entropy: blocks are coded from 16-bit pages, once"};
  }
  return {};
}

[[nodiscard]] constexpr PolicyProblem tier_problem(const PolicyParams& p) {
  const TierParams& t = p.tier;
  if (!t.on()) return {};
  if (t.host_bytes > kTierBytesMax) return {"tier.host_bytes", "must be at most 16 TiB"};
  if (t.start > kTierTokensMax) return {"tier.start", "must be at most 4096"};
  if (t.recent > kTierTokensMax) return {"tier.recent", "must be at most 4096"};
  if (t.fetch == 0 || t.fetch > kTierTokensMax) return {"tier.fetch", "must be 1 to 4096"};
  if (t.channels == 0 || t.channels > kTierChannelsMax) {
    return {"tier.channels", "must be 1 to 64"};
  }
  if (!format_valid(static_cast<uint8_t>(t.dense_format))) {
    return {"tier.dense_format", "is no format"};
  }
  if (p.evict != EvictRule::kNone) {
    return {"evict.rule", "must be none with tier: every token stays, in a page or in the tier"};
  }
  if (p.entropy.on()) return {"tier", "and entropy do not go together: one place for old tokens"};
  if (!every_format_16bit(p)) {
    return {"formats", "must all be f16 with tier: rows come back bit by bit as they were"};
  }
  return {};
}

}  // namespace detail

[[nodiscard]] constexpr PolicyProblem placement_problem(const PolicyParams& p) {
  const PolicyProblem problem = detail::entropy_problem(p);
  return problem.any() ? problem : detail::tier_problem(p);
}

}  // namespace thinkv
