// Host tiers on the device, run by the emulator, against the host's: the same rows fetched in every
// step, the same bits in working pages, attention over them (tests/support/device_twin_tier.cpp).
#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/policy/tier_select.h"
#include "tests/support/seed.h"
#include "tests/support/tier_twin.h"

namespace thinkv::cuda {
namespace {

using testing::DeviceReader;
using testing::DeviceTier;
using testing::DeviceVector;
using testing::geometry_of;
using testing::plain_policy;
using testing::TierTally;
using testing::TwinBatch;

PolicyParams tailorkv() {
  return testing::must_ship("tailorkv", 0);
}

// Layer 0 is dense in the shipped policy, layer 1 sparse.
TEST(CudaMethodTailorKv, FetchesTheHostsRowsBitByBit) {
  for (const uint32_t dim : kHeadDims) {
    for (const ValueType type : {ValueType::kFp16, ValueType::kBf16}) {
      SCOPED_TRACE(std::to_string(dim) + (type == ValueType::kBf16 ? " bf16" : " fp16"));
      TierTally tally;
      const ModelGeometry geometry{
          .layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = dim, .value_type = type};
      EXPECT_EQ(testing::run_tier_policy(tailorkv(), geometry, Element::kF16, 300, 6, dim, tally),
                "");
      EXPECT_GE(tally.rows, 9u * 2 * 128);
      EXPECT_GT(tally.hints, 0u);
    }
  }
}

// A prompt of more than a whole tile of keys by channel, and its rest.
TEST(CudaTier, ALongPromptHasTilesOfKeys) {
  PolicyParams policy = tailorkv();
  policy.tier.dense_layers[0] = 0;
  for (const uint32_t middle : {kTierTile, 2 * kTierTile + 77}) {
    TierTally tally;
    const ModelGeometry geometry{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 64};
    EXPECT_EQ(testing::run_tier_policy(policy, geometry, Element::kF32, middle + 64, 2, 3, tally),
              "")
        << middle;
    EXPECT_GE(tally.rows, 5u * 128);
  }
}

TEST(CudaTier, RandomTiersAreTheHosts) {
  const uint64_t seed = testing::seed_from_environment(20261129);
  TierTally tally;
  constexpr uint64_t kDraws = testing::random_rounds(20);
  for (uint64_t i = 0; i < kDraws; ++i) {
    ASSERT_EQ(testing::run_drawn_tier(seed + i, tally), "") << "seed " << seed + i;
  }
  EXPECT_GT(tally.rows, 100u * kDraws);
  EXPECT_GT(tally.hints, kDraws);
}

// ---- the choice alone ----

// One lane whose keys are as given, and the rows that a query of ones chooses.
class Lane {
 public:
  Lane(const std::vector<float>& keys_of_channel_0, uint32_t fetch)
      : pool_({.geometry = geometry_of(1, 1, 64),
               .tier_rows = static_cast<uint32_t>(keys_of_channel_0.size()),
               .tier_fetch = fetch}) {
    policy_.rotate = 0;
    policy_.tier = {.host_bytes = 1, .start = 0, .recent = 0, .channels = 1};
    policy_.tier.fetch = static_cast<uint16_t>(fetch);
    const auto tokens = static_cast<uint32_t>(keys_of_channel_0.size());
    tier_ = std::make_unique<DeviceTier>(pool_.options().geometry, policy_, tokens);
    std::vector<float> rows(size_t{tokens} * 64, 0.0f);
    for (uint32_t i = 0; i < tokens; ++i) rows[size_t{i} * 64] = keys_of_channel_0[i];
    THINKV_CHECK(tier_->put(0, rows.data(), rows.data(), Element::kF32) == cudaSuccess);
    pool_.tier(0) = &tier_->sequence();
  }
  [[nodiscard]] testing::DevicePool& pool() { return pool_; }
  [[nodiscard]] TierSequence& sequence() { return tier_->sequence(); }
  [[nodiscard]] TierQuery query(const std::vector<float>& q) const {
    return {.q = q.data(), .element = Element::kF32, .layer = 0, .first_lane = 0, .lanes = 1};
  }
  std::vector<uint32_t> choose(const std::vector<float>& q = std::vector<float>(64, 1.0f)) {
    pool_.view().tier_memory->picks[0] = 0;
    THINKV_CHECK(launch_tier_fetch(pool_.view(), query(q), nullptr) == cudaSuccess);
    return picks();
  }
  [[nodiscard]] std::vector<uint32_t> picks() {
    const uint32_t* first = pool_.view().tier_memory->picks + 1;
    return {first, first + fetched_rows(sequence(), 0)};
  }

 private:
  testing::DevicePool pool_;
  PolicyParams policy_ = plain_policy(Format::kF16);
  std::unique_ptr<DeviceTier> tier_;
};

TEST(CudaTierChoice, OfEqualsTheNewerRowAndNanIsTheLowest) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<std::vector<float>> cases = {
      {3, 1, 2, 2, 2, 0},       {0, 0, 0, 0, 0, 0, 0},      {-0.0f, 0.0f, -0.0f, 0.0f, -1},
      {nan, 1, nan, -2, 3},     {-inf, nan, -inf, nan},     {inf, -5, -6, inf, 7, 7, 7},
      {-1, -2, -3, -3, -3, -9}, {1e-8f, 6e-8f, 6e-8f, 0, 0}};
  for (const auto& keys : cases) {
    for (uint32_t fetch = 1; fetch <= keys.size(); ++fetch) {
      std::vector<uint32_t> wanted;
      std::vector<float> halves;
      for (const float x : keys) halves.push_back(fp16_to_float(fp16_from_float(x)));
      policy::choose_rows(halves, fetch, wanted);
      EXPECT_EQ(Lane(keys, fetch).choose(), wanted) << fetch;
    }
  }
}

// Few different numbers over many warps' shares: ties are cut at every place.
TEST(CudaTierChoice, TiesAreCutWhereTheHostCutsThem) {
  std::mt19937_64 random(testing::seed_from_environment(5));
  for (uint32_t turn = 0; turn < 24; ++turn) {
    std::vector<float> keys(40 + random() % 3000);
    const uint32_t kinds = 1 + static_cast<uint32_t>(random() % 4);
    for (float& x : keys) x = static_cast<float>(random() % kinds) - 1.0f;
    const auto fetch = static_cast<uint32_t>(1 + random() % (keys.size() - 1));
    std::vector<uint32_t> wanted;
    policy::choose_rows(keys, fetch, wanted);
    ASSERT_EQ(Lane(keys, fetch).choose(), wanted) << keys.size() << " " << fetch;
  }
}

// ---- what a step finds ----

TEST(CudaTier, AChoiceAheadIsForItsStepAlone) {
  Lane lane({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 3);
  std::vector<float> up(64, 0.0f), down(64, 0.0f);
  up[0] = 1.0f, down[0] = -1.0f;
  const std::vector<uint32_t> highest = {7, 8, 9}, lowest = {0, 1, 2};
  const BatchView view = lane.pool().view();
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  ASSERT_EQ(launch_tier_choose(view, lane.query(down), nullptr), cudaSuccess);
  for (uint32_t attend = 0; attend < 2; ++attend) {
    ASSERT_EQ(launch_tier_fetch(view, lane.query(up), nullptr), cudaSuccess);
    EXPECT_EQ(lane.picks(), lowest) << "the guess is not looked at again";
  }
  ASSERT_EQ(launch_tier_choose(view, lane.query(down), nullptr), cudaSuccess);
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  ASSERT_EQ(launch_tier_fetch(view, lane.query(up), nullptr), cudaSuccess);
  EXPECT_EQ(lane.picks(), highest) << "it was made for the step before";
  EXPECT_EQ(lane.pool().lease().faults, 0u);
}

TEST(CudaTier, IndicesAndCountsAreCheckedWhereTheyAreFollowed) {
  const std::vector<float> q(64, 1.0f);
  for (uint32_t damage = 0; damage < 4; ++damage) {
    Lane lane({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 9);
    const BatchView view = lane.pool().view();
    uint32_t* picks = view.tier_memory->picks;
    if (damage == 0) {  // chosen ahead, by somebody who cannot count
      ASSERT_EQ(launch_tier_choose(view, lane.query(q), nullptr), cudaSuccess);
      picks[4] = 10;
      picks[5] = 0xFFFF'FFFFu;
    }
    if (damage == 1) lane.sequence().fetch = 100, lane.sequence().tokens = 50;
    if (damage == 2) const_cast<TierMemory*>(view.tier_memory)->room = 5;
    if (damage == 3) const_cast<WorkingPages*>(view.working)->lane_pages = 1;
    if (damage != 0) picks[0] = 0;
    ASSERT_EQ(launch_tier_fetch(view, lane.query(q), nullptr), cudaSuccess);
    EXPECT_NE(lane.pool().lease().faults & (damage == 0 ? kBadMetadata : kListFull), 0u) << damage;
  }
}

// A sequence whose rows lie in another process: its tokens would be missing without a word.
TEST(CudaTier, RowsThatAreNotHereAreReported) {
  PolicyParams policy = tailorkv();
  TwinBatch batch({.geometry = geometry_of(2, 1, 64), .tier_rows = 200, .tier_fetch = 128});
  batch.open(0, policy);
  batch.prefill(0, 200);
  batch.pool().tier(0) = nullptr;
  ASSERT_EQ(launch_begin(batch.pool().view(), nullptr), cudaSuccess);
  EXPECT_EQ(batch.pool().lease().faults, kBadMetadata);
}

TEST(CudaTier, AShortPromptHasNoMiddle) {
  for (const uint32_t tokens : {1u, 8u, 9u, 63u, 64u, 65u}) {
    PolicyParams policy = tailorkv();
    TwinBatch batch({.geometry = geometry_of(2, 1, 64), .tier_rows = 16, .tier_fetch = 128});
    batch.open(0, policy);
    batch.prefill(0, tokens);
    EXPECT_EQ(testing::compared(batch, "the prompt"), "");
    EXPECT_EQ(testing::compared_steps(batch, 18), "") << tokens;
    EXPECT_EQ(batch.fetched_rows(), tokens > 64 ? 18u * (tokens - 64) : 0u);
  }
}

// Nothing of the prompt stays in the pages of a sparse layer.
TEST(CudaTier, AllOfAPromptMayLieInTheTier) {
  PolicyParams policy = tailorkv();
  policy.tier.start = policy.tier.recent = 0;
  policy.tier.dense_layers[0] = 2;
  TwinBatch batch({.geometry = geometry_of(2, 2, 64), .tier_rows = 100, .tier_fetch = 128});
  batch.open(0, policy);
  batch.prefill(0, 100);
  EXPECT_EQ(testing::compared(batch, "the prompt"), "");
  EXPECT_EQ(DeviceReader(batch.pool(), batch.pool().root(0)).lane(0).pages, 0u);
  EXPECT_EQ(testing::compared_steps(batch, 18), "");
  EXPECT_EQ(batch.fetched_rows(), 18u * 2 * 100);
}

}  // namespace
}  // namespace thinkv::cuda
