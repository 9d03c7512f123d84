// The refresh of the device, in the emulator, against kernels::Sequence: after every step the same
// segments, the same live slots in the same pages, the same counters.
#include <cstdlib>
#include <string>

#include "kernels/cuda/refresh.h"
#include "tests/support/refresh_twins.h"

namespace thinkv::cuda {
namespace {

using testing::halving_policy;
using testing::label_by_layers;
using testing::planted;
using testing::Twins;

// Select, grain, floor, order.
using Rules = std::tuple<SelectRule, SelectGrain, FloorRule, DemoteOrder>;
class CudaRefresh : public ::testing::TestWithParam<Rules> {};

TEST_P(CudaRefresh, SameAsTheHostAfterEveryStep) {
  PolicyParams p = halving_policy(16, 4, 40);
  std::tie(p.select, p.grain, p.floor_rule, p.order) = GetParam();
  label_by_layers(p, {1});
  p.demote_on_transition = 0;  // labels differ, the budget alone demotes
  p.thought_format[0] = Format::kK8V8;
  p.thought_format[1] = Format::kK4V4;
  p.thought_format[2] = Format::kK4V2;
  Twins twins(testing::geometry_of({.layers = 2, .kv_heads = 2, .group = 2}), p, 11);
  for (uint32_t segment = 0; segment < 10; ++segment) {
    planted.percent[1] = segment * 37 % 100;
    ASSERT_NO_FATAL_FAILURE(twins.run(16));
  }
  EXPECT_GE(twins.device().counters.demotions, 10u);
  const bool merges = p.floor_rule == FloorRule::kMerge;
  EXPECT_EQ(twins.device().counters.merges > 0, merges);
  EXPECT_EQ(twins.device().counters.over_budget_steps > 0, !merges);
}

std::string name_of(const ::testing::TestParamInfo<Rules>& info) {
  const auto [select, grain, floor, order] = info.param;
  const char* const selects[] = {"Medoids", "WeightedMedoids", "Attention", "Recent"};
  return std::string(selects[static_cast<uint32_t>(select)]) +
         (grain == SelectGrain::kLayer ? "ByLayer" : "ByHead") +
         (floor == FloorRule::kMerge ? "Merge" : "Soft") +
         (order == DemoteOrder::kOldest ? "Oldest" : "Importance");
}

INSTANTIATE_TEST_SUITE_P(
    Rules, CudaRefresh,
    ::testing::Combine(::testing::Values(SelectRule::kMedoids, SelectRule::kWeightedMedoids,
                                         SelectRule::kAttention, SelectRule::kRecent),
                       ::testing::Values(SelectGrain::kKvHead, SelectGrain::kLayer),
                       ::testing::Values(FloorRule::kSoft, FloorRule::kMerge),
                       ::testing::Values(DemoteOrder::kImportance, DemoteOrder::kOldest)),
    name_of);

TEST(CudaRefreshLabels, TransitionsTakeEverythingEarlierDown) {
  PolicyParams p = halving_policy(32, 4, 0);
  label_by_layers(p, {0, 2});
  p.select = SelectRule::kWeightedMedoids;
  Twins twins(testing::geometry_of({.layers = 3, .kv_heads = 3, .group = 1}), p, 12);
  const uint32_t percents[] = {10, 90, 90, 50, 10, 90, 25, 75, 90};
  for (const uint32_t percent : percents) {
    planted.percent[1] = percent;
    ASSERT_NO_FATAL_FAILURE(twins.run(32));
  }
  EXPECT_GT(twins.device().counters.demotions, 8u);
}

TEST(CudaRefreshLabels, APolicyWithoutLabelLayersHasOneClass) {
  Twins twins(testing::geometry_of({}), halving_policy(16, 4, 0), 13);
  planted.percent[1] = 90;
  ASSERT_NO_FATAL_FAILURE(twins.run(64));
  EXPECT_EQ(twins.device().counters.segments[0], 4u);
}

TEST(CudaRefreshShapes, HeadDim128AndThePapersSchedule) {
  PolicyParams p = testing::tbe_policy(256);
  p.floor_rule = FloorRule::kMerge;
  Twins twins(testing::geometry_of({.layers = 1, .kv_heads = 1, .group = 1, .head_dim = 128}), p,
              14);
  ASSERT_NO_FATAL_FAILURE(twins.run(540));
  EXPECT_GT(twins.device().counters.demotions, 4u);
}

TEST(CudaRefreshShapes, HeadDim256ByLayer) {
  PolicyParams p = halving_policy(16, 4, 64);
  p.grain = SelectGrain::kLayer;
  Twins twins(testing::geometry_of({.layers = 1, .kv_heads = 2, .group = 1, .head_dim = 256}), p,
              15);
  ASSERT_NO_FATAL_FAILURE(twins.run(160));
  EXPECT_GT(twins.device().counters.demotions, 3u);
}

// The keys of a layer, or of long segments, do not fit shared memory: whole heads and parts of
// heads are streamed.
TEST(CudaRefreshShapes, EightHeadsByLayer) {
  for (const SelectRule select : {SelectRule::kMedoids, SelectRule::kWeightedMedoids}) {
    PolicyParams p = halving_policy(64, 16, 80);
    p.grain = SelectGrain::kLayer;
    p.select = select;
    p.thought_format[0] = Format::kNvfp4;
    const ModelGeometry g =
        testing::geometry_of({.layers = 1, .kv_heads = 8, .group = 1, .head_dim = 128});
    ASSERT_FALSE(medoids_fit(medoid_vector_bytes(90), 64, 32, g.kv_heads * g.head_dim));
    Twins twins(g, p, 18);
    ASSERT_NO_FATAL_FAILURE(twins.run(136));
    EXPECT_GT(twins.device().counters.demotions, 1u);
  }
}

TEST(CudaRefreshShapes, LongSegmentsOfWideHeadsByLayer) {
  PolicyParams p = halving_policy(192, 48, 208);
  p.grain = SelectGrain::kLayer;
  const ModelGeometry g =
      testing::geometry_of({.layers = 1, .kv_heads = 2, .group = 1, .head_dim = 256});
  const MedoidStreamSize size{192, 96, 2, p.kmeans_iterations, 0};
  ASSERT_EQ(medoid_stream_width(size, 256, medoid_vector_bytes(90)), 128u);
  Twins twins(g, p, 19);
  ASSERT_NO_FATAL_FAILURE(twins.run(420));
  EXPECT_GT(twins.device().counters.demotions, 1u);
}

TEST(CudaRefreshShapes, ThePapersPolicyIsSupportedForEveryModel) {
  PolicyParams p = testing::tbe_policy(1024);
  p.grain = SelectGrain::kLayer;
  for (const uint32_t head_dim : {64u, 128u, 256u}) {
    for (const uint32_t heads : {1u, 8u, 64u}) {
      const ModelGeometry g =
          testing::geometry_of({.layers = 2, .kv_heads = heads, .group = 1, .head_dim = head_dim});
      EXPECT_TRUE(supported(g, p).has_value()) << heads << " x " << head_dim;
    }
  }
  p.kmeans_iterations = 16;
  p.segment_tokens = 256;
  const ModelGeometry largest =
      testing::geometry_of({.layers = 2, .kv_heads = 64, .group = 1, .head_dim = 256});
  EXPECT_TRUE(supported(largest, p).has_value());
  p.segment_tokens = 512;  // 128 KiB of places alone
  EXPECT_FALSE(supported(largest, p).has_value());
  p.grain = SelectGrain::kKvHead;
  EXPECT_TRUE(supported(largest, p).has_value());
  p.segment_tokens = 816;
  EXPECT_FALSE(supported(largest, p).has_value());
}

TEST(CudaRefreshScores, TiesGoToTheNewer) {
  PolicyParams p = halving_policy(32, 4, 64);
  p.select = SelectRule::kAttention;
  Twins twins(testing::geometry_of({}), p, 16);
  planted.granularity = 2;
  p.score_decay = 1.0f;
  ASSERT_NO_FATAL_FAILURE(twins.run(200));
}

// Rules with and without keys, full and empty rows, more rows than a block decides for.
TEST(CudaRefreshBatch, EveryRowGoesItsOwnWay) {
  Twins::Rows rows(11);
  for (const uint32_t row : {0u, 2u, 3u, 7u, 8u, 10u}) {
    PolicyParams p = halving_policy(16u << row % 2, 4, 48 + 8 * row);
    p.select = static_cast<SelectRule>(row % 4);
    p.grain = row == 10 ? SelectGrain::kLayer : SelectGrain::kKvHead;
    label_by_layers(p, {0});
    rows[row] = p;
  }
  Twins twins(testing::geometry_of({.layers = 1, .kv_heads = 2}), rows, 17);
  for (uint32_t part = 0; part < 10; ++part) {
    for (uint32_t row = 0; row < rows.size(); ++row)
      planted.percent[row] = (part * 29 + row * 17) % 100;
    ASSERT_NO_FATAL_FAILURE(twins.run(16));
  }
  for (const uint32_t row : {0u, 2u, 3u, 7u, 8u, 10u}) {
    EXPECT_GT(twins.device(row).counters.demotions, 3u) << row;
  }
}

PolicyParams random_policy(std::mt19937_64& random) {
  const uint32_t tau = 16u << random() % 3;
  PolicyParams p = halving_policy(tau, 2u << random() % 2, 0);
  p.budget_tokens = random() % 4 == 0 ? 0 : 40 + static_cast<uint32_t>(random() % 100);
  p.select = static_cast<SelectRule>(random() % 4);
  p.grain = static_cast<SelectGrain>(random() % 2);
  p.floor_rule = static_cast<FloorRule>(random() % 2);
  p.order = static_cast<DemoteOrder>(random() % 2);
  p.demote_on_transition = random() % 2;
  p.score_every = static_cast<uint16_t>(1 + random() % 3);
  p.rotate = random() % 2;
  p.kmeans_iterations = 1 + static_cast<uint32_t>(random() % 4);
  label_by_layers(p, {static_cast<uint16_t>(random() % 2), 1});
  const Format formats[] = {Format::kF16,  Format::kK8V8, Format::kK8V4,  Format::kK4V4,
                            Format::kK4V2, Format::kK2V2, Format::kNvfp4, Format::kTernary};
  for (Format& f : p.thought_format) f = formats[random() % 8];
  p.sink_format = Format::kK8V8;
  p.sink_tokens = static_cast<uint32_t>(random() % 2) * 8;
  return p;
}

TEST(CudaRefreshProperty, RandomPoliciesLabelsAndBudgets) {
  const char* given = std::getenv("THINKV_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : 5151;
  SCOPED_TRACE(::testing::Message() << "THINKV_SEED=" << seed);
  std::mt19937_64 random(seed);
  for (uint32_t world = 0; world < 6; ++world) {
    Twins::Rows rows(1 + random() % 4);
    for (auto& row : rows) row = random_policy(random);
    const uint32_t heads = 1 + static_cast<uint32_t>(random() % 3);
    Twins twins(testing::geometry_of({.layers = 2, .kv_heads = heads}), rows, random());
    planted.granularity = random() % 2 == 0 ? 3 : 64;
    for (uint32_t row = 0; row < rows.size(); row += 2) {
      ASSERT_NO_FATAL_FAILURE(twins.prefill(row, 1 + static_cast<uint32_t>(random() % 90)));
    }
    ASSERT_NO_FATAL_FAILURE(twins.expect_same());
    for (uint32_t part = 0; part < 12; ++part) {
      SCOPED_TRACE(::testing::Message() << "world " << world);
      for (uint32_t& percent : planted.percent) percent = static_cast<uint32_t>(random() % 100);
      ASSERT_NO_FATAL_FAILURE(twins.run(1 + static_cast<uint32_t>(random() % 24)));
      const auto row = static_cast<uint32_t>(random() % rows.size());
      const uint32_t budget = 30 + static_cast<uint32_t>(random() % 150);
      ASSERT_TRUE(twins.host(row).set_budget(budget).has_value());
      ASSERT_EQ(launch_budget(twins.batch.view, twins.batch.roots[row], budget, nullptr),
                cudaSuccess);
    }
  }
}

}  // namespace
}  // namespace thinkv::cuda
