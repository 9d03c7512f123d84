// Policies that recode to blocks of tokens, on the device in the emulator beside the host: the
// shipped ones in every width, and rules drawn by chance.
#include <string>

#include "gtest/gtest.h"

#include "tests/support/rank_twin.h"
#include "tests/support/seed.h"

namespace thinkv::cuda {
namespace {

using testing::RankTally;

ModelGeometry geometry_of(uint32_t layers, uint32_t dim, ValueType type = ValueType::kFp16) {
  return {.layers = layers, .q_heads = 4, .kv_heads = 2, .head_dim = dim, .value_type = type};
}

// The policy with a small budget, so that most tokens are in blocks.
PolicyParams policy_of(const char* name, Format format = Format::kNone) {
  const auto policy = testing::shipped_params(name, 24);
  THINKV_CHECK(policy.has_value());
  PolicyParams params = *policy;
  for (uint32_t i = 0; i < params.rule_count && format != Format::kNone; ++i) {
    params.rules[i].recode_format = i + 1u == params.rule_count ? format : single_of(format);
  }
  return params;
}

void expect_same(const PolicyParams& policy, const ModelGeometry& geometry) {
  ASSERT_TRUE(supported(geometry, policy).has_value());
  RankTally tally;
  EXPECT_EQ(testing::run_block_policy(policy, geometry, tally), "");
  EXPECT_GT(tally.recoded, geometry.lanes() * 150u) << "the rules do nothing";
}

TEST(MethodKivi, OnTheDeviceAsOnTheHost) {
  expect_same(policy_of("kivi"), geometry_of(2, 64));
  expect_same(policy_of("kivi"), geometry_of(1, 256, ValueType::kBf16));
}
TEST(MethodKivi, FourAndOneBitsOnTheDeviceAsOnTheHost) {
  expect_same(policy_of("kivi", Format::kKivi4), geometry_of(1, 128));
  expect_same(policy_of("kivi", Format::kKivi1), geometry_of(1, 128));
}
TEST(MethodThinK, OnTheDeviceAsOnTheHost) {
  expect_same(policy_of("think"), geometry_of(2, 64));
  expect_same(policy_of("think"), geometry_of(1, 256, ValueType::kBf16));
}
TEST(MethodXQuant, OnTheDeviceAsOnTheHost) {
  expect_same(policy_of("xquant"), geometry_of(5, 64));
  expect_same(policy_of("xquant"), geometry_of(4, 128, ValueType::kBf16));
}
TEST(MethodXQuant, OneBitOnTheDeviceAsOnTheHost) {
  expect_same(policy_of("xquant", Format::kPair1), geometry_of(4, 64));
}

// More tokens than the kernel for few of them has room for.
TEST(BlockPolicies, LongPromptsAgreeWithTheHost) {
  for (const char* name : testing::kBlockPolicies) {
    EXPECT_EQ(testing::run_long_prompt(policy_of(name), kRankRowsFew + 200, 4), "") << name;
  }
}

TEST(BlockPoliciesRandom, RulesAgreeWithTheHost) {
  constexpr uint64_t kDraws = 60;
  const uint64_t first = testing::seed_from_environment(20260107);
  RankTally tally;
  for (uint64_t i = 0; i < kDraws; ++i) {
    ASSERT_EQ(testing::run_drawn_rules(first + i, tally, true), "")
        << "replay: THINKV_SEED=" << first + i;
  }
  tally.print("rules with blocks drawn by chance");
  EXPECT_GT(tally.evicted, 10 * kDraws) << "the rules do too little";
  EXPECT_GT(tally.recoded, 100 * kDraws);
}

}  // namespace
}  // namespace thinkv::cuda
