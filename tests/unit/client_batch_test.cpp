// GpuBatch::reserve against a GPU that is behind: kernels that do nothing, on the fake driver,
// whose progress arrives only when somebody waits for the stream.
#include "client/gpu/batch.h"

#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "client/gpu/engine.h"
#include "client/gpu/kernel_table.h"
#include "client/gpu/sequence.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/fake_daemon.h"
#include "tests/support/shapes.h"

namespace thinkv::client {
namespace {

// The GPU that the kernels below pretend to be.
struct World {
  cuda::Progress* progress = nullptr;
  uint64_t steps = 0;          // launched
  uint32_t lane_pages = 3;     // of its longest lane, whatever the host's bound says
  uint32_t table_pages = 100;  // that a lane's table holds
  uint64_t rank_tokens = 0;    // of lanes that rank rules see
  uint32_t waits = 0;
  uint32_t centred_lses = 0;
  uint32_t queries = 0;      // of a layer, as last given
  uint32_t ended_with = 77;  // queries of the prompt that ended
  uint32_t classes_end = 0;
  uint32_t class_calls = 0;
  uint32_t stream_reads = 0;
  const unsigned char* stream_pages = nullptr;  // of the last of them
  bool reads_blocks = false;                    // of the last attend
  uint64_t tokens = 0;                          // of every sequence
  std::vector<uint32_t> evicted;
};
World world;  // NOLINT: kernels are plain functions

using cuda::BatchView;
using cuda::Element;

const KernelTable kIdleKernels = {
    .refill = [](cuda::Lease*, const uint32_t*, uint32_t, StreamHandle) { return 0; },
    .drain =
        [](cuda::Lease*, uint32_t* out, uint32_t, StreamHandle) {
          out[0] = 0;
          return 0;
        },
    .open = [](const BatchView&, uint32_t, const PolicyParams&, uint32_t, bool,
               StreamHandle) { return 0; },
    .prefill = [](const BatchView&, uint32_t, uint32_t, const void*, const void*, Element, uint32_t,
                  StreamHandle) { return 0; },
    .code_prompt = [](const BatchView&, uint32_t, uint32_t, const void*, const void*, Element,
                      uint32_t, StreamHandle) { return 0; },
    .prefill_queries =
        [](const BatchView&, uint32_t, const PolicyParams&, uint32_t, const void*, Element,
           const cuda::Prompt& prompt, StreamHandle) {
          world.queries = prompt.queries;
          return 0;
        },
    .prefill_end =
        [](const BatchView&, uint32_t, const PolicyParams&, const cuda::Prompt& prompt,
           StreamHandle) {
          world.ended_with = prompt.queries;
          return 0;
        },
    .classes =
        [](const BatchView&, uint32_t, uint32_t first, const uint8_t*, uint32_t count,
           StreamHandle) {
          world.classes_end = first + count;
          ++world.class_calls;
          return 0;
        },
    .close = [](const BatchView&, uint32_t, StreamHandle) { return 0; },
    .evict =
        [](const BatchView&, uint32_t, const uint32_t* positions, uint32_t count, StreamHandle) {
          world.evicted.insert(world.evicted.end(), positions, positions + count);
          return 0;
        },
    .trim = [](const BatchView&, uint32_t, uint32_t, StreamHandle) { return 0; },
    .copy = [](const BatchView&, uint32_t, uint32_t, StreamHandle) { return 0; },
    .recode = [](const BatchView&, uint32_t, uint32_t, uint32_t, Format,
                 StreamHandle) { return 0; },
    .budget = [](const BatchView&, uint32_t, uint32_t, StreamHandle) { return 0; },
    .numbers =
        [](const BatchView&, uint32_t, cuda::SequenceNumbers* out, StreamHandle) {
          *out = {};
          out->tokens = world.tokens;
          return 0;
        },
    .sparsity = [](const BatchView&, uint32_t, float*, StreamHandle) { return 0; },
    .begin =
        [](const BatchView& view, StreamHandle) {
          world.progress = view.progress;
          return 0;
        },
    .append = [](const BatchView&, uint32_t, const void*, const void*, Element,
                 StreamHandle) { return 0; },
    .end =
        [](const BatchView&, StreamHandle) {
          ++world.steps;
          return 0;
        },
    .read_streams =
        [](const BatchView& view, uint32_t, StreamHandle) {
          ++world.stream_reads;
          world.stream_pages = view.stream_pages;
          return 0;
        },
    .attend =
        [](const cuda::AttendParams& p, const cuda::AttendShape&, StreamHandle) {
          world.reads_blocks = p.blocks;
          return 0;
        },
    .centred_lse =
        [](const BatchView&, uint32_t, const void*, Element, float*, StreamHandle) {
          ++world.centred_lses;
          return 0;
        },
    .tier_put = [](const cuda::TierPut&, StreamHandle) { return 0; },
    .tier_choose = [](const BatchView&, const cuda::TierQuery&, StreamHandle) { return 0; },
    .tier_fetch = [](const BatchView&, const cuda::TierQuery&, StreamHandle) { return 0; },
    .attend_shape = [](uint32_t, uint32_t, uint32_t, bool) { return cuda::AttendShape{}; },
    .attend_part_floats = [](const cuda::AttendShape&, uint32_t, uint32_t,
                             uint32_t) { return uint64_t{64}; },
    .emit_scratch_bytes = [](uint64_t, uint32_t) { return uint64_t{64}; },
    .open_pages = [](const ModelGeometry&, const PolicyParams&) { return 0u; },
    .prefill_pages = [](const ModelGeometry&, const PolicyParams&, uint32_t,
                        uint32_t) { return 0u; },
    .prefill_end_pages = [](const ModelGeometry&, const PolicyParams&, uint32_t,
                            const cuda::Prompt&) { return 0u; },
    .class_pages = [](const ModelGeometry&, uint32_t) { return 0u; },
    .classes_max = [](const ModelGeometry&) { return 200'000u; },
    // Every step flushes: the bound of a lane grows by two pages a step.
    .step_pages = [](const ModelGeometry&, const PolicyParams&,
                     const cuda::StepSequence&) { return 1u; },
    .recode_pages = [](const ModelGeometry&, const PolicyParams&, uint32_t, Format) { return 0u; },
    .rank_memory_tokens = [](const ModelGeometry&, const PolicyParams&, uint32_t,
                             uint64_t) { return world.rank_tokens; },
    .rank_memory_shape =
        [](uint64_t tokens, uint32_t) {
          return cuda::RankMemoryShape{static_cast<uint32_t>(tokens), 1, 26 * tokens};
        },
    .supported = [](const ModelGeometry&, const PolicyParams&) { return Status(); },
    .lane_pages_limit = [](const ModelGeometry&, const PolicyParams&) { return world.table_pages; },
};

cuda::DriverResult wait_for_the_gpu(cuda::StreamHandle) {
  if (world.progress == nullptr) return cuda::kSuccess;
  ++world.waits;
  world.progress->steps = world.steps;
  world.progress->lane_pages_max = world.lane_pages;
  return cuda::kSuccess;
}

}  // namespace

// Instead of the library's: this program is linked with it first.
const KernelTable* kernel_table() {
  return &kIdleKernels;
}

namespace {

class ReserveBehind : public test::CudaFixture {
 protected:
  void SetUp() override {
    CudaFixture::SetUp();
    if (driver_ == nullptr) return;
    world = {};
    // The driver is a table of functions of this process.
    synchronize_ = &const_cast<cuda::Driver*>(driver_)->stream_synchronize;
    *synchronize_ = wait_for_the_gpu;
    Result<std::unique_ptr<Session>> session =
        Session::open({.socket_path = daemon_.path(), .client_name = "reserve"});
    ASSERT_TRUE(session) << session.error().what;
    session_ = std::move(*session);
    Result<std::unique_ptr<GpuEngine>> engine =
        GpuEngine::open(*session_, testing::geometry_of(1, 1, 64));
    ASSERT_TRUE(engine) << engine.error().what;
    engine_ = std::move(*engine);
  }
  void TearDown() override {
    batch_.reset();
    world.progress = nullptr;  // it was the batch's
    sequence_.reset();
    engine_.reset();
    session_.reset();
    if (synchronize_ != nullptr) *synchronize_ = real_;
    CudaFixture::TearDown();
  }

  void open(uint32_t tokens_max, bool centred = false, bool blocks = false) {
    Result<std::unique_ptr<GpuBatch>> batch =
        GpuBatch::open(*engine_, {.capacity = 1, .tokens_max = tokens_max});
    ASSERT_TRUE(batch) << batch.error().what;
    batch_ = std::move(*batch);
    sequence_ = sequence_of(centred, blocks);
    ASSERT_TRUE(batch_->set(0, sequence_.get()));
  }
  std::unique_ptr<GpuSequence> sequence_of(bool centred, bool blocks = false) {
    PolicyParams policy = testing::plain_policy(Format::kK4V4);
    policy.centre = centred ? 1 : 0;
    if (blocks) {
      policy.evict = EvictRule::kRank;
      policy.rule_count = 1;
      policy.rules[0].action = RankAction::kRecode;
      policy.rules[0].recode_format = Format::kKivi2;
    }
    Result<std::unique_ptr<GpuSequence>> sequence = GpuSequence::open(*engine_, policy, {});
    EXPECT_TRUE(sequence) << sequence.error().what;
    return sequence ? std::move(*sequence) : nullptr;
  }

  std::unique_ptr<GpuSequence> coded_sequence() {
    PolicyParams policy = testing::plain_policy(Format::kF16);
    policy.rotate = 1;  // as the other sequences of the batch
    policy.entropy.key_step = policy.entropy.value_step = 0.1f;
    Result<std::unique_ptr<GpuSequence>> sequence = GpuSequence::open(*engine_, policy, {});
    EXPECT_TRUE(sequence) << sequence.error().what;
    return sequence ? std::move(*sequence) : nullptr;
  }

  // Steps until a reserve fails, at most `steps`.
  Status run(uint32_t steps) {
    for (uint32_t i = 0; i < steps; ++i) {
      THINKV_TRY(batch_->reserve(1));
      THINKV_TRY(batch_->begin());
      THINKV_TRY(batch_->end());
    }
    return {};
  }

  test::FakeDaemon daemon_{
      test::FakeFaults{.backend = "cuda", .device = test::fake_cuda::uuid_of(0), .pages = 900}};
  std::unique_ptr<Session> session_;
  std::unique_ptr<GpuEngine> engine_;
  std::unique_ptr<GpuSequence> sequence_;
  std::unique_ptr<GpuBatch> batch_;

 private:
  cuda::DriverResult (**synchronize_)(cuda::StreamHandle) = nullptr;
  cuda::DriverResult (*real_)(cuda::StreamHandle) = driver_or_null();
  static cuda::DriverResult (*driver_or_null())(cuda::StreamHandle) {
    const Result<const cuda::Driver*> loaded = cuda::Driver::load();
    return loaded ? (*loaded)->stream_synchronize : nullptr;
  }
};

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

TEST_F(ReserveBehind, CodedBlocksAreReadBeforeAttention) {
  open(0);
  ASSERT_TRUE(batch_->attend(0, {}));
  EXPECT_EQ(world.stream_reads, 0u);
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = coded_sequence();
  ASSERT_TRUE(batch_->set(0, sequence_.get()));
  ASSERT_TRUE(batch_->attend(0, {}));
  EXPECT_EQ(world.stream_reads, 1u);
  EXPECT_NE(world.stream_pages, nullptr);
}

TEST_F(ReserveBehind, CodedBlocksAreRefusedByStepsThatWereLaunchedWithoutThem) {
  open(0);
  ASSERT_TRUE(run(1));
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = coded_sequence();
  const Status refused = batch_->set(0, sequence_.get());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ReserveBehind, CodedTokensHaveTheirPlaceInTheList) {
  world.lane_pages = 3;
  open(300);  // 17 pages a lane: enough for three and two of the buffer
  ASSERT_TRUE(batch_->set(0, nullptr));
  sequence_ = coded_sequence();
  ASSERT_TRUE(sequence_->prefill(0, this, this, Element::kF32, 192));
  ASSERT_TRUE(sequence_->prefill_end());
  ASSERT_TRUE(batch_->set(0, sequence_.get()));
  // 128 tokens are coded: 16 pages, and there are as many in the lane's table.
  const Status refused = batch_->reserve(1);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(std::string(refused.error().what).find("tokens_max"), std::string::npos);
}

TEST_F(ReserveBehind, CodedBlocksGoWholeOrNotAtAll) {
  open(0);
  sequence_ = coded_sequence();
  ASSERT_TRUE(sequence_->prefill(0, this, this, Element::kF32, 256));
  ASSERT_TRUE(sequence_->prefill_end());
  world.tokens = 256;
  const auto refusal = [&](std::vector<uint32_t> positions) {
    const Result<uint64_t> evicted = sequence_->evict(positions);
    return evicted ? std::string() : std::string(evicted.error().what);
  };
  std::vector<uint32_t> second(64);
  std::iota(second.begin(), second.end(), 64u);
  EXPECT_NE(refusal({3}).find("name all 64"), std::string::npos);
  EXPECT_NE(refusal({200}).find("whole coded blocks"), std::string::npos);
  EXPECT_EQ(refusal(second), "");
  EXPECT_EQ(world.evicted, second);
  world.evicted.clear();
  EXPECT_EQ(refusal({70, 80}), "") << "they are gone already";
  EXPECT_TRUE(world.evicted.empty());
  EXPECT_EQ(sequence_->trim(64).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(sequence_->quantize(0, 10, Format::kK4V4).error().code, ErrorCode::kUnsupported);
}

TEST_F(ReserveBehind, LanesBeyondABlockGetTheirMemoryBeforeTheyAreRanked) {
  open(0);
  world.rank_tokens = 10000;
  EXPECT_TRUE(batch_->reserve(1));
  const uint32_t waits = world.waits;
  EXPECT_TRUE(batch_->reserve(1)) << "it is there";
  EXPECT_EQ(world.waits, waits);
  world.rank_tokens = uint64_t{1} << 50;
  const Status refused = batch_->reserve(1);
  ASSERT_FALSE(refused);
  EXPECT_NE(std::string(refused.error().what).find(std::to_string(26 * world.rank_tokens)),
            std::string::npos)
      << "says how much was asked for: " << refused.error().what;
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
