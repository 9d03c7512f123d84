// The policy at work on real pages: labels, formats by thought, transitions, budget, selection.
#include <algorithm>

#include "tests/support/sequence_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::check_invariants;
using testing::geometry_of;
using testing::read_lane;
using testing::step;
using testing::tbe_policy;
using testing::TokenSource;

// What the next attention reports as its share of near-zero entries, in percent.
uint32_t planted_percent = 0;

// The reference kernels with a planted sparsity: labels become a script.
const KernelSet& planted() {
  static const KernelSet set = [] {
    KernelSet s = reference();
    s.attend = [](const AttendParams& params) {
      reference().attend(params);
      if (params.sparsity != nullptr) *params.sparsity = {100, planted_percent};
    };
    return s;
  }();
  return set;
}

struct World {
  World(const ModelGeometry& g, const PolicyParams& p, const SequenceOptions& o = {},
        const KernelSet& kernels = planted())
      : pool({.head_dim = g.head_dim, .capacity = 4096}),
        source(pool),
        tokens(g, 5),
        sequence(std::move(Sequence::create(source, kernels, g, p, o)).value()) {}
  void run(uint32_t steps) {
    std::vector<float> out;
    for (uint32_t i = 0; i < steps; ++i) {
      ASSERT_TRUE(step(sequence, tokens, &out).has_value());
    }
  }
  std::vector<uint32_t> positions(uint32_t lane) const {
    std::vector<uint32_t> found;
    for (const auto& [position, token] : read_lane(sequence, lane)) found.push_back(position);
    return found;
  }
  uint32_t count(uint32_t lane, uint32_t first, uint32_t end) const {
    const auto all = positions(lane);
    return static_cast<uint32_t>(std::lower_bound(all.begin(), all.end(), end) -
                                 std::lower_bound(all.begin(), all.end(), first));
  }
  testing::VectorPool pool;
  testing::VectorPageSource source;
  TokenSource tokens;
  Sequence sequence;
};

const testing::GeometryShape kSmall{.layers = 2, .kv_heads = 2, .group = 2, .head_dim = 64};

// Segments of 32 tokens: 16, 8, 4.
PolicyParams labelled_policy() {
  PolicyParams p = tbe_policy(0);
  p.segment_tokens = 32;
  p.schedule_length = 3;
  p.schedule[0] = 16;
  p.schedule[1] = 8;
  p.schedule[2] = 4;
  p.label_layer_count = 1;
  p.label_layers[0] = 1;
  p.thresholds[0] = 0.25f;
  p.thresholds[1] = 0.75f;
  p.thought_format[0] = Format::kK8V8;
  p.thought_format[1] = Format::kK4V4;
  p.thought_format[2] = Format::kK4V2;
  return p;
}

TEST(SequencePolicy, ALabelIsThatOfTheNextSegmentAndDecidesItsFormat) {
  World world(geometry_of(kSmall), labelled_policy());
  planted_percent = 10;  // found at the end of segment 0: segment 1 is execution
  world.run(32);
  planted_percent = 50;
  world.run(32);
  planted_percent = 10;
  world.run(32);
  const auto lane = read_lane(world.sequence, 3);
  EXPECT_EQ(lane.at(5).format, Format::kK8V8) << "the first segment is reasoning";
  EXPECT_EQ(lane.at(40).format, Format::kK4V4);
  EXPECT_EQ(lane.at(70).format, Format::kK8V8);
  const SequenceStats stats = world.sequence.stats();
  EXPECT_EQ(stats.segments[0], 2u);
  EXPECT_EQ(stats.segments[1], 1u);
  EXPECT_EQ(stats.segments[2], 0u) << "the fourth has no token yet";
  EXPECT_EQ(stats.demotions, 0u);
}

TEST(SequencePolicy, EachTransitionTakesEverythingEarlierOneLevelDown) {
  World world(geometry_of(kSmall), labelled_policy());
  planted_percent = 90;
  world.run(32);  // closes segment 0 and demotes it
  for (uint32_t lane = 0; lane < 4; ++lane) EXPECT_EQ(world.count(lane, 0, 32), 16u);
  world.run(32);  // a second transition in a row counts too
  for (uint32_t lane = 0; lane < 4; ++lane) {
    EXPECT_EQ(world.count(lane, 0, 32), 8u);
    EXPECT_EQ(world.count(lane, 32, 64), 16u);
  }
  EXPECT_EQ(read_lane(world.sequence, 0).rbegin()->second.format, Format::kK4V2);
  planted_percent = 50;
  world.run(32);
  EXPECT_EQ(world.count(0, 0, 32), 8u);
  planted_percent = 90;
  world.run(64);
  EXPECT_EQ(world.count(0, 0, 32), 4u) << "never below the last step";
  EXPECT_EQ(world.count(0, 32, 64), 4u);
  EXPECT_EQ(world.count(0, 64, 96), 8u);
  EXPECT_EQ(world.count(0, 96, 128), 8u);
  EXPECT_EQ(world.count(0, 128, 160), 16u);
  check_invariants(world.sequence);
}

TEST(SequencePolicy, OneClassWhereThePolicyHasNoLabelLayers) {
  PolicyParams policy = labelled_policy();
  policy.label_layer_count = 0;
  World world(geometry_of(kSmall), policy);
  planted_percent = 90;
  world.run(96);
  EXPECT_EQ(world.sequence.stats().segments[0], 3u);
  EXPECT_EQ(world.sequence.stats().demotions, 0u);
  EXPECT_EQ(world.count(0, 0, 96), 96u);
}

TEST(SequencePolicy, StepsWithoutAttentionAreReasoning) {
  World world(geometry_of(kSmall), labelled_policy());
  planted_percent = 90;
  for (uint32_t i = 0; i < 64; ++i) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  EXPECT_EQ(world.sequence.stats().segments[0], 2u);
  EXPECT_EQ(world.sequence.stats().demotions, 0u);
}

TEST(SequencePolicy, SparsityIsMeasuredInLabelLayersAtTheRefreshOnly) {
  World world(geometry_of(kSmall), labelled_policy());
  planted_percent = 40;
  std::vector<float> sparsity(2);
  world.run(31);
  world.sequence.sparsity(sparsity);
  EXPECT_NE(sparsity[0], sparsity[0]);
  EXPECT_NE(sparsity[1], sparsity[1]);
  world.run(1);
  world.sequence.sparsity(sparsity);
  EXPECT_NE(sparsity[0], sparsity[0]);
  EXPECT_FLOAT_EQ(sparsity[1], 0.4f);
}

TEST(SequencePolicy, ATraceMeasuresEveryLayerAtEveryStep) {
  World world(geometry_of(kSmall), labelled_policy(), {.trace_sparsity = true});
  planted_percent = 70;
  std::vector<float> sparsity(2);
  for (uint32_t i = 0; i < 40; ++i) {
    world.run(1);
    world.sequence.sparsity(sparsity);
    EXPECT_FLOAT_EQ(sparsity[0], 0.7f);
    EXPECT_FLOAT_EQ(sparsity[1], 0.7f);
  }
}

TEST(SequencePolicy, ThePromptIsOutsideTheBudgetAndNeverEvicted) {
  World world(geometry_of(kSmall), tbe_policy(160));
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 200).has_value());
  for (uint32_t i = 0; i < 600; ++i) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  EXPECT_EQ(world.count(0, 0, 200), 200u);
  EXPECT_LE(world.count(0, 200, 800), 160u);
  EXPECT_EQ(world.sequence.stats().live_tokens_max, 200u + world.count(0, 200, 800));
}

TEST(SequencePolicy, SurvivorsAreNestedUnchangedAndTheBudgetHolds) {
  for (const SelectRule rule : {SelectRule::kMedoids, SelectRule::kWeightedMedoids,
                                SelectRule::kAttention, SelectRule::kRecent}) {
    for (const SelectGrain grain : {SelectGrain::kKvHead, SelectGrain::kLayer}) {
      SCOPED_TRACE(static_cast<int>(rule) * 10 + static_cast<int>(grain));
      PolicyParams policy = tbe_policy(200);
      policy.select = rule;
      policy.grain = grain;
      World world(geometry_of({.layers = 1, .kv_heads = 2, .group = 2}), policy);
      auto before = read_lane(world.sequence, 1);
      for (uint32_t round = 0; round < 80; ++round) {
        world.run(8);
        auto after = read_lane(world.sequence, 1);
        for (const auto& [position, token] : after) {
          if (position < round * 8) {
            ASSERT_EQ(before.count(position), 1u) << "an evicted token came back: " << position;
          }
          const auto old = before.find(position);
          if (old == before.end() || old->second.buffered) continue;
          ASSERT_EQ(token, old->second) << "a survivor changed: " << position;
        }
        EXPECT_LE(after.size(), 200u);
        EXPECT_TRUE(grain != SelectGrain::kLayer || world.positions(0) == world.positions(1));
        check_invariants(world.sequence);
        before = std::move(after);
      }
      EXPECT_EQ(world.sequence.stats().over_budget_steps, 0u);
      EXPECT_GT(world.sequence.stats().demotions, 0u);
    }
  }
}

TEST(SequencePolicy, RecentKeepsTheNewestOfTheSegment) {
  PolicyParams policy = tbe_policy(129);
  policy.select = SelectRule::kRecent;
  World world(geometry_of({}), policy);
  for (uint32_t i = 0; i < 130; ++i) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  const auto live = world.positions(0);
  ASSERT_EQ(live.size(), 66u);
  EXPECT_EQ(live.front(), 64u);
}

// Keys in well separated clusters: k-means keeps one of each.
TEST(SequencePolicy, MedoidsKeepOneTokenOfEachCluster) {
  PolicyParams policy = tbe_policy(129);
  policy.schedule_length = 1;
  policy.schedule[0] = 8;
  policy.thought_format[0] = Format::kK8V8;
  const ModelGeometry geometry = geometry_of({});
  World world(geometry, policy);
  for (uint32_t t = 0; t < 130; ++t) {
    std::vector<float> k(64, 0.0f), v(64, 0.1f);
    k[(t / 16) % 8 * 8] = 50.0f;  // 8 clusters of 16 tokens
    k[63] = 0.01f * static_cast<float>(t % 16);
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    ASSERT_TRUE(world.sequence.append(0, k.data(), v.data()).has_value());
    ASSERT_TRUE(world.sequence.end_step().has_value());
  }
  EXPECT_EQ(world.count(0, 0, 128), 8u);
  for (uint32_t cluster = 0; cluster < 8; ++cluster) {
    EXPECT_EQ(world.count(0, cluster * 16, cluster * 16 + 16), 1u) << cluster;
  }
}

// A few tokens draw all attention: selection by attention keeps exactly them.
TEST(SequencePolicy, AttentionKeepsWhatIsAttended) {
  PolicyParams policy = tbe_policy(129);
  policy.select = SelectRule::kAttention;
  policy.schedule_length = 1;
  policy.schedule[0] = 4;
  policy.thought_format[0] = Format::kK8V8;
  World world(geometry_of({}), policy, {}, reference());
  const std::vector<uint32_t> heavy = {7, 40, 41, 100};
  std::vector<float> q(64, 0.0f), out(64);
  q[3] = 8.0f;
  for (uint32_t t = 0; t < 130; ++t) {
    std::vector<float> k(64, 0.0f);
    k[3] = std::count(heavy.begin(), heavy.end(), t) != 0 ? 8.0f : -8.0f;
    k[5] = 1.0f;
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    ASSERT_TRUE(world.sequence.append(0, k.data(), k.data()).has_value());
    ASSERT_TRUE(world.sequence.attend(0, q.data(), out.data(), nullptr).has_value());
    ASSERT_TRUE(world.sequence.end_step().has_value());
  }
  const auto live = world.positions(0);
  EXPECT_EQ(std::vector<uint32_t>(live.begin(), live.begin() + 4), heavy);
}

TEST(SequencePolicy, OnlyScoringPoliciesPayForScores) {
  const auto metadata = [](SelectRule rule, EvictRule evict) {
    PolicyParams policy = tbe_policy(0);
    policy.select = rule;
    policy.evict = evict;
    World world(geometry_of({}), policy);
    for (uint32_t i = 0; i < 2000; ++i) {
      if (!step(world.sequence, world.tokens)) ADD_FAILURE();
    }
    return world.sequence.stats().metadata_pages;
  };
  const uint64_t plain = metadata(SelectRule::kMedoids, EvictRule::kTbe);
  EXPECT_GT(metadata(SelectRule::kAttention, EvictRule::kTbe), plain);
  EXPECT_EQ(metadata(SelectRule::kAttention, EvictRule::kNone), plain);
}

// Held bytes stay flat while tokens grow: slots of evicted tokens take the new ones.
TEST(SequencePolicy, Budget256HoldsAboutTheSameBytesForEver) {
  PolicyParams policy = tbe_policy(256);
  policy.select = SelectRule::kWeightedMedoids;
  policy.floor_rule = FloorRule::kMerge;
  World world(geometry_of({.layers = 1, .kv_heads = 2, .group = 2}), policy, {}, host());
  uint64_t most_early = 0, most_late = 0;
  for (uint32_t t = 0; t < 4096; ++t) {
    world.run(1);
    uint64_t& most = t < 1024 ? most_early : most_late;
    most = std::max(most, world.sequence.stats().bytes_held);
  }
  EXPECT_LE(most_late, most_early * 11 / 10);
  const SequenceStats stats = world.sequence.stats();
  EXPECT_GT(stats.reused_slots, 0u);
  EXPECT_GT(stats.reused_slots * 2, stats.evicted_slots) << "most evicted slots are used again";
  EXPECT_EQ(stats.gathered_bytes, 0u);
  EXPECT_EQ(stats.over_budget_steps, 0u);
  EXPECT_LT(stats.bytes_held * 10, stats.bytes_f16);
  EXPECT_EQ(stats.pages + stats.metadata_pages, world.pool.held());
}

TEST(SequencePolicy, NoBudgetKeepsEverythingAndAnswersAsANoEvictPolicy) {
  PolicyParams evicting = tbe_policy(64);
  PolicyParams keeping = evicting;
  keeping.evict = EvictRule::kNone;
  const ModelGeometry geometry = geometry_of(kSmall);
  World a(geometry, evicting, {.budget_tokens = kBudgetNone}, host());
  World b(geometry, keeping, {}, host());
  EXPECT_EQ(a.sequence.stats().budget_tokens, 0u);
  EXPECT_EQ(b.sequence.stats().budget_tokens, 0u) << "a budget needs an evicting policy";
  std::vector<float> out_a, out_b;
  for (uint32_t t = 0; t < 300; ++t) {
    ASSERT_TRUE(step(a.sequence, a.tokens, &out_a).has_value());
    ASSERT_TRUE(step(b.sequence, b.tokens, &out_b).has_value());
    ASSERT_EQ(out_a, out_b);
  }
  EXPECT_EQ(a.sequence.stats().live_slots, 1200u);
  EXPECT_EQ(a.sequence.stats().evicted_slots, 0u);
}

TEST(SequencePolicy, ALowerBudgetActsAtTheNextStep) {
  World world(geometry_of({}), tbe_policy(4096));
  EXPECT_EQ(world.sequence.stats().budget_tokens, 4096u);
  for (uint32_t i = 0; i < 512; ++i) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  EXPECT_EQ(world.positions(0).size(), 512u);
  ASSERT_TRUE(world.sequence.set_budget(100).has_value());
  ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  EXPECT_LE(world.positions(0).size(), 100u);
  ASSERT_TRUE(world.sequence.set_budget(kBudgetNone).has_value());
  EXPECT_EQ(world.sequence.stats().budget_tokens, 0u);
  ASSERT_TRUE(world.sequence.set_budget(kBudgetOfPolicy).has_value());
  EXPECT_EQ(world.sequence.stats().budget_tokens, 4096u);
}

}  // namespace
}  // namespace thinkv::kernels
