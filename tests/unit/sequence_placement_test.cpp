// Where a sequence lies has no influence on what it answers: page ids, addresses, what dead slots
// hold, and whether the process that wrote it is still there.
#include <thread>

#include "tests/support/sequence_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::geometry_of;
using testing::step;
using testing::TokenSource;
using testing::VectorPageSource;
using testing::VectorPool;

const testing::GeometryShape kShape{.layers = 2, .kv_heads = 2, .group = 3, .head_dim = 64};

PolicyParams busy_policy() {
  PolicyParams policy = testing::tbe_policy(150);
  policy.select = SelectRule::kWeightedMedoids;
  policy.prompt_format = Format::kK8V4;
  policy.sink_format = Format::kF16;
  policy.sink_tokens = 4;
  return policy;
}

struct World {
  explicit World(uint64_t shuffle_seed, const PolicyParams& policy = busy_policy())
      : pool({.head_dim = 64, .capacity = 512, .shuffle_seed = shuffle_seed}),
        source(pool),
        tokens(geometry_of(kShape), 21),
        sequence(std::move(Sequence::create(source, host(), geometry_of(kShape), policy)).value()) {
    EXPECT_TRUE(testing::prefill(sequence, tokens, 33).has_value());
  }
  std::vector<float> next() {
    std::vector<float> out;
    EXPECT_TRUE(step(sequence, tokens, &out).has_value());
    return out;
  }
  VectorPool pool;
  VectorPageSource source;
  TokenSource tokens;
  Sequence sequence;
};

void set_bits(std::byte* page, const CodeSection& section, uint32_t slot) {
  for (uint32_t dim = 0; dim < section.head_dim; ++dim) {
    const CodeSite site = section.site(slot, dim);
    for (uint32_t bit = 0; bit < section.bits; ++bit) {
      const uint32_t at = site.shift + bit;
      page[site.byte + at / 8] |= static_cast<std::byte>(1u << (at % 8));
    }
  }
}

// Codes, scales and position of a slot all ones: NaN wherever the format has one.
void poison_slot(std::byte* page, const PageLayout& layout, uint32_t slot) {
  const FormatInfo& info = format_info(layout.format);
  set_bits(page, layout.k, slot);
  set_bits(page, layout.v, slot);
  const uint32_t k_scale = info.k.scale_bytes(layout.head_dim);
  const uint32_t v_scale = info.v.scale_bytes(layout.head_dim);
  std::memset(page + layout.k_scale_offset + slot * k_scale, 0xFF, k_scale);
  std::memset(page + layout.v_scale_offset + slot * v_scale, 0xFF, v_scale);
  std::memset(page + layout.position_offset + slot * kPositionBytes, 0xFF, kPositionBytes);
}

// Result: slots poisoned.
uint32_t poison_dead_slots(const Sequence& sequence) {
  const SequenceState& state = *sequence.state();
  uint32_t poisoned = 0;
  const auto poison = [&](uint32_t raw, Format format, uint64_t live) {
    const PageLayout& layout = page_layout(format, state.geometry.head_dim);
    std::byte* page = state.pages.address(raw);
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      if (((live >> slot) & 1u) != 0) continue;
      poison_slot(page, layout, slot);
      ++poisoned;
    }
    std::memset(page + layout.bytes_used, 0xFF, page_bytes(layout.head_dim) - layout.bytes_used);
  };
  for (uint32_t i = 0; i < state.lanes.size(); ++i) {
    state.lane(i).pages().for_each([&](uint32_t, const PageDescriptor& page) {
      poison(page.page, static_cast<Format>(page.format), page.live);
    });
    const LaneHeader& lane = *state.lanes[i];
    for (uint32_t b = 0; b < kBufferPages; ++b) {
      const uint32_t first = b * kBufferPageSlots;
      const uint32_t count = lane.buffer_count > first ? lane.buffer_count - first : 0;
      if (lane.buffer_page[b] != PageId::kNoneRaw) {
        poison(lane.buffer_page[b], state.store.wide, low_slots(std::min(count, 8u)));
      }
    }
  }
  return poisoned;
}

TEST(SequencePlacement, TheOrderOfPagesInThePoolChangesNoBit) {
  World plain(0), shuffled(77), other(1234567);
  for (uint32_t t = 0; t < 400; ++t) {
    const std::vector<float> out = plain.next();
    ASSERT_EQ(out, shuffled.next()) << t;
    ASSERT_EQ(out, other.next()) << t;
  }
  EXPECT_GT(plain.sequence.stats().reused_slots, 0u);
  EXPECT_EQ(plain.sequence.stats().reused_slots, other.sequence.stats().reused_slots);
}

TEST(SequencePlacement, MovingASequenceToOtherAddressesChangesNoBit) {
  World still(0), moving(5);
  for (uint32_t t = 0; t < 300; ++t) {
    if (t % 37 == 0) {
      const PageId root = moving.sequence.detach();
      moving.pool.relocate();
      auto attached = Sequence::attach(moving.source, host(), root);
      ASSERT_TRUE(attached.has_value()) << attached.error().what;
      moving.sequence = std::move(attached).value();
    }
    ASSERT_EQ(still.next(), moving.next()) << t;
  }
  const SequenceStats a = still.sequence.stats(), b = moving.sequence.stats();
  EXPECT_EQ(a.bytes_held, b.bytes_held);
  EXPECT_EQ(a.demotions, b.demotions);
  EXPECT_EQ(a.evicted_slots, b.evicted_slots);
  moving.sequence.release();
  EXPECT_EQ(moving.pool.held(), 0u);
}

TEST(SequencePlacement, NanInDeadSlotsAndSpareBytesChangesNoBit) {
  for (uint32_t f = 1; f < kFormatCount; ++f) {
    SCOPED_TRACE(format_info(static_cast<Format>(f)).name);
    PolicyParams policy = busy_policy();
    policy.thought_format[0] = static_cast<Format>(f);
    World clean(0, policy), poisoned(0, policy);
    uint64_t slots = 0;
    for (uint32_t t = 0; t < 200; ++t) {
      slots += poison_dead_slots(poisoned.sequence);
      ASSERT_EQ(clean.next(), poisoned.next()) << t;
    }
    EXPECT_GT(slots, 0u);
  }
}

TEST(SequencePlacement, LanesOnTheirOwnAnswerAsTheWholeLayer) {
  World whole(0), lanes(0);
  const ModelGeometry g = geometry_of(kShape);
  const size_t rows = size_t{g.group()} * g.head_dim;
  for (uint32_t t = 0; t < 40; ++t) {
    const std::vector<float> wanted = whole.next();
    ASSERT_TRUE(lanes.sequence.begin_step().has_value());
    for (uint32_t layer = 0; layer < g.layers; ++layer) {
      const auto k = lanes.tokens.kv(), v = lanes.tokens.kv(), q = lanes.tokens.q();
      ASSERT_TRUE(lanes.sequence.append(layer, k.data(), v.data()).has_value());
      for (uint32_t head = g.kv_heads; head-- > 0;) {
        AttendScratch scratch;
        std::vector<float> out(rows);
        ASSERT_TRUE(
            lanes.sequence
                .attend_lane(layer, head, q.data() + head * rows, out.data(), nullptr, scratch)
                .has_value());
        const auto at =
            wanted.begin() + static_cast<std::ptrdiff_t>((layer * g.kv_heads + head) * rows);
        ASSERT_TRUE(std::equal(out.begin(), out.end(), at));
      }
    }
    ASSERT_TRUE(lanes.sequence.end_step().has_value());
  }
}

TEST(SequencePlacement, LanesOfALayerRunOnThreads) {
  World serial(0), threaded(0);
  const ModelGeometry g = geometry_of(kShape);
  const size_t rows = size_t{g.group()} * g.head_dim;
  std::vector<AttendScratch> scratch(g.kv_heads);
  for (uint32_t t = 0; t < 60; ++t) {
    const std::vector<float> wanted = serial.next();
    std::vector<float> out(wanted.size());
    ASSERT_TRUE(threaded.sequence.begin_step().has_value());
    for (uint32_t layer = 0; layer < g.layers; ++layer) {
      const auto k = threaded.tokens.kv(), v = threaded.tokens.kv(), q = threaded.tokens.q();
      ASSERT_TRUE(threaded.sequence.append(layer, k.data(), v.data()).has_value());
      std::vector<std::thread> threads;
      for (uint32_t head = 0; head < g.kv_heads; ++head) {
        threads.emplace_back([&, layer, head] {
          float* at = out.data() + (layer * g.kv_heads + head) * rows;
          EXPECT_TRUE(
              threaded.sequence
                  .attend_lane(layer, head, q.data() + head * rows, at, nullptr, scratch[head])
                  .has_value());
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
    ASSERT_TRUE(threaded.sequence.end_step().has_value());
    ASSERT_EQ(out, wanted) << t;
  }
}

TEST(SequenceAttach, RefusesWhatIsNotASequence) {
  World world(0);
  EXPECT_FALSE(Sequence::attach(world.source, host(), kNoPage).has_value());
  ASSERT_TRUE(world.source.reserve(1).has_value());
  const PageId stranger = world.source.take();
  EXPECT_EQ(Sequence::attach(world.source, host(), stranger).error().code,
            ErrorCode::kInvalidArgument);
  world.source.give_back(stranger);

  const PageId root = world.sequence.detach();
  auto* header = reinterpret_cast<SequenceHeader*>(world.source.address(root) + kGranuleBytes);
  const auto refused_with = [&](auto change, auto restore) {
    change();
    auto attached = Sequence::attach(world.source, host(), root);
    EXPECT_FALSE(attached.has_value());
    restore();
    return attached ? ErrorCode::kOk : attached.error().code;
  };
  EXPECT_EQ(refused_with([&] { header->version += 1; }, [&] { header->version -= 1; }),
            ErrorCode::kVersionMismatch);
  EXPECT_EQ(refused_with([&] { header->head_dim = 65; }, [&] { header->head_dim = 64; }),
            ErrorCode::kUnsupported);
  EXPECT_EQ(refused_with([&] { header->layers = 3; }, [&] { header->layers = 2; }),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused_with([&] { header->policy.evict = static_cast<EvictRule>(9); },
                         [&] { header->policy.evict = EvictRule::kTbe; }),
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(refused_with([&] { header->magic ^= 1; }, [&] { header->magic ^= 1; }),
            ErrorCode::kInvalidArgument);
  world.sequence = std::move(Sequence::attach(world.source, host(), root)).value();
  EXPECT_EQ(world.next().size(), size_t{2} * 6 * 64);
}

}  // namespace
}  // namespace thinkv::kernels
