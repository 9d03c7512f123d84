// Rank rules of the device in the emulator, beside the host's: each shipped policy, and rules drawn
// by chance.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "daemon/ops/policy_file.h"
#include "gtest/gtest.h"
#include "kernels/cuda/rank.h"
#include "tests/support/device_twin.h"
#include "tests/support/random_rules.h"

namespace thinkv::cuda {
namespace {

using testing::TwinBatch;

PolicyParams shipped(const std::string& name, uint32_t budget) {
  const char* root = std::getenv("THINKV_SOURCE_DIR");
  ops::Diagnostics problems(name);
  const auto policy = ops::load_policy(
      std::string(root == nullptr ? "." : root) + "/config/policies/" + name + ".yaml", &problems);
  EXPECT_TRUE(policy.has_value()) << problems.text();
  PolicyParams params = policy ? policy->params : PolicyParams{};
  params.budget_tokens = budget;
  return params;
}

void run_steps(TwinBatch& batch, uint32_t steps, const std::string& what) {
  for (uint32_t i = 0; i < steps; ++i) {
    batch.step();
    batch.compare();
    ASSERT_EQ(batch.wrong(), "") << what << ", step " << i;
  }
}

// A prompt above the budget, and one that comes without a prompt.
void run_policy(const PolicyParams& policy, uint32_t dim) {
  TwinBatch batch({.geometry = {.layers = 3, .q_heads = 4, .kv_heads = 2, .head_dim = dim},
                   .capacity = 3,
                   .extent_pages = 1024,
                   .plant_scores = true});
  batch.open(2, policy);
  batch.prefill(2, 150);
  batch.compare();
  ASSERT_EQ(batch.wrong(), "") << "the prompt";
  batch.open(0, policy);
  run_steps(batch, 100, policy.name);
  batch.evict(2, {3, 5, 8, 100, 120, 160, 161});
  batch.compare();
  ASSERT_EQ(batch.wrong(), "") << "evicted";
  run_steps(batch, 40, policy.name);
  const kernels::SequenceStats stats = batch.twin(2)->host->stats();
  const bool ruled = policy.rule_count > 0;
  EXPECT_GT(stats.evicted_slots + (ruled ? 0 : 8), 7u) << "the rules do nothing";
  batch.close(0);
  batch.close(2);
  batch.compare();
  EXPECT_EQ(batch.wrong(), "");
}

class CudaRank : public ::testing::TestWithParam<const char*> {};

TEST_P(CudaRank, AgreesWithTheHost) {
  run_policy(shipped(GetParam(), 64), 64);
}

INSTANTIATE_TEST_SUITE_P(Policies, CudaRank,
                         ::testing::Values("streaming-llm", "h2o", "snapkv", "pyramidkv", "random",
                                           "quantized-pruning", "thinkv-ladder", "full", "diffkv",
                                           "fastgen", "r-kv", "dbudgetkv", "kvcrush"),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::erase(name, '-');
                           return name;
                         });

// ---- rules drawn by chance ----

constexpr uint32_t kDraws = 100;

Format any_format(TwinBatch& batch) {
  return static_cast<Format>(1 + batch.below(kFormatCount - 1));
}

PolicyParams draw_policy(TwinBatch& batch) {
  PolicyParams p;
  do {
    p = PolicyParams{};
    std::snprintf(p.name, sizeof p.name, "%s", "random");
    p.prompt_format = any_format(batch);
    p.sink_format = any_format(batch);
    for (Format& f : p.thought_format) f = any_format(batch);
    p.rotate = static_cast<uint8_t>(batch.below(2));
    p.sink_tokens = batch.below(3) * batch.below(12);
    p.score_decay = batch.below(4) == 0 ? 1.0f : 0.9f;
    testing::draw_rules(p, batch.random());
  } while (rank_unsupported(p) != nullptr);
  return p;
}

// What the draws did, so that a test of nothing shows.
struct Tally {
  uint64_t evicted = 0, recoded = 0, gathered = 0, missed = 0;
  void add(const kernels::SequenceStats& s) {
    evicted += s.evicted_slots;
    recoded += s.recoded_slots;
    gathered += s.gathered_bytes;
    missed += s.over_budget_steps;
  }
};

void run_draw(uint64_t seed, Tally& tally) {
  const uint32_t dim = kHeadDims[seed % 10 == 0 ? 2 : seed % 4 == 0 ? 1 : 0];
  TwinBatch batch({.geometry = {.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = dim},
                   .element = static_cast<Element>(seed % 3),
                   .capacity = 2,
                   .extent_pages = 1024,
                   .seed = seed,
                   .plant_scores = true});
  const PolicyParams policy = draw_policy(batch);
  batch.open(1, policy);
  if (batch.below(4) != 0) batch.prefill(1, 1 + batch.below(140));
  batch.compare();
  ASSERT_EQ(batch.wrong(), "") << "the prompt of seed " << seed;
  run_steps(batch, 60, "seed " + std::to_string(seed));
  tally.add(batch.twin(1)->host->stats());
  batch.close(1);
  batch.compare();
  EXPECT_EQ(batch.wrong(), "");
}

TEST(CudaRankRandom, RulesAgreeWithTheHost) {
  const char* text = std::getenv("THINKV_SEED");
  const uint64_t first = text != nullptr ? std::strtoull(text, nullptr, 0) : 20251129;
  std::printf("seed %llu\n", static_cast<unsigned long long>(first));
  Tally tally;
  for (uint64_t i = 0; i < kDraws; ++i) {
    run_draw(first + i, tally);
    ASSERT_FALSE(HasFailure()) << "replay: THINKV_SEED=" << first + i;
  }
  std::printf("%llu evicted, %llu recoded, %llu bytes moved, %llu steps over the budget\n",
              static_cast<unsigned long long>(tally.evicted),
              static_cast<unsigned long long>(tally.recoded),
              static_cast<unsigned long long>(tally.gathered),
              static_cast<unsigned long long>(tally.missed));
  EXPECT_GT(tally.evicted, 100 * kDraws) << "the rules do too little";
  EXPECT_GT(tally.recoded, 10 * kDraws);
  EXPECT_GT(tally.gathered, 100 * kDraws);
  EXPECT_GT(tally.missed, kDraws / 10);
}

}  // namespace
}  // namespace thinkv::cuda
