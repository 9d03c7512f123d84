// The policy's decisions on hand-made tables: labels, order of demotions, floor rule.
#include "kernels/policy/segments.h"

#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace thinkv::policy {
namespace {

constexpr auto kR = Thought::kReasoning;
constexpr auto kE = Thought::kExecution;
constexpr auto kT = Thought::kTransition;

struct Row {
  Thought label;
  uint8_t level;
};

// Closed segments of 128 tokens and an open one behind them.
std::vector<Segment> table_of(const std::vector<Row>& closed) {
  std::vector<Segment> table;
  uint32_t start = 0;
  for (const Row& row : closed) {
    table.push_back({.start = start,
                     .end = start + 128,
                     .label = static_cast<uint8_t>(row.label),
                     .level = row.level,
                     .merged = 0,
                     .waiting = 0,
                     .live = 0});
    start += 128;
  }
  table.push_back({.start = start,
                   .end = kOpenEnd,
                   .label = static_cast<uint8_t>(kT),
                   .level = 0,
                   .merged = 0,
                   .waiting = 0,
                   .live = 0});
  return table;
}

PolicyParams paper() {
  PolicyParams p;
  p.evict = EvictRule::kTbe;
  p.schedule_length = 5;
  for (uint32_t i = 0; i < 5; ++i) p.schedule[i] = static_cast<uint16_t>(64u >> i);
  p.label_layer_count = 1;
  p.thresholds[0] = 0.25f;
  p.thresholds[1] = 0.75f;
  return p;
}

TEST(PolicyLabel, ThresholdsAreOpenTowardsReasoning) {
  const PolicyParams p = paper();
  EXPECT_EQ(label_of(0.0f, p), kE);
  EXPECT_EQ(label_of(0.249f, p), kE);
  EXPECT_EQ(label_of(0.25f, p), kR);
  EXPECT_EQ(label_of(0.5f, p), kR);
  EXPECT_EQ(label_of(0.75f, p), kR);
  EXPECT_EQ(label_of(0.751f, p), kT);
  EXPECT_EQ(label_of(1.0f, p), kT);
}

TEST(PolicyLabel, OneClassWithoutLabelLayersOrWithoutMeasurement) {
  PolicyParams p = paper();
  EXPECT_EQ(label_of(std::numeric_limits<float>::quiet_NaN(), p), kR);
  p.label_layer_count = 0;
  EXPECT_EQ(label_of(0.0f, p), kR);
  EXPECT_EQ(label_of(1.0f, p), kR);
}

TEST(PolicyTransition, OnlyATransitionDemotesEverything) {
  PolicyParams p = paper();
  EXPECT_TRUE(demotes_everything(kT, p));
  EXPECT_FALSE(demotes_everything(kR, p));
  EXPECT_FALSE(demotes_everything(kE, p));
  p.demote_on_transition = 0;
  EXPECT_FALSE(demotes_everything(kT, p));
  p = paper();
  p.evict = EvictRule::kNone;
  EXPECT_FALSE(demotes_everything(kT, p));
}

TEST(PolicyBudget, LeastImportantFirstOldestWithinAType) {
  const PolicyParams p = paper();
  EXPECT_EQ(next_demotion(table_of({{kR, 0}, {kE, 0}, {kT, 0}, {kT, 0}}), p), 2u);
  EXPECT_EQ(next_demotion(table_of({{kR, 0}, {kE, 0}, {kT, 5}, {kT, 4}}), p), 3u);
  EXPECT_EQ(next_demotion(table_of({{kR, 0}, {kE, 3}, {kT, 5}, {kE, 0}}), p), 1u);
  EXPECT_EQ(next_demotion(table_of({{kR, 4}, {kE, 5}, {kR, 0}}), p), 0u);
}

TEST(PolicyBudget, OldestOrderIgnoresTheType) {
  PolicyParams p = paper();
  p.order = DemoteOrder::kOldest;
  EXPECT_EQ(next_demotion(table_of({{kR, 0}, {kT, 0}}), p), 0u);
  EXPECT_EQ(next_demotion(table_of({{kR, 5}, {kR, 2}, {kT, 0}}), p), 1u);
}

TEST(PolicyBudget, NothingBelowTheLastLevelAndNeverTheOpenSegment) {
  const PolicyParams p = paper();
  EXPECT_FALSE(next_demotion(table_of({{kR, 5}, {kT, 5}}), p).has_value());
  EXPECT_FALSE(next_demotion(table_of({}), p).has_value());
  EXPECT_FALSE(can_demote(table_of({}).back(), p));
}

TEST(PolicyBudget, TargetsFollowTheSchedule) {
  const PolicyParams p = paper();
  Segment segment = table_of({{kR, 0}})[0];
  const uint32_t expected[] = {64, 32, 16, 8, 4};
  for (const uint32_t target : expected) {
    ASSERT_TRUE(can_demote(segment, p));
    EXPECT_EQ(demotion_target(segment, p), target);
    ++segment.level;
  }
  EXPECT_FALSE(can_demote(segment, p));
}

TEST(PolicyFloor, MergeJoinsTheTwoOldestClosedSegments) {
  PolicyParams p = paper();
  EXPECT_FALSE(can_merge_oldest(table_of({{kR, 5}, {kR, 5}}), p)) << "kSoft never merges";
  p.floor_rule = FloorRule::kMerge;
  const auto table = table_of({{kT, 5}, {kE, 5}, {kR, 5}});
  ASSERT_TRUE(can_merge_oldest(table, p));
  const Segment joined = merge(table[0], table[1], p);
  EXPECT_EQ(joined.start, 0u);
  EXPECT_EQ(joined.end, 256u);
  EXPECT_EQ(joined.label, static_cast<uint8_t>(kE)) << "as important as the more important";
  EXPECT_EQ(joined.level, 5);
  EXPECT_EQ(joined.merged, 1);
}

TEST(PolicyFloor, OneClosedSegmentCannotMerge) {
  PolicyParams p = paper();
  p.floor_rule = FloorRule::kMerge;
  EXPECT_FALSE(can_merge_oldest(table_of({{kR, 5}}), p));
  EXPECT_FALSE(can_merge_oldest(table_of({}), p));
}

}  // namespace
}  // namespace thinkv::policy
