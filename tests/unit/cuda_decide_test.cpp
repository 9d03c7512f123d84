// What the end of a step decides on the device, without tokens: long runs of one warp, the limits
// of the list and of the segment table.
#include "kernels/cuda/refresh_decide.cuh"
#include "tests/support/refresh_twins.h"

namespace thinkv::cuda {
namespace {

using testing::halving_policy;
using testing::label_by_layers;
using testing::planted;
using testing::Twins;

__global__ void decide_alone(const BatchView view, uint32_t row, uint32_t* due) {
  const bool listed = decide(view, sequence_at(view, view.roots[row]), row);
  if (threadIdx.x == 0) *due = listed ? 1 : 0;
}

// A sequence that decides but holds no token.
struct Decider {
  explicit Decider(const PolicyParams& given)
      : batch(testing::geometry_of({}), 1, 512), policy(given) {
    batch.open(0, policy, policy.budget_tokens);
  }
  [[nodiscard]] DeviceSequence& sequence() const { return *batch.sequence(0); }
  void step() {
    DeviceSequence& s = sequence();
    const policy::Segment& open = *open_segment(batch.view, &s);
    s.closing = s.tokens + 1 - open.start >= policy.segment_tokens ? 1 : 0;
    s.tokens += 1;
    s.counters.steps += 1;
    if (launch(decide_alone, {.blocks = 1, .threads = 32}, nullptr, batch.view, 0u, &due) != 0) {
      ADD_FAILURE();
    }
    peak = std::max(peak, s.generated_live);
    if (first_over == 0 && s.counters.over_budget_steps > 0) first_over = s.tokens;
  }
  void run(uint32_t steps) {
    for (uint32_t i = 0; i < steps; ++i) step();
  }
  testing::DeviceBatch batch;
  PolicyParams policy;
  uint32_t peak = 0, first_over = 0, due = 0;
};

// The numbers of thinkv-method.md 8.4, as SequenceAccounting has them for the host.
TEST(CudaDecide, PaperScheduleAt32768TokensAndBudget1024) {
  Decider decider(testing::tbe_policy(1024));
  decider.run(32768);
  const DeviceCounters& counters = decider.sequence().counters;
  EXPECT_EQ(counters.demotions, 1275u);
  EXPECT_EQ(decider.peak, 1148u);
  EXPECT_EQ(decider.first_over, 28925u);
  EXPECT_EQ(counters.refreshes, 256u);
  EXPECT_EQ(decider.sequence().generated_live, 255u * 4u + 128u);
}

TEST(CudaDecide, Budget512IsFirstBrokenAt12541) {
  Decider decider(testing::tbe_policy(512));
  decider.run(12600);
  EXPECT_EQ(decider.first_over, 12541u);
}

TEST(CudaDecide, MergingKeepsTheBudgetUntilOneClosedSegmentIsLeft) {
  PolicyParams policy = testing::tbe_policy(512);
  policy.floor_rule = FloorRule::kMerge;
  Decider wide(policy);
  wide.run(16384);
  EXPECT_EQ(wide.first_over, 0u);
  EXPECT_LE(wide.peak, 512u);
  EXPECT_GT(wide.sequence().counters.merges, 0u);
  policy.budget_tokens = 100;  // less than an open segment can hold
  Decider narrow(policy);
  narrow.run(1024);
  EXPECT_EQ(narrow.peak, 132u);
  EXPECT_EQ(narrow.sequence().counters.over_budget_steps, 28u + 7u * 32u);
}

TEST(CudaDecide, NothingIsListedWhereNothingIsDue) {
  Decider decider(testing::tbe_policy(100));
  for (uint32_t i = 0; i < 400; ++i) {
    const uint64_t before = decider.sequence().counters.demotions;
    decider.step();
    const uint64_t demoted = decider.sequence().counters.demotions - before;
    EXPECT_EQ(decider.due, decider.sequence().demotions > 0 ? 1u : 0u);
    EXPECT_EQ(decider.sequence().demotions, demoted) << "full segments lose tokens each time";
  }
  EXPECT_GT(decider.sequence().counters.demotions, 8u);
}

PolicyParams short_segments() {
  PolicyParams p = halving_policy(16, 4, 0);
  p.evict = EvictRule::kNone;
  return p;
}

// Contiguous from 0 to the open segment.
void expect_whole(const Decider& decider) {
  const std::vector<policy::Segment> segments = decider.batch.segments(0);
  EXPECT_EQ(segments.front().start, 0u);
  for (size_t i = 1; i < segments.size(); ++i) EXPECT_EQ(segments[i].start, segments[i - 1].end);
  EXPECT_EQ(segments.back().end, policy::kOpenEnd);
}

TEST(CudaDecide, AFullSegmentTableJoinsTheTwoOldest) {
  Decider decider(short_segments());
  const uint32_t most = kSegmentPagesMax * segments_per_page(64);
  decider.run((most - 1) * 16);
  EXPECT_EQ(decider.sequence().segments, most);
  EXPECT_EQ(decider.sequence().segment_pages, kSegmentPagesMax);
  EXPECT_EQ(decider.sequence().counters.merges, 0u);
  decider.run(40);
  EXPECT_EQ(decider.sequence().segments, most);
  EXPECT_EQ(decider.sequence().counters.merges, 2u);
  EXPECT_EQ(decider.batch.segments(0)[0].end, 48u);
  EXPECT_EQ(decider.batch.lease.faults, 0u);
  expect_whole(decider);
}

TEST(CudaDecide, AnEmptyLeaseJoinsTheTwoOldest) {
  Decider decider(short_segments());
  const uint32_t a_page = segments_per_page(64);
  decider.run((a_page - 1) * 16);
  decider.batch.lease.count = 0;
  decider.run(16);
  EXPECT_EQ(decider.sequence().segments, a_page);
  EXPECT_EQ(decider.sequence().segment_pages, 1u);
  EXPECT_EQ(decider.batch.lease.faults, uint32_t{kLeaseEmpty});
  expect_whole(decider);
}

// 150 segments of 16 tokens against a list of 144: a transition takes two steps, and a budget that
// falls to 620 does too. Afterwards all is as on the host.
TEST(CudaDecide, AFullListGoesOnInTheNextSteps) {
  PolicyParams p = halving_policy(16, 4, 0);
  label_by_layers(p, {0});
  p.select = SelectRule::kRecent;
  ASSERT_EQ(demotions_per_page(64), 144u);
  Twins twins(testing::geometry_of({}), p, 21);
  for (uint32_t i = 0; i < 150 * 16 - 1; ++i) ASSERT_NO_FATAL_FAILURE(twins.step());
  ASSERT_NO_FATAL_FAILURE(twins.expect_same());
  planted.percent[1] = 90;
  ASSERT_NO_FATAL_FAILURE(twins.step());
  EXPECT_EQ(twins.host().state()->header->counters.demotions, 150u);
  EXPECT_EQ(twins.device().counters.demotions, 144u);
  EXPECT_EQ(twins.device().waiting, 6u);
  planted.percent[1] = 50;
  ASSERT_NO_FATAL_FAILURE(twins.run(3));
  EXPECT_EQ(twins.device().counters.demotions, 150u);

  ASSERT_TRUE(twins.host().set_budget(620).has_value());
  ASSERT_EQ(launch_budget(twins.batch.view, twins.batch.roots[1], 620, nullptr), cudaSuccess);
  ASSERT_NO_FATAL_FAILURE(twins.step());
  EXPECT_EQ(twins.device().counters.demotions, 150u + 144u) << "147 are needed";
  ASSERT_NO_FATAL_FAILURE(twins.run(40));
}

// A second transition comes while the list still works on the first: every segment steps down once
// for each of them, and never below the last level.
TEST(CudaDecide, TransitionsThatOverlapAreAllCarriedOut) {
  for (const uint32_t last : {4u, 8u}) {  // two levels, one level
    PolicyParams p = halving_policy(16, last, 0);
    label_by_layers(p, {0});
    Decider decider(p);
    decider.batch.view.emit[0] = kEmitSparsity;
    LaneSparsity& found = decider.batch.view.sparsity[0];
    constexpr uint32_t kClosed = 2600;  // 17 lists of 144, and 152 more
    found = {100, 50};
    decider.run(kClosed * 16 - 1);
    found = {100, 90};
    decider.run(17);  // closes the last of them, and the next
    EXPECT_EQ(decider.sequence().waiting, 152u + (last == 4 ? kClosed + 1 : 1u));
    found = {100, 50};
    decider.run(40);
    EXPECT_EQ(decider.sequence().waiting, 0u);
    const std::vector<policy::Segment> segments = decider.batch.segments(0);
    for (uint32_t i = 0; i < kClosed; ++i) ASSERT_EQ(segments[i].level, p.schedule_length) << i;
    EXPECT_EQ(segments[kClosed].level, 1u);
    EXPECT_EQ(segments[kClosed + 1].level, 0u);
    EXPECT_EQ(decider.sequence().counters.demotions, kClosed * p.schedule_length + 1);
  }
}

// Tokens that the engine took are still counted: a sequence is never over its budget unseen.
TEST(CudaDecide, AfterAnEvictionTheCountIsAnUpperBound) {
  PolicyParams p = halving_policy(32, 4, 100);
  p.select = SelectRule::kAttention;
  Twins twins(testing::geometry_of({.layers = 1, .kv_heads = 2}), p, 22);
  ASSERT_NO_FATAL_FAILURE(twins.run(90));
  const std::vector<uint32_t> gone = {3, 5, 6, 7, 8, 40, 41, 42, 43, 50, 51};
  ASSERT_EQ(launch_evict(twins.batch.view, twins.batch.roots[1], gone.data(),
                         static_cast<uint32_t>(gone.size()), nullptr),
            cudaSuccess);
  ASSERT_TRUE(twins.host().evict(gone).has_value());
  for (uint32_t i = 0; i < 200; ++i) {
    ASSERT_NO_FATAL_FAILURE(twins.step());
    const uint32_t counted = twins.device().generated_live;
    EXPECT_LE(counted, 100u);
    EXPECT_LE(twins.lane(0).lane->live, counted);
    EXPECT_LE(twins.lane(1).lane->live, counted);
  }
  EXPECT_EQ(twins.batch.lease.faults, 0u);
}

}  // namespace
}  // namespace thinkv::cuda
