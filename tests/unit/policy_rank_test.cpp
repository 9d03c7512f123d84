// The pure decisions of rank rules, against numbers worked out by hand or from the papers.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/policy/distinct.h"
#include "kernels/policy/rank_budget.h"
#include "kernels/policy/rank_select.h"
#include "kernels/policy/rank_signal.h"
#include "kernels/policy/rank_trigger.h"

namespace thinkv::policy {
namespace {

std::vector<uint32_t> marked(const std::vector<uint8_t>& keep) {
  std::vector<uint32_t> rows;
  for (uint32_t i = 0; i < keep.size(); ++i) {
    if (keep[i] != 0) rows.push_back(i);
  }
  return rows;
}

// ---- budgets ----

struct PyramidSum {
  uint32_t first, last;
  uint64_t all;
};
PyramidSum pyramid_of(uint32_t tokens) {
  const Pyramid p{.budget = 512, .window = 32, .tokens = tokens, .beta = 20.0f, .layers = 32};
  PyramidSum sum{pyramid_budget(p, 0) - 32, pyramid_budget(p, 31) - 32, 0};
  for (uint32_t layer = 0; layer < 32; ++layer) sum.all += pyramid_budget(p, layer) - 32;
  return sum;
}

TEST(RankPyramid, LayersTogetherHaveLayersTimesTheBudget) {
  const PyramidSum free = pyramid_of(8192);
  EXPECT_EQ(free.first, 936u);
  EXPECT_EQ(free.last, 24u);
  EXPECT_EQ(free.all, 15360u);
  const PyramidSum clamped = pyramid_of(700);
  EXPECT_EQ(clamped.first, 668u);
  EXPECT_EQ(clamped.last, 292u);
  EXPECT_EQ(clamped.all, 15360u);
}

TEST(RankPyramid, UniformWhereThereIsNothingToBuild) {
  const Pyramid narrow{.budget = 32, .window = 32, .tokens = 900, .beta = 20.0f, .layers = 4};
  const Pyramid roomy{.budget = 512, .window = 32, .tokens = 512, .beta = 20.0f, .layers = 4};
  const Pyramid one{.budget = 512, .window = 32, .tokens = 900, .beta = 20.0f, .layers = 1};
  for (uint32_t layer = 0; layer < 4; ++layer) {
    EXPECT_EQ(pyramid_budget(narrow, layer), 32u);
    EXPECT_EQ(pyramid_budget(roomy, layer), 512u);
  }
  EXPECT_EQ(pyramid_budget(one, 0), 512u);
}

TEST(RankGroups, SharesSumToTheWholeExactly) {
  const uint8_t two[] = {2, 1};
  EXPECT_EQ(group_budget(60, 2, 0, two), 80u);
  EXPECT_EQ(group_budget(60, 2, 1, two), 40u);
  const uint8_t three[] = {7, 5, 1};
  for (const uint32_t heads : {1u, 3u, 5u, 8u}) {
    uint32_t sum = 0;
    for (uint32_t rank = 0; rank < heads; ++rank) sum += group_budget(101, heads, rank, three);
    EXPECT_EQ(sum, 101 * heads) << heads;
  }
}

TEST(RankBytes, FourTimesTheTokensInPagesOfFourTimesTheSlots) {
  EXPECT_EQ(tokens_of_equal_bytes(1024, 32, 8), 4096u);
  EXPECT_EQ(tokens_of_equal_bytes(10, 22, 8), 27u) << "never above the bytes";
}

// ---- signals ----

TEST(RankProtect, TheNewestAreANumberOrAShareAndOfBothTheSmaller) {
  const auto newest = [](uint16_t recent, uint8_t percent, uint32_t limit) {
    RankRule rule;
    rule.recent = recent;
    rule.recent_percent = percent;
    return newest_protected(rule, limit);
  };
  EXPECT_EQ(newest(0, 0, 1000), 0u);
  EXPECT_EQ(newest(128, 0, 1000), 128u);
  EXPECT_EQ(newest(128, 0, 100), 128u) << "whatever the budget";
  EXPECT_EQ(newest(0, 50, 1000), 500u);
  EXPECT_EQ(newest(128, 50, 1000), 128u);
  EXPECT_EQ(newest(128, 50, 255), 127u);
  EXPECT_EQ(newest(128, 50, 1), 0u);
}

TEST(RankPool, AverageCountsTheEndsAsZeroAndMaximumDoesNot) {
  const std::vector<float> x = {5, 0, 0, 10, 0};
  std::vector<float> out(5);
  pool_rows(Pool::kAverage, 5, x, out);
  EXPECT_EQ(out, (std::vector<float>{1, 3, 3, 2, 2}));
  pool_rows(Pool::kMaximum, 3, x, out);
  EXPECT_EQ(out, (std::vector<float>{5, 5, 10, 10, 10}));
}

TEST(RankLifetime, CountsTheQueriesThatSawATokenAndWereMeasured) {
  const Lifetimes l{.tokens = 110, .prompt = 100, .queries = {8, 8}};
  EXPECT_EQ(lifetime(l, 109), 1u);
  EXPECT_EQ(lifetime(l, 100), 10u);
  EXPECT_EQ(lifetime(l, 99), 11u) << "the prompt's last query and ten steps";
  EXPECT_EQ(lifetime(l, 92), 18u);
  EXPECT_EQ(lifetime(l, 0), 18u);
}

TEST(RankLifetime, QueriesFromAllOverThePromptAreCountedOneByOne) {
  for (const auto& [prompt, given, wanted] : {std::array{100u, 100u, 7u},
                                              {64u, 64u, 64u},
                                              {90u, 33u, 5u},
                                              {1u, 1u, 1u},
                                              {50u, 49u, 48u}}) {
    PolicyParams p;
    p.prompt_queries = static_cast<uint16_t>(wanted);
    p.prompt_spread = 1;
    const PromptSample sample = prompt_sample(p, given);
    EXPECT_EQ(sampled_query(sample, sample.used - 1), given - 1) << "the newest";
    for (uint32_t position = 0; position < prompt; ++position) {
      uint32_t seen = 0;
      for (uint32_t i = 0; i < sample.used; ++i) {
        seen += prompt - given + sampled_query(sample, i) >= position ? 1 : 0;
      }
      ASSERT_EQ(lifetime({prompt + 3, prompt, sample}, position), 3 + seen) << position;
    }
  }
}

TEST(RankLifetime, TheNewestAreAWindowOfTheirOwnLength) {
  PolicyParams p;
  p.score_window = 32;
  EXPECT_EQ(prompt_sample(p, 50).given, 32u);
  EXPECT_EQ(sampled_query(prompt_sample(p, 50), 0), 0u);
  EXPECT_EQ(prompt_sample(p, 20).used, 20u);
  p.prompt_queries = 40;
  EXPECT_EQ(prompt_sample(p, 50).used, 40u);
}

TEST(RankRandom, DependsOnSeedStreamAndPositionOnly) {
  EXPECT_EQ(random_score(1, 2, 3), random_score(1, 2, 3));
  EXPECT_NE(random_score(1, 2, 3), random_score(1, 2, 4));
  EXPECT_NE(random_score(1, 2, 3), random_score(1, 3, 3));
  EXPECT_NE(random_score(1, 2, 3), random_score(2, 2, 3));
  double sum = 0.0;
  for (uint32_t i = 0; i < 4096; ++i) {
    const float x = random_score(7, 0, i);
    ASSERT_TRUE(x >= 0.0f && x < 1.0f);
    sum += double{x};
  }
  EXPECT_NEAR(sum / 4096, 0.5, 0.02) << "4 standard deviations of the mean are 0.018";
}

// 24 distinct keys, then 24 copies of another one with a little noise.
std::vector<float> keys_with_duplicates(uint32_t dim) {
  std::mt19937_64 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> keys(size_t{48} * dim), copied(dim);
  for (float& x : copied) x = normal(random);
  for (uint32_t i = 0; i < 48; ++i) {
    for (uint32_t d = 0; d < dim; ++d) {
      const float noise = normal(random);
      keys[size_t{i} * dim + d] = i < 24 ? noise : copied[d] + 0.05f * noise;
    }
    normalise_row(keys.data() + size_t{i} * dim, dim);
  }
  return keys;
}

TEST(RankRedundancy, OneNearDuplicateStaysAndItIsTheLast) {
  constexpr uint32_t kDim = 64;
  std::vector<float> score(48);
  std::vector<float> scratch(redundancy_scratch(48, kDim));
  redundancy(keys_with_duplicates(kDim), kDim, 0.5f, scratch, score);
  EXPECT_NEAR(std::accumulate(score.begin(), score.end(), 0.0f), 1.0f, 1e-5f);
  for (float& x : score) x = -x;
  std::vector<uint32_t> order(48);
  std::vector<uint8_t> keep(48);
  const std::vector<uint8_t> fixed(48, 0);
  keep_best(score, fixed, 24, order, keep);
  const std::vector<uint32_t> rows = marked(keep);
  EXPECT_EQ(std::count_if(rows.begin(), rows.end(), [](uint32_t r) { return r >= 24; }), 1);
  EXPECT_EQ(rows.back(), 47u);
}

TEST(RankDistinct, TheAngleToTheMeanCountsAndNotTheLength) {
  constexpr uint32_t kDim = 64;
  std::vector<float> mean(kDim, 0.0f), key(kDim, 0.0f);
  const auto distance = [&] {
    return key_distance(key.data(), mean.data(), std::sqrt(dot(mean.data(), mean.data(), kDim)),
                        kDim);
  };
  EXPECT_EQ(distance(), 1.0f) << "nothing to compare";
  mean[3] = 2.0f;
  EXPECT_EQ(distance(), 1.0f);
  for (const float length : {0.5f, 1.0f, 300.0f}) {
    key[3] = length;
    EXPECT_EQ(distance(), 0.0f);
    key[3] = -length;
    EXPECT_EQ(distance(), 2.0f);
  }
  key[3] = 1.0f;
  key[9] = std::sqrt(3.0f);
  EXPECT_NEAR(distance(), 0.5f, 1e-6f) << "60 degrees";
  key[9] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(distance(), 0.0f);
}

TEST(RankDistinct, DistancesAreTogetherAsMuchAsTheAttention) {
  std::vector<float> attention(700), distances(700);
  for (uint32_t i = 0; i < 700; ++i) {
    attention[i] = random_score(1, 0, i);
    distances[i] = 5.0f * random_score(2, 0, i);
  }
  const float sum = sum_of_rows(attention);
  EXPECT_NEAR(sum, std::accumulate(attention.begin(), attention.end(), 0.0), 1e-3);
  const float scale = distance_scale(sum, sum_of_rows(distances));
  for (float& x : distances) x *= scale;
  EXPECT_NEAR(sum_of_rows(distances), sum, 1e-3f);
  EXPECT_EQ(distance_scale(0.0f, 4.0f), 1.0f) << "nothing was looked at so far";
  EXPECT_EQ(distance_scale(2.0f, 0.0f), 0.0f);
  EXPECT_EQ(distance_scale(2.0f, std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(distance_scale(std::numeric_limits<float>::quiet_NaN(), 1.0f), 1.0f);
}

// ---- selections ----

TEST(RankKeepBest, KeepsTheProtectedAndTheHighestTheNewerOfEquals) {
  const std::vector<float> score = {1, 5, 3, 3, NAN, 0};
  const std::vector<uint8_t> fixed = {0, 0, 0, 0, 0, 1};
  std::vector<uint32_t> order(6);
  std::vector<uint8_t> keep(6);
  keep_best(score, fixed, 2, order, keep);
  EXPECT_EQ(marked(keep), (std::vector<uint32_t>{1, 3, 5}));
  keep_best(score, fixed, 0, order, keep);
  EXPECT_EQ(marked(keep), (std::vector<uint32_t>{5}));
  keep_best(score, fixed, 5, order, keep);
  EXPECT_EQ(marked(keep).size(), 6u);
}

TEST(RankDropLowest, IsKeepBestOfAllButOne) {
  std::mt19937 random(3);
  std::vector<float> score(40);
  std::vector<uint8_t> fixed(40), one(40), best(40);
  std::vector<uint32_t> order(40);
  for (uint32_t round = 0; round < 200; ++round) {
    for (float& x : score) x = static_cast<float>(random() % 8);
    for (uint8_t& f : fixed) f = random() % 3 == 0 ? 1 : 0;
    const auto free = static_cast<uint32_t>(std::count(fixed.begin(), fixed.end(), 0));
    ASSERT_EQ(drop_lowest(score, fixed, one), free > 0);
    keep_best(score, fixed, free - 1, order, best);
    ASSERT_EQ(one, best);
  }
  const std::vector<uint8_t> all(40, 1);
  EXPECT_FALSE(drop_lowest(score, all, one));
  EXPECT_EQ(marked(one).size(), 40u);
}

TEST(RankShared, HeadsHaveTheirOwnFirstAndTheBestOfTheRestWin) {
  // Head 0: 9 5 1; head 1: 8 7 6. Rows descend in worth.
  std::vector<SharedRow> rows = {{9, 0, 2}, {5, 0, 1}, {1, 0, 0}, {8, 1, 0}, {7, 1, 1}, {6, 1, 2}};
  std::vector<uint32_t> places(2);
  const std::vector<uint32_t> none = {0, 0}, two = {2, 2}, three = {3, 0};
  auto copy = rows;
  share_places(copy, none, 4, places);
  EXPECT_EQ(places, (std::vector<uint32_t>{1, 3}));
  copy = rows;
  share_places(copy, two, 5, places);
  EXPECT_EQ(places, (std::vector<uint32_t>{2, 3}));
  copy = rows;
  share_places(copy, three, 4, places);
  EXPECT_EQ(places, (std::vector<uint32_t>{3, 1}));
  copy = rows;
  share_places(copy, three, 2, places);
  EXPECT_EQ(places, (std::vector<uint32_t>{2, 0}));
  copy = rows;
  share_places(copy, none, 0, places);
  EXPECT_EQ(places, (std::vector<uint32_t>{0, 0}));
}

// Weights in the order of dropping; `fixed` are the weights of what is never dropped.
uint32_t dropped(std::vector<float> weights, const std::vector<float>& fixed, float loss) {
  float square = 0.0f;
  for (const float w : fixed) square += w * w;
  weights.push_back(0.0f);
  return droppable(weights, 1, {&square, 1}, loss);
}

TEST(RankMaxDrop, AgreesWithTheClosedFormOfAUniformRow) {
  const std::vector<float> uniform(1000, 0.001f);
  EXPECT_EQ(dropped(uniform, {}, 0.01f), 19u);
  EXPECT_EQ(dropped(uniform, {}, 0.05f), 97u);
  EXPECT_EQ(dropped(uniform, {}, 0.0f), 0u) << "no token with a weight goes";
  uint32_t before = 0;
  for (float loss = 0.01f; loss < 0.9f; loss += 0.05f) {
    const uint32_t m = dropped(uniform, {}, loss);
    EXPECT_GE(m, before);
    before = m;
  }
}

TEST(RankMaxDrop, AStrongSinkLeavesNothingElse) {
  std::vector<float> decaying(996);
  float sum = 0.0f, w = 1.0f;
  for (auto it = decaying.rbegin(); it != decaying.rend(); ++it, w *= 0.99f) sum += * it = w;
  for (float& x : decaying) x *= 0.2f / sum;
  EXPECT_EQ(dropped(decaying, {0.5f, 0.1f, 0.1f, 0.1f}, 0.01f), 996u);
}

TEST(RankTiers, TheFourCasesOfADecodeStep) {
  const Tiers t = tiers_of(0.02f, 1.0f, 100);  // 0.0002, 0.01
  constexpr float kNone = INFINITY;
  EXPECT_EQ(tier_move(0.0001f, 0.0005f, t), TierMove::kEvictHigh) << "1: below prune, and lowest";
  EXPECT_EQ(tier_move(0.0001f, kNone, t), TierMove::kEvictHigh);
  EXPECT_EQ(tier_move(0.0001f, 0.00005f, t), TierMove::kRecodeReplace) << "2: the low one is lower";
  EXPECT_EQ(tier_move(0.005f, 0.0001f, t), TierMove::kRecodeReplace) << "2: below quant";
  EXPECT_EQ(tier_move(0.005f, 0.005f, t), TierMove::kRecode) << "2: a new low slot";
  EXPECT_EQ(tier_move(0.005f, kNone, t), TierMove::kRecode);
  EXPECT_EQ(tier_move(0.02f, 0.00001f, t), TierMove::kNone) << "3: only the new token comes";
  EXPECT_EQ(tier_of(0.0001f, t), Tier::kPruned);
  EXPECT_EQ(tier_of(0.0002f, t), Tier::kLow);
  EXPECT_EQ(tier_of(0.01f, t), Tier::kHigh);
}

TEST(RankStrata, EveryDistanceIsRepresentedOnceWhereTheyAreEqual) {
  std::vector<uint32_t> distance(24);
  for (uint32_t i = 0; i < 24; ++i) distance[i] = (i * 7) % 6;  // four of each
  std::vector<uint32_t> order(24);
  std::vector<uint8_t> picked(24);
  pick_strata(distance, 6, order, picked);
  std::vector<uint32_t> count(6, 0);
  for (const uint32_t i : marked(picked)) count[distance[i]] += 1;
  EXPECT_EQ(count, std::vector<uint32_t>(6, 1));
  pick_strata(distance, 5, order, picked);
  EXPECT_EQ(marked(picked).size(), 5u);
  pick_strata(distance, 40, order, picked);
  EXPECT_EQ(marked(picked).size(), 24u);
  pick_strata(distance, 0, order, picked);
  EXPECT_EQ(marked(picked).size(), 0u);
}

TEST(RankStrata, AnchorsAndDistancesCountTheHeadsAlone) {
  const std::vector<Signature> rows = {{{0b011, 0}}, {{0b001, 0}}, {{0b101, 0}}};
  const auto bits = [&](Anchor kind) { return anchor_of(kind, 3, ~0ull, ~0ull, rows).bits[0]; };
  EXPECT_EQ(bits(Anchor::kZeros), 0u);
  EXPECT_EQ(bits(Anchor::kOnes), 0b111u);
  EXPECT_EQ(bits(Anchor::kAlternating), 0b010u);
  EXPECT_EQ(bits(Anchor::kMean), 0b001u) << "more than half have it";
  EXPECT_EQ(bits(Anchor::kRandom), 0b111u);
  EXPECT_EQ(hamming(rows[0], rows[2]), 2u);
  const Signature wide = anchor_of(Anchor::kOnes, 70, 0, 0, rows);
  EXPECT_EQ(std::popcount(wide.bits[0]) + std::popcount(wide.bits[1]), 70);
}

TEST(RankMasks, TheCheapestThatRecoversEnoughIsTaken) {
  const uint32_t n = 100;
  const std::vector<uint8_t> none(n, 0);
  std::vector<uint8_t> special(n, 0), first(n);
  special[0] = 1;
  std::vector<uint32_t> order(n);
  const auto choose = [&](const std::vector<float>& attention) {
    first_masks(attention, special, none, 30, 30, order, first);
    return choose_mask(attention, first, 0.95f);
  };
  std::vector<float> attention(n, 0.0004f);
  attention[0] = 0.97f;
  EXPECT_EQ(choose(attention).mask, kMaskSpecial);
  attention.assign(n, 0.0f);
  for (uint32_t i = 40; i < 68; ++i) attention[i] = 1.0f;
  EXPECT_EQ(choose(attention).mask, kMaskFrequent);
  attention.assign(n, 0.001f);
  // The newest have been seen by fewer queries: the frequent ones are the older ones of the band.
  for (uint32_t i = 45; i < 100; ++i) attention[i] = 1.0f - 0.001f * static_cast<float>(i - 45);
  EXPECT_EQ(choose(attention).mask, kMaskLocal);
  attention.assign(n, 1.0f);
  const MaskChoice full = choose(attention);
  EXPECT_EQ(full.mask, kMaskFull);
  for (uint32_t m = 0; m < kMaskFull; ++m) EXPECT_LT(full.recovered[m], 0.95f);
  attention.assign(n, 0.0f);
  EXPECT_EQ(choose(attention).mask, kMaskFull) << "nothing was measured: nothing is dropped";
}

// ---- triggers ----

PolicyParams rank_policy(ScoreKind kind, uint16_t window) {
  PolicyParams p;
  p.name[0] = 'p';
  p.evict = EvictRule::kRank;
  p.budget_tokens = 64;
  p.score_kind = kind;
  p.score_window = window;
  p.rule_count = 1;
  p.rules[0].attention = 1.0f;
  return p;
}

TEST(RankTrigger, AWindowIsTheStepsBeforeAFiring) {
  PolicyParams p = rank_policy(ScoreKind::kWindow, 8);
  p.rules[0].every = 128;
  for (uint32_t generated = 1; generated <= 300; ++generated) {
    const Moment m{.generated = generated, .waiting = false};
    const uint32_t in_round = (generated - 1) % 128 + 1;
    EXPECT_EQ(measures(p, m), in_round > 120) << generated;
    EXPECT_EQ(starts_window(p, m), in_round == 121) << generated;
    EXPECT_EQ(any_fires(p, m), in_round == 128) << generated;
  }
}

TEST(RankTrigger, WithoutQueriesThePromptsRulesWaitAndOthersWithAttentionToo) {
  PolicyParams p = rank_policy(ScoreKind::kSum, 8);
  p.rules[0].at_prompt_end = 1;
  p.rule_count = 2;
  p.rules[1].attention = 1.0f;
  p.rules[1].every = 1;
  EXPECT_TRUE(fires(p, p.rules[0], {.generated = 0, .waiting = false}));
  EXPECT_FALSE(any_fires(p, {.generated = 0, .waiting = true}));
  EXPECT_FALSE(any_fires(p, {.generated = 7, .waiting = true}));
  EXPECT_TRUE(fires(p, p.rules[0], {.generated = 8, .waiting = true}));
  EXPECT_FALSE(fires(p, p.rules[1], {.generated = 8, .waiting = true}));
  EXPECT_TRUE(fires(p, p.rules[1], {.generated = 9, .waiting = false}));
  EXPECT_FALSE(fires(p, p.rules[0], {.generated = 9, .waiting = false}));
}

TEST(RankTrigger, RulesOfThePromptAloneMeasureNoStep) {
  PolicyParams p = rank_policy(ScoreKind::kWindow, 8);
  p.rules[0].at_prompt_end = 1;
  EXPECT_FALSE(measures(p, {.generated = 5, .waiting = false}));
  EXPECT_TRUE(measures(p, {.generated = 5, .waiting = true}));
  p.rules[0].attention = 0.0f;
  p.rules[0].position = 1.0f;
  EXPECT_FALSE(any_waits_for_queries(p));
  EXPECT_FALSE(keeps_sums(p));
}

}  // namespace
}  // namespace thinkv::policy
