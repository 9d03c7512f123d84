// The accounting of the retention schedule that follows from the paper's constants, by the real
// policy on real pages: 32,768 generated tokens, budget 1,024, segments of 128, no transitions.
#include "tests/support/sequence_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::step;
using testing::TokenSource;

struct Accounting {
  uint32_t peak = 0;
  uint32_t first_over = 0;  // generated tokens at the first step that ends over the budget
  SequenceStats stats;
};

Accounting run(const PolicyParams& policy, uint32_t tokens_total) {
  const ModelGeometry geometry = testing::geometry_of({});
  testing::VectorPool pool({.head_dim = 64, .capacity = 4096});
  testing::VectorPageSource source(pool);
  auto sequence = Sequence::create(source, host(), geometry, policy);
  EXPECT_TRUE(sequence.has_value());
  TokenSource tokens(geometry, 7);
  Accounting result;
  for (uint32_t t = 1; t <= tokens_total; ++t) {
    if (const Status done = step(*sequence, tokens); !done) {
      ADD_FAILURE() << done.error().what << " at token " << t;
      break;
    }
    const SequenceState& state = *sequence->state();
    result.peak = std::max(result.peak, state.generated_live());
    if (result.first_over == 0 && state.header->counters.over_budget_steps > 0) {
      result.first_over = t;
    }
  }
  result.stats = sequence->stats();
  return result;
}

TEST(SequenceAccounting, PaperScheduleAt32768TokensAndBudget1024) {
  const Accounting result = run(testing::tbe_policy(1024), 32768);
  EXPECT_EQ(result.stats.demotions, 1275u);
  EXPECT_EQ(result.peak, 1148u);
  EXPECT_EQ(result.first_over, 28925u);
  EXPECT_EQ(result.stats.refreshes, 256u);
  EXPECT_EQ(result.stats.steps, 32768u);
  const double rate = static_cast<double>(result.stats.demotions) / 32768.0;
  EXPECT_NEAR(rate, 0.0389, 0.00005);
  EXPECT_EQ(result.stats.live_slots, 255u * 4u + 128u);
  EXPECT_EQ(result.stats.evicted_slots, 32768u - 1148u);
  EXPECT_EQ(result.stats.gathered_bytes, 0u);
  EXPECT_GT(result.stats.reused_slots, 0u);
}

TEST(SequenceAccounting, Budget512IsFirstBrokenAt12541) {
  const Accounting result = run(testing::tbe_policy(512), 12600);
  EXPECT_EQ(result.first_over, 12541u);
}

TEST(SequenceAccounting, MergingKeepsTheBudgetBeyondTheFloor) {
  PolicyParams policy = testing::tbe_policy(512);
  policy.floor_rule = FloorRule::kMerge;
  const Accounting result = run(policy, 16384);
  EXPECT_EQ(result.stats.over_budget_steps, 0u);
  EXPECT_EQ(result.first_over, 0u);
  EXPECT_LE(result.peak, 512u);
  EXPECT_GT(result.stats.merges, 0u);
}

TEST(SequenceAccounting, MergingStopsAtOneClosedSegmentAndCountsTheRest) {
  PolicyParams policy = testing::tbe_policy(100);  // less than an open segment can hold
  policy.floor_rule = FloorRule::kMerge;
  const Accounting result = run(policy, 1024);
  // From the second segment on: 4 tokens of the one closed segment and more than 96 open ones.
  EXPECT_EQ(result.peak, 132u);
  EXPECT_EQ(result.stats.over_budget_steps, 28u + 7u * 32u);
}

}  // namespace
}  // namespace thinkv::kernels
