// rank_twin.h: rank policies on the device beside the host, for the emulator and for a GPU: those
// that are shipped, and rules drawn by chance. Every function answers what is wrong, or nothing.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>

#include "daemon/ops/policy_file.h"
#include "kernels/cuda/rank.h"
#include "tests/support/device_twin.h"
#include "tests/support/random_rules.h"
#include "tests/support/seed.h"

namespace thinkv::testing {

// Shipped policies whose rules run on the device, and one without rules.
inline constexpr const char* kRankPolicies[] = {
    "streaming-llm",     "h2o",     "snapkv", "pyramidkv", "random",
    "quantized-pruning", "thinkv",  "diffkv", "fastgen",   "r-kv",
    "dbudgetkv",         "kvcrush", "uncomp", "full"};

inline std::optional<PolicyParams> shipped_params(const std::string& name, uint32_t budget) {
  const char* root = std::getenv("THINKV_SOURCE_DIR");
  ops::Diagnostics problems(name);
  const auto policy = ops::load_policy(
      std::string(root == nullptr ? "." : root) + "/config/policies/" + name + ".yaml", &problems);
  if (!policy) return std::nullopt;
  PolicyParams params = policy->params;
  params.budget_tokens = budget;
  return params;
}

// The same where the policy must be there. budget 0: none.
inline PolicyParams must_ship(const std::string& name, uint32_t budget) {
  const auto policy = shipped_params(name, budget);
  THINKV_CHECK(policy.has_value());
  return *policy;
}

// Those that recode to blocks of tokens; run_block_policy() is theirs.
inline constexpr const char* kBlockPolicies[] = {"kivi", "think", "xquant"};

inline constexpr uint32_t kEvictedByHand = 7 * 3 * 2;  // of run_rank_policy(), beside the rules

// What rules did, so that a test of nothing shows.
struct RankTally {
  uint64_t evicted = 0, recoded = 0, gathered = 0, missed = 0;
  void add(const kernels::SequenceStats& s) {
    evicted += s.evicted_slots;
    recoded += s.recoded_slots;
    gathered += s.gathered_bytes;
    missed += s.over_budget_steps;
  }
  void print(const char* of) const {
    std::printf("%s: %llu evicted, %llu recoded, %llu bytes moved, %llu steps over the budget\n",
                of, static_cast<unsigned long long>(evicted),
                static_cast<unsigned long long>(recoded), static_cast<unsigned long long>(gathered),
                static_cast<unsigned long long>(missed));
  }
};

inline std::string compared(TwinBatch& batch, const std::string& when) {
  batch.compare();
  return batch.wrong().empty() ? "" : when + ": " + batch.wrong();
}

inline std::string compared_steps(TwinBatch& batch, uint32_t steps) {
  for (uint32_t i = 0; i < steps; ++i) {
    batch.step();
    if (const std::string wrong = compared(batch, "step " + std::to_string(i)); !wrong.empty()) {
      return wrong;
    }
  }
  return "";
}

// What the engine tells beside keys and values.
struct RankHints {
  uint32_t queries = 0;  // of the prompt
  bool classes = false;  // of all tokens, some told early, some late, some twice
};

// Classes by chance, most of them 0.
inline std::vector<uint8_t> drawn_classes(TwinBatch& batch, uint32_t count) {
  std::vector<uint8_t> classes(count);
  for (uint8_t& bits : classes) {
    bits = batch.below(4) == 0 ? static_cast<uint8_t>(batch.below(8)) : uint8_t{0};
  }
  return classes;
}

// One sequence with a prompt above the budget, and one that comes without a prompt.
inline std::string run_rank_policy(const PolicyParams& policy, uint32_t dim, RankTally& tally,
                                   const RankHints& hints = {}) {
  const ModelGeometry geometry{.layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = dim};
  TwinBatch batch({.geometry = geometry,
                   .capacity = 3,
                   .extent_pages = 1024,
                   .rank_dims = cuda::rank_medoid_dims(geometry, policy),
                   .plant_scores = true});
  batch.open(2, policy);
  if (hints.classes) batch.classes(2, 0, drawn_classes(batch, 150));
  batch.prefill(2, 150, hints.queries);
  std::string wrong = compared(batch, "the prompt");
  batch.open(0, policy);
  if (hints.classes) batch.classes(0, 20, drawn_classes(batch, 30));
  if (wrong.empty()) wrong = compared_steps(batch, 60);
  // More than a page of positions: another page, and the newest tokens' classes are known late.
  if (hints.classes) {
    batch.classes(2, 140, drawn_classes(batch, page_bytes(dim)));
    batch.copy(2);
  }
  if (wrong.empty()) wrong = compared_steps(batch, 40);
  batch.evict(2, {3, 5, 8, 100, 120, 160, 161});  // at most kEvictedByHand slots
  if (wrong.empty()) wrong = compared(batch, "after an eviction");
  // The next rules find more to recode than they left.
  batch.recode(2, 10, 200, Format::kF16);
  if (wrong.empty()) wrong = compared(batch, "after a recoding to more bits");
  if (wrong.empty()) wrong = compared_steps(batch, 40);
  tally.add(batch.twin(2)->host->stats());
  batch.close(0);
  batch.close(2);
  return wrong.empty() ? compared(batch, "closed") : wrong;
}

inline std::vector<uint32_t> positions_from(uint32_t first, uint32_t end) {
  std::vector<uint32_t> all;
  for (uint32_t i = first; i < end; ++i) all.push_back(i);
  return all;
}

// As run_rank_policy(), of six layers, and with what is asked of blocks between steps: tokens die
// one by one and a block whole, some leave blocks for slots, and the sequence is copied.
inline std::string run_block_policy(const PolicyParams& policy, ModelGeometry geometry,
                                    RankTally& tally, uint32_t queries = 0) {
  TwinBatch batch(
      {.geometry = geometry, .capacity = 2, .extent_pages = 2048, .plant_scores = true});
  batch.open(1, policy);
  batch.prefill(1, 200, queries);
  std::string wrong = compared(batch, "the prompt");
  batch.open(0, policy);
  if (wrong.empty()) wrong = compared_steps(batch, 70);
  batch.copy(1);
  // Just half of the second block, which makes it sparse.
  const Format format = policy.rules[policy.rule_count - 1].recode_format;
  const uint32_t slots = page_layout(format, geometry.head_dim).slots;
  batch.evict(1, positions_from(slots, slots + slots / 2));
  if (wrong.empty()) wrong = compared_steps(batch, 33);
  batch.evict(1, {1, 2, 3, 70, 110, 111, 112});
  batch.evict(1, positions_from(100, 140));
  if (wrong.empty()) wrong = compared(batch, "after an eviction");
  if (wrong.empty()) wrong = compared_steps(batch, 33);
  batch.recode(1, 40, 60, Format::kK2V2);
  if (wrong.empty()) wrong = compared(batch, "out of blocks");
  batch.copy(1);
  if (wrong.empty()) wrong = compared_steps(batch, 40);
  batch.trim(1, 90);
  if (wrong.empty()) wrong = compared(batch, "trimmed");
  if (wrong.empty()) wrong = compared_steps(batch, 20);
  tally.add(batch.twin(1)->host->stats());
  batch.close(0);
  batch.close(1);
  return wrong.empty() ? compared(batch, "closed") : wrong;
}

// A lane that the kernel for most tokens takes: a prompt of `tokens`, compared when the rules that
// wait for the first steps have fired.
inline std::string run_long_prompt(const PolicyParams& policy, uint32_t tokens, uint32_t dim = 64,
                                   uint32_t layers = 1, uint32_t queries = 0) {
  const ModelGeometry geometry{.layers = layers, .q_heads = 2, .kv_heads = 2, .head_dim = dim};
  TwinBatch batch({.geometry = geometry,
                   .capacity = 1,
                   .extent_pages = 1024 * layers + tokens / 8,
                   .rank_tokens = tokens + 128,
                   .rank_dims = cuda::rank_medoid_dims(geometry, policy),
                   .plant_scores = true});
  batch.open(0, policy);
  batch.prefill(0, tokens, queries);
  std::string wrong = compared(batch, "the prompt");
  const uint32_t steps = queries > 0 ? 2 : policy.score_window + 2u;
  for (uint32_t i = 0; i < steps; ++i) batch.step();
  if (wrong.empty()) wrong = compared(batch, "the first window");
  const kernels::SequenceStats stats = batch.twin(0)->host->stats();
  if (wrong.empty() && stats.evicted_slots + stats.recoded_slots == 0)
    wrong = "the rules did nothing";
  return wrong;
}

// Rules by k-means on keys.
struct MedoidKind {
  SelectGrain grain;
  float attention = 0.0f;  // not 0: the keys are weighted
  RankAction action = RankAction::kEvict;
  [[nodiscard]] std::string name() const {
    return std::string("medoids ") + (grain == SelectGrain::kLayer ? "by layer" : "by head") +
           (attention != 0.0f ? ", weighted" : "") +
           (action == RankAction::kRecode ? ", recoded" : "");
  }
};
inline constexpr MedoidKind kMedoidKinds[] = {{SelectGrain::kKvHead, 0.0f, RankAction::kEvict},
                                              {SelectGrain::kKvHead, 1.0f, RankAction::kRecode},
                                              {SelectGrain::kLayer, 0.0f, RankAction::kRecode},
                                              {SelectGrain::kLayer, 1.0f, RankAction::kEvict}};
// Those that a test goes through: the emulator under a sanitizer takes minutes for all.
[[nodiscard]] constexpr std::span<const MedoidKind> medoid_kinds() {
  const std::span<const MedoidKind> all(kMedoidKinds);
  return random_rounds(4) == 4 ? all : all.subspan(1, 1);
}

// They fire at the prompt's end, where none waits for attention, and at every 32nd token.
inline PolicyParams medoid_policy(const MedoidKind& kind, uint32_t budget) {
  PolicyParams p = plain_policy(Format::kK8V4);
  p.evict = EvictRule::kRank;
  p.grain = kind.grain;
  p.budget_tokens = budget;
  p.score_kind = ScoreKind::kWindow;
  p.score_window = 8;
  p.rule_count = 1;
  RankRule& rule = p.rules[0];
  rule.at_prompt_end = 1;
  rule.every = 32;
  p.kmeans_iterations = random_rounds(4);
  rule.select = RankSelect::kMedoids;
  rule.attention = kind.attention;
  rule.position = 1.0f;  // without attention nothing reads it
  rule.action = kind.action;
  rule.recode_format = Format::kK4V4;
  rule.sinks = 4;
  rule.recent = 16;
  return p;
}

// Budgets by groups where heads differ: of prompts shorter and longer than what the entropy looks
// at. `queries` 0: by the keys.
inline std::string run_prompt_entropy(const PolicyParams& policy, uint32_t dim, uint32_t queries) {
  TwinBatch batch({.geometry = {.layers = 2, .q_heads = 9, .kv_heads = 3, .head_dim = dim},
                   .capacity = 2,
                   .extent_pages = 1024,
                   .plant_scores = true});
  batch.open(0, policy);
  batch.open(1, policy);
  batch.prefill(0, 71, queries);
  batch.prefill(1, 203, queries);
  std::string wrong = compared(batch, "the prompts");
  if (wrong.empty()) wrong = compared_steps(batch, policy.score_window + 3u);
  for (uint32_t row = 0; row < 2 && wrong.empty(); ++row) {
    const kernels::RankLane& lane = batch.twin(row)->state().lane(0).rank();
    if (!(lane.head_signal > 0.0f)) wrong = "no entropy was found";
    if (batch.twin(row)->host->stats().evicted_slots == 0) wrong = "the rules did nothing";
  }
  return wrong;
}

inline Format any_format(TwinBatch& batch) {
  return static_cast<Format>(1 + batch.below(kFormatCount - 1));
}

inline PolicyParams draw_rank_policy(TwinBatch& batch, bool blocks) {
  PolicyParams p{};
  std::snprintf(p.name, sizeof p.name, "%s", "random");
  p.prompt_format = any_format(batch);
  p.sink_format = any_format(batch);
  for (Format& f : p.thought_format) f = any_format(batch);
  p.rotate = static_cast<uint8_t>(batch.below(2));
  p.sink_tokens = batch.below(3) * batch.below(12);
  p.score_decay = batch.below(4) == 0 ? 1.0f : 0.9f;
  p.centre = blocks ? 0 : static_cast<uint8_t>(batch.below(2));
  draw_rules(p, batch.random(), blocks);
  return p;
}

// A policy, a prompt, a recoding and 64 steps that the seed decides. `blocks`: the last rule
// recodes to them, and tokens are evicted instead.
inline std::string run_drawn_rules(uint64_t seed, RankTally& tally, bool blocks = false) {
  const uint32_t dim = kHeadDims[seed % 10 == 0 ? 2 : seed % 4 == 0 ? 1 : 0];
  const ValueType type = blocks && seed % 7 < 3 ? ValueType::kBf16 : ValueType::kFp16;
  const auto kv_heads = 1 + static_cast<uint32_t>(seed % 4);
  TwinBatch batch({.geometry = {.layers = blocks ? 3u : 2u,
                                .q_heads = 12,
                                .kv_heads = kv_heads,
                                .head_dim = dim,
                                .value_type = type},
                   .element = static_cast<cuda::Element>(seed / 3 % 3),
                   .capacity = 2,
                   .extent_pages = 1024,
                   .seed = seed,
                   .rank_dims = kv_heads * dim,
                   .plant_scores = true});
  batch.open(1, draw_rank_policy(batch, blocks));
  if (batch.below(4) == 0)
    batch.classes(1, batch.below(60), drawn_classes(batch, 1 + batch.below(150)));
  if (batch.below(4) != 0) {
    const uint32_t tokens = 1 + batch.below(140);
    batch.prefill(1, tokens, batch.below(3) == 0 ? 0 : 1 + batch.below(tokens));
  }
  std::string wrong = compared(batch, "the prompt");
  if (wrong.empty()) wrong = compared_steps(batch, 40);
  if (batch.below(3) == 0) batch.classes(1, 0, drawn_classes(batch, 200));
  if (blocks) batch.evict(1, positions_from(batch.below(20), 20 + batch.below(20)));
  if (wrong.empty() && batch.below(2) == 0) {
    batch.recode(1, batch.below(20), 20 + batch.below(20), any_format(batch));
    wrong = compared(batch, "after a recoding");
  }
  if (wrong.empty()) wrong = compared_steps(batch, 24);
  tally.add(batch.twin(1)->host->stats());
  batch.close(1);
  return wrong.empty() ? compared(batch, "closed") : wrong;
}

}  // namespace thinkv::testing
