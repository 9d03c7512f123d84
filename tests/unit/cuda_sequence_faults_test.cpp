// What the device's sequences do when a promise was broken or metadata was damaged, what the lease
// does at its bounds, and the bounds that the host is given. Run by the emulator.
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/device_twin.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::cuda {
namespace {

using testing::DevicePool;
using testing::DeviceReader;
using testing::geometry_of;
using testing::plain_policy;
using testing::TwinBatch;

TEST(CudaSequence, WithoutPromisedPagesTokensAreLostAndSaidToBe) {
  TwinBatch batch({.geometry = geometry_of(1, 1, 64)});
  batch.open(0, plain_policy(Format::kK4V4));
  for (uint32_t i = 0; i < 15; ++i) batch.step();
  DevicePool& pool = batch.pool();
  pool.supply(0);
  testing::DeviceVector<float> rows(64);
  for (uint32_t i = 0; i < 64; ++i) rows[i] = 1.0f;
  const BatchView view = pool.view();
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  ASSERT_EQ(launch_append(view, 0, rows.data(), rows.data(), Element::kF32, nullptr), cudaSuccess);
  ASSERT_EQ(launch_end(view, nullptr), cudaSuccess);
  EXPECT_EQ(pool.lease().faults, kLeaseEmpty);
  EXPECT_EQ(pool.progress().faults, kLeaseEmpty);
  EXPECT_EQ(pool.lease().count, 0u);
  const DeviceReader reader(pool, batch.twin(0)->root);
  EXPECT_EQ(reader.lane(0).live, 0u);
  EXPECT_EQ(reader.lane(0).buffer_count, 0u);
}

TEST(CudaSequence, APageListThatIsTooSmallIsCutAndSaidToBe) {
  DevicePool pool({.geometry = geometry_of(1, 2, 64), .list_pages = 2});
  const uint32_t root = pool.take();
  pool.supply(200);
  PolicyParams policy = plain_policy(Format::kK4V4);
  ASSERT_EQ(launch_open(pool.view(), root, policy, 0, false, nullptr), cudaSuccess);
  std::vector<float> rows(2 * 40 * 64, 1.0f);
  ASSERT_EQ(
      launch_prefill(pool.view(), root, 0, rows.data(), rows.data(), Element::kF32, 40, nullptr),
      cudaSuccess);
  ASSERT_EQ(launch_prefill_end(pool.view(), root, policy, {40}, nullptr), cudaSuccess);
  pool.root(0) = root;
  ASSERT_EQ(launch_begin(pool.view(), nullptr), cudaSuccess);
  ASSERT_EQ(launch_append(pool.view(), 0, rows.data(), rows.data(), Element::kF32, nullptr),
            cudaSuccess);
  EXPECT_EQ(pool.lease().faults, kListFull);
  EXPECT_EQ(pool.lane_begin()[2], 2u);
}

// Damages one word of the metadata at a time; every kernel must get by, and say so.
TEST(CudaSequence, BadMetadataIsReportedAndNotFollowed) {
  for (uint32_t damage = 0; damage < 8; ++damage) {
    SCOPED_TRACE(damage);
    TwinBatch batch({.geometry = geometry_of(1, 2, 64), .capacity = 2});
    batch.open(0, plain_policy(Format::kK4V4));
    batch.open(1, plain_policy(Format::kK4V4));
    batch.prefill(0, 40);
    batch.prefill(1, 40);
    for (uint32_t i = 0; i < 15; ++i) batch.step();
    DevicePool& pool = batch.pool();
    const DeviceReader reader(pool, batch.twin(0)->root);
    DeviceLane& lane = reader.lane(0);
    const uint32_t outside = PageId(ExtentId(3), 0).raw(),
                   past_end = PageId(ExtentId(0), 512).raw();
    if (damage == 0) reader.header().version = 77;
    if (damage == 1) reinterpret_cast<uint32_t*>(&reader.header() + 1)[0] = outside;
    if (damage == 2) lane.table[0] = past_end;
    if (damage == 3) lane.pages = 100'000;
    if (damage == 4) lane.buffer_page[1] = outside;
    if (damage == 5) lane.buffer_count = 1000;
    if (damage == 6) reader.descriptor(lane, 0).page = PageId::kNoneRaw;
    if (damage == 7) reader.descriptor(lane, 0).format = 200;
    pool.supply(32);
    std::vector<float> rows(2 * 2 * 64, 1.0f);
    const BatchView view = pool.view();
    ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
    ASSERT_EQ(launch_append(view, 0, rows.data(), rows.data(), Element::kF32, nullptr),
              cudaSuccess);
    ASSERT_EQ(launch_end(view, nullptr), cudaSuccess);
    const std::vector<uint32_t> positions = {1, 2, 3};
    ASSERT_EQ(launch_evict(view, pool.root(0), positions.data(), 3, nullptr), cudaSuccess);
    ASSERT_EQ(launch_recode(view, pool.root(0), 0, 30, Format::kK2V2, nullptr), cudaSuccess);
    ASSERT_EQ(launch_close(view, pool.root(0), nullptr), cudaSuccess);
    EXPECT_NE(pool.lease().faults & kBadMetadata, 0u);
    // The neighbour goes on as if nothing had been.
    const DeviceReader other(pool, pool.root(1));
    std::string wrong;
    std::set<uint32_t> owned;
    other.check(owned, wrong);
    EXPECT_EQ(wrong, "");
    EXPECT_EQ(other.lane(0).live, 56u);
  }
}

TEST(CudaLease, KeepsWhatFitsAndSaysWhatDoesNot) {
  DevicePool pool({.geometry = geometry_of(1, 1, 64), .extents = 1, .extent_pages = 8});
  pool.supply(6);
  std::vector<uint32_t> more(5, 99), out(9, 7);
  ASSERT_EQ(launch_refill(&pool.lease(), more.data(), 5, nullptr), cudaSuccess);
  EXPECT_EQ(pool.lease().count, 8u);
  EXPECT_EQ(pool.lease().faults, kLeaseFull);
  ASSERT_EQ(launch_drain(&pool.lease(), out.data(), 3, nullptr), cudaSuccess);
  EXPECT_EQ(out[0], 3u);
  EXPECT_EQ(out[1], 99u);
  EXPECT_EQ(out[4], 7u) << "beyond what was asked for";
  ASSERT_EQ(launch_drain(&pool.lease(), out.data(), 8, nullptr), cudaSuccess);
  EXPECT_EQ(out[0], 5u);
  EXPECT_EQ(pool.lease().count, 0u);
}

// ---- sizes ----

TEST(CudaSequenceSizes, BlocksTakePagesForWholeOnesOnly) {
  PolicyParams p = plain_policy(Format::kF16);
  p.evict = EvictRule::kRank;
  p.rotate = 0;
  p.budget_tokens = 64;
  p.rule_count = 1;
  p.rules[0].at_prompt_end = 1;
  p.rules[0].every = 24;
  p.rules[0].position = 1.0f;
  p.rules[0].action = RankAction::kRecode;
  const ModelGeometry g = geometry_of(3, 1, 128);
  struct Bound {
    Format format;
    uint32_t slots;  // of the smallest block that a layer gets
  };
  for (const Bound b :
       {Bound{Format::kKivi4, 24}, Bound{Format::kKivi2, 44}, Bound{Format::kKivi1, 64},
        Bound{Format::kPair2, 32}, Bound{Format::kPair1, 64}, Bound{Format::kThink, 10}}) {
    SCOPED_TRACE(format_info(b.format).name);
    p.rules[0].recode_format = b.format;
    EXPECT_TRUE(supported(g, p).has_value());
    EXPECT_EQ(prefill_end_pages(g, p, 64, {b.slots - 1}), 0u);
    EXPECT_EQ(prefill_end_pages(g, p, 64, {2 * b.slots - 1}), g.lanes());
    EXPECT_EQ(step_pages(g, p, {2 * b.slots, 23, 12, 64}),
              g.lanes() * ((2 * b.slots + 24) / b.slots));
    EXPECT_EQ(step_pages(g, p, {2 * b.slots, 24, 12, 64}), 0u);
  }
}

TEST(CudaSequenceSizes, AStepThatFlushesNothingTakesNothing) {
  const ModelGeometry g = geometry_of(4, 2, 128);
  PolicyParams p = plain_policy(Format::kK4V4);
  p.segment_tokens = 64;
  EXPECT_EQ(step_pages(g, p, {10, 14, 5}), 0u);
  EXPECT_EQ(step_pages(g, p, {10, 15, 5}), 8u);
  EXPECT_EQ(step_pages(g, p, {10, 63, 5}), 8u + 1u) << "and a page of segments";
  EXPECT_EQ(step_pages(g, p, {10, 15, 143}), 8u) << "144 descriptors a table page";
  EXPECT_EQ(step_pages(g, p, {10, 15, 144}), 16u);
  p.thought_format[0] = Format::kF16;
  EXPECT_EQ(step_pages(g, p, {10, 15, 5}), 16u);
  p.thought_format[0] = Format::kK2V2;
  p.sink_tokens = 20;
  EXPECT_EQ(step_pages(g, p, {10, 15, 5}), 16u) << "sinks and others in one flush";
  EXPECT_EQ(step_pages(g, p, {20, 15, 5}), 8u);
}

TEST(CudaSequenceSizes, WhatTheDeviceCannotHoldIsRefused) {
  PolicyParams p = plain_policy(Format::kK4V4);
  EXPECT_TRUE(supported(geometry_of(32, 8, 128), p).has_value());
  const Status lanes = supported(geometry_of(256, 32, 64), p);
  ASSERT_FALSE(lanes.has_value());
  EXPECT_EQ(lanes.error().code, ErrorCode::kUnsupported);
  p.evict = EvictRule::kTbe;
  p.schedule_length = 1;
  p.schedule[0] = 512;
  p.segment_tokens = 1024;
  const Status medoids = supported(geometry_of(32, 8, 256), p);
  ASSERT_FALSE(medoids.has_value());
  EXPECT_EQ(medoids.error().code, ErrorCode::kUnsupported);
  p.name[0] = '\0';
  EXPECT_EQ(supported(geometry_of(32, 8, 128), p).error().code, ErrorCode::kInvalidArgument);
}

TEST(CudaSequenceSizes, ATierLeavesOfAPromptWhatStaysInPages) {
  PolicyParams tier = plain_policy(Format::kF16);
  tier.tier.host_bytes = 1;
  tier.tier.dense_layers[0] = 1;
  const ModelGeometry g = geometry_of(2, 1, 64);
  EXPECT_TRUE(supported(g, tier).has_value());
  const uint32_t slots = page_layout(Format::kK2V2, 64).slots, pages = (32'000 + slots - 1) / slots;
  EXPECT_EQ(prefill_pages(g, tier, 0, 32'000), pages + (pages - 1) / 72) << "a table beside 72";
  EXPECT_EQ(prefill_pages(g, tier, 1, 32'000), 8u) << "start and recent";
}

}  // namespace
}  // namespace thinkv::cuda
