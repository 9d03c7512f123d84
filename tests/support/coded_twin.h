// coded_twin.h: policies with entropy on the device beside the host, for the emulator and for a
// GPU. Every function answers what is wrong, or nothing.
#pragma once

#include <string>
#include <vector>

#include "tests/support/rank_twin.h"

namespace thinkv::testing {

// What streams did, so that a test of nothing shows.
struct CodedTally {
  uint64_t coded = 0, raw = 0, evicted = 0;
  void add(const TwinBatch& batch, const kernels::SequenceStats& s) {
    coded += batch.coded_blocks();
    raw += batch.raw_blocks();
    evicted += s.evicted_slots;
  }
  void print(const char* of) const {
    std::printf("%s: %llu coded and %llu raw blocks compared, %llu slots evicted\n", of,
                static_cast<unsigned long long>(coded), static_cast<unsigned long long>(raw),
                static_cast<unsigned long long>(evicted));
    std::fflush(stdout);
  }
};

// One sequence with a prompt, one that comes without, one that has no streams; whole blocks of the
// first are evicted and it is copied.
inline std::string run_coded_policy(const PolicyParams& policy, const ModelGeometry& geometry,
                                    CodedTally& tally, cuda::Element element = cuda::Element::kF32,
                                    bool wild = false) {
  TwinBatch batch({.geometry = geometry,
                   .element = element,
                   .capacity = 4,
                   .extent_pages = 2048,
                   .wild = wild,
                   .streams = true,
                   .attends = !wild});
  batch.open(2, policy);
  batch.prefill(2, 270);
  std::string wrong = compared(batch, "the prompt");
  if (wrong.empty()) wrong = compared_steps(batch, 60);
  batch.open(0, policy);
  PolicyParams plain = policy;
  plain.entropy = {};
  batch.open(3, plain);
  if (wrong.empty()) wrong = compared_steps(batch, 80);
  batch.copy(2);
  // The second and the last block: the page of the end may go and come again.
  const uint32_t coded = policy::coded_tokens(policy.entropy, 270 + 140);
  std::vector<uint32_t> positions = positions_from(64, 128);
  for (const uint32_t p : positions_from(coded - 64, coded)) positions.push_back(p);
  batch.evict(2, positions);
  if (wrong.empty()) wrong = compared(batch, "after an eviction");
  if (wrong.empty()) wrong = compared_steps(batch, 70);
  batch.evict(2, positions_from(0, coded));
  if (wrong.empty()) wrong = compared(batch, "without old blocks");
  if (wrong.empty()) wrong = compared_steps(batch, 66);
  batch.copy(2);
  tally.add(batch, batch.twin(2)->host->stats());
  for (const uint32_t row : {0u, 2u, 3u}) batch.close(row);
  return wrong.empty() ? compared(batch, "closed") : wrong;
}

// A prompt of many blocks: tables of several pages, and several rounds of the kernels.
inline std::string run_coded_prompt(const PolicyParams& policy, const ModelGeometry& geometry,
                                    uint32_t tokens, CodedTally& tally) {
  TwinBatch batch({.geometry = geometry,
                   .element = cuda::Element::kBf16,
                   .capacity = 1,
                   .extent_pages = 1024 + geometry.lanes() * (tokens / 8 + 64),
                   .streams = true});
  batch.open(0, policy);
  batch.prefill(0, tokens);
  std::string wrong = compared(batch, "a long prompt");
  if (wrong.empty()) wrong = compared_steps(batch, 1);
  tally.add(batch, batch.twin(0)->host->stats());
  batch.close(0);
  return wrong.empty() ? compared(batch, "closed") : wrong;
}

// A policy with entropy, a prompt, steps and evictions that the seed decides.
inline std::string run_drawn_streams(uint64_t seed, CodedTally& tally) {
  const uint32_t dim = kHeadDims[seed % 9 == 0 ? 2 : seed % 4 == 0 ? 1 : 0];
  const auto heads = 1 + static_cast<uint32_t>(seed % 3);
  TwinBatch batch({.geometry = {.layers = dim == 64 ? 2u : 1u,
                                .q_heads = 2 * heads,
                                .kv_heads = heads,
                                .head_dim = dim,
                                .value_type = static_cast<ValueType>(seed / 2 % 2)},
                   .element = static_cast<cuda::Element>(seed / 3 % 3),
                   .capacity = 2,
                   .extent_pages = 1024,
                   .seed = seed,
                   .wild = seed % 5 == 1,
                   .streams = true,
                   .attends = seed % 5 != 1});
  constexpr float kShares[] = {0.005f, 0.02f, 0.1f, 0.5f};
  PolicyParams policy = plain_policy(Format::kF16);
  // Machines differ in the sign of the NaN that a rotation makes of infinities.
  policy.rotate = static_cast<uint8_t>(seed % 5 == 1 ? 0 : batch.below(2));
  policy.entropy = {.key_step = kShares[batch.below(4)],
                    .value_step = kShares[batch.below(4)],
                    .recent = 128 + 64 * batch.below(3)};
  batch.open(1, policy);
  if (batch.below(4) != 0) batch.prefill(1, 1 + batch.below(500));
  std::string wrong = compared(batch, "the prompt");
  for (uint32_t round = 0; round < 3 && wrong.empty(); ++round) {
    for (uint32_t i = 10 + batch.below(70); i > 0; --i) batch.step();
    wrong = compared(batch, "round " + std::to_string(round));
    const uint32_t blocks =
        policy::coded_tokens(policy.entropy, batch.twin(1)->host->tokens()) / kStreamBlockTokens;
    std::vector<uint32_t> positions;
    for (uint32_t b = 0; b < blocks; ++b) {
      if (batch.below(3) != 0) continue;
      for (const uint32_t p : positions_from(64 * b, 64 * b + 64)) positions.push_back(p);
    }
    batch.evict(1, positions);
    if (wrong.empty()) wrong = compared(batch, "evicted in round " + std::to_string(round));
    if (batch.below(2) == 0) batch.copy(1);
  }
  tally.add(batch, batch.twin(1)->host->stats());
  batch.close(1);
  return wrong.empty() ? compared(batch, "closed") : wrong;
}

}  // namespace thinkv::testing
