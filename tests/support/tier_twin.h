// tier_twin.h: policies with a tier on the device beside the host, for the emulator and for a GPU.
// Every function answers what is wrong, or nothing.
#pragma once

#include <string>

#include "tests/support/rank_twin.h"

namespace thinkv::testing {

// What was fetched and hinted.
struct TierTally {
  uint64_t rows = 0, hints = 0;
  void add(const TwinBatch& batch) {
    rows += batch.fetched_rows();
    hints += batch.hints();
  }
};

// Two sequences with prompts of different lengths, one of them without rows in the tier at times,
// and a row that stays empty; `tokens` of the longer prompt.
inline std::string run_tier_policy(const PolicyParams& policy, ModelGeometry geometry,
                                   cuda::Element element, uint32_t tokens, uint32_t steps,
                                   uint64_t seed, TierTally& tally, bool wild = false) {
  TwinBatch batch({.geometry = geometry,
                   .element = element,
                   .capacity = 3,
                   .extent_pages = 512 + 2 * tokens / 8,
                   .seed = seed,
                   .wild = wild,
                   .tier_rows = tokens,
                   .tier_fetch = policy.tier.fetch});
  batch.open(2, policy);
  batch.prefill(2, tokens);
  batch.open(0, policy);
  batch.prefill(0, 1 + batch.below(90));
  std::string wrong = compared(batch, "the prompts");
  if (wrong.empty()) wrong = compared_steps(batch, steps);
  // What is in pages can go, what is in the tier stays.
  batch.evict(2, {1, tokens - 1, tokens + 2});
  batch.copy(2);
  if (wrong.empty()) wrong = compared(batch, "after an eviction");
  if (wrong.empty()) wrong = compared_steps(batch, 3);
  tally.add(batch);
  batch.close(0);
  batch.close(2);
  return wrong.empty() ? compared(batch, "closed") : wrong;
}

// A policy, a shape and a prompt that the seed decides.
inline std::string run_drawn_tier(uint64_t seed, TierTally& tally) {
  std::mt19937_64 random(seed);
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  PolicyParams policy = plain_policy(Format::kF16);
  policy.rotate = static_cast<uint8_t>(below(2));
  policy.tier.host_bytes = uint64_t{1} << 30;
  policy.tier.dense_layers[0] = below(8);
  policy.tier.dense_format = below(2) == 0 ? Format::kK4V4 : Format::kK2V2;
  policy.tier.start = static_cast<uint16_t>(2 + below(20));
  policy.tier.recent = static_cast<uint16_t>(1 + below(70));
  policy.tier.fetch = static_cast<uint16_t>(1 + below(90));
  policy.tier.channels = static_cast<uint8_t>(1 + below(kTierChannelsMax));
  const uint32_t heads = 1 + below(2), dim = kHeadDims[below(4) == 0 ? 2 : below(2)];
  const ModelGeometry geometry{.layers = 1 + below(3),
                               .q_heads = heads * (1 + below(3)),
                               .kv_heads = heads,
                               .head_dim = dim,
                               .value_type = below(2) == 0 ? ValueType::kFp16 : ValueType::kBf16};
  // Numbers without a rotation: machines differ in the NaN that a sum of two NaN is.
  const bool wild = policy.rotate == 0 && below(3) == 0;
  return run_tier_policy(policy, geometry, static_cast<cuda::Element>(below(3)), 30 + below(400),
                         4 + below(20), random(), tally, wild);
}

}  // namespace thinkv::testing
