// Entropy-coded streams (kvcomp as shipped) on real pages: what leaves when, what comes back, what
// it costs, and what is refused.
#include <numeric>

#include "tests/support/stream_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::attend_over;
using testing::check_invariants;
using testing::geometry_of;
using testing::RankWorld;
using testing::read_lane;
using testing::read_stream;
using testing::shipped_policy;
using testing::StoredToken;
using testing::stream_of;

constexpr uint32_t kDim = 64;
const testing::GeometryShape kTwoHeads{.layers = 2, .kv_heads = 2, .group = 2, .head_dim = kDim};

// Tokens in blocks and in pages, of which none is in both.
std::map<uint32_t, StoredToken> everything(const Sequence& sequence, uint32_t lane) {
  auto all = read_stream(sequence, lane);
  for (const auto& [position, token] : read_lane(sequence, lane)) {
    EXPECT_TRUE(all.emplace(position, token).second) << "twice: " << position;
  }
  return all;
}

std::vector<uint32_t> range(uint32_t first, uint32_t end) {
  std::vector<uint32_t> all(end - first);
  std::iota(all.begin(), all.end(), first);
  return all;
}

TEST(MethodKvComp, WholeBlocksLeaveAndTheNewestTwoStay) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kvcomp"));
  world.prefill_random(300, 0);
  for (uint32_t tokens = 300; tokens <= 520; ++tokens) {
    // The formula of the method's code: whole blocks of what is behind the newest 128, where the
    // open block counts as whole.
    const uint32_t blocks = (tokens + 64 - tokens % 64 - 128) / 64;
    for (uint32_t lane = 0; lane < 4; ++lane) {
      ASSERT_EQ(stream_of(world.sequence, lane).blocks().size(), blocks) << tokens;
      const auto in_pages = world.positions(lane);
      ASSERT_EQ(in_pages.front(), blocks * 64);
      ASSERT_EQ(in_pages.size(), tokens - blocks * 64);
    }
    ASSERT_EQ(world.sequence.stats().live_slots, 4u * tokens);
    check_invariants(world.sequence);
    world.run(1);
  }
}

// Prompt rows as they were given; each is back within half of its step.
TEST(MethodKvComp, EveryValueIsWithinHalfAStep) {
  const ModelGeometry g = geometry_of(kTwoHeads);
  RankWorld world(g, shipped_policy("kvcomp"));
  const auto k = world.tokens.kv(448), v = world.tokens.kv(448);
  world.prefill(k, v);
  const float rel_k = 0.05f, rel_v = 0.1f;
  const auto value = [&](const std::vector<float>& x, uint32_t token, uint32_t head, uint32_t c) {
    return x[(size_t{token} * 2 + head) * kDim + c];
  };
  double worst_k = 0.0, worst_v = 0.0;
  for (uint32_t head = 0; head < 2; ++head) {
    const auto stored = read_stream(world.sequence, head);
    ASSERT_EQ(stored.size(), 384u);
    for (uint32_t first = 0; first < 384; first += 64) {
      for (uint32_t c = 0; c < kDim; ++c) {
        float low = 1e9f, high = -1e9f;
        for (uint32_t t = first; t < first + 64; ++t) {
          low = std::min(low, value(k, t, head, c));
          high = std::max(high, value(k, t, head, c));
        }
        for (uint32_t t = first; t < first + 64; ++t) {
          const double error = std::fabs(stored.at(t).k[c] - value(k, t, head, c));
          worst_k = std::max(worst_k, error / (rel_k * (high - low)));
        }
      }
    }
    for (const auto& [t, token] : stored) {
      float low = 1e9f, high = -1e9f;
      for (uint32_t c = 0; c < kDim; ++c) {
        low = std::min(low, value(v, t, head, c));
        high = std::max(high, value(v, t, head, c));
      }
      for (uint32_t c = 0; c < kDim; ++c) {
        worst_v = std::max(
            worst_v, std::fabs(token.v[c] - value(v, t, head, c)) / double{rel_v * (high - low)});
      }
    }
  }
  // Half a step, 2^-8 more because the step is bf16, and the 16 bits that attention reads: at most
  // 4 x 2^-11 of a step of 0.2 here.
  EXPECT_LE(worst_k, 0.5 * (1 + 0x1p-8) + 0.01);
  EXPECT_LE(worst_v, 0.5 * (1 + 0x1p-8) + 0.01);
  EXPECT_GT(worst_k, 0.45);
}

TEST(MethodKvComp, AttentionIsThatOfTheDecodedTokens) {
  const ModelGeometry g = geometry_of(kTwoHeads);
  for (const KernelSet* kernels : {&host(), &reference()}) {
    RankWorld world(g, shipped_policy("kvcomp"), 0, *kernels);
    world.prefill_random(400, 0);
    world.run(70);
    ASSERT_TRUE(world.sequence.begin_step().has_value());
    for (uint32_t layer = 0; layer < g.layers; ++layer) {
      const auto k = world.tokens.kv(), v = world.tokens.kv(), q = world.tokens.q();
      std::vector<float> out(q.size());
      ASSERT_TRUE(world.sequence.append(layer, k.data(), v.data()).has_value());
      ASSERT_TRUE(world.sequence.attend(layer, q.data(), out.data(), nullptr).has_value());
      for (uint32_t head = 0; head < g.q_heads; ++head) {
        const auto tokens = everything(world.sequence, layer * 2 + head / 2);
        ASSERT_EQ(tokens.size(), 471u);
        const auto expected = attend_over(tokens, q.data() + head * kDim, kDim);
        for (uint32_t d = 0; d < kDim; ++d) EXPECT_NEAR(out[head * kDim + d], expected[d], 2e-3);
      }
    }
    world.sequence.cancel_step();
  }
}

// All bytes: streams, tables, codebooks, whole pages.
TEST(MethodKvComp, RealBytesAreAThirdOfA16BitCache) {
  RankWorld world(geometry_of({.layers = 2, .kv_heads = 2, .group = 1, .head_dim = 128}),
                  shipped_policy("kvcomp"));
  world.prefill(world.tokens.kv(4096), world.tokens.kv(4096));
  const SequenceStats stats = world.sequence.stats();
  uint64_t coded = 0;
  for (uint32_t lane = 0; lane < 4; ++lane) {
    const Stream stream = stream_of(world.sequence, lane);
    stream.blocks().for_each([&](uint32_t, const StreamBlock& block) { coded += block.bytes; });
    EXPECT_EQ(stream.blocks().size(), 63u);
  }
  // K in units of 64 values at .05 (4.3 bits), V of 128 at .1 (3.1), and 32 bits a unit.
  const double bits = 8.0 * static_cast<double>(coded) / (4 * 63 * 64 * 256);
  EXPECT_NEAR(bits, (4.3 + 0.5 + 3.1 + 0.25) / 2, 0.15);
  const double share = static_cast<double>(stats.bytes_held) / static_cast<double>(stats.bytes_f16);
  EXPECT_LT(share, 0.32);
  EXPECT_GT(share, bits / 16);
}

TEST(MethodKvComp, CodebooksAreFrozenAfterTheirFirstBlocks) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kvcomp"));
  world.run(127);
  const auto table = [&] {
    const SequenceState& state = *world.sequence.state();
    return SharedVector<LayerCodes>(state.header->codebooks, *state.store.heap)[1];
  };
  EXPECT_EQ(table().key[0], 0) << "no block yet";
  world.run(1);
  const LayerCodes first = table();
  EXPECT_TRUE(code_lengths_valid(first.key) && code_lengths_valid(first.value));
  world.run(128);
  EXPECT_EQ(stream_of(world.sequence, 2).blocks().size(), 3u);
  const LayerCodes later = table();
  EXPECT_TRUE(first.key == later.key && first.value == later.value);
}

TEST(Streams, ACancelledStepLeavesNoTrace) {
  const ModelGeometry g = geometry_of(kTwoHeads);
  RankWorld straight(g, shipped_policy("kvcomp")), wavering(g, shipped_policy("kvcomp"));
  for (RankWorld* world : {&straight, &wavering}) {
    world->prefill_random(200, 0);
    world->run(55);  // the next one makes a block
  }
  const SequenceStats before = wavering.sequence.stats();
  const auto stored = everything(wavering.sequence, 1);
  ASSERT_TRUE(wavering.sequence.begin_step().has_value());
  const auto k = testing::TokenSource(g, 77).kv();
  ASSERT_TRUE(wavering.sequence.append(0, k.data(), k.data()).has_value());
  wavering.sequence.cancel_step();
  EXPECT_EQ(wavering.source.promised(), 0u);
  EXPECT_EQ(wavering.sequence.stats().live_slots, before.live_slots);
  EXPECT_EQ(everything(wavering.sequence, 1), stored);
  straight.run(100);
  wavering.run(100);
  for (uint32_t lane = 0; lane < 4; ++lane) {
    EXPECT_EQ(everything(straight.sequence, lane), everything(wavering.sequence, lane));
  }
}

TEST(Streams, OutliveTheObjectAndMoveWithTheirPages) {
  const ModelGeometry g = geometry_of(kTwoHeads);
  RankWorld stays(g, shipped_policy("kvcomp")), moves(g, shipped_policy("kvcomp"), 3);
  for (RankWorld* world : {&stays, &moves}) {
    world->prefill_random(333, 0);
    world->run(20);
  }
  const PageId root = moves.sequence.detach();
  moves.pool.relocate();
  auto attached = Sequence::attach(moves.source, host(), root);
  ASSERT_TRUE(attached.has_value());
  moves.sequence = std::move(attached).value();
  std::vector<float> a, b;
  for (uint32_t i = 0; i < 80; ++i) {
    ASSERT_TRUE(testing::step(stays.sequence, stays.tokens, &a).has_value());
    ASSERT_TRUE(testing::step(moves.sequence, moves.tokens, &b).has_value());
    ASSERT_EQ(a, b) << i;
  }
  moves.sequence.release();
  EXPECT_EQ(moves.pool.held(), 0u);
}

TEST(Streams, ABlockGoesWholeAndItsPagesWithIt) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kvcomp"));
  world.prefill_random(64 * 12, 0);  // 11 blocks
  const uint64_t pages = world.sequence.stats().pages;
  // From the front, then from the middle.
  EXPECT_EQ(world.sequence.evict(range(0, 128)).value(), 4u * 128);
  EXPECT_EQ(world.sequence.evict(range(320, 384)).value(), 4u * 64);
  check_invariants(world.sequence);
  EXPECT_LT(world.sequence.stats().pages, pages);
  EXPECT_EQ(world.sequence.stats().live_slots, 4u * (64 * 12 - 192));
  EXPECT_EQ(world.sequence.stats().evicted_slots, 4u * 192);
  const auto left = everything(world.sequence, 3);
  EXPECT_EQ(left.count(127) + left.count(320) + left.count(383), 0u);
  EXPECT_EQ(left.count(128) + left.count(319) + left.count(384), 3u);
  EXPECT_EQ(world.sequence.evict(range(0, 128)).value(), 0u) << "gone already";
  // All of them, the page that the next block would begin in too; then blocks come again.
  EXPECT_EQ(world.sequence.evict(range(0, 64 * 11)).value(), 4u * 64 * 8);
  check_invariants(world.sequence);
  EXPECT_EQ(world.positions(0).size(), 64u);
  EXPECT_EQ(world.sequence.stats().pages, 4u * 8);
  world.run(200);
  check_invariants(world.sequence);
  EXPECT_EQ(everything(world.sequence, 2).size(), 264u);
  EXPECT_EQ(stream_of(world.sequence, 0).blocks().size(), 3u);
}

TEST(Streams, WhatWouldNeedASingleTokenOfABlockIsRefused) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kvcomp"));
  world.prefill_random(300, 0);
  const auto refused = [&](const std::vector<uint32_t>& positions) {
    const auto done = world.sequence.evict(positions);
    EXPECT_FALSE(done.has_value());
    return done ? std::string() : std::string(done.error().what);
  };
  auto all_but_one = range(0, 128);
  all_but_one.erase(all_but_one.begin() + 70);
  EXPECT_NE(refused(all_but_one).find("name all 64"), std::string::npos);
  EXPECT_NE(refused({5}).find("name all 64"), std::string::npos);
  EXPECT_NE(refused({200}).find("whole coded blocks"), std::string::npos);
  EXPECT_EQ(world.sequence.evict(std::vector<uint32_t>{299, 4000}).value(), 0u);
  EXPECT_EQ(world.sequence.quantize(0, 10, Format::kK4V4).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(world.sequence.stats().live_slots, 4u * 300);
  check_invariants(world.sequence);
}

TEST(Streams, AnEmptyPoolRefusesTheStepAndNothingElse) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 1});
  testing::VectorPool pool({.head_dim = kDim, .capacity = 41});
  testing::VectorPageSource source(pool), hog(pool);
  testing::TokenSource tokens(g, 5);
  Sequence sequence =
      std::move(Sequence::create(source, host(), g, shipped_policy("kvcomp"))).value();
  ASSERT_TRUE(testing::prefill(sequence, tokens, 191).has_value());
  ASSERT_TRUE(hog.reserve(pool.free_pages()).has_value());
  const uint64_t held = pool.held();
  const Status refused = sequence.begin_step();
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code, ErrorCode::kExhausted);
  EXPECT_EQ(pool.held(), held);
  ASSERT_TRUE(hog.reserve(0).has_value());
  ASSERT_TRUE(testing::step(sequence, tokens).has_value());
  EXPECT_EQ(stream_of(sequence, 0).blocks().size(), 2u);
  check_invariants(sequence);
}

TEST(Streams, RowsWithoutCodesAreKeptAsTheyAre) {
  const ModelGeometry g = geometry_of({.layers = 1, .kv_heads = 2});
  RankWorld world(g, shipped_policy("kvcomp"));
  auto k = world.tokens.kv(192);
  const auto v = world.tokens.kv(192);
  const size_t row = 2 * kDim;
  k[70 * row + 3] = std::numeric_limits<float>::infinity();  // head 0, the second block
  world.prefill(k, v);
  const Stream stream = stream_of(world.sequence, 0);
  EXPECT_EQ(stream.blocks()[0].raw, 0u);
  EXPECT_EQ(stream.blocks()[1].raw, 1u);
  EXPECT_EQ(stream.blocks()[1].bytes, raw_block_bytes(kDim));
  const auto stored = read_stream(world.sequence, 0);
  for (uint32_t c = 0; c < kDim; ++c) {
    EXPECT_EQ(stored.at(70).k[c], testing::to_16bit(k[70 * row + c], Format::kF16));
    EXPECT_EQ(stored.at(99).v[c], testing::to_16bit(v[99 * row + c], Format::kF16));
  }
  EXPECT_EQ(stream_of(world.sequence, 1).blocks()[1].raw, 0u);
  check_invariants(world.sequence);
}

// ---- bytes in the pool that are not what was written ----

struct Damaged {
  Damaged() : world(geometry_of({.layers = 1, .kv_heads = 1}), shipped_policy("kvcomp")) {
    world.prefill_random(320, 0);
  }
  Status attend() {
    const auto k = world.tokens.kv(), v = world.tokens.kv(), q = world.tokens.q();
    std::vector<float> out(q.size());
    EXPECT_TRUE(world.sequence.begin_step().has_value());
    EXPECT_TRUE(world.sequence.append(0, k.data(), v.data()).has_value());
    const Status done = world.sequence.attend(0, q.data(), out.data(), nullptr);
    world.sequence.cancel_step();
    return done;
  }
  bool attaches() {
    const PageId root = world.sequence.detach();
    return Sequence::attach(world.source, host(), root).has_value();
  }
  RankWorld world;
};

TEST(Streams, DamagedBytesAreAnErrorOfTheStep) {
  Damaged damaged;
  ASSERT_TRUE(damaged.attend().has_value());
  const SequenceState& state = *damaged.world.sequence.state();
  StreamLane& lane = *stream_header(state.store, *state.lanes[0]);
  const uint32_t page = SharedVector<uint32_t>(lane.pages, *state.store.heap)[0];
  std::memset(state.pages.address(page), 0xFF, 32);  // the lengths of the runs
  const Status done = damaged.attend();
  ASSERT_FALSE(done.has_value());
  EXPECT_EQ(done.error().code, ErrorCode::kInternal);
}

TEST(Streams, ABlockOutsideOfItsStreamIsAnErrorOfTheStep) {
  Damaged damaged;
  stream_of(damaged.world.sequence, 0).blocks()[2].unit = 1u << 30;
  EXPECT_EQ(damaged.attend().error().code, ErrorCode::kInternal);
  EXPECT_FALSE(damaged.attaches());
}

TEST(Streams, CodebooksThatAreNoneAreNotAttached) {
  Damaged damaged;
  const SequenceState& state = *damaged.world.sequence.state();
  SharedVector<LayerCodes>(state.header->codebooks, *state.store.heap)[0].value[9] = 200;
  EXPECT_FALSE(damaged.attaches());
}

TEST(Streams, BlocksWithoutCodebooksAreNotAttached) {
  Damaged damaged;
  const SequenceState& state = *damaged.world.sequence.state();
  SharedVector<LayerCodes>(state.header->codebooks, *state.store.heap)[0] = {};
  EXPECT_FALSE(damaged.attaches());
}

TEST(Streams, ATableOutOfOrderIsNotAttached) {
  Damaged damaged;
  stream_of(damaged.world.sequence, 0).blocks()[1].first_position = 0;
  EXPECT_FALSE(damaged.attaches());
}

}  // namespace
}  // namespace thinkv::kernels
