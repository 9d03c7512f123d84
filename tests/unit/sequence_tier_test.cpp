// A host tier (tailorkv as shipped) on real pages: which rows are fetched, that they are the rows
// that were given, and that nothing else of a step changes.
#include <numeric>

#include "kernels/policy/tier_select.h"
#include "kernels/sequence/tiering.h"
#include "tests/support/stream_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::attend_over;
using testing::check_invariants;
using testing::geometry_of;
using testing::RankWorld;
using testing::read_lane;
using testing::shipped_policy;
using testing::StoredToken;

constexpr uint32_t kDim = 64;
// Layer 0 is dense in the shipped policy, layer 1 sparse.
const testing::GeometryShape kShape{.layers = 2, .kv_heads = 2, .group = 2, .head_dim = kDim};

std::vector<uint32_t> range(uint32_t first, uint32_t end) {
  std::vector<uint32_t> all(end - first);
  std::iota(all.begin(), all.end(), first);
  return all;
}

// Weights of rows of normal logits of deviation `sigma`.
std::vector<float> softmax_rows(double sigma, size_t rows, size_t n) {
  std::mt19937_64 random(11);
  std::normal_distribution<double> normal;
  std::vector<float> weights(rows * n);
  for (size_t r = 0; r < rows; ++r) {
    std::vector<double> e(n);
    double sum = 0.0;
    for (double& x : e) sum += x = std::exp(sigma * normal(random));
    for (size_t i = 0; i < n; ++i) weights[r * n + i] = static_cast<float>(e[i] / sum);
  }
  return weights;
}

TEST(MethodTailorKv, TheErrorOfALayerFallsAsItsAttentionPeaks) {
  constexpr std::pair<double, double> kTable[] = {
      {0, 0.95}, {1, 0.74}, {2, 0.373}, {3, 0.119}, {4, 0.030}};
  for (const auto& [sigma, expected] : kTable) {
    const double error = policy::top_mass_error(softmax_rows(sigma, 64, 2000), 2000);
    EXPECT_NEAR(error, expected, 0.015) << sigma;
    EXPECT_EQ(error > policy::kTopMassErrorMax, sigma <= 2) << sigma;
  }
}

// ---- the choice ----

TEST(TierSelect, ChannelsAreThoseWhereQueryAndKeysAreLarge) {
  const std::vector<float> query = {1.0f, -4.0f, 0.1f, 2.0f, 2.0f};
  const std::vector<float> key_max = {1.0f, 0.5f, 50.0f, 1.0f, 1.0f};
  std::vector<uint32_t> chosen;
  policy::choose_channels(query, key_max, 1, chosen);
  EXPECT_EQ(chosen, std::vector<uint32_t>{2});
  policy::choose_channels(query, key_max, 3, chosen);
  EXPECT_EQ(chosen, (std::vector<uint32_t>{1, 2, 3})) << "of equals the lower";
  policy::choose_channels(query, key_max, 99, chosen);
  EXPECT_EQ(chosen.size(), 5u);
}

TEST(TierSelect, RowsAreTheHighestAndOfEqualsTheNewer) {
  std::vector<uint32_t> chosen;
  policy::choose_rows(std::vector<float>{3, 1, 2, 2, 2, 0}, 3, chosen);
  EXPECT_EQ(chosen, (std::vector<uint32_t>{0, 3, 4}));
  policy::choose_rows(std::vector<float>{3, 1}, 5, chosen);
  EXPECT_EQ(chosen, (std::vector<uint32_t>{0, 1}));
}

// Keys that differ in 8 channels alone: what the partial products rank highest is the exact top.
TEST(MethodTailorKv, RecallIsOneWhereTheEnergyIsInEightChannels) {
  constexpr uint32_t kTokens = 900, kGroup = 3;
  testing::TokenSource source(geometry_of({.kv_heads = 1}), 8);
  auto k = source.rows(kTokens, 1);
  const auto q = source.rows(kGroup, 1);
  for (size_t i = 0; i < k.size(); ++i) k[i] *= i % kDim % 8 == 3 ? 20.0f : 0.0f;
  TierLane lane;
  lane.put(Format::kF16, kDim, 0, k, k);
  TierParams params;
  params.host_bytes = 1;
  TierScratch scratch;
  lane.choose(params, q.data(), kGroup, scratch);
  std::vector<std::pair<double, uint32_t>> exact;
  for (uint32_t i = 0; i < kTokens; ++i) {
    double dot = 0.0;
    for (uint32_t c = 0; c < kDim; ++c) {
      double mean = 0.0;
      for (uint32_t g = 0; g < kGroup; ++g) mean += double{q[g * kDim + c]} / kGroup;
      dot += mean * double{testing::to_16bit(k[i * kDim + c], Format::kF16)};
    }
    exact.emplace_back(-dot, i);
  }
  std::sort(exact.begin(), exact.end());
  std::vector<uint32_t> best;
  for (uint32_t i = 0; i < 128; ++i) best.push_back(exact[i].second);
  std::sort(best.begin(), best.end());
  EXPECT_EQ(scratch.rows, best);
}

// ---- on a sequence ----

// A prompt in every layer, and what was given.
struct World : RankWorld {
  explicit World(uint32_t count, const PolicyParams& policy = shipped_policy("tailorkv"),
                 const KernelSet& kernels = host())
      : RankWorld(geometry_of(kShape), policy, 0, kernels),
        k(tokens.kv(count)),
        v(tokens.kv(count)) {
    prefill(k, v);
  }
  const TierLane& tier(uint32_t lane) const { return sequence.state()->tier[lane]; }
  StoredToken given(uint32_t token, uint32_t head) const {
    StoredToken t{Format::kF16, false, {}, {}};
    for (uint32_t c = 0; c < kDim; ++c) {
      const size_t at = (size_t{token} * 2 + head) * kDim + c;
      t.k.push_back(testing::to_16bit(k[at], Format::kF16));
      t.v.push_back(testing::to_16bit(v[at], Format::kF16));
    }
    return t;
  }
  void open_step() {
    ASSERT_TRUE(sequence.begin_step().has_value());
    const auto new_k = tokens.kv(), new_v = tokens.kv();
    for (uint32_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(sequence.append(layer, new_k.data(), new_v.data()).has_value());
    }
  }
  std::vector<float> attend(uint32_t layer, const std::vector<float>& q) {
    std::vector<float> out(q.size());
    EXPECT_TRUE(sequence.attend(layer, q.data(), out.data(), nullptr).has_value());
    return out;
  }
  std::vector<float> k, v;
};

TEST(MethodTailorKv, TheMiddleOfThePromptIsInTheTierBitByBit) {
  World world(500);
  check_invariants(world.sequence);
  for (uint32_t head = 0; head < 2; ++head) {
    // Dense: everything in 2-bit pages.
    const auto dense = read_lane(world.sequence, head);
    EXPECT_EQ(dense.size(), 500u);
    EXPECT_EQ(dense.begin()->second.format, Format::kK2V2);
    EXPECT_EQ(world.tier(head).tokens(), 0u);
    auto sparse = range(0, 8);
    for (const uint32_t p : range(444, 500)) sparse.push_back(p);
    EXPECT_EQ(world.positions(2 + head), sparse);
    const TierLane& tier = world.tier(2 + head);
    ASSERT_EQ(tier.tokens(), 436u);
    ASSERT_EQ(tier.first(), 8u);
    std::vector<float> k(kDim), v(kDim);
    for (uint32_t row = 0; row < tier.tokens(); ++row) {
      tier.read(row, k.data(), v.data());
      const StoredToken given = world.given(8 + row, head);
      ASSERT_TRUE(k == given.k && v == given.v) << row;
    }
  }
  const SequenceStats stats = world.sequence.stats();
  EXPECT_EQ(stats.tier_bytes, 2u * (436 * kDim * 6 + kDim * 4));
  EXPECT_EQ(stats.live_slots, 2u * 500 + 2u * 64);
  EXPECT_LT(stats.bytes_held, stats.bytes_f16 / 2);
}

// The kernel sees the pages of the lane, then the fetched rows in pages of their own: the same
// bits.
TEST(MethodTailorKv, AttentionIsExactOverTheChosenRows) {
  for (const KernelSet* kernels : {&host(), &reference()}) {
    World world(700, shipped_policy("tailorkv"), *kernels);
    world.run(40);
    world.open_step();
    const auto q = world.tokens.q();
    const auto out = world.attend(1, q);
    for (uint32_t head = 0; head < 2; ++head) {
      const SequenceState& state = *world.sequence.state();
      TierScratch scratch;
      const float* lane_q = q.data() + head * 2 * kDim;
      world.tier(2 + head).choose(state.policy().tier, lane_q, 2, scratch);
      ASSERT_EQ(scratch.rows.size(), 128u);
      std::vector<PageView> views;
      collect_views(state, 2 + head, views);
      std::vector<float> k, v;
      std::vector<uint32_t> positions;
      for (const uint32_t row : scratch.rows) {
        const StoredToken token = world.given(8 + row, head);
        k.insert(k.end(), token.k.begin(), token.k.end());
        v.insert(v.end(), token.v.begin(), token.v.end());
        positions.push_back(8 + row);
      }
      StagingPages staging;
      staging.start(Format::kF16, kDim, 128);
      staging.write(*kernels, k.data(), v.data(), positions.data(), 128, views);
      std::vector<float> expected(2 * kDim), lse(2);
      kernels->attend({.pages = views,
                       .head_dim = kDim,
                       .group = 2,
                       .q = lane_q,
                       .softmax_scale = 0.125f,
                       .out = expected.data(),
                       .lse = lse.data()});
      for (uint32_t i = 0; i < 2 * kDim; ++i) ASSERT_EQ(out[head * 2 * kDim + i], expected[i]);
    }
  }
}

TEST(MethodTailorKv, FetchingEverythingIsTheExactCache) {
  PolicyParams policy = shipped_policy("tailorkv");
  policy.tier.fetch = 4096;
  policy.tier.dense_layers[0] = 0;
  World world(300, policy);
  World exact(300, shipped_policy("full-f16"));
  for (uint32_t i = 0; i < 40; ++i) {
    world.open_step();
    exact.open_step();
    const auto q = world.tokens.q();
    static_cast<void>(exact.tokens.q());
    for (uint32_t layer = 0; layer < 2; ++layer) {
      const auto a = world.attend(layer, q), b = exact.attend(layer, q);
      // The same rows in another order: sums of 340 weights in fp32.
      for (size_t c = 0; c < a.size(); ++c) ASSERT_NEAR(a[c], b[c], 1e-5f);
    }
    ASSERT_TRUE(world.sequence.end_step().has_value());
    ASSERT_TRUE(exact.sequence.end_step().has_value());
  }
  check_invariants(world.sequence);
}

TEST(MethodTailorKv, AnHintChoosesAheadAndForOneStep) {
  World hinted(600), plain(600);
  const auto other = testing::TokenSource(geometry_of(kShape), 99).q();
  EXPECT_EQ(hinted.sequence.prefetch(1, other.data()).error().code, ErrorCode::kInvalidArgument)
      << "no step is open";
  for (uint32_t i = 0; i < 3; ++i) {
    hinted.open_step();
    plain.open_step();
    const auto q = hinted.tokens.q();
    static_cast<void>(plain.tokens.q());
    // The query itself as the hint changes nothing, another one does, and only for its step.
    const auto& hint = i == 1 ? other : q;
    for (uint32_t layer = 0; i < 2 && layer < 2; ++layer) {
      ASSERT_TRUE(hinted.sequence.prefetch(layer, hint.data()).has_value()) << layer;
    }
    EXPECT_EQ(hinted.attend(1, q) == plain.attend(1, q), i != 1) << i;
    EXPECT_EQ(hinted.attend(0, q), plain.attend(0, q)) << i;
    ASSERT_TRUE(hinted.sequence.end_step().has_value());
    ASSERT_TRUE(plain.sequence.end_step().has_value());
  }
  hinted.open_step();
  EXPECT_EQ(hinted.sequence.prefetch(2, other.data()).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(hinted.sequence.prefetch(1, nullptr).error().code, ErrorCode::kInvalidArgument);
  hinted.sequence.cancel_step();
  RankWorld without(geometry_of(kShape), shipped_policy("full-f16"));
  ASSERT_TRUE(without.sequence.begin_step().has_value());
  EXPECT_TRUE(without.sequence.prefetch(1, other.data()).has_value());
}

TEST(Tier, AShortPromptHasNoMiddle) {
  for (const uint32_t tokens : {1u, 8u, 9u, 63u, 64u, 65u}) {
    World world(tokens);
    EXPECT_EQ(world.tier(2).tokens(), tokens > 64 ? tokens - 64 : 0);
    EXPECT_EQ(world.positions(2).size(), std::min(tokens, 64u));
    world.run(20);
    check_invariants(world.sequence);
  }
}

TEST(Tier, RotatedRowsAreChosenByRotatedQueries) {
  PolicyParams policy = shipped_policy("tailorkv");
  policy.rotate = 1;
  policy.tier.fetch = 4096;
  World world(200, policy);
  World exact(200, shipped_policy("full-f16"));
  world.open_step();
  exact.open_step();
  const auto q = world.tokens.q();
  const auto a = world.attend(1, q), b = exact.attend(1, q);
  for (size_t c = 0; c < a.size(); ++c) EXPECT_NEAR(a[c], b[c], 4e-3f);
}

TEST(Tier, ItsBytesAreBounded) {
  PolicyParams policy = shipped_policy("tailorkv");
  const uint64_t needed = 2 * TierLane::bytes_of(kDim, 436);
  policy.tier.host_bytes = needed;
  World fits(500, policy);
  EXPECT_EQ(fits.sequence.stats().tier_bytes, needed);
  policy.tier.host_bytes = needed - 1;
  RankWorld refused(geometry_of(kShape), policy);
  const auto k = refused.tokens.kv(500);
  ASSERT_TRUE(refused.sequence.prefill(0, k.data(), k.data(), 500).has_value()) << "dense";
  const uint64_t held = refused.pool.held();
  const Status done = refused.sequence.prefill(1, k.data(), k.data(), 500);
  ASSERT_FALSE(done.has_value());
  EXPECT_EQ(done.error().code, ErrorCode::kQuotaExceeded);
  EXPECT_NE(std::string(done.error().what).find("tier.host_bytes"), std::string::npos);
  EXPECT_EQ(refused.pool.held(), held);
  EXPECT_EQ(refused.source.promised(), 0u);
  EXPECT_EQ(refused.sequence.stats().tier_bytes, 0u);
}

TEST(Tier, TheBoundIsOfAllLayersTogether) {
  const ModelGeometry g = geometry_of({.layers = 3, .kv_heads = 1});
  PolicyParams policy = shipped_policy("tailorkv");
  policy.tier.host_bytes = 2 * TierLane::bytes_of(kDim, 136) - 1;
  RankWorld world(g, policy);
  const auto k = world.tokens.kv(200);
  ASSERT_TRUE(world.sequence.prefill(2, k.data(), k.data(), 200).has_value());
  EXPECT_EQ(world.sequence.prefill(1, k.data(), k.data(), 200).error().code,
            ErrorCode::kQuotaExceeded);
  ASSERT_TRUE(world.sequence.prefill(0, k.data(), k.data(), 200).has_value());
}

TEST(Tier, WhatItHoldsCannotBeEvictedRecodedOrMoved) {
  World world(300);
  EXPECT_EQ(world.sequence.evict(std::vector<uint32_t>{3, 8}).error().code,
            ErrorCode::kUnsupported);
  EXPECT_EQ(world.sequence.evict(std::vector<uint32_t>{243}).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(world.sequence.stats().evicted_slots, 0u);
  EXPECT_EQ(world.sequence.evict(std::vector<uint32_t>{3, 250}).value(), 8u);
  EXPECT_EQ(world.sequence.quantize(0, 9, Format::kK4V4).error().code, ErrorCode::kUnsupported);
  check_invariants(world.sequence);
  const PageId root = world.sequence.detach();
  EXPECT_EQ(Sequence::attach(world.source, host(), root).error().code, ErrorCode::kUnsupported);
  // One without rows in the tier can move.
  World small(40);
  const PageId other = small.sequence.detach();
  EXPECT_TRUE(Sequence::attach(small.source, host(), other).has_value());
}

// Everything generated stays in 16 bits in sparse layers, and goes to the dense format in others.
TEST(Tier, GeneratedTokensStayInPages) {
  World world(100);
  world.run(100);
  check_invariants(world.sequence);
  EXPECT_EQ(world.tier(2).tokens(), 36u);
  EXPECT_EQ(world.positions(2).size(), 164u);
  EXPECT_EQ(world.positions(0).size(), 200u);
  for (const auto& [position, token] : read_lane(world.sequence, 2)) {
    EXPECT_EQ(token.format, Format::kF16) << position;
  }
  for (const auto& [position, token] : read_lane(world.sequence, 0)) {
    EXPECT_EQ(token.format, token.buffered ? Format::kF16 : Format::kK2V2) << position;
  }
}

}  // namespace
}  // namespace thinkv::kernels
