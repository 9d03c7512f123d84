// Where a prompt is cut, its survivors move into few pages, bit for bit; and heads that share a
// budget (Ada-KV).
#include "tests/support/rank_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::check_invariants;
using testing::geometry_of;
using testing::RankWorld;
using testing::read_lane;

// Keeps `budget` tokens by chance: survivors lie all over the prompt's pages.
PolicyParams by_chance(Format format, uint32_t budget) {
  PolicyParams p = testing::plain_policy(format);
  p.evict = EvictRule::kRank;
  p.budget_tokens = budget;
  p.rule_count = 1;
  p.rules[0].at_prompt_end = 1;
  p.rules[0].random = 1.0f;
  p.rules[0].seed = 11;
  return p;
}

// The sum of every token's slot.
std::map<uint32_t, float> sums_of(const Sequence& sequence, uint32_t index) {
  const Lane lane = sequence.state()->lane(index);
  std::map<uint32_t, float> sums;
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    for (uint32_t slot = 0; slot < kSlotsPerPageMax; ++slot) {
      if ((page.live >> slot & 1u) != 0) sums[lane.position(page, slot)] = lane.sums(page)[slot];
    }
  });
  return sums;
}

class CutPrompt : public ::testing::TestWithParam<std::tuple<Format, uint32_t>> {};

TEST_P(CutPrompt, SurvivorsMoveBitForBitIntoAsFewPagesAsTheyNeed) {
  const auto [format, dim] = GetParam();
  const auto geometry = geometry_of({.layers = 1, .kv_heads = 2, .group = 1, .head_dim = dim});
  PolicyParams policy = by_chance(format, 90);
  policy.rules[0].attention = 1e-6f;  // so that slots have sums
  policy.score_kind = ScoreKind::kSum;
  policy.score_window = 64;
  PolicyParams all = policy;
  all.budget_tokens = 1000;
  RankWorld cut(geometry, policy), whole(geometry, all);
  cut.prefill_random(400, 64);
  whole.prefill_random(400, 64);
  const uint32_t slots = page_layout(format, dim).slots;
  for (uint32_t lane = 0; lane < 2; ++lane) {
    const auto kept = read_lane(cut.sequence, lane), before = read_lane(whole.sequence, lane);
    ASSERT_EQ(kept.size(), 90u);
    for (const auto& [position, token] : kept) EXPECT_EQ(token, before.at(position)) << position;
    const auto sums = sums_of(cut.sequence, lane), sums_before = sums_of(whole.sequence, lane);
    for (const auto& [position, sum] : sums) EXPECT_EQ(sum, sums_before.at(position));
    const uint32_t buffered = cut.sequence.state()->lane(lane).header().buffer_count;
    EXPECT_EQ(cut.sequence.state()->lane(lane).pages().size(), (90 - buffered + slots - 1) / slots);
  }
  check_invariants(cut.sequence);
  const uint64_t moved = cut.sequence.stats().gathered_bytes;
  EXPECT_GT(moved, 0u);
  EXPECT_LE(moved, 2u * 90u * page_layout(format, dim).slot_payload_bytes());
  EXPECT_EQ(whole.sequence.stats().gathered_bytes, 0u);
  cut.run(40);
  EXPECT_EQ(cut.sequence.stats().gathered_bytes, moved);  // decoding moves nothing
  check_invariants(cut.sequence);
}

INSTANTIATE_TEST_SUITE_P(Formats, CutPrompt,
                         ::testing::Combine(::testing::Values(Format::kF16, Format::kK8V8,
                                                              Format::kK8V4, Format::kK4V4,
                                                              Format::kK4V2, Format::kK2V2,
                                                              Format::kNvfp4, Format::kTernary),
                                            ::testing::Values(64u, 128u, 256u)));

TEST(CutPrompt, RulesThatWaitForQueriesCutAndMoveAfterTheWindow) {
  PolicyParams policy = by_chance(Format::kK4V4, 60);
  policy.rules[0].attention = 1.0f;
  policy.score_kind = ScoreKind::kWindow;
  policy.score_window = 32;
  RankWorld world(geometry_of({.layers = 1, .kv_heads = 1, .group = 1, .head_dim = 64}), policy);
  world.prefill_random(300, 0);
  world.run(31);
  EXPECT_EQ(world.sequence.stats().gathered_bytes, 0u);
  world.run(1);
  EXPECT_GT(world.sequence.stats().gathered_bytes, 0u);
  EXPECT_LE(world.sequence.state()->lane(0).pages().size(), 2u);
  check_invariants(world.sequence);
}

PolicyParams shared(float least) {
  PolicyParams p = testing::plain_policy(Format::kF16);
  p.rotate = 0;
  p.evict = EvictRule::kRank;
  p.budget_tokens = 64;
  p.score_kind = ScoreKind::kSum;
  p.score_window = 64;
  p.rule_count = 1;
  RankRule& rule = p.rules[0];
  rule.at_prompt_end = 1;
  rule.every = 16;
  rule.attention = 1.0f;
  rule.budget = BudgetRule::kShared;
  rule.budget_low = least;
  return p;
}

// Head 0 looks at one key, head 1 at all of them alike.
void prefill_sharp_and_flat(RankWorld& world) {
  auto k = world.tokens.kv(200);
  const auto v = world.tokens.kv(200);
  for (size_t i = 0; i < k.size() / 64; ++i) {
    const bool head0 = i % 2 == 0;
    std::fill_n(k.begin() + static_cast<std::ptrdiff_t>(i * 64), 64, 0.0f);
    k[i * 64] = head0 && i / 2 == 50 ? 40.0f : 0.0f;
    k[i * 64 + 1] = head0 ? 0.0f : 0.001f * static_cast<float>(i);
  }
  std::vector<float> q(size_t{64} * 2 * 64, 0.0f);
  for (size_t i = 0; i < q.size(); i += 64) q[i] = q[i + 1] = 8.0f;
  world.prefill(k, v, q);
}

TEST(BudgetShared, AFlatHeadTakesWhatASharpOneDoesNotNeed) {
  const auto geometry = geometry_of({.layers = 1, .kv_heads = 2, .group = 1, .head_dim = 64});
  RankWorld world(geometry, shared(0.25f));
  prefill_sharp_and_flat(world);
  const size_t sharp = world.positions(0).size(), flat = world.positions(1).size();
  EXPECT_EQ(sharp + flat, 128u);
  EXPECT_EQ(sharp, 16u);  // the share that no head goes below
  EXPECT_TRUE(world.holds(0, 50));
  world.run(64);
  EXPECT_LE(world.positions(0).size() + world.positions(1).size(), 128u);
  check_invariants(world.sequence);
}

TEST(BudgetShared, WithAllOfItsOwnItIsTheFixedBudget) {
  const auto geometry = geometry_of({.layers = 2, .kv_heads = 2, .group = 2, .head_dim = 64});
  PolicyParams fixed = shared(1.0f);
  fixed.rules[0].budget = BudgetRule::kFixed;
  fixed.rules[0].budget_low = 0.0f;
  RankWorld a(geometry, shared(1.0f)), b(geometry, fixed);
  a.prefill_random(200, 64);
  b.prefill_random(200, 64);
  a.run(100);
  b.run(100);
  for (uint32_t lane = 0; lane < 4; ++lane) EXPECT_EQ(a.positions(lane), b.positions(lane));
}

}  // namespace
}  // namespace thinkv::kernels
