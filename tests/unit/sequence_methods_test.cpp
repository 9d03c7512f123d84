// The published methods, as shipped in config/policies, at work on real pages: each test has the
// property or number by which its method is known.
#include <bit>

#include "kernels/policy/rank_trigger.h"
#include "tests/support/rank_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::attention_over;
using testing::geometry_of;
using testing::RankWorld;
using testing::read_lane;
using testing::shipped_policy;

constexpr uint32_t kDim = 64;
const testing::GeometryShape kTwoHeads{.layers = 2, .kv_heads = 2, .group = 2, .head_dim = kDim};

std::vector<uint32_t> range(uint32_t first, uint32_t end) {
  std::vector<uint32_t> all;
  for (uint32_t i = first; i < end; ++i) all.push_back(i);
  return all;
}

// The sinks, then the newest.
std::vector<uint32_t> sinks_and_newest(uint32_t sinks, uint32_t newest, uint32_t tokens) {
  std::vector<uint32_t> all = range(0, sinks);
  for (const uint32_t p : range(tokens - newest, tokens)) all.push_back(p);
  return all;
}

TEST(MethodStreamingLlm, HoldsFourSinksAndTheNewestAtEveryStep) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("streaming-llm", 64));
  world.prefill_random(150, 0);
  for (uint32_t generated = 0; generated <= 100; ++generated) {
    for (uint32_t lane = 0; lane < 4; ++lane) {
      ASSERT_EQ(world.positions(lane), sinks_and_newest(4, 60, 150 + generated)) << generated;
    }
    world.run(1);
  }
  EXPECT_EQ(world.sequence.stats().over_budget_steps, 0u);
}

// A step by hand, so that the test sees what attention sees. Adds each token's weight to `sums`.
void measured_step(RankWorld& world, std::map<uint32_t, double>& sums) {
  const ModelGeometry& g = world.geometry;
  const auto k = world.tokens.kv(), v = world.tokens.kv(), q = world.tokens.q();
  std::vector<float> out(q.size());
  ASSERT_TRUE(world.sequence.begin_step().has_value());
  ASSERT_TRUE(world.sequence.append(0, k.data(), v.data()).has_value());
  for (const auto& [p, w] :
       attention_over(read_lane(world.sequence, 1), q.data() + g.group() * kDim, g.group(), kDim)) {
    sums[p] += w;
  }
  ASSERT_TRUE(world.sequence.attend(0, q.data(), out.data(), nullptr).has_value());
  ASSERT_TRUE(world.sequence.end_step().has_value());
}

TEST(MethodH2o, SumsAreThoseOfTheAttentionAmongTheLivingAndTheLowestGoes) {
  RankWorld world(geometry_of({.layers = 1, .kv_heads = 2, .group = 2}), shipped_policy("h2o", 64));
  std::map<uint32_t, double> sums;
  for (uint32_t i = 0; i < 200; ++i) {
    const auto before = world.positions(1);
    measured_step(world, sums);
    const auto after = world.positions(1);
    ASSERT_LE(after.size(), 64u);
    // Exactly one token went once the budget was full: the lowest outside of the newest half.
    std::vector<uint32_t> gone;
    for (const uint32_t p : before) {
      if (!std::binary_search(after.begin(), after.end(), p)) gone.push_back(p);
    }
    ASSERT_EQ(gone.size(), i < 64 ? 0u : 1u);
    for (const uint32_t victim : gone) {
      for (const uint32_t p : before) {
        const bool recent = p + 32 >= i + 1;
        ASSERT_TRUE(recent || sums[victim] <= sums[p] + 1e-5) << victim << " before " << p;
      }
      sums.erase(victim);
    }
  }
  const Lane lane = world.sequence.state()->lane(1);
  uint32_t checked = 0;
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    for (uint64_t left = page.live; left != 0; left &= left - 1, ++checked) {
      const auto slot = static_cast<uint32_t>(std::countr_zero(left));
      const double expected = sums.at(lane.position(page, slot));
      EXPECT_NEAR(lane.sums(page)[slot], expected, 1e-4 * expected + 1e-6);
    }
  });
  EXPECT_GE(checked, 48u);
}

TEST(MethodH2o, APlantedHeavyHitterSurvives) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  RankWorld world(g, shipped_policy("h2o", 48));
  std::vector<float> heavy(kDim, 0.0f), out(kDim);
  heavy[3] = 8.0f;
  for (uint32_t i = 0; i < 300; ++i) {
    const auto k = i == 10 ? heavy : world.tokens.kv();
    const auto v = world.tokens.kv();
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    ASSERT_TRUE(world.sequence.append(0, k.data(), v.data()).has_value());
    ASSERT_TRUE(world.sequence.attend(0, heavy.data(), out.data(), nullptr).has_value());
    ASSERT_TRUE(world.sequence.end_step().has_value());
  }
  EXPECT_TRUE(world.holds(0, 10));
  EXPECT_FALSE(world.holds(0, 100));
}

// ---- SnapKV and its kin: the prompt's end ----

// SnapKV's scores of one kv head, in double: prompt tokens before the window, pooled over 5.
std::vector<double> snapkv_scores(const std::map<uint32_t, testing::StoredToken>& prompt,
                                  const std::vector<float>& q, uint32_t window, uint32_t kv_head,
                                  const ModelGeometry& g) {
  const auto n = static_cast<uint32_t>(prompt.size());
  std::vector<double> sums(n, 0.0), pooled(n - window, 0.0);
  for (uint32_t i = 0; i < window; ++i) {
    std::map<uint32_t, testing::StoredToken> seen(prompt.begin(),
                                                  prompt.upper_bound(n - window + i));
    const float* row = q.data() + (size_t{i} * g.q_heads + kv_head * g.group()) * kDim;
    for (const auto& [p, w] : attention_over(seen, row, g.group(), kDim)) sums[p] += w;
  }
  for (uint32_t i = 0; i < n - window; ++i) {
    for (uint32_t j = i < 2 ? 0 : i - 2; j <= std::min(i + 2, n - window - 1); ++j) {
      pooled[i] += sums[j] / 5;
    }
  }
  return pooled;
}

TEST(MethodSnapKv, IsTheDenseReferenceOfTheLast32Queries) {
  constexpr uint32_t kTokens = 180, kWindow = 32, kBudget = 64;
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 2, .group = 3});
  for (const KernelSet* kernels : {&host(), &reference()}) {
    RankWorld world(g, shipped_policy("snapkv", kBudget), 0, *kernels);
    const auto k = world.tokens.kv(kTokens), v = world.tokens.kv(kTokens);
    const auto q = world.tokens.rows(kWindow, g.q_heads);
    RankWorld full(g, shipped_policy("full"));
    full.prefill(k, v);
    world.prefill(k, v, q);
    for (uint32_t head = 0; head < 2; ++head) {
      const auto score = snapkv_scores(read_lane(full.sequence, head), q, kWindow, head, g);
      std::vector<uint32_t> order = range(0, kTokens - kWindow);
      std::sort(order.begin(), order.end(),
                [&](uint32_t a, uint32_t b) { return score[a] > score[b]; });
      order.resize(kBudget - kWindow);
      for (const uint32_t p : range(kTokens - kWindow, kTokens)) order.push_back(p);
      std::sort(order.begin(), order.end());
      EXPECT_EQ(world.positions(head), order) << kernels->name;
    }
    world.run(40);
    EXPECT_EQ(world.positions(0).size(), kBudget + 40u) << "generated tokens all stay";
  }
}

TEST(MethodSnapKv, APlantedKeyStaysWithItsNeighbours) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  RankWorld world(g, shipped_policy("snapkv", 40));
  auto k = world.tokens.kv(200);
  const auto v = world.tokens.kv(200);
  std::vector<float> q(size_t{32} * kDim, 0.0f);
  for (uint32_t i = 0; i < 32; ++i) q[i * kDim + 5] = 6.0f;
  for (uint32_t t = 0; t < 200; ++t) k[t * kDim + 5] = t == 77 ? 8.0f : 0.0f;
  world.prefill(k, v, q);
  for (const uint32_t p : range(75, 80)) EXPECT_TRUE(world.holds(0, p)) << p;
}

TEST(MethodSnapKv, WithoutQueriesTheFirstStepsAreTheWindow) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("snapkv", 64));
  world.prefill_random(150, 0);
  world.run(31);
  EXPECT_EQ(world.positions(1).size(), 181u);
  world.run(1);
  EXPECT_EQ(world.positions(1).size(), 64u);
  EXPECT_TRUE(world.holds(1, 150)) << "the window is protected";
  world.run(20);
  EXPECT_EQ(world.positions(1).size(), 84u);
}

TEST(MethodPyramidKv, LayersTogetherKeepLayersTimesTheBudget) {
  const ModelGeometry g = geometry_of({.layers = 5, .kv_heads = 2});
  RankWorld world(g, shipped_policy("pyramidkv", 100));
  world.prefill_random(400, 32);
  std::vector<size_t> kept;
  size_t all = 0;
  for (uint32_t layer = 0; layer < 5; ++layer) {
    kept.push_back(world.positions(2 * layer).size());
    EXPECT_EQ(world.positions(2 * layer + 1).size(), kept.back());
    all += kept.back();
  }
  EXPECT_TRUE(std::is_sorted(kept.rbegin(), kept.rend()));
  EXPECT_EQ(all, 5u * 100u);
  EXPECT_EQ(kept.front(), 32u + 133u) << "2 x 68 less 68 / 20";
}

TEST(MethodRKv, OfNearDuplicatesTheLastStaysAndTheBudgetHolds) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  RankWorld world(g, shipped_policy("r-kv", 64));
  const auto copied = world.tokens.kv();
  const std::vector<float> nothing(kDim, 0.0f);  // uniform attention
  std::vector<float> out(kDim);
  for (uint32_t i = 0; i < 128; ++i) {
    const bool duplicate = i % 4 == 1 && i < 110;  // 1, 5, .. 109
    auto k = world.tokens.kv();
    for (uint32_t d = 0; duplicate && d < kDim; ++d) k[d] = copied[d] + 0.05f * k[d];
    const auto v = world.tokens.kv();
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    ASSERT_TRUE(world.sequence.append(0, k.data(), v.data()).has_value());
    ASSERT_TRUE(world.sequence.attend(0, nothing.data(), out.data(), nullptr).has_value());
    ASSERT_EQ(world.positions(0).size(), i + 1) << "nothing goes between two firings";
    ASSERT_TRUE(world.sequence.end_step().has_value());
  }
  const auto kept = world.positions(0);
  EXPECT_EQ(kept.size(), 64u);
  std::vector<uint32_t> duplicates;
  for (const uint32_t p : kept) {
    if (p % 4 == 1 && p < 110) duplicates.push_back(p);
  }
  EXPECT_EQ(duplicates, (std::vector<uint32_t>{109}));
  for (const uint32_t p : range(120, 128)) EXPECT_TRUE(world.holds(0, p)) << "the window";
}

TEST(MethodRandom, KeepsABudgetOfTokensThatNoScoreChose) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("random", 64));
  world.prefill_random(200, 0);
  world.run(200);
  const auto kept = world.positions(0);
  EXPECT_EQ(kept.size(), 64u);
  EXPECT_NE(kept, world.positions(1)) << "each head draws its own";
  for (const uint32_t p : sinks_and_newest(4, 32, 400)) {
    EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), p));
  }
  // 28 of 364: half of them from each half, give or take 4 standard deviations of 2.5.
  const auto early =
      std::count_if(kept.begin(), kept.end(), [](uint32_t p) { return p >= 4 && p < 186; });
  EXPECT_NEAR(static_cast<double>(early), 14.0, 10.0);
}

TEST(MethodDbudgetKv, UniformAttentionLosesTheCountOfTheClosedForm) {
  // floor(n (1 - (1 - T)^2)) with n 1000, T 1 %: the 19 oldest behind the sinks.
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 2});
  RankWorld world(g, shipped_policy("dbudgetkv"));
  const auto k = world.tokens.kv(1000), v = world.tokens.kv(1000);
  world.prefill(k, v, std::vector<float>(size_t{2} * kDim, 0.0f));
  EXPECT_EQ(world.positions(0), sinks_and_newest(4, 1000 - 4 - 19, 1000));
  EXPECT_EQ(world.positions(1), world.positions(0));
}

TEST(MethodDbudgetKv, AStrongSinkLeavesTheFloor) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  RankWorld world(g, shipped_policy("dbudgetkv"));
  auto k = world.tokens.kv(600);
  const auto v = world.tokens.kv(600);
  std::vector<float> q(kDim, 0.0f);
  q[9] = 8.0f;
  for (uint32_t t = 0; t < 600; ++t) k[t * kDim + 9] = t == 0 ? 12.0f : 0.0f;
  world.prefill(k, v, q);
  EXPECT_EQ(world.positions(0), sinks_and_newest(4, 60, 600));
}

TEST(MethodKvCrush, AQuarterIsSpreadOverWhatTheBaseRejects) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 4});
  PolicyParams base = shipped_policy("snapkv", 75);  // three quarters of 100
  RankWorld crush(g, shipped_policy("kvcrush", 100)), snap(g, base);
  const auto k = crush.tokens.kv(300), v = crush.tokens.kv(300);
  const auto q = crush.tokens.rows(32, g.q_heads);
  crush.prefill(k, v, q);
  snap.prefill(k, v, q);
  for (uint32_t lane = 0; lane < 4; ++lane) {
    const auto kept = crush.positions(lane), best = snap.positions(lane);
    EXPECT_EQ(kept.size(), 100u);
    EXPECT_TRUE(std::includes(kept.begin(), kept.end(), best.begin(), best.end()));
    // Representatives of each class that some heads, but not this one, find important.
    std::vector<uint32_t> extra;
    std::set_difference(kept.begin(), kept.end(), best.begin(), best.end(),
                        std::back_inserter(extra));
    std::set<uint32_t> distances;
    for (const uint32_t p : extra) {
      uint32_t heads = 0;
      for (uint32_t other = 0; other < 4; ++other) heads += snap.holds(other, p) ? 1 : 0;
      distances.insert(heads);
    }
    EXPECT_GE(distances.size(), 2u) << lane;
  }
}

TEST(MethodUncomp, AHeadWithMoreDirectionsKeepsMore) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 2, .group = 2});
  RankWorld world(g, shipped_policy("uncomp", 60));
  const auto k = world.tokens.kv(300), v = world.tokens.kv(300);
  auto q = world.tokens.rows(32, g.q_heads);
  const auto line = world.tokens.rows(1, 1);
  for (uint32_t i = 0; i < 32; ++i) {  // the first kv head's queries lie on a line
    for (uint32_t h = 0; h < 2; ++h) {
      const float length = q[(size_t{i} * 4 + h) * kDim];
      for (uint32_t d = 0; d < kDim; ++d) q[(size_t{i} * 4 + h) * kDim + d] = length * line[d];
    }
  }
  world.prefill(k, v, q);
  EXPECT_EQ(world.positions(0).size(), 40u);
  EXPECT_EQ(world.positions(1).size(), 80u) << "2 to 1, and 2 x 60 in all";
  world.run(50);
  EXPECT_EQ(world.positions(0).size(), 40u);
  EXPECT_EQ(world.positions(1).size(), 80u);
}

// ---- DiffKV ----

// Channel 7 of the keys decides the attention of queries that are 4 there.
std::vector<float> keys_with(RankWorld& world, const std::vector<float>& logits) {
  auto k = world.tokens.kv(static_cast<uint32_t>(logits.size()));
  for (size_t t = 0; t < logits.size(); ++t) {
    std::fill_n(k.begin() + static_cast<std::ptrdiff_t>(t * kDim), kDim, 0.0f);
    k[t * kDim + 7] = logits[t] * 8.0f / 4.0f;  // the scale of 1/8 is taken back
  }
  return k;
}

TEST(MethodDiffKv, ThePromptIsSortedIntoHighLowAndNothing) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  PolicyParams p = shipped_policy("diffkv");
  p.rotate = 0;
  RankWorld world(g, p);
  // 200 tokens. Uniform is 1/200; low below it, pruned below a 50th of it.
  std::vector<float> logits(200, -0.7f);
  for (uint32_t t = 0; t < 200; t += 4) logits[t] = 1.5f;   // above uniform
  for (uint32_t t = 1; t < 136; t += 4) logits[t] = -6.0f;  // far below
  std::vector<float> q(size_t{64} * kDim, 0.0f);
  for (uint32_t i = 0; i < 64; ++i) q[i * kDim + 7] = 4.0f;
  world.prefill(keys_with(world, logits), world.tokens.kv(200), q);
  const auto lane = read_lane(world.sequence, 0);
  for (uint32_t t = 0; t < 200; ++t) {
    if (t >= 136) {
      EXPECT_EQ(lane.at(t).format, Format::kK8V4) << "the newest 64 stay high";
    } else if (t % 4 == 0) {
      EXPECT_EQ(lane.at(t).format, Format::kK8V4) << t;
    } else if (t % 4 == 1) {
      EXPECT_EQ(lane.count(t), 0u) << t;
    } else {
      EXPECT_EQ(lane.at(t).format, Format::kK4V2) << t;
    }
  }
  const SequenceStats stats = world.sequence.stats();
  EXPECT_EQ(stats.evicted_slots, 34u);
  EXPECT_EQ(stats.recoded_slots, 68u);
}

TEST(MethodDiffKv, AStepMovesAtMostOneTokenAndSlotsAreUsedAgainInPlace) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  RankWorld world(g, shipped_policy("diffkv"));
  world.prefill_random(150, 64);
  SequenceStats before = world.sequence.stats();
  for (uint32_t i = 0; i < 200; ++i) {
    world.run(1);
    const SequenceStats after = world.sequence.stats();
    EXPECT_LE(after.recoded_slots - before.recoded_slots, 1u);
    EXPECT_LE(after.evicted_slots - before.evicted_slots, 1u);
    EXPECT_EQ(after.live_slots + after.evicted_slots, after.tokens);
    before = after;
  }
  EXPECT_GT(before.recoded_slots, 20u) << "the test moved too little";
  EXPECT_GT(before.reused_slots, 10u) << "recoded tokens leave slots behind, which are used";
  testing::check_invariants(world.sequence);
}

// ---- FastGen ----

TEST(MethodFastGen, HeadsTakeTheCheapestMaskThatRecoversTheirAttention) {
  constexpr uint32_t kTokens = 200;
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 3});
  RankWorld world(g, shipped_policy("fastgen"));
  std::vector<float> k(size_t{kTokens} * 3 * kDim, 0.0f), q(size_t{64} * 3 * kDim, 0.0f);
  const auto v = world.tokens.kv(kTokens);
  const auto at = [](std::vector<float>& x, uint32_t token, uint32_t head) {
    return x.data() + (size_t{token} * 3 + head) * kDim;
  };
  // Head 0 looks at the first token, head 1 at the newer half, head 2 everywhere.
  at(k, 0, 0)[0] = 20.0f;
  for (uint32_t t = kTokens / 2; t < kTokens; ++t) at(k, t, 1)[0] = 20.0f;
  for (uint32_t i = 0; i < 64; ++i) at(q, i, 0)[0] = at(q, i, 1)[0] = 20.0f;
  ASSERT_TRUE(
      world.sequence.token_classes(0, std::vector<uint8_t>{1, 0, 0, 0, 0, 0, 2}).has_value());
  world.prefill(k, v, q);
  const auto mask = [&](uint32_t lane) { return world.sequence.state()->lane(lane).rank().mask; };
  EXPECT_EQ(mask(0), policy::kMaskSpecial);
  EXPECT_EQ(mask(1), policy::kMaskLocal);
  EXPECT_EQ(mask(2), policy::kMaskFull);
  EXPECT_EQ(world.positions(0).size(), 64u) << "the floor";
  EXPECT_EQ(world.positions(2).size(), kTokens);
  EXPECT_LT(world.positions(1).size(), kTokens);
  EXPECT_EQ(world.positions(1).size(), 105u) << "4 sinks, punctuation, 60 frequent, 40 more local";
  const auto local = world.positions(1).size();
  world.run(60);
  EXPECT_EQ(world.positions(0).size(), 64u);
  EXPECT_EQ(world.positions(1).size(), local);
  EXPECT_EQ(world.positions(2).size(), kTokens + 60u);
}

TEST(MethodFastGen, TokensOfProtectedClassesAreAppendedBesideTheMask) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  RankWorld world(g, shipped_policy("fastgen", 32));
  std::vector<float> k(size_t{100} * kDim, 0.0f), q(kDim, 0.0f);
  k[0] = q[0] = 20.0f;  // all attention on the first token
  world.prefill(k, world.tokens.kv(100), q);
  ASSERT_EQ(world.positions(0).size(), 32u);
  for (uint32_t i = 0; i < 40; ++i) {
    const std::vector<uint8_t> special(1, i % 4 == 0 ? 1 : 0);
    ASSERT_TRUE(world.sequence.token_classes(100 + i, special).has_value());
    world.run(1);
  }
  world.run(60);
  for (uint32_t i = 0; i < 40; i += 4) EXPECT_TRUE(world.holds(0, 100 + i)) << i;
  EXPECT_FALSE(world.holds(0, 101));
  EXPECT_EQ(world.positions(0).size(), 32u) << "ten special tokens are within the floor";
}

TEST(MethodQuantizedPruning, HoldsTheTokensThatTheBytesOfTheBudgetHold) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 2});
  RankWorld packed(g, shipped_policy("quantized-pruning", 64)), wide(g, shipped_policy("h2o", 64));
  packed.prefill_random(600, 64);
  wide.prefill_random(600, 64);
  packed.run(200);
  wide.run(200);
  EXPECT_EQ(wide.positions(0).size(), 64u);
  EXPECT_EQ(packed.positions(0).size(), 64u / 8 * page_layout(Format::kK4V4, kDim).slots);
  // Pages beside the buffers: equal bytes. Slots in holes of pages are not compacted.
  EXPECT_EQ(packed.sequence.stats().over_budget_steps, 0u);
}

uint32_t with_eight_bit_keys(const Sequence& sequence, uint32_t lane) {
  uint32_t count = 0;
  for (const auto& [position, token] : read_lane(sequence, lane)) {
    EXPECT_TRUE(token.buffered || token.format == Format::kK8V4 || token.format == Format::kK4V4);
    count += token.format == Format::kK8V4 ? 1 : 0;
    if (position < 4) {
      EXPECT_EQ(token.format, Format::kK8V4) << position;
    }
  }
  return count;
}

TEST(MethodThinkv, TheBestFewHaveEightBitKeysAndTheRestFour) {
  RankWorld world(geometry_of({.layers = 1, .kv_heads = 2, .group = 2, .head_dim = 64}),
                  shipped_policy("thinkv", 200));
  world.prefill_random(400, 64);
  for (uint32_t lane = 0; lane < 2; ++lane) {
    // 2 % of the budget, which the sinks take.
    EXPECT_EQ(with_eight_bit_keys(world.sequence, lane), 4u);
  }
  world.run(160);
  for (uint32_t lane = 0; lane < 2; ++lane) {
    const auto tokens = read_lane(world.sequence, lane);
    EXPECT_EQ(tokens.size(), 200u);
    // A token that went down stays down, also when it is among the best again.
    EXPECT_EQ(with_eight_bit_keys(world.sequence, lane), 4u);
    for (uint32_t position = 560 - 50; position < 560; ++position) {
      EXPECT_TRUE(tokens.contains(position)) << position << " is of the newest quarter";
    }
  }
  testing::check_invariants(world.sequence);
}

}  // namespace
}  // namespace thinkv::kernels
