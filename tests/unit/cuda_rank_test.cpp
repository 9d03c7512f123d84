// Rank rules of the device in the emulator, beside the host's: each shipped policy, and rules drawn
// by chance; and exp, which both must have alike.
#include <cmath>
#include <string>

#include "gtest/gtest.h"

#include "kernels/policy/exact_exp.h"
#include "tests/support/rank_twin.h"
#include "tests/support/seed.h"

namespace thinkv::cuda {
namespace {

using testing::RankTally;

class CudaRank : public ::testing::TestWithParam<const char*> {};

TEST_P(CudaRank, AgreesWithTheHost) {
  const auto policy = testing::shipped_params(GetParam(), 64);
  ASSERT_TRUE(policy.has_value());
  RankTally tally;
  EXPECT_EQ(testing::run_rank_policy(*policy, 64, tally), "");
  if (policy->rule_count == 0) return;
  EXPECT_GT(tally.evicted, testing::kEvictedByHand) << "the rules do nothing";
}

TEST_P(CudaRank, AgreesWithTheHostWhenItIsToldQueriesAndClasses) {
  auto policy = testing::shipped_params(GetParam(), 64);
  ASSERT_TRUE(policy.has_value());
  for (RankRule& rule : policy->rules) {  // the attention of random numbers is even
    if (rule.budget == BudgetRule::kFirstFit) rule.budget_low = 0.4f;
  }
  RankTally tally;
  EXPECT_EQ(testing::run_rank_policy(*policy, 64, tally, {.queries = 40, .classes = true}), "");
  if (policy->rule_count == 0) return;
  EXPECT_GT(tally.evicted, testing::kEvictedByHand) << "the rules do nothing";
}

std::string name_of(const ::testing::TestParamInfo<const char*>& tested) {
  std::string name = tested.param;
  std::erase(name, '-');
  return name;
}
INSTANTIATE_TEST_SUITE_P(Policies, CudaRank, ::testing::ValuesIn(testing::kRankPolicies), name_of);

// More tokens than the kernel for few of them has room for.
TEST(CudaRankLong, PromptsAgreeWithTheHost) {
  for (const char* name : {"streaming-llm", "thinkv", "quantized-pruning", "dbudgetkv"}) {
    const auto policy = testing::shipped_params(name, 300);
    ASSERT_TRUE(policy.has_value());
    EXPECT_EQ(testing::run_long_prompt(*policy, kRankRowsFew + 200), "") << name;
  }
}

// More than a block has room for: rows lie in RankMemory.
TEST(CudaRankLong, PromptsBeyondABlockAgreeWithTheHost) {
  for (const char* name : {"h2o", "thinkv", "fastgen", "dbudgetkv", "kvcrush"}) {
    auto policy = testing::shipped_params(name, 300);
    ASSERT_TRUE(policy.has_value());
    policy->score_window = std::min<uint16_t>(policy->score_window, 16);
    const uint32_t tokens = kRankRowsMax + 200;
    const ModelGeometry g{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 128};
    ASSERT_EQ(rank_need(g, *policy, 4096, tokens), (RankNeed{tokens, 0}));
    EXPECT_EQ(testing::run_long_prompt(*policy, tokens, 128), "") << name;
  }
}

// The last place of a layer is found over all heads while each head's rows are loaded again; of
// equal numbers by the row, whose higher bytes are 0.
TEST(CudaRankShared, HeadsWithEqualNumbersAgreeWithTheHost) {
  PolicyParams p = testing::plain_policy(Format::kF16);
  p.evict = EvictRule::kRank;
  p.rule_count = 1;
  p.score_kind = ScoreKind::kWindow;  // of one query: few different numbers
  p.score_window = 1;
  RankRule& rule = p.rules[0];
  rule.every = 16;
  rule.budget = BudgetRule::kShared;
  rule.attention = 1.0f;
  for (uint32_t i = 0; i < 12; ++i) {
    p.budget_tokens = 30 + i;
    rule.budget_low = static_cast<float>(i % 4) * 0.25f;
    testing::TwinBatch batch(
        {.geometry = {.layers = 1, .q_heads = 3, .kv_heads = 3, .head_dim = 64},
         .seed = i + 1,
         .plant_scores = true});
    batch.open(0, p);
    batch.prefill(0, 50 + i);
    for (uint32_t token = 0; token < 34; ++token) batch.step();
    EXPECT_EQ(testing::compared(batch, "34 steps"), "") << i;
    EXPECT_GT(batch.twin(0)->host->stats().evicted_slots, 3 * 34u);
  }
}

TEST(CudaRankLong, LanesWhoseKeysNoBlockComparesAreRefusedByTheirPages) {
  const auto policy = testing::shipped_params("r-kv", 64);
  ASSERT_TRUE(policy.has_value());
  const ModelGeometry g{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 256};
  const uint32_t slots = page_layout(Format::kF16, 256).slots;
  EXPECT_EQ(lane_pages_limit(g, *policy), (rank_rows_max(*policy, 256) - 1) / slots);
  EXPECT_EQ(rank_need(g, *policy, 1u << 20, 1u << 20), RankNeed{}) << "no memory helps";
  const auto other = testing::shipped_params("thinkv", 64);
  ASSERT_TRUE(other.has_value());
  const ModelGeometry usual{.layers = 32, .q_heads = 32, .kv_heads = 8, .head_dim = 128};
  EXPECT_GE(lane_pages_limit(usual, *other) * page_layout(Format::kK8V4, 128).slots, 32768u);
}

// What a rule kept at its last firing and what came since, not the whole lane.
TEST(CudaRankSizes, AFiringTakesFewPagesOnceTheRulesHaveFired) {
  const auto policy = testing::shipped_params("thinkv", 1024);
  ASSERT_TRUE(policy.has_value());
  const ModelGeometry g{.layers = 32, .q_heads = 32, .kv_heads = 8, .head_dim = 128};
  const uint32_t wide = page_layout(Format::kK8V4, 128).slots;
  const uint32_t slots = page_layout(Format::kK4V4, 128).slots;
  const auto up = [](uint32_t a, uint32_t b) { return (a + b - 1) / b; };
  StepSequence s{.prompt = 4096, .generated = 79, .lane_pages_max = 1040 / wide, .budget = 1024};
  const uint32_t tables = 2, flush = up(16, wide);
  // A tenth of the budget, the 16 tokens since step 64, and 16 that a buffer could hold.
  const uint32_t settled = up(102 + 16 + 16, slots), unsettled = up(1024, slots);
  EXPECT_LE(step_pages(g, *policy, s), g.lanes() * (flush + settled + tables));
  s.settled_from = 80;  // a client recoded: only what the first rule leaves is known
  EXPECT_GE(step_pages(g, *policy, s), g.lanes() * (flush + unsettled));
  EXPECT_LE(step_pages(g, *policy, s), g.lanes() * (flush + unsettled + 2 * tables));
  s.budget = kRankBudgetNone;
  EXPECT_LE(step_pages(g, *policy, s), g.lanes() * (flush + 1)) << "nothing is over no budget";
  EXPECT_EQ(prefill_end_pages(g, *policy, 1024, {4096}), 0u) << "the rules wait for queries";
  PolicyParams p = *policy;
  for (RankRule& rule : p.rules) rule.attention = 0.0f, rule.position = 1.0f, rule.value_norm = 0;
  EXPECT_LE(prefill_end_pages(g, p, 1024, {32768}), 2 * g.lanes() * up(1024, slots));
}

TEST(CudaRankMedoids, RulesAgreeWithTheHost) {
  for (const testing::MedoidKind& kind : testing::medoid_kinds()) {
    const PolicyParams policy = testing::medoid_policy(kind, 64);
    ASSERT_TRUE(policy_params_valid(policy));
    for (const uint32_t queries : {0u, 40u}) {
      if (queries != 0 && kind.attention == 0.0f) continue;  // no rule reads them
      RankTally tally;
      const uint32_t dim = queries == 0 ? 64 : 128;
      EXPECT_EQ(testing::run_rank_policy(policy, dim, tally, {.queries = queries}), "")
          << kind.name();
      EXPECT_GT(tally.evicted + tally.recoded, testing::kEvictedByHand + 300) << kind.name();
    }
  }
}

// More rows than the k-means takes, of which no run has a whole number of the places.
TEST(CudaRankMedoids, RunsOfManyRowsAgreeWithTheHost) {
  for (const testing::MedoidKind& kind : testing::medoid_kinds()) {
    const PolicyParams policy = testing::medoid_policy(kind, 150);
    EXPECT_EQ(testing::run_long_prompt(policy, 2 * kernels::kMedoidRowsMax + 101), "")
        << kind.name();
  }
}

TEST(CudaRankMedoids, LanesBeyondABlockAgreeWithTheHost) {
  for (const testing::MedoidKind& kind : testing::medoid_kinds()) {
    if (kind.attention == 0.0f) continue;
    const PolicyParams policy = testing::medoid_policy(kind, 60);
    EXPECT_EQ(testing::run_long_prompt(policy, kRankRowsMax + 200), "") << kind.name();
  }
}

// Fewer places than runs: some keep nothing. And places for all that may go but one.
TEST(CudaRankMedoids, BudgetsAtBothEndsAgreeWithTheHost) {
  constexpr uint32_t kTokens = kernels::kMedoidRowsMax + 76;
  for (const uint32_t budget : {20u, 21u, kTokens - 1}) {
    const PolicyParams policy = testing::medoid_policy({SelectGrain::kKvHead}, budget);
    EXPECT_EQ(testing::run_long_prompt(policy, kTokens), "") << budget;
  }
}

// Nor are weights, where the norms of such values are among them.
TEST(CudaRankMedoids, KeysThatAreNotNumbersAgreeWithTheHost) {
  for (const testing::MedoidKind& kind : testing::medoid_kinds()) {
    PolicyParams policy = testing::medoid_policy(kind, 80);
    policy.rotate = 0;  // machines differ in the NaN that a sum of two NaN is
    policy.prompt_format = Format::kF16;
    policy.rules[0].value_norm = kind.attention != 0.0f ? 1 : 0;
    const ModelGeometry geometry = testing::geometry_of(2, 2, 64);
    testing::TwinBatch batch({.geometry = geometry,
                              .rank_dims = rank_medoid_dims(geometry, policy),
                              .plant_scores = true,
                              .wild = true});
    batch.open(0, policy);
    batch.prefill(0, 200);
    EXPECT_EQ(testing::compared(batch, "the prompt"), "") << kind.name();
    EXPECT_EQ(testing::compared_steps(batch, 33), "") << kind.name();
    const kernels::SequenceStats stats = batch.twin(0)->host->stats();
    EXPECT_GT(stats.evicted_slots + stats.recoded_slots, 4 * 100u) << kind.name();
  }
}

// Room for the keys of one head is none for those of a layer.
TEST(CudaRankMedoids, WithoutMemoryNothingIsDecidedAndThatIsSaid) {
  const PolicyParams policy = testing::medoid_policy({SelectGrain::kLayer}, 48);
  for (const uint32_t dims : {0u, 64u}) {
    testing::TwinBatch batch({.geometry = testing::geometry_of(1, 2, 64), .rank_dims = dims});
    batch.open(0, policy);
    batch.prefill(0, 120);
    EXPECT_EQ(batch.pool().lease().faults, kRowsFull);
    const testing::DeviceReader reader(batch.pool(), batch.twin(0)->root);
    for (uint32_t lane = 0; lane < 2; ++lane) {
      EXPECT_EQ(reader.lane(lane).live + reader.lane(lane).buffer_count, 120u) << "as it was";
    }
  }
}

TEST(CudaRankMedoids, MemoryIsAskedForByThePolicysDims) {
  const ModelGeometry g{.layers = 32, .q_heads = 32, .kv_heads = 8, .head_dim = 128};
  const PolicyParams head = testing::medoid_policy({SelectGrain::kKvHead}, 1024);
  PolicyParams layer = testing::medoid_policy({SelectGrain::kLayer}, 1024);
  EXPECT_TRUE(supported(g, head).has_value());
  EXPECT_EQ(rank_need(g, head, 100, 1000), (RankNeed{0, 128}));
  EXPECT_EQ(rank_need(g, layer, 1000, 9000), (RankNeed{9000, 1024}));
  layer.rules[0].similarity = -1.0f;
  EXPECT_EQ(rank_need(g, layer, 1000, 9000), (RankNeed{0, 1024})) << "rows never leave the block";
  for (const uint32_t dims : {128u, 1024u, 16384u}) {
    const RankMemoryShape shape = rank_memory_shape({9000, dims}, 132);
    EXPECT_EQ(shape.dims, dims);
    EXPECT_EQ(shape.bytes, shape.blocks * rank_region_bytes(shape.room, dims));
    EXPECT_GE(rank_region_bytes(shape.room, dims), 2ull * kernels::kMedoidRowsMax * dims * 4);
    EXPECT_LE(shape.bytes, 256u << 20);
  }
  EXPECT_EQ(rank_memory_shape({9000, 128}, 132).blocks, 132u);
}

TEST(CudaRankRandom, RulesAgreeWithTheHost) {
  constexpr uint64_t kDraws = testing::random_rounds(40);
  const uint64_t first = testing::seed_from_environment(20251129);
  RankTally tally;
  for (uint64_t i = 0; i < kDraws; ++i) {
    ASSERT_EQ(testing::run_drawn_rules(first + i, tally), "")
        << "replay: THINKV_SEED=" << first + i;
  }
  tally.print("rules drawn by chance");
  EXPECT_GT(tally.evicted, 100 * kDraws) << "the rules do too little";
  EXPECT_GT(tally.recoded, 10 * kDraws);
  EXPECT_GT(tally.gathered, 100 * kDraws);
  EXPECT_GT(tally.missed, kDraws / 10);
}

TEST(ExactExp, IsExpWithinTwoRoundings) {
  for (float x = -87.0f; x <= 0.0f; x += 0.00137f) {
    const double exact = std::exp(static_cast<double>(x));
    const double found = static_cast<double>(policy::exact_exp(x));
    ASSERT_LE(std::fabs(found - exact), 2.4e-7 * exact) << x;
  }
  EXPECT_EQ(policy::exact_exp(0.0f), 1.0f);
  EXPECT_EQ(policy::exact_exp(-88.0f), 0.0f);
  EXPECT_EQ(policy::exact_exp(-INFINITY), 0.0f);
  EXPECT_TRUE(std::isnan(policy::exact_exp(NAN)));
}

}  // namespace
}  // namespace thinkv::cuda
