// idle_gpu.h: a GPU that is behind: kernels that do nothing, on the fake driver, whose progress
// arrives only when somebody waits for the stream. For tests of client/gpu.
//
// The program has one kernel_table(), which answers kIdleKernels, in place of the library's.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "client/gpu/batch.h"
#include "client/gpu/engine.h"
#include "client/gpu/kernel_table.h"
#include "client/gpu/sequence.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/fake_daemon.h"
#include "tests/support/shapes.h"

namespace thinkv::client {

// The GPU that the kernels below pretend to be.
struct World {
  cuda::Progress* progress = nullptr;
  uint64_t steps = 0;                      // launched
  uint32_t lane_pages = 3;                 // of its longest lane, whatever the host's bound says
  uint32_t table_pages = 100;              // that a lane's table holds
  cuda::RankNeed rank_need;                // of every lane that rank rules see
  std::vector<cuda::RankNeed> rank_needs;  // that memory was made for
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
inline World world;  // NOLINT: kernels are plain functions

using cuda::BatchView;
using cuda::Element;

inline const KernelTable kIdleKernels = {
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
    .rank_need = [](const ModelGeometry&, const PolicyParams&, uint32_t,
                    uint64_t) { return world.rank_need; },
    .rank_memory_shape =
        [](const cuda::RankNeed& need, uint32_t) {
          world.rank_needs.push_back(need);
          return cuda::RankMemoryShape{static_cast<uint32_t>(need.tokens + 1), need.dims, 1,
                                       26 * need.tokens + 1};
        },
    .supported = [](const ModelGeometry&, const PolicyParams&) { return Status(); },
    .lane_pages_limit = [](const ModelGeometry&, const PolicyParams&) { return world.table_pages; },
};

inline cuda::DriverResult wait_for_the_gpu(cuda::StreamHandle) {
  if (world.progress == nullptr) return cuda::kSuccess;
  ++world.waits;
  world.progress->steps = world.steps;
  world.progress->lane_pages_max = world.lane_pages;
  return cuda::kSuccess;
}

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

}  // namespace thinkv::client
