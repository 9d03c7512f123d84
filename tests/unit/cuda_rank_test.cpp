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
  ASSERT_EQ(rank_unsupported(*policy), nullptr);
  RankTally tally;
  EXPECT_EQ(testing::run_rank_policy(*policy, 64, tally), "");
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
  for (const char* name : {"streaming-llm", "thinkv-ladder", "quantized-pruning", "dbudgetkv"}) {
    const auto policy = testing::shipped_params(name, 300);
    ASSERT_TRUE(policy.has_value());
    EXPECT_EQ(testing::run_long_prompt(*policy, kRankRowsFew + 200), "") << name;
  }
}

TEST(CudaRankLong, LanesThatNoBlockHoldsAreRefusedByTheirPages) {
  const auto policy = testing::shipped_params("h2o", 64);
  ASSERT_TRUE(policy.has_value());
  const ModelGeometry g{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 256};
  const uint32_t slots = page_layout(Format::kF16, 256).slots;
  const uint32_t taken = rank_rows_max(*policy, 256);
  EXPECT_EQ(lane_pages_limit(g, *policy, taken), (taken - 1) / slots);
  // So few tokens are taken wherever they lie.
  EXPECT_EQ(lane_pages_limit(g, *policy, taken - 1),
            kTablePagesMax * descriptors_per_page(256, score_bytes(*policy)));
}

TEST(CudaRankRandom, RulesAgreeWithTheHost) {
  constexpr uint64_t kDraws = 100;
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
