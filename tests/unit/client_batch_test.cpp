// GpuBatch::reserve against a GPU that is behind, and what a batch and its sequences ask of the
// kernels.
#include <string>
#include <vector>

#include "tests/support/idle_gpu.h"

namespace thinkv::client {

// Instead of the library's: this program is linked with it first.
const KernelTable* kernel_table() {
  return &kIdleKernels;
}

namespace {

TEST_F(ReserveBehind, ABoundBeyondALanesTableAsksTheGpu) {
  world.table_pages = 20;
  open(0);
  const uint32_t before = world.waits;
  const Status ran = run(40);
  EXPECT_TRUE(ran) << ran.error().what;
  EXPECT_GT(world.waits, before);
  EXPECT_LT(world.waits, before + 20) << "not at every step";
}

TEST_F(ReserveBehind, ALaneThatReallyFillsItsTableIsRefused) {
  world.table_pages = 20;
  world.lane_pages = 19;
  open(0);
  const Status ran = run(40);
  ASSERT_FALSE(ran);
  EXPECT_EQ(ran.error().code, ErrorCode::kUnsupported);
  const uint64_t reserved = world.steps;
  EXPECT_FALSE(batch_->reserve(1));
  EXPECT_EQ(world.steps, reserved);
}

TEST_F(ReserveBehind, ABoundBeyondTheListAsksTheGpu) {
  open(160);  // 13 pages a lane
  const Status ran = run(40);
  EXPECT_TRUE(ran) << ran.error().what;
}

TEST_F(ReserveBehind, ALaneThatReallyFillsTheListIsRefused) {
  world.lane_pages = 12;
  open(160);
  const Status ran = run(40);
  ASSERT_FALSE(ran);
  EXPECT_EQ(ran.error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ReserveBehind, AnLseOfCentredKeysIsCompleted) {
  open(0, true);
  float lse = 0.0f;
  ASSERT_TRUE(batch_->attend(0, {.lse = nullptr}));
  EXPECT_EQ(world.centred_lses, 0u);
  ASSERT_TRUE(batch_->attend(0, {.lse = &lse}));
  EXPECT_EQ(world.centred_lses, 1u);
}

TEST_F(ReserveBehind, AnLseThatKnowsNoCentredKeysIsNotHandedToThem) {
  open(0);
  float lse = 0.0f;
  ASSERT_TRUE(batch_->attend(0, {.lse = &lse}));
  EXPECT_EQ(world.centred_lses, 0u);
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = sequence_of(true);
  EXPECT_EQ(batch_->set(0, sequence_.get()).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ReserveBehind, ABatchThatBlocksMayComeToReadsThem) {
  open(0);
  ASSERT_TRUE(batch_->attend(0, {}));
  EXPECT_FALSE(world.reads_blocks);
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = sequence_of(false, true);
  ASSERT_TRUE(batch_->set(0, sequence_.get()));
  ASSERT_TRUE(batch_->attend(0, {}));
  EXPECT_TRUE(world.reads_blocks);
  // Others may join, and what was launched goes on reading blocks.
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = sequence_of(false);
  ASSERT_TRUE(batch_->set(0, sequence_.get()));
  ASSERT_TRUE(batch_->attend(0, {}));
  EXPECT_TRUE(world.reads_blocks);
}

TEST_F(ReserveBehind, BlocksAreRefusedByStepsThatWereLaunchedWithoutThem) {
  open(0);
  ASSERT_TRUE(run(1));
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = sequence_of(false, true);
  EXPECT_EQ(batch_->set(0, sequence_.get()).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ReserveBehind, LanesBeyondABlockGetTheirMemoryBeforeTheyAreRanked) {
  open(0);
  world.rank_need.tokens = 10000;
  EXPECT_TRUE(batch_->reserve(1));
  const uint32_t waits = world.waits;
  EXPECT_TRUE(batch_->reserve(1)) << "it is there";
  EXPECT_EQ(world.waits, waits);
  world.rank_need.tokens = uint64_t{1} << 50;
  const Status refused = batch_->reserve(1);
  ASSERT_FALSE(refused);
  EXPECT_NE(std::string(refused.error().what).find(std::to_string(26 * world.rank_need.tokens + 1)),
            std::string::npos)
      << "says how much was asked for: " << refused.error().what;
}

// Sequences share the memory, so a new need keeps the room that others rely on.
TEST_F(ReserveBehind, MemoryOfRankRulesGrowsToAllThatIsNeeded) {
  open(0);
  using Need = cuda::RankNeed;
  for (const Need need : {Need{0, 128}, Need{10000, 0}, Need{500, 64}, Need{0, 0}, Need{9, 256}}) {
    world.rank_need = need;
    EXPECT_TRUE(batch_->reserve(1));
  }
  EXPECT_EQ(world.rank_needs, (std::vector<Need>{{0, 128}, {10000, 128}, {10000, 256}}));
}

// ---- what the engine tells about a prompt ----

TEST_F(ReserveBehind, QueriesComeOnceALayerBetweenItsKeysAndThePromptsEnd) {
  open(0);
  GpuSequence& s = *sequence_;
  const auto code = [](const Status& status) {
    return status ? ErrorCode::kOk : status.error().code;
  };
  float rows[64] = {};
  EXPECT_EQ(code(s.prefill_queries(0, rows, Element::kF32, 8)), ErrorCode::kInvalidArgument);
  ASSERT_TRUE(s.prefill(0, rows, rows, Element::kF32, 50));
  for (const uint32_t count : {0u, 51u, 65u}) {
    EXPECT_EQ(code(s.prefill_queries(0, rows, Element::kF32, count)), ErrorCode::kInvalidArgument);
  }
  EXPECT_EQ(code(s.prefill_queries(1, rows, Element::kF32, 8)), ErrorCode::kInvalidArgument);
  ASSERT_TRUE(s.prefill_queries(0, rows, Element::kF32, 8));
  EXPECT_EQ(world.queries, 8u);
  EXPECT_EQ(code(s.prefill_queries(0, rows, Element::kF32, 8)), ErrorCode::kInvalidArgument);
  ASSERT_TRUE(s.prefill_end());
  EXPECT_EQ(world.ended_with, 8u);
  EXPECT_EQ(code(s.prefill_queries(0, rows, Element::kF32, 8)), ErrorCode::kInvalidArgument);
  sequence_ = sequence_of(false);
  ASSERT_TRUE(sequence_->prefill(0, rows, rows, Element::kF32, 50));
  ASSERT_TRUE(sequence_->prefill_end());
  EXPECT_EQ(world.ended_with, 0u);
}

TEST_F(ReserveBehind, ClassesGoToTheGpuInPiecesWhereRulesReadThem) {
  open(0);
  const std::vector<uint8_t> classes(150'000, 1);
  ASSERT_TRUE(sequence_->token_classes(5, classes));
  EXPECT_EQ(world.classes_end, 0u) << "no rule of the policy reads them";
  PolicyParams policy = testing::plain_policy(Format::kK4V4);
  policy.evict = EvictRule::kRank;
  policy.rule_count = 1;
  policy.rules[0].classes = 1;
  Result<std::unique_ptr<GpuSequence>> reads = GpuSequence::open(*engine_, policy, {});
  ASSERT_TRUE(reads);
  ASSERT_TRUE((*reads)->token_classes(5, classes));
  EXPECT_EQ(world.classes_end, 150'005u);
  EXPECT_EQ(world.class_calls, 3u) << "64 KiB at a time";
  const Status late = (*reads)->token_classes(60'000, classes);
  ASSERT_FALSE(late);
  EXPECT_EQ(late.error().code, ErrorCode::kUnsupported);
  const Status beyond = (*reads)->token_classes(0xFFFF'FFFFu, std::span(classes).first(1));
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code, ErrorCode::kInvalidArgument);
}

// ---- tiers ----

class TierMemory : public ReserveBehind {
 protected:
  static constexpr uint32_t kPrompt = 1000;
  static constexpr uint64_t kBytes = (kPrompt - 64) * 64 * 6 + 64 * 4;  // of the one lane

  std::unique_ptr<GpuSequence> tiered(uint64_t host_bytes) {
    PolicyParams policy = testing::plain_policy(Format::kF16);
    policy.tier.host_bytes = host_bytes;
    Result<std::unique_ptr<GpuSequence>> sequence = GpuSequence::open(*engine_, policy, {});
    EXPECT_TRUE(sequence) << sequence.error().what;
    return sequence ? std::move(*sequence) : nullptr;
  }
  static Status prefill(GpuSequence& sequence) {
    return sequence.prefill(0, &world, &world, Element::kF16, kPrompt);  // nobody reads it
  }
};

// TearDown() finds what was not given back.
TEST_F(TierMemory, IsPinnedForAPromptAndGoesWithItsSequence) {
  const size_t before = test::fake_cuda::held()->allocations;
  auto sequence = tiered(kBytes);
  ASSERT_TRUE(prefill(*sequence));
  ASSERT_TRUE(sequence->prefill_end());
  ASSERT_NE(sequence->tier(), nullptr);
  EXPECT_EQ(sequence->tier()->bytes(), kBytes);
  EXPECT_EQ(test::fake_cuda::held()->allocations, before + 2) << "rows, and where they lie";
  sequence.reset();
  EXPECT_EQ(test::fake_cuda::held()->allocations, before);
}

TEST_F(TierMemory, BeyondHostBytesIsRefused) {
  auto sequence = tiered(kBytes - 1);
  const Status refused = prefill(*sequence);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kQuotaExceeded);
  EXPECT_EQ(sequence->tier(), nullptr);
}

TEST_F(TierMemory, ThatCannotBePinnedIsRefusedWithItsBytes) {
  auto sequence = tiered(kBytes);
  fail("cuMemHostAlloc", 1, cuda::kErrorOutOfMemory);
  const Status refused = prefill(*sequence);
  stop_failing();
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kExhausted);
  EXPECT_NE(std::string(refused.error().what).find("359424 bytes of pinned memory"),
            std::string::npos)
      << refused.error().what;
  EXPECT_EQ(sequence->tier(), nullptr);
  EXPECT_TRUE(prefill(*sequence)) << "the layer can come again";
}

TEST_F(TierMemory, OfABatchGrowsWithItsSequencesAndIsListed) {
  Result<std::unique_ptr<GpuBatch>> batch =
      GpuBatch::open(*engine_, {.capacity = 1, .tokens_max = 32});
  ASSERT_TRUE(batch);
  sequence_ = tiered(kBytes);
  ASSERT_TRUE(prefill(*sequence_));
  ASSERT_TRUE(sequence_->prefill_end());
  batch_ = std::move(*batch);
  fail("cuMemAlloc_v2", 3, cuda::kErrorOutOfMemory);
  EXPECT_EQ(batch_->set(0, sequence_.get()).error().code, ErrorCode::kExhausted);
  stop_failing();
  ASSERT_TRUE(batch_->set(0, sequence_.get()));
  const Status full = batch_->reserve(1);
  ASSERT_FALSE(full) << "16 working pages and the lane's own are more than 9";
  EXPECT_EQ(full.error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ReserveBehind, TheFirstReserveHasNothingToAskFor) {
  world.table_pages = 1;
  open(0);
  EXPECT_EQ(batch_->reserve(1).error().code, ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace thinkv::client
