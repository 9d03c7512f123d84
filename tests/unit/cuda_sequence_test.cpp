// The device's sequences, run by the emulator, against the host's: the same tokens on both sides,
// compared after every step (tests/support/device_twin.h).
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/device_twin.h"

namespace thinkv::cuda {
namespace {

using testing::DevicePool;
using testing::DeviceReader;
using testing::geometry_of;
using testing::plain_policy;
using testing::TwinBatch;

constexpr Format kAllFormats[] = {Format::kF16,  Format::kBf16,  Format::kK8V8,
                                  Format::kK8V4, Format::kK4V4,  Format::kK4V2,
                                  Format::kK2V2, Format::kNvfp4, Format::kTernary};

void expect_same(TwinBatch& batch) {
  batch.compare();
  ASSERT_EQ(batch.wrong(), "");
}

void run_steps(TwinBatch& batch, uint32_t steps) {
  for (uint32_t i = 0; i < steps; ++i) {
    batch.step();
    ASSERT_NO_FATAL_FAILURE(expect_same(batch));
  }
}

TEST(CudaSequence, EveryFormatIsCodedAsOnTheHost) {
  for (const uint32_t dim : kHeadDims) {
    for (const ValueType type : {ValueType::kFp16, ValueType::kBf16}) {
      for (const Format format : kAllFormats) {
        SCOPED_TRACE(std::string(format_info(format).name) + " " + std::to_string(dim));
        TwinBatch batch(
            {.geometry = geometry_of(1, 1, dim, type), .extent_pages = 64, .wild = true});
        PolicyParams policy = plain_policy(format);
        policy.rotate = 0;  // machines differ in the NaN that a sum of two NaN is
        batch.open(0, policy);
        batch.prefill(0, 40);
        ASSERT_NO_FATAL_FAILURE(expect_same(batch));
        ASSERT_NO_FATAL_FAILURE(run_steps(batch, 18));
      }
    }
  }
}

TEST(CudaSequence, RotatesAndRoundsAsOnTheHost) {
  for (const uint32_t dim : kHeadDims) {
    for (const Element element : {Element::kF32, Element::kF16, Element::kBf16}) {
      for (const ValueType type : {ValueType::kFp16, ValueType::kBf16}) {
        SCOPED_TRACE(dim);
        TwinBatch batch(
            {.geometry = geometry_of(1, 2, dim, type), .element = element, .extent_pages = 64});
        batch.open(0, plain_policy(Format::kK4V2));
        batch.prefill(0, 20);
        ASSERT_NO_FATAL_FAILURE(run_steps(batch, 18));
      }
    }
  }
}

// The lse that attention would have left, 0 for each head, with what centring takes from it.
std::vector<float> missing_lse(TwinBatch& batch, const std::vector<float>& q) {
  const ModelGeometry& g = batch.geometry();
  testing::DeviceVector<float> device_q(q.size()), lse(g.q_heads);
  std::copy(q.begin(), q.end(), device_q.data());
  std::fill_n(lse.data(), g.q_heads, 0.0f);
  THINKV_CHECK(launch_centred_lse(batch.pool().view(), 1, device_q.data(), Element::kF32,
                                  lse.data(), nullptr) == cudaSuccess);
  return {lse.data(), lse.data() + g.q_heads};
}

TEST(CudaSequence, CentresKeysAsOnTheHost) {
  for (const uint32_t dim : kHeadDims) {
    for (const Element element : {Element::kF32, Element::kF16, Element::kBf16}) {
      for (const bool rotate : {false, true}) {
        SCOPED_TRACE(std::to_string(dim) + (rotate ? " rotated" : ""));
        ModelGeometry geometry = geometry_of(2, 2, dim);
        geometry.q_heads = 6;
        TwinBatch batch({.geometry = geometry, .element = element, .extent_pages = 64});
        PolicyParams policy = plain_policy(Format::kK4V4);
        policy.rotate = rotate ? 1 : 0;
        policy.centre = 1;
        policy.sink_tokens = 4;
        policy.sink_format = Format::kF16;
        batch.open(0, policy);
        batch.prefill(0, 75);
        ASSERT_NO_FATAL_FAILURE(expect_same(batch));
        ASSERT_NO_FATAL_FAILURE(run_steps(batch, 18));
        std::vector<float> q(size_t{6} * dim);
        for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i % 13) - 6.0f;
        const std::vector<float> lse = missing_lse(batch, q);
        const kernels::SequenceState& state = *batch.twin(0)->host->state();
        if (rotate) kernels::host().rotate(q.data(), 6, dim);
        for (uint32_t head = 0; head < 6; ++head) {
          const float wanted =
              state.softmax_scale * state.centres.missing(2 + head / 3, &q[size_t{head} * dim]);
          EXPECT_NEAR(lse[head], wanted, 1e-4f * (1.0f + std::fabs(wanted)));
        }
      }
    }
  }
}

TEST(CudaSequence, AnyPromptLengthAndAnyNumberOfSinks) {
  for (const uint32_t prompt : {0u, 1u, 15u, 16u, 17u, 100u}) {
    for (const uint32_t sinks : {0u, 4u, 20u}) {
      SCOPED_TRACE(std::to_string(prompt) + " tokens, " + std::to_string(sinks) + " sinks");
      TwinBatch batch({.geometry = geometry_of(1, 2, 64), .extent_pages = 128});
      PolicyParams policy = plain_policy(Format::kK4V4);
      policy.sink_format = Format::kF16;
      policy.sink_tokens = sinks;
      policy.prompt_format = Format::kK8V4;
      batch.open(0, policy);
      if (prompt > 0) batch.prefill(0, prompt);
      ASSERT_NO_FATAL_FAILURE(expect_same(batch));
      ASSERT_NO_FATAL_FAILURE(run_steps(batch, 34));
    }
  }
}

TEST(CudaSequence, RowsWithoutASequenceAreLeftAlone) {
  TwinBatch batch({.geometry = geometry_of(2, 3, 64), .element = Element::kF16, .capacity = 5});
  batch.open(1, plain_policy(Format::kK2V2));
  batch.open(3, plain_policy(Format::kK8V8));
  batch.prefill(3, 30);
  ASSERT_NO_FATAL_FAILURE(run_steps(batch, 20));
  batch.close(1);
  batch.open(0, plain_policy(Format::kNvfp4));
  ASSERT_NO_FATAL_FAILURE(run_steps(batch, 20));
}

TEST(CudaSequence, ALongTableGrowsByPagesAndShrinks) {
  // 14 descriptors a table page where there are scores.
  TwinBatch batch({.geometry = geometry_of(1, 1, 64), .plant_scores = true});
  PolicyParams policy = plain_policy(Format::kF16);
  policy.evict = EvictRule::kTbe;
  policy.select = SelectRule::kAttention;
  policy.schedule_length = 1;
  policy.schedule[0] = 64;
  policy.segment_tokens = 1024;
  batch.open(0, policy);
  batch.prefill(0, 130);  // 17 pages
  ASSERT_NO_FATAL_FAILURE(run_steps(batch, 100));
  const DeviceReader reader(batch.pool(), batch.twin(0)->root);
  ASSERT_GE(reader.lane(0).table_pages, 2u);
  std::vector<uint32_t> most;
  for (uint32_t i = 0; i < 200; ++i) most.push_back(i);
  batch.evict(0, most);
  ASSERT_NO_FATAL_FAILURE(expect_same(batch));
  EXPECT_EQ(reader.lane(0).table_pages, 1u);
  ASSERT_NO_FATAL_FAILURE(run_steps(batch, 40));
}

TEST(CudaSequence, TrimmingIsAnEvictionOfAllButTheNewest) {
  for (const Format format : {Format::kF16, Format::kK4V4}) {
    for (const uint32_t keep : {1u, 16u, 17u, 40u, 1000u}) {
      SCOPED_TRACE(std::string(format_info(format).name) + " " + std::to_string(keep));
      TwinBatch batch({.geometry = geometry_of(2, 2, 64)});
      batch.open(0, plain_policy(format));
      batch.prefill(0, 90);
      for (uint32_t round = 0; round < 3; ++round) {
        // With the buffer empty, and with some tokens in it.
        ASSERT_NO_FATAL_FAILURE(run_steps(batch, round * 20));
        batch.trim(0, keep);
        ASSERT_NO_FATAL_FAILURE(expect_same(batch));
      }
      ASSERT_NO_FATAL_FAILURE(run_steps(batch, 40));
    }
  }
}

TEST(CudaSequence, EvictedSlotsAreTakenOldestPageFirst) {
  TwinBatch batch({.geometry = geometry_of(1, 2, 64)});
  batch.open(0, plain_policy(Format::kK4V4));
  batch.prefill(0, 100);
  std::vector<uint32_t> every_third;
  for (uint32_t i = 0; i < 84; i += 3) every_third.push_back(i);
  batch.evict(0, every_third);
  ASSERT_NO_FATAL_FAILURE(expect_same(batch));
  ASSERT_NO_FATAL_FAILURE(run_steps(batch, 65));
  EXPECT_EQ(DeviceReader(batch.pool(), batch.twin(0)->root).header().counters.reused_slots,
            2 * 28u);
}

TEST(CudaSequence, RecodesARangeToEveryFormat) {
  for (const uint32_t dim : kHeadDims) {
    TwinBatch batch({.geometry = geometry_of(1, 2, dim)});
    PolicyParams policy = plain_policy(Format::kK8V8);
    policy.sink_format = Format::kF16;
    policy.sink_tokens = 8;
    batch.open(0, policy);
    batch.prefill(0, 70);
    for (uint32_t i = 0; i < 40; ++i) batch.step();
    uint32_t first = 0;
    for (const Format format : kAllFormats) {
      SCOPED_TRACE(format_info(format).name);
      batch.recode(0, first, first + 50, format);
      ASSERT_NO_FATAL_FAILURE(expect_same(batch));
      first += 6;
    }
    ASSERT_NO_FATAL_FAILURE(run_steps(batch, 20));
  }
}

TEST(CudaSequence, AClosedSequenceLeavesEveryPageInTheLease) {
  TwinBatch batch({.geometry = geometry_of(3, 4, 64), .capacity = 2});
  const uint64_t all = batch.pool().free_pages();
  batch.open(0, plain_policy(Format::kK4V4));
  batch.open(1, plain_policy(Format::kF16));
  batch.prefill(1, 50);
  ASSERT_NO_FATAL_FAILURE(run_steps(batch, 40));
  batch.close(0);
  batch.close(1);
  EXPECT_EQ(batch.pool().free_pages(), all);
  EXPECT_EQ(batch.pool().lease().used_total, 0u);
  ASSERT_NO_FATAL_FAILURE(expect_same(batch));
}

// ---- what attention is asked to measure ----

PolicyParams scored_policy() {
  PolicyParams p = plain_policy(Format::kK4V4);
  p.evict = EvictRule::kTbe;
  p.select = SelectRule::kAttention;
  p.schedule_length = 1;
  p.schedule[0] = 8;
  p.segment_tokens = 16;
  p.score_every = 3;
  p.label_layer_count = 1;
  p.label_layers[0] = 1;
  return p;
}

TEST(CudaSequence, AsksForScoresAndSparsityWhenTheyAreDue) {
  TwinBatch batch({.geometry = geometry_of(3, 1, 64), .capacity = 3, .plant_scores = true});
  batch.open(0, scored_policy());
  batch.open(2, plain_policy(Format::kK4V4), true);
  for (uint32_t step = 0; step < 34; ++step) {
    SCOPED_TRACE(step);
    batch.step();
    for (uint32_t layer = 0; layer < 3; ++layer) {
      const uint8_t scores = step % 3 == 0 ? kEmitScores : uint8_t{0};
      const uint8_t label = layer == 1 && step % 16 == 15 ? kEmitSparsity : uint8_t{0};
      EXPECT_EQ(batch.pool().emit()[3 * layer + 0], scores | label);
      EXPECT_EQ(batch.pool().emit()[3 * layer + 1], 0) << "no sequence";
      EXPECT_EQ(batch.pool().emit()[3 * layer + 2], kEmitSparsity) << "traced";
    }
  }
  ASSERT_NO_FATAL_FAILURE(expect_same(batch));
}

TEST(CudaSequence, SparsityIsThatOfTheLastStepOrUnknown) {
  TwinBatch batch({.geometry = geometry_of(2, 2, 64), .capacity = 2});
  batch.open(0, plain_policy(Format::kK4V4));
  batch.open(1, plain_policy(Format::kK4V4), true);
  DevicePool& pool = batch.pool();
  const BatchView view = pool.view();
  const auto ask = [&](uint32_t row) {
    std::vector<float> out(2, -1.0f);
    EXPECT_EQ(launch_sparsity(view, pool.root(row), out.data(), nullptr), cudaSuccess);
    return out;
  };
  EXPECT_TRUE(std::isnan(ask(1)[0])) << "before the first step";
  batch.step();
  for (uint32_t i = 0; i < 8; ++i) view.sparsity[i] = {.live = 100, .near_zero = 10 * i};
  view.sparsity[7].live = 0;
  EXPECT_EQ(ask(1)[0], (0.2f + 0.3f) / 2.0f);
  EXPECT_TRUE(std::isnan(ask(1)[1])) << "a lane was not measured";
  EXPECT_TRUE(std::isnan(ask(0)[0])) << "not traced";
  // The sequence moves to a row whose last step was another's.
  batch.step();
  batch.step();
  std::swap(pool.root(0), pool.root(1));
  pool.positions()[0] = 0;
  EXPECT_TRUE(std::isnan(ask(0)[0]));
  std::swap(pool.root(0), pool.root(1));
}

TEST(CudaSequence, ANewBudgetIsInForceWhereThePolicyEvicts) {
  TwinBatch batch({.geometry = geometry_of(2, 1, 64), .capacity = 2});
  batch.open(0, scored_policy());
  batch.open(1, plain_policy(Format::kK4V4));
  for (uint32_t row = 0; row < 2; ++row) {
    const uint32_t root = batch.pool().root(row);
    ASSERT_EQ(launch_budget(batch.pool().view(), root, 77, nullptr), cudaSuccess);
    SequenceNumbers numbers;
    ASSERT_EQ(launch_numbers(batch.pool().view(), root, &numbers, nullptr), cudaSuccess);
    EXPECT_EQ(numbers.budget_tokens, row == 0 ? 77u : 0u);
  }
}

}  // namespace
}  // namespace thinkv::cuda
