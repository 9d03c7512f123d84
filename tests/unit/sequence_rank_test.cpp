// What holds for every rank policy: budget n changes nothing, the same seed the same tokens,
// refused calls leave no trace; and policies that no file ships, put together from the primitives.
#include "kernels/policy/rank_trigger.h"
#include "tests/support/rank_fixture.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::kernels {
namespace {

using testing::check_invariants;
using testing::geometry_of;
using testing::rank_policies;
using testing::RankWorld;
using testing::read_lane;
using testing::shipped_policy;

const testing::GeometryShape kSmall{.layers = 2, .kv_heads = 2, .group = 2, .head_dim = 64};

class EveryRankPolicy : public ::testing::TestWithParam<std::string> {};

// Prompt with queries, then steps; the outputs of all of them.
std::vector<float> outputs_of(RankWorld& world, uint32_t prompt, uint32_t queries, uint32_t steps) {
  world.prefill_random(prompt, queries);
  std::vector<float> all, out;
  for (uint32_t i = 0; i < steps; ++i) {
    EXPECT_TRUE(testing::step(world.sequence, world.tokens, &out).has_value());
    all.insert(all.end(), out.begin(), out.end());
  }
  return all;
}

// Rules of a share of the budget recode what they do not keep, also where all tokens stay.
bool has_rungs(const PolicyParams& policy) {
  return std::any_of(policy.rules, policy.rules + policy.rule_count,
                     [](const RankRule& rule) { return rule.budget_percent < 100; });
}

TEST_P(EveryRankPolicy, ABudgetOfAllTokensChangesNoBit) {
  for (const uint32_t queries : {0u, 64u}) {
    const PolicyParams policy = shipped_policy(GetParam(), 300);
    PolicyParams none = policy;
    none.evict = EvictRule::kNone;
    none.rule_count = 0;
    for (RankRule& rule : none.rules) rule = RankRule{};
    RankWorld evicting(geometry_of(kSmall), policy), keeping(geometry_of(kSmall), none);
    const auto wanted = outputs_of(keeping, 90, queries, 150);
    const auto found = outputs_of(evicting, 90, queries, 150);
    EXPECT_EQ(evicting.sequence.stats().evicted_slots, 0u);
    if (has_rungs(policy)) continue;
    ASSERT_EQ(found, wanted);
    EXPECT_EQ(evicting.sequence.stats().recoded_slots, 0u);
  }
}

TEST_P(EveryRankPolicy, NoBudgetChangesNoBit) {
  RankWorld world(geometry_of(kSmall), shipped_policy(GetParam()));
  ASSERT_TRUE(world.sequence.set_budget(kBudgetNone).has_value());
  static_cast<void>(outputs_of(world, 200, 64, 140));
  EXPECT_EQ(world.sequence.stats().evicted_slots + world.sequence.stats().recoded_slots, 0u);
  EXPECT_EQ(world.sequence.stats().budget_tokens, 0u);
}

TEST_P(EveryRankPolicy, TheSameTokensGoWhateverPagesThePoolGives) {
  const PolicyParams policy = shipped_policy(GetParam(), 70);
  RankWorld a(geometry_of(kSmall), policy, 1), b(geometry_of(kSmall), policy, 77);
  const auto first = outputs_of(a, 200, 64, 150), second = outputs_of(b, 200, 64, 150);
  for (uint32_t lane = 0; lane < 4; ++lane) EXPECT_EQ(a.positions(lane), b.positions(lane));
  EXPECT_GT(a.sequence.stats().evicted_slots + a.sequence.stats().recoded_slots, 0u);
  check_invariants(a.sequence);
  EXPECT_EQ(a.source.promised(), 0u);
}

// The oracle's kernels and the fast ones agree to rounding, so tokens of near-equal worth may
// differ.
TEST_P(EveryRankPolicy, TheOracleKeepsNearlyTheSame) {
  const PolicyParams policy = shipped_policy(GetParam(), 70);
  RankWorld fast(geometry_of(kSmall), policy), plain(geometry_of(kSmall), policy, 0, reference());
  static_cast<void>(outputs_of(fast, 160, 64, 140));
  static_cast<void>(outputs_of(plain, 160, 64, 140));
  for (uint32_t lane = 0; lane < 4; ++lane) {
    const auto a = fast.positions(lane), b = plain.positions(lane);
    std::vector<uint32_t> both;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    EXPECT_GE(both.size() * 50, a.size() * 49) << "lane " << lane;
    EXPECT_GE(both.size() * 50, b.size() * 49) << "lane " << lane;
  }
}

TEST_P(EveryRankPolicy, GoesOnAfterAnAttachAsIfNothingHadHappened) {
  const PolicyParams policy = shipped_policy(GetParam(), 70);
  RankWorld stays(geometry_of(kSmall), policy), moves(geometry_of(kSmall), policy);
  for (RankWorld* world : {&stays, &moves}) {
    const std::vector<uint8_t> classes = {1, 0, 2, 0, 1};
    ASSERT_TRUE(world->sequence.token_classes(3, classes).has_value());
    world->prefill_random(150, 0);
    world->run(10);  // rules wait for queries, windows are half full
  }
  const PageId root = moves.sequence.detach();
  moves.pool.relocate();
  moves.sequence = std::move(Sequence::attach(moves.source, host(), root)).value();
  stays.run(160);
  moves.run(160);
  for (uint32_t lane = 0; lane < 4; ++lane) EXPECT_EQ(stays.positions(lane), moves.positions(lane));
  moves.sequence.release();
  EXPECT_EQ(moves.pool.held(), 0u);
}

TEST_P(EveryRankPolicy, ACancelledStepLeavesTheTokensAsTheyWere) {
  RankWorld world(geometry_of(kSmall), shipped_policy(GetParam(), 70));
  world.prefill_random(150, 64);
  for (uint32_t i = 0; i < 140; ++i) {
    const auto before = world.positions(0), later = world.positions(2);
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    const auto k = world.tokens.kv(), v = world.tokens.kv();
    ASSERT_TRUE(world.sequence.append(1, k.data(), v.data()).has_value());
    world.sequence.cancel_step();
    ASSERT_EQ(world.positions(0), before);
    ASSERT_EQ(world.positions(2), later);
    world.run(1);
  }
  check_invariants(world.sequence);
}

INSTANTIATE_TEST_SUITE_P(Shipped, EveryRankPolicy, ::testing::ValuesIn(rank_policies()),
                         [](const auto& given) {
                           std::string name = given.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// ---- put together by hand ----

ops::Policy written(const std::string& text) {
  ops::Diagnostics problems("p.yaml");
  const auto policy = ops::parse_policy(text, "/x/p.yaml", &problems);
  EXPECT_TRUE(policy.has_value()) << problems.text();
  return policy ? *policy : ops::Policy{};
}

const std::string kPacked =
    "name: p\nrotation: hadamard\nformats: {prompt: k4v4, thoughts: {reasoning: k4v4, "
    "execution: k4v4, transition: k4v4}}\n";
const std::string kWide =
    "name: p\nrotation: none\nformats: {prompt: f16, thoughts: {reasoning: f16, "
    "execution: f16, transition: f16}}\n";

TEST(RankComposition, ScoresOfRKvOnPagesOfFourBits) {
  const ops::Policy policy =
      written(kPacked +
              "evict: {rule: rank, budget: 96}\n"
              "scores: {accumulate: window, window: 8, reduce: max-logit}\n"
              "rules:\n"
              "  - trigger: {every: 32}\n"
              "    signal: {attention: 0.07, pool: maximum, width: 7, redundancy: 0.93}\n"
              "    protect: {recent: 8}\n");
  RankWorld world(geometry_of(kSmall), policy.params);
  world.prefill_random(120, 0);
  world.run(64);
  EXPECT_EQ(world.positions(3).size(), 96u);
  for (const auto& [position, token] : read_lane(world.sequence, 3)) {
    EXPECT_EQ(token.format, Format::kK4V4) << position;
  }
  EXPECT_GT(world.sequence.stats().reused_slots, 0u);
}

// Tokens that no query has looked for yet, and that nothing else could stand for.
TEST(RankComposition, DistinctKeysStayWhereAttentionSaysNothing) {
  const auto kept = [](const std::string& signal) {
    const ops::Policy policy = written("centring: prompt\n" + kWide +
                                       "evict: {rule: rank, budget: 24}\n"
                                       "scores: {accumulate: mean, window: 8}\n"
                                       "rules: [{trigger: {prompt_end: true}, signal: {" +
                                       signal + "}}]\n");
    const ModelGeometry geometry = geometry_of(kSmall);
    RankWorld world(geometry, policy.params);
    const size_t dim = geometry.head_dim;
    std::vector<float> k = world.tokens.kv(96);
    for (size_t i = 0; i < k.size(); ++i) k[i] = 0.05f * k[i] + (i % dim == 5 ? 1.0f : 0.0f);
    for (const size_t token : {11, 40, 63}) {
      for (size_t head = 0; head < geometry.kv_heads; ++head) {
        float* const key = k.data() + (token * geometry.kv_heads + head) * dim;
        key[5] = -1.0f;
        key[token] = 1.0f;
      }
    }
    // Queries of nothing look at all tokens alike.
    world.prefill(k, world.tokens.kv(96), std::vector<float>(8 * geometry.q_heads * dim, 0.0f));
    EXPECT_EQ(world.positions().size(), 24u);
    return world.holds(0, 11) && world.holds(0, 40) && world.holds(3, 63);
  };
  EXPECT_TRUE(kept("attention: 1, distinct: 2"));
  EXPECT_FALSE(kept("attention: 1"));
}

TEST(RankComposition, RecodeToTwoBitsThenEvict) {
  const ops::Policy policy = written(kPacked +
                                     "evict: {rule: rank, budget: 120}\n"
                                     "scores: {accumulate: decayed, decay: 0.9}\n"
                                     "rules:\n"
                                     "  - trigger: {every: 16}\n"
                                     "    signal: {attention: 1.0}\n"
                                     "    budget: {percent: 50}\n"
                                     "    protect: {recent: 16}\n"
                                     "    action: recode\n"
                                     "    format: k4v2\n"
                                     "  - trigger: {every: 16}\n"
                                     "    signal: {attention: 1.0, values: true}\n"
                                     "    protect: {sinks: 4, recent: 16}\n");
  RankWorld world(geometry_of(kSmall), policy.params);
  world.run(320);
  uint32_t low = 0;
  for (const auto& [position, token] : read_lane(world.sequence, 0)) {
    low += token.format == Format::kK4V2 ? 1 : 0;
    EXPECT_TRUE(token.format == Format::kK4V2 || token.format == Format::kK4V4);
  }
  EXPECT_EQ(world.positions(0).size(), 120u);
  EXPECT_GE(low, 60u) << "at least half is recoded";
  EXPECT_GT(world.sequence.stats().recoded_bytes, 0u);
  check_invariants(world.sequence);
}

TEST(RankComposition, MedoidsByHeadAndByLayer) {
  for (const char* grain : {"kv_head", "layer"}) {
    const ops::Policy policy = written(kWide + "evict: {rule: rank, budget: 64, grain: " + grain +
                                       "}\n"
                                       "rules:\n"
                                       "  - trigger: {every: 64}\n"
                                       "    select: {rule: medoids}\n"
                                       "    protect: {sinks: 4, recent: 16}\n");
    RankWorld world(geometry_of(kSmall), policy.params);
    world.run(256);
    for (uint32_t lane = 0; lane < 4; ++lane) EXPECT_EQ(world.positions(lane).size(), 64u);
    EXPECT_EQ(world.positions(0) == world.positions(1), std::string(grain) == "layer");
    EXPECT_TRUE(world.holds(2, 3));
    EXPECT_TRUE(world.holds(2, 240));
  }
}

TEST(RankComposition, MedoidsOfMoreRowsThanTheKernelTakes) {
  const ops::Policy policy = written(kWide +
                                     "evict: {rule: rank, budget: 1100}\n"
                                     "rules:\n"
                                     "  - trigger: {prompt_end: true}\n"
                                     "    select: {rule: medoids}\n");
  RankWorld world(geometry_of({.layers = 1, .kv_heads = 1}), policy.params);
  world.prefill_random(1500, 0);
  EXPECT_EQ(world.positions(0).size(), 1100u);
}

TEST(RankComposition, AGeneratedBudgetLeavesThePromptAlone) {
  const ops::Policy policy = written(kWide +
                                     "evict: {rule: rank, budget: 40}\n"
                                     "rules:\n"
                                     "  - trigger: {every: 1}\n"
                                     "    signal: {position: 1.0}\n"
                                     "    budget: {count: generated}\n");
  RankWorld world(geometry_of(kSmall), policy.params);
  world.prefill_random(100, 0);
  world.run(90);
  const auto kept = world.positions(1);
  EXPECT_EQ(kept.size(), 140u);
  EXPECT_EQ(kept[99], 99u);
  EXPECT_EQ(kept[100], 150u);
}

TEST(RankComposition, TheBytesOfATokenAreThoseOfTheWidestFormat) {
  const ops::Policy policy = written(
      "name: p\nrotation: hadamard\nformats: {prompt: k8v8, thoughts: {reasoning: k4v4, "
      "execution: k4v4, transition: k4v4}}\n"
      "evict: {rule: rank, budget: 50}\n"
      "rules:\n"
      "  - trigger: {prompt_end: true}\n"
      "    signal: {position: 1.0}\n"
      "    budget: {rule: bytes}\n");
  RankWorld world(geometry_of(kSmall), policy.params);
  world.prefill_random(300, 0);
  EXPECT_EQ(world.positions(0).size(), 50u * page_layout(Format::kK8V8, 64).slots / 8);
}

// ---- calls ----

TEST(RankCalls, ALowerBudgetActsAtTheNextStep) {
  RankWorld world(geometry_of(kSmall), shipped_policy("h2o", 150));
  world.prefill_random(100, 64);
  world.run(100);
  EXPECT_EQ(world.positions(0).size(), 150u);
  ASSERT_TRUE(world.sequence.set_budget(60).has_value());
  world.run(1);
  EXPECT_EQ(world.positions(0).size(), 60u);
  EXPECT_EQ(world.sequence.stats().budget_tokens, 60u);
}

TEST(RankCalls, WhatIsProtectedStaysAndCountsAsOverBudget) {
  RankWorld world(geometry_of(kSmall), shipped_policy("random", 20));
  world.prefill_random(100, 0);
  EXPECT_EQ(world.positions(0).size(), 36u);
  EXPECT_EQ(world.sequence.stats().over_budget_steps, 1u);
  world.run(10);
  EXPECT_EQ(world.sequence.stats().over_budget_steps, 11u);
}

TEST(RankCalls, QueriesComeBetweenPrefillAndItsEndOnceALayer) {
  RankWorld world(geometry_of(kSmall), shipped_policy("snapkv", 40));
  Sequence& s = world.sequence;
  const auto k = world.tokens.kv(50), v = world.tokens.kv(50);
  const auto q = world.tokens.rows(64, world.geometry.q_heads);
  const auto code = [](const Status& status) {
    return status ? ErrorCode::kOk : status.error().code;
  };
  EXPECT_EQ(code(s.prefill_queries(0, q.data(), 8)), ErrorCode::kInvalidArgument) << "no prompt";
  ASSERT_TRUE(s.prefill(0, k.data(), v.data(), 50).has_value());
  EXPECT_EQ(code(s.prefill_queries(1, q.data(), 8)), ErrorCode::kInvalidArgument) << "its keys";
  EXPECT_EQ(code(s.prefill_queries(2, q.data(), 8)), ErrorCode::kInvalidArgument) << "no layer";
  EXPECT_EQ(code(s.prefill_queries(0, nullptr, 8)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(s.prefill_queries(0, q.data(), 0)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(s.prefill_queries(0, q.data(), 51)), ErrorCode::kInvalidArgument) << "of 50";
  ASSERT_TRUE(s.prefill_queries(0, q.data(), 8).has_value());
  EXPECT_EQ(code(s.prefill_queries(0, q.data(), 8)), ErrorCode::kInvalidArgument) << "twice";
  ASSERT_TRUE(s.prefill(1, k.data(), v.data(), 50).has_value());
  EXPECT_EQ(code(s.prefill_end()), ErrorCode::kInvalidArgument) << "one layer's are missing";
  EXPECT_EQ(code(s.prefill_queries(1, q.data(), 9)), ErrorCode::kInvalidArgument)
      << "another count";
  ASSERT_TRUE(s.prefill_queries(1, q.data(), 8).has_value());
  ASSERT_TRUE(s.prefill_end().has_value());
  EXPECT_EQ(world.positions(0).size(), 40u);
  EXPECT_EQ(code(s.prefill_queries(0, q.data(), 8)), ErrorCode::kInvalidArgument) << "too late";
}

TEST(RankCalls, QueriesAndClassesAreTakenAndUnusedUnderOtherPolicies) {
  RankWorld world(geometry_of(kSmall), shipped_policy("full"));
  const std::vector<uint8_t> classes(1000, 1);
  ASSERT_TRUE(world.sequence.token_classes(0, classes).has_value());
  const uint64_t held = world.pool.held();
  ASSERT_TRUE(world.sequence.token_classes(5000, classes).has_value());
  EXPECT_EQ(world.pool.held(), held) << "nothing is stored";
  world.prefill_random(80, 64);
  EXPECT_EQ(world.positions(0).size(), 80u);
}

TEST(RankCalls, ClassesAreRefusedInAStepAndBeyondWhatCanBeHeld) {
  RankWorld world(geometry_of(kSmall), shipped_policy("fastgen"));
  const std::vector<uint8_t> one(1, 1);
  EXPECT_EQ(world.sequence.token_classes(0xFFFF'FFFFu, one).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(world.sequence.token_classes(16'000'000, one).error().code, ErrorCode::kUnsupported);
  ASSERT_TRUE(world.sequence.begin_step().has_value());
  EXPECT_EQ(world.sequence.token_classes(0, one).error().code, ErrorCode::kInvalidArgument);
  world.sequence.cancel_step();
  ASSERT_TRUE(world.sequence.token_classes(40'000, one).has_value());
  world.sequence.release();
  EXPECT_EQ(world.pool.held(), 0u) << "the class table goes with the sequence";
}

TEST(RankCalls, APromptWhoseRulesFindNoPagesStaysOpen) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  PolicyParams policy = shipped_policy("diffkv");
  policy.rotate = 0;
  testing::VectorPool pool({.head_dim = 64, .capacity = 400});
  testing::VectorPageSource source(pool), other(pool);
  Sequence s = std::move(Sequence::create(source, host(), g, policy)).value();
  testing::TokenSource tokens(g, 9);
  const auto k = tokens.kv(200), v = tokens.kv(200);
  auto q = tokens.rows(64, 1);
  for (float& x : q) x *= 4.0f;
  ASSERT_TRUE(s.prefill(0, k.data(), v.data(), 200).has_value());
  ASSERT_TRUE(s.prefill_queries(0, q.data(), 64).has_value());
  ASSERT_TRUE(other.reserve(pool.free_pages()).has_value());  // someone takes what is left
  const uint64_t held = pool.held();
  EXPECT_EQ(s.prefill_end().error().code, ErrorCode::kExhausted);
  EXPECT_EQ(pool.held(), held);
  EXPECT_EQ(s.tokens(), 0u);
  ASSERT_TRUE(other.reserve(0).has_value());
  ASSERT_TRUE(s.prefill_end().has_value());
  EXPECT_GT(s.stats().recoded_slots, 0u);
}

TEST(RankCalls, CreateRefusesRulesThatContradictEachOther) {
  PolicyParams policy = shipped_policy("r-kv", 64);
  EXPECT_TRUE(policy_params_valid(policy));
  policy.rules[0].every = 4;  // less than the window
  EXPECT_FALSE(policy_params_valid(policy));
  testing::VectorPool pool({.head_dim = 64, .capacity = 64});
  testing::VectorPageSource source(pool);
  EXPECT_FALSE(Sequence::create(source, host(), geometry_of(kSmall), policy).has_value());
  EXPECT_EQ(pool.held(), 0u);
}

}  // namespace
}  // namespace thinkv::kernels
