// The life of a sequence: prompt, steps, the buffer, attention, misuse, exhaustion.
#include <cmath>

#include "tests/support/sequence_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::check_invariants;
using testing::geometry_of;
using testing::plain_policy;
using testing::read_lane;
using testing::step;
using testing::TokenSource;
using testing::VectorPageSource;
using testing::VectorPool;

struct World {
  explicit World(const ModelGeometry& g, const PolicyParams& p, const SequenceOptions& o = {},
                 uint32_t capacity = 2048)
      : pool({.head_dim = g.head_dim, .capacity = capacity}),
        source(pool),
        tokens(g, 11),
        sequence(std::move(Sequence::create(source, reference(), g, p, o)).value()) {}
  VectorPool pool;
  VectorPageSource source;
  TokenSource tokens;
  Sequence sequence;
};

const testing::GeometryShape kSmall{.layers = 2, .kv_heads = 2, .group = 3, .head_dim = 64};

// Attention over what a lane holds, in double, from the decoded tokens.
std::vector<double> dense_attention(const Sequence& sequence, uint32_t lane, const float* q_row,
                                    double* lse) {
  const uint32_t dim = sequence.geometry().head_dim;
  std::vector<float> q(q_row, q_row + dim);
  const bool rotate = sequence.policy().rotate != 0;
  if (rotate) reference().rotate(q.data(), 1, dim);
  double total = 0.0;
  std::vector<double> sum(dim, 0.0);
  for (const auto& [position, token] : read_lane(sequence, lane)) {
    double dot = 0.0;
    for (uint32_t d = 0; d < dim; ++d) dot += double{q[d]} * double{token.k[d]};
    const double weight = std::exp(dot * double{sequence.state()->softmax_scale});
    total += weight;
    for (uint32_t d = 0; d < dim; ++d) sum[d] += weight * double{token.v[d]};
  }
  std::vector<float> out(dim);
  for (uint32_t d = 0; d < dim; ++d) out[d] = static_cast<float>(sum[d] / total);
  if (rotate) reference().rotate_back(out.data(), 1, dim);
  *lse = std::log(total);
  return {out.begin(), out.end()};
}

void expect_attention_matches(World& world) {
  const ModelGeometry g = world.sequence.geometry();
  ASSERT_TRUE(world.sequence.begin_step().has_value());
  for (uint32_t layer = 0; layer < g.layers; ++layer) {
    const auto k = world.tokens.kv(), v = world.tokens.kv(), q = world.tokens.q();
    std::vector<float> out(q.size()), lse(g.q_heads);
    ASSERT_TRUE(world.sequence.append(layer, k.data(), v.data()).has_value());
    ASSERT_TRUE(world.sequence.attend(layer, q.data(), out.data(), lse.data()).has_value());
    for (uint32_t head = 0; head < g.q_heads; ++head) {
      double lse_wanted = 0.0;
      const uint32_t lane = layer * g.kv_heads + head / g.group();
      const float* q_row = q.data() + size_t{head} * g.head_dim;
      const auto wanted = dense_attention(world.sequence, lane, q_row, &lse_wanted);
      EXPECT_NEAR(double{lse[head]}, lse_wanted, 1e-4);
      for (uint32_t d = 0; d < g.head_dim; ++d) {
        ASSERT_NEAR(double{out[size_t{head} * g.head_dim + d]}, wanted[d], 2e-4);
      }
    }
  }
  ASSERT_TRUE(world.sequence.end_step().has_value());
}

TEST(SequenceStep, AttentionIsThatOfTheStoredTokensInEveryFormat) {
  for (uint32_t f = 1; f < kFormatCount; ++f) {
    SCOPED_TRACE(format_info(static_cast<Format>(f)).name);
    PolicyParams policy = plain_policy(static_cast<Format>(f));
    policy.sink_format = Format::kF16;
    policy.sink_tokens = 4;
    World world(geometry_of(kSmall), policy);
    ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 37).has_value());
    for (uint32_t i = 0; i < 35; ++i) {
      ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
    }
    expect_attention_matches(world);
    check_invariants(world.sequence);
  }
}

TEST(SequenceStep, WithoutRotationToo) {
  PolicyParams policy = plain_policy(Format::kK8V8);
  policy.rotate = 0;
  World world(geometry_of(kSmall), policy);
  for (uint32_t i = 0; i < 20; ++i) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  expect_attention_matches(world);
}

TEST(SequenceStep, TheNewestSixteenAreExact) {
  const ModelGeometry geometry = geometry_of({});
  World world(geometry, plain_policy(Format::kK2V2));
  for (uint32_t t = 1; t <= 200; ++t) {
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    const auto k = world.tokens.kv(), v = world.tokens.kv();
    ASSERT_TRUE(world.sequence.append(0, k.data(), v.data()).has_value());
    uint32_t exact = 0;
    for (const auto& [position, token] : read_lane(world.sequence, 0)) {
      exact += token.buffered ? 1 : 0;
    }
    EXPECT_EQ(exact, (t - 1) % 16 + 1);  // a full buffer leaves when the next token comes
    EXPECT_EQ(read_lane(world.sequence, 0).size(), t);
    ASSERT_TRUE(world.sequence.end_step().has_value());
  }
}

TEST(SequenceStep, SixteenBitFlushesCopyNothing) {
  const ModelGeometry geometry = geometry_of({});
  World world(geometry, plain_policy(Format::kF16));
  for (uint32_t t = 0; t < 16; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  const LaneHeader& lane = *world.sequence.state()->lanes[0];
  const std::set<uint32_t> buffer(lane.buffer_page, lane.buffer_page + 2);
  ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  std::set<uint32_t> table;
  world.sequence.state()->lane(0).pages().for_each(
      [&](uint32_t, const PageDescriptor& page) { table.insert(page.page); });
  EXPECT_EQ(table, buffer);
  EXPECT_EQ(world.sequence.stats().pages, 3u) << "the second buffer page comes when it is needed";
}

TEST(SequenceStep, Bf16ModelsKeepBf16) {
  ModelGeometry geometry = geometry_of({});
  geometry.value_type = ValueType::kBf16;
  World world(geometry, plain_policy(Format::kF16));
  for (uint32_t t = 0; t < 40; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  for (const auto& [position, token] : read_lane(world.sequence, 0)) {
    EXPECT_EQ(token.format, Format::kBf16);
  }
}

TEST(SequenceStep, PromptFormatsAndSinks) {
  PolicyParams policy = plain_policy(Format::kK4V2);
  policy.prompt_format = Format::kK4V4;
  policy.sink_format = Format::kK8V8;
  policy.sink_tokens = 10;
  World world(geometry_of(kSmall), policy);
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 70).has_value());
  for (uint32_t t = 0; t < 17; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  for (const auto& [position, token] : read_lane(world.sequence, 3)) {
    const Format wanted = position < 10   ? Format::kK8V8
                          : position < 70 ? Format::kK4V4
                          : position < 86 ? Format::kK4V2
                                          : Format::kF16;
    EXPECT_EQ(token.format, wanted) << position;
  }
}

TEST(SequenceStep, SinksAmongGeneratedTokensWhereThereIsNoPrompt) {
  PolicyParams policy = plain_policy(Format::kK4V4);
  policy.sink_format = Format::kF16;
  policy.sink_tokens = 5;
  World world(geometry_of(kSmall), policy);
  for (uint32_t t = 0; t < 17; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  for (const auto& [position, token] : read_lane(world.sequence, 0)) {
    EXPECT_EQ(token.format, position < 5 || position == 16 ? Format::kF16 : Format::kK4V4);
  }
  check_invariants(world.sequence);
}

TEST(SequenceStep, ReleaseGivesEverythingBackAndLaterCallsAreStale) {
  World world(geometry_of(kSmall), testing::tbe_policy(64));
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 50).has_value());
  for (uint32_t t = 0; t < 300; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  const SequenceStats stats = world.sequence.stats();
  EXPECT_EQ(stats.pages + stats.metadata_pages, world.pool.held());
  EXPECT_EQ(stats.bytes_held, world.pool.held() * page_bytes(64));
  world.sequence.release();
  EXPECT_EQ(world.pool.held(), 0u);
  EXPECT_EQ(world.pool.free_pages(), 2048u);
  const float x[64 * 6] = {};
  float out[64 * 6];
  EXPECT_EQ(world.sequence.begin_step().error().code, ErrorCode::kStale);
  EXPECT_EQ(world.sequence.append(0, x, x).error().code, ErrorCode::kStale);
  EXPECT_EQ(world.sequence.attend(0, x, out, nullptr).error().code, ErrorCode::kStale);
  EXPECT_EQ(world.sequence.end_step().error().code, ErrorCode::kStale);
  EXPECT_EQ(world.sequence.prefill(0, x, x, 1).error().code, ErrorCode::kStale);
  EXPECT_EQ(world.sequence.evict({}).error().code, ErrorCode::kStale);
  EXPECT_EQ(world.sequence.quantize(0, 0, Format::kF16).error().code, ErrorCode::kStale);
  EXPECT_EQ(world.sequence.set_budget(5).error().code, ErrorCode::kStale);
  world.sequence.release();
}

TEST(SequenceMisuse, StepsOutOfOrder) {
  World world(geometry_of(kSmall), plain_policy(Format::kK4V4));
  Sequence& s = world.sequence;
  const float x[64 * 6] = {};
  float out[64 * 6];
  const auto refused = [](const Status& status) {
    return !status && status.error().code == ErrorCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused(s.append(0, x, x)));
  EXPECT_TRUE(refused(s.attend(0, x, out, nullptr)));
  EXPECT_TRUE(refused(s.end_step()));
  EXPECT_TRUE(refused(s.prefill_end()));
  ASSERT_TRUE(s.begin_step().has_value());
  EXPECT_TRUE(refused(s.begin_step()));
  EXPECT_TRUE(refused(s.attend(0, x, out, nullptr))) << "before its append";
  EXPECT_TRUE(refused(s.append(2, x, x))) << "no such layer";
  EXPECT_TRUE(refused(s.append(0, nullptr, x)));
  ASSERT_TRUE(s.append(0, x, x).has_value());
  EXPECT_TRUE(refused(s.append(0, x, x))) << "twice";
  EXPECT_TRUE(refused(s.attend(0, nullptr, out, nullptr)));
  EXPECT_TRUE(refused(s.attend(1, x, out, nullptr)));
  AttendScratch scratch;
  EXPECT_TRUE(refused(s.attend_lane(0, 2, x, out, nullptr, scratch))) << "no such kv head";
  EXPECT_TRUE(refused(s.end_step())) << "layer 1 is missing";
  EXPECT_EQ(s.evict({}).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(s.quantize(0, 0, Format::kF16).error().code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(refused(s.prefill(0, x, x, 1)));
  ASSERT_TRUE(s.append(1, x, x).has_value());
  ASSERT_TRUE(s.end_step().has_value());
  EXPECT_TRUE(refused(s.prefill(0, x, x, 1))) << "after the first token";
  EXPECT_EQ(s.tokens(), 1u);
}

TEST(SequenceMisuse, Prompts) {
  World world(geometry_of(kSmall), plain_policy(Format::kK4V4));
  Sequence& s = world.sequence;
  const auto x = world.tokens.kv(3);
  const auto refused = [](const Status& status) {
    return !status && status.error().code == ErrorCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused(s.prefill(0, x.data(), x.data(), 0)));
  EXPECT_TRUE(refused(s.prefill(9, x.data(), x.data(), 3)));
  EXPECT_TRUE(refused(s.prefill(0, x.data(), nullptr, 3)));
  ASSERT_TRUE(s.prefill(0, x.data(), x.data(), 3).has_value());
  EXPECT_TRUE(refused(s.prefill(0, x.data(), x.data(), 3))) << "twice";
  EXPECT_TRUE(refused(s.prefill(1, x.data(), x.data(), 2))) << "another token count";
  EXPECT_TRUE(refused(s.prefill_end())) << "layer 1 is missing";
  EXPECT_TRUE(refused(s.begin_step()));
  ASSERT_TRUE(s.prefill(1, x.data(), x.data(), 3).has_value());
  ASSERT_TRUE(s.prefill_end().has_value());
  EXPECT_TRUE(refused(s.prefill_end()));
  EXPECT_TRUE(refused(s.prefill(0, x.data(), x.data(), 3)));
  EXPECT_EQ(s.tokens(), 3u);
}

TEST(SequenceMisuse, GeometryAndPolicy) {
  VectorPool pool({});
  VectorPageSource source(pool);
  const auto code = [&](const ModelGeometry& g, const PolicyParams& p) {
    auto sequence = Sequence::create(source, reference(), g, p);
    return sequence ? ErrorCode::kOk : sequence.error().code;
  };
  const PolicyParams good = testing::tbe_policy(64);
  ModelGeometry geometry = geometry_of(kSmall);
  EXPECT_EQ(code(geometry, good), ErrorCode::kOk);
  geometry.head_dim = 96;
  EXPECT_EQ(code(geometry, good), ErrorCode::kUnsupported);
  geometry = geometry_of(kSmall);
  geometry.layers = 0;
  EXPECT_EQ(code(geometry, good), ErrorCode::kInvalidArgument);
  geometry = geometry_of(kSmall);
  PolicyParams bad = good;
  bad.schedule[1] = 64;
  EXPECT_EQ(code(geometry, bad), ErrorCode::kInvalidArgument);
  bad = good;
  bad.label_layer_count = 1;
  bad.label_layers[0] = 2;
  EXPECT_EQ(code(geometry, bad), ErrorCode::kInvalidArgument);
  bad = good;
  bad.segment_tokens = 1024;
  bad.schedule_length = 1;
  bad.schedule[0] = 1000;
  EXPECT_EQ(code(geometry, bad), ErrorCode::kOk);
  bad.floor_rule = FloorRule::kMerge;
  EXPECT_EQ(code(geometry, bad), ErrorCode::kUnsupported);
  EXPECT_EQ(pool.held(), 0u);
}

TEST(SequenceExhaustion, OpeningWithoutPagesHoldsNothing) {
  const ModelGeometry geometry = geometry_of({.layers = 30, .kv_heads = 3});
  for (uint32_t capacity = 0; capacity < 6; ++capacity) {
    VectorPool pool({.head_dim = 64, .capacity = capacity});
    VectorPageSource source(pool);
    auto sequence = Sequence::create(source, reference(), geometry, plain_policy(Format::kF16));
    ASSERT_FALSE(sequence.has_value());
    EXPECT_EQ(sequence.error().code, ErrorCode::kExhausted);
    EXPECT_EQ(pool.held(), 0u);
  }
}

TEST(SequenceExhaustion, AStepThatCannotHaveItsPagesChangesNothingAndWorksLater) {
  const ModelGeometry geometry = geometry_of(kSmall);
  World world(geometry, plain_policy(Format::kK8V8), {}, 40);
  uint32_t done = 0;
  Status last;
  while ((last = step(world.sequence, world.tokens)).has_value()) ++done;
  EXPECT_EQ(last.error().code, ErrorCode::kExhausted);
  EXPECT_EQ(world.sequence.tokens(), done);
  const auto before = read_lane(world.sequence, 2);
  EXPECT_EQ(before.size(), done);
  EXPECT_EQ(world.sequence.begin_step().error().code, ErrorCode::kExhausted);
  EXPECT_EQ(read_lane(world.sequence, 2), before);
  EXPECT_FALSE(world.sequence.in_step());
  // Room by eviction, and the sequence goes on.
  std::vector<uint32_t> oldest(done - 16);
  for (uint32_t i = 0; i < oldest.size(); ++i) oldest[i] = i;
  ASSERT_TRUE(world.sequence.evict(oldest).has_value());
  EXPECT_TRUE(step(world.sequence, world.tokens).has_value());
  check_invariants(world.sequence);
}

TEST(SequenceExhaustion, APromptLayerThatDoesNotFitCanBeTriedAgain) {
  const ModelGeometry geometry = geometry_of({.layers = 2});
  VectorPool pool({.head_dim = 64, .capacity = 10});
  VectorPageSource source(pool), other_source(pool);
  TokenSource tokens(geometry, 3);
  auto other = Sequence::create(other_source, reference(), geometry, plain_policy(Format::kK4V4));
  auto sequence = Sequence::create(source, reference(), geometry, plain_policy(Format::kK4V4));
  ASSERT_TRUE(other.has_value() && sequence.has_value());
  ASSERT_TRUE(testing::prefill(*other, tokens, 60).has_value());
  const auto x = tokens.kv(70);
  ASSERT_TRUE(sequence->prefill(0, x.data(), x.data(), 70).has_value());
  const uint64_t held = pool.held();
  EXPECT_EQ(sequence->prefill(1, x.data(), x.data(), 70).error().code, ErrorCode::kExhausted);
  EXPECT_EQ(pool.held(), held);
  other->release();
  EXPECT_TRUE(sequence->prefill(1, x.data(), x.data(), 70).has_value());
  EXPECT_TRUE(sequence->prefill_end().has_value());
}

TEST(SequenceCancel, APartOfAStepLeavesNoTrace) {
  const ModelGeometry geometry = geometry_of(kSmall);
  World world(geometry, plain_policy(Format::kK4V4));
  World twin(geometry, plain_policy(Format::kK4V4));
  for (uint32_t t = 0; t < 40; ++t) {
    const auto k = world.tokens.kv();
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    ASSERT_TRUE(world.sequence.append(t % 2, k.data(), k.data()).has_value());
    world.sequence.cancel_step();
    EXPECT_EQ(world.sequence.tokens(), t);
    TokenSource same(geometry, t + 100), again(geometry, t + 100);
    ASSERT_TRUE(step(world.sequence, same).has_value());
    ASSERT_TRUE(step(twin.sequence, again).has_value());
    check_invariants(world.sequence);
  }
  for (uint32_t lane = 0; lane < geometry.lanes(); ++lane) {
    EXPECT_EQ(read_lane(world.sequence, lane), read_lane(twin.sequence, lane));
  }
  EXPECT_EQ(world.source.promised(), 0u);
}

TEST(SequenceSteady, AStepWithoutNewPagesAsksForNone) {
  World world(geometry_of(kSmall), plain_policy(Format::kK4V4));
  for (uint32_t t = 0; t < 10; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  const uint64_t calls = world.source.reserve_calls;
  for (uint32_t t = 10; t < 16; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  EXPECT_EQ(world.source.reserve_calls, calls);
  EXPECT_EQ(world.source.promised(), 0u);
}

TEST(SequenceRequests, EvictSkipsTheNewestAndTheDead) {
  World world(geometry_of(kSmall), plain_policy(Format::kK4V4));
  for (uint32_t t = 0; t < 48; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  const std::vector<uint32_t> wanted = {3, 1, 3, 31, 32, 47, 48, 4000};
  EXPECT_EQ(world.sequence.evict(wanted).value(), 3u * 4u);
  EXPECT_EQ(world.sequence.evict(wanted).value(), 0u);
  const auto lane = read_lane(world.sequence, 1);
  EXPECT_EQ(lane.size(), 45u);
  EXPECT_EQ(lane.count(1) + lane.count(3) + lane.count(31), 0u);
  EXPECT_EQ(lane.count(32) + lane.count(47), 2u);
  EXPECT_EQ(world.sequence.stats().evicted_slots, 12u);
}

TEST(SequenceRequests, EvictedSlotsAreTakenByTheNextFlush) {
  World world(geometry_of({}), plain_policy(Format::kK4V4));
  for (uint32_t t = 0; t < 49; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  // 48 tokens in two pages (32 + 16), one in the buffer.
  std::vector<uint32_t> wanted(12);
  for (uint32_t i = 0; i < 12; ++i) wanted[i] = 2 * i;
  ASSERT_EQ(world.sequence.evict(wanted).value(), 12u);
  const uint64_t pages = world.sequence.stats().pages;
  for (uint32_t t = 49; t < 65; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  EXPECT_EQ(world.sequence.stats().reused_slots, 12u);
  EXPECT_EQ(world.sequence.stats().pages, pages);
  EXPECT_EQ(read_lane(world.sequence, 0).size(), 53u);
}

TEST(SequenceRequests, QuantizeRecodesARangeAndNothingElse) {
  World world(geometry_of(kSmall), plain_policy(Format::kK8V8));
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 20).has_value());
  for (uint32_t t = 0; t < 40; ++t) ASSERT_TRUE(step(world.sequence, world.tokens).has_value());
  const auto before = read_lane(world.sequence, 0);
  // 52 tokens are out of the buffer; 10 .. 51 of the range are.
  EXPECT_EQ(world.sequence.quantize(10, 59, Format::kK4V2).value(), 42u * 4u);
  const auto after = read_lane(world.sequence, 0);
  ASSERT_EQ(after.size(), before.size());
  for (const auto& [position, token] : after) {
    const bool recoded = position >= 10 && position < 52;
    EXPECT_EQ(token.format, recoded ? Format::kK4V2 : before.at(position).format);
    EXPECT_TRUE(recoded || token == before.at(position)) << position;
  }
  EXPECT_EQ(world.sequence.quantize(10, 59, Format::kK4V2).value(), 0u);
  EXPECT_EQ(world.sequence.stats().recoded_slots, 168u);
  EXPECT_EQ(world.sequence.stats().recoded_bytes,
            168u * page_layout(Format::kK4V2, 64).slot_payload_bytes());
  check_invariants(world.sequence);
  expect_attention_matches(world);
}

TEST(SequenceRequests, BadRangesAndFormats) {
  World world(geometry_of(kSmall), plain_policy(Format::kK8V8));
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 20).has_value());
  const auto code = [&](uint32_t first, uint32_t last, Format format) {
    return world.sequence.quantize(first, last, format).error().code;
  };
  EXPECT_EQ(code(0, 20, Format::kK4V4), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(5, 4, Format::kK4V4), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(0, 0xFFFF'FFFFu, Format::kK4V4), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(0, 5, Format::kNone), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(0, 5, static_cast<Format>(kAllFormatCount)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(0, 5, Format::kKivi2), ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace thinkv::kernels
