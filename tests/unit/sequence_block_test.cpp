// Policies whose rules recode to blocks, as shipped and written, on real pages: KIVI, XQuant,
// ThinK, and R-KV's score over KIVI's codes.
#include <numeric>

#include "kernels/policy/channels.h"
#include "kernels/sequence/block.h"
#include "tests/support/format_model.h"
#include "tests/support/policy_text.h"
#include "tests/support/rank_fixture.h"
#include "thinkv/internal/policy_check.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

using testing::check_invariants;
using testing::geometry_of;
using testing::RankWorld;
using testing::read_lane;
using testing::shipped_policy;

constexpr uint32_t kDim = 64;
using Tokens = testing::LaneModel;

// What the tokens [first, first + block) become by the oracle; of a pair, `other` is the lane of
// the partner layer.
Tokens through_block(Format view, const Tokens& tokens, uint32_t first, float eta,
                     const Tokens* other) {
  testing::BlockModel block{.view = view, .head_dim = kDim, .positions = {}, .eta = eta};
  for (uint32_t p = first; p < first + page_layout(view, kDim).slots; ++p) {
    block.positions.push_back(p);
    block.add(tokens.at(p), is_second(view) ? 1 : 0);
    if (is_second(view) || is_pair(view)) block.add(other->at(p), is_second(view) ? 0 : 1);
  }
  return block.coded();
}

// The tokens up to `end` of a lane are blocks in order, each what the oracle makes of the 16-bit
// tokens of the other sequence.
void expect_blocks(Format view, const Tokens& actual, const Tokens& exact, uint32_t end,
                   float eta = 0.0f, const Tokens* partner = nullptr) {
  const uint32_t slots = page_layout(view, kDim).slots;
  ASSERT_EQ(end % slots, 0u);
  for (uint32_t first = 0; first < end; first += slots) {
    for (const auto& [p, wanted] : through_block(view, exact, first, eta, partner)) {
      ASSERT_EQ(actual.at(p), wanted) << p;
    }
  }
  for (const auto& [p, token] : actual) {
    if (p < end) continue;
    ASSERT_EQ(token, exact.at(p)) << "the tail is as it was: " << p;
  }
}

// Tokens of a lane that are in pages of a format.
uint32_t count_in(const Tokens& tokens, Format format) {
  return static_cast<uint32_t>(std::count_if(
      tokens.begin(), tokens.end(), [&](const auto& t) { return t.second.format == format; }));
}

const testing::GeometryShape kTwoHeads{.layers = 2, .kv_heads = 2, .group = 2, .head_dim = kDim};

// ---- KIVI ----

TEST(MethodKivi, BlocksOfTheOldestAreCodedAndTheNewest32StayAtSixteenBits) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kivi"));
  RankWorld full(geometry_of(kTwoHeads), shipped_policy("full-f16"));
  world.prefill_random(150, 0);
  full.prefill_random(150, 0);
  for (uint32_t generated = 0; generated <= 100; ++generated) {
    const Tokens actual = read_lane(world.sequence, 3);
    const uint32_t tokens = 150 + generated;
    const uint32_t fired = 150 + generated / 32 * 32;  // tokens at the last firing
    const uint32_t coded = (fired - 32) / 44 * 44;
    ASSERT_EQ(actual.size(), tokens);
    ASSERT_EQ(count_in(actual, Format::kKivi2), coded) << generated;
    if (generated % 25 == 0) {
      expect_blocks(Format::kKivi2, actual, read_lane(full.sequence, 3), coded);
      check_invariants(world.sequence);
    }
    world.run(1);
    full.run(1);
  }
  EXPECT_EQ(world.sequence.stats().evicted_slots, 0u);
  EXPECT_EQ(world.sequence.stats().recoded_slots, 4u * 176);
}

TEST(MethodKivi, APageHolds44Tokens) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kivi"));
  world.prefill_random(2080, 0);
  const SequenceStats stats = world.sequence.stats();
  EXPECT_EQ(stats.pages, 4u * (2024 / 44 + 56 / 8));
  EXPECT_LT(stats.bytes_held * 4, stats.bytes_f16);
  world.sequence.release();
  EXPECT_EQ(world.pool.held(), 0u);
}

TEST(MethodKivi, FourBitsAreBlocksOf24) {
  PolicyParams policy = shipped_policy("kivi");
  policy.rules[0].recode_format = Format::kKivi4;
  RankWorld world(geometry_of(kTwoHeads), policy),
      full(geometry_of(kTwoHeads), shipped_policy("full-f16"));
  world.prefill_random(150, 0);
  full.prefill_random(150, 0);
  expect_blocks(Format::kKivi4, read_lane(world.sequence, 0), read_lane(full.sequence, 0), 96);
}

TEST(MethodKivi, DeadTokensOfABlockStayMaskedUntilItGoes) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kivi"));
  world.prefill_random(150, 0);
  const uint64_t held = world.pool.held();
  std::vector<uint32_t> some(43);
  std::iota(some.begin(), some.end(), 0u);
  ASSERT_EQ(world.sequence.evict(some).value(), 4u * 43);
  EXPECT_EQ(world.pool.held(), held) << "a block goes as a whole";
  check_invariants(world.sequence);
  ASSERT_EQ(world.sequence.evict(std::vector<uint32_t>{43}).value(), 4u);
  EXPECT_EQ(world.pool.held(), held - 4);
  // Half of the next block: its tokens are written anew with the next that come.
  std::vector<uint32_t> half(22);
  std::iota(half.begin(), half.end(), 44u);
  ASSERT_TRUE(world.sequence.evict(half).has_value());
  world.run(32);
  check_invariants(world.sequence);
  const Tokens tokens = read_lane(world.sequence, 0);
  EXPECT_EQ(tokens.size(), 150u + 32 - 66);
  const Lane lane = world.sequence.state()->lane(0);
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    EXPECT_FALSE(page.format == static_cast<uint8_t>(Format::kKivi2) &&
                 is_sparse_block(lane, page));
  });
}

TEST(BlockFormats, ComeByRulesOnly) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("kivi"));
  world.prefill_random(100, 0);
  const Result<uint64_t> done = world.sequence.quantize(0, 40, Format::kKivi2);
  ASSERT_FALSE(done.has_value());
  EXPECT_EQ(done.error().code, ErrorCode::kUnsupported);
  // Out of blocks a token can always be taken.
  EXPECT_GT(world.sequence.quantize(0, 20, Format::kK2V2).value(), 0u);
  check_invariants(world.sequence);
}

// ---- XQuant ----

const testing::GeometryShape kSixLayers{.layers = 6, .kv_heads = 2, .group = 2, .head_dim = kDim};

TEST(MethodXQuant, TwoLayersShareThePageOfCodesAndEachHasItsScales) {
  RankWorld world(geometry_of(kSixLayers), shipped_policy("xquant", 32));
  RankWorld full(geometry_of(kSixLayers), shipped_policy("full-f16"));
  for (RankWorld* w : {&world, &full}) {
    ASSERT_TRUE(testing::prefill(w->sequence, w->tokens, 150).has_value());
    w->run(70);
  }
  check_invariants(world.sequence);
  const uint32_t single = (150 + 64 - 32) / 44 * 44, coded = (150 + 64 - 32) / 32 * 32;
  for (uint32_t lane = 0; lane < 12; ++lane) {
    SCOPED_TRACE(lane);
    const uint32_t layer = lane / 2;
    const bool second = layer % 2 == 1;
    const Format view = layer < 2 ? Format::kKivi2 : second ? Format::kPair2Second : Format::kPair2;
    const Tokens partner = read_lane(full.sequence, second          ? lane - 2
                                                    : lane + 2 < 12 ? lane + 2
                                                                    : lane);
    expect_blocks(view, read_lane(world.sequence, lane), read_lane(full.sequence, lane),
                  layer < 2 ? single : coded, 0.045f, &partner);
  }
  // Eight lanes in pairs: each page of codes is in two of them, and taken once.
  std::set<uint32_t> shared;
  uint64_t views = 0, others = 0;
  for (uint32_t lane = 0; lane < 12; ++lane) {
    const Lane of = world.sequence.state()->lane(lane);
    others += testing::buffer_pages(of.header());
    of.pages().for_each([&](uint32_t, const PageDescriptor& page) {
      const auto format = static_cast<Format>(page.format);
      const bool pair = is_pair(format) || is_second(format);
      if (pair) shared.insert(page.page);
      views += pair ? 1 : 0;
      others += pair ? 0 : 1;
    });
  }
  EXPECT_EQ(views, 8u * (coded / 32));
  EXPECT_EQ(shared.size(), 4u * (coded / 32));
  EXPECT_EQ(world.sequence.stats().pages, shared.size() + others);
}

TEST(MethodXQuant, ALastLayerWithoutPartnerHasACodeOfItsOwn) {
  testing::GeometryShape shape = kSixLayers;
  shape.layers = 5;
  RankWorld world(geometry_of(shape), shipped_policy("xquant", 32));
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 100).has_value());
  EXPECT_EQ(count_in(read_lane(world.sequence, 8), Format::kKivi2), 44u);
  EXPECT_EQ(count_in(read_lane(world.sequence, 7), Format::kPair2Second), 64u);
  check_invariants(world.sequence);
}

TEST(MethodXQuant, BitsByLayerRange) {
  const PolicyParams policy = ops::good(
      "name: p\n"
      "formats: {prompt: f16, thoughts: {reasoning: f16, execution: f16, transition: f16}}\n"
      "rotation: none\n"
      "evict: {rule: rank, budget: 16}\n"
      "blocks: {eta_1bit: 0.3333}\n"
      "rules:\n"
      "  - {trigger: {prompt_end: true}, signal: {position: 1}, action: recode, format: kivi4,\n"
      "     layers: [0, 2]}\n"
      "  - {trigger: {prompt_end: true}, signal: {position: 1}, action: recode, format: pair1,\n"
      "     layers: [2, 4]}\n"
      "  - {trigger: {prompt_end: true}, signal: {position: 1}, action: recode, format: kivi1,\n"
      "     layers: [4, 256]}\n");
  RankWorld world(geometry_of(kSixLayers), policy);
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 150).has_value());
  const std::pair<Format, uint32_t> wanted[] = {{Format::kKivi4, 120}, {Format::kKivi4, 120},
                                                {Format::kPair1, 128}, {Format::kPair1Second, 128},
                                                {Format::kKivi1, 128}, {Format::kKivi1, 128}};
  for (uint32_t lane = 0; lane < 12; ++lane) {
    const auto& [format, count] = wanted[lane / 2];
    EXPECT_EQ(count_in(read_lane(world.sequence, lane), format), count) << lane;
  }
}

TEST(MethodXQuant, PairsGoAndMoveTogether) {
  RankWorld world(geometry_of(kSixLayers), shipped_policy("xquant", 32));
  ASSERT_TRUE(testing::prefill(world.sequence, world.tokens, 150).has_value());
  const uint64_t held = world.pool.held();
  std::vector<uint32_t> block(44);  // the first block, and some of the next
  std::iota(block.begin(), block.end(), 0u);
  ASSERT_EQ(world.sequence.evict(block).value(), 12u * 44);
  check_invariants(world.sequence);
  EXPECT_EQ(world.pool.held(), held - 8) << "four single lanes and four pairs";
  const PageId root = world.sequence.detach();
  world.pool.relocate();
  world.sequence = std::move(Sequence::attach(world.source, host(), root)).value();
  world.run(70);
  check_invariants(world.sequence);
  // A token leaves the page of its pair for a format of its own in both lanes.
  EXPECT_GT(world.sequence.quantize(40, 90, Format::kK4V4).value(), 0u);
  check_invariants(world.sequence);
  EXPECT_EQ(read_lane(world.sequence, 5).at(60).format, Format::kK4V4);
  world.sequence.release();
  EXPECT_EQ(world.pool.held(), 0u);
}

// ---- ThinK ----

// Bits of the think pages of a lane, which must be the same in all.
std::vector<uint64_t> channels_in_pages(const Sequence& sequence, uint32_t index, Format format) {
  std::vector<uint64_t> bits;
  const Lane lane = sequence.state()->lane(index);
  const BlockLayout layout = block_layout(format, kDim);
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    if (page.format != static_cast<uint8_t>(format)) return;
    uint64_t mask = 0;
    std::memcpy(&mask, sequence.state()->pages.address(page.page) + layout.channel_offset, 8);
    if (bits.empty()) bits.push_back(mask);
    EXPECT_EQ(bits.front(), mask);
  });
  return bits;
}

// The channels by |Q_c K_c^T|_F^2, each logit's part computed.
uint64_t brute_force_channels(const Tokens& prompt, const std::vector<float>& q, uint32_t kv_head,
                              const ModelGeometry& g, uint32_t window) {
  std::vector<double> energy(kDim, 0.0);
  const auto queries = static_cast<uint32_t>(q.size() / (g.q_heads * kDim));
  for (uint32_t i = queries - window; i < queries; ++i) {
    for (uint32_t h = 0; h < g.group(); ++h) {
      const float* row = q.data() + (size_t{i} * g.q_heads + kv_head * g.group() + h) * kDim;
      for (const auto& [p, token] : prompt) {
        for (uint32_t c = 0; c < kDim; ++c) {
          energy[c] += std::pow(double{row[c]} * double{token.k[c]}, 2);
        }
      }
    }
  }
  std::vector<uint32_t> order(kDim);
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return energy[a] > energy[b]; });
  uint64_t bits = 0;
  for (uint32_t i = 0; i < 40; ++i) bits |= uint64_t{1} << order[i];
  return bits;
}

TEST(MethodThinK, KeepsTheChannelsOfTheMostEnergyForGood) {
  const ModelGeometry g = geometry_of(kTwoHeads);
  RankWorld world(g, shipped_policy("think")), full(g, shipped_policy("full-f16"));
  const auto k = world.tokens.kv(150), v = world.tokens.kv(150);
  const auto q = world.tokens.rows(50, g.q_heads);
  world.prefill(k, v, q);
  full.prefill(k, v, q);
  full.tokens = world.tokens;
  std::vector<uint64_t> masks;
  for (uint32_t lane = 0; lane < 4; ++lane) {
    const auto bits = channels_in_pages(world.sequence, lane, Format::kThink);
    ASSERT_EQ(bits.size(), 1u);
    EXPECT_EQ(bits[0], brute_force_channels(read_lane(full.sequence, lane), q, lane % 2, g, 32));
    masks.push_back(bits[0]);
  }
  EXPECT_NE(masks[0], masks[1]) << "heads choose their own";
  world.run(100);
  full.run(100);
  check_invariants(world.sequence);
  for (uint32_t lane = 0; lane < 4; ++lane) {
    EXPECT_EQ(channels_in_pages(world.sequence, lane, Format::kThink)[0], masks[lane]);
    const Tokens actual = read_lane(world.sequence, lane), exact = read_lane(full.sequence, lane);
    ASSERT_EQ(actual.size(), 250u);
    // Fired at 246 tokens: all but the newest 32, in pages of 10.
    EXPECT_EQ(count_in(actual, Format::kThink), 210u);
    for (const auto& [p, token] : actual) {
      const bool narrow = p < 210;
      ASSERT_EQ(token.format, narrow ? Format::kThink : Format::kF16);
      ASSERT_EQ(token.v, exact.at(p).v);
      for (uint32_t c = 0; c < kDim; ++c) {
        const bool kept = !narrow || ((masks[lane] >> c) & 1u) != 0;
        ASSERT_EQ(token.k[c], kept ? exact.at(p).k[c] : 0.0f);
      }
    }
  }
}

TEST(MethodThinK, WithoutQueriesTheKeysDecideAndBfloatStaysBfloat) {
  ModelGeometry g = geometry_of(kTwoHeads);
  g.value_type = ValueType::kBf16;
  RankWorld world(g, shipped_policy("think")), full(g, shipped_policy("full-f16"));
  const auto k = world.tokens.kv(100), v = world.tokens.kv(100);
  world.prefill(k, v);
  full.prefill(k, v);
  const std::vector<float> ones(size_t{32} * g.q_heads * kDim, 1.0f);
  EXPECT_EQ(channels_in_pages(world.sequence, 1, Format::kThinkBf16)[0],
            brute_force_channels(read_lane(full.sequence, 1), ones, 1, g, 32));
}

TEST(MethodThinK, TheBytesOfAFifthAreSaved) {
  RankWorld world(geometry_of(kTwoHeads), shipped_policy("think"));
  world.prefill_random(2032, 32);
  EXPECT_EQ(world.sequence.stats().pages, 4u * (2000 / 10 + 32 / 8));
}

// Keys and queries of independent channel scales. The table: .398, .051 and .002 of the energy go
// with 40 % of the channels.
double energy_dropped(float sigma) {
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal;
  constexpr uint32_t kChannels = 128, kRows = 64, kTrials = 60;
  double dropped = 0;
  for (uint32_t trial = 0; trial < kTrials; ++trial) {
    std::vector<float> energy[2];
    for (std::vector<float>& sums : energy) {
      std::vector<float> scale(kChannels), rows(kRows * kChannels);
      for (float& s : scale) s = std::exp(sigma * normal(random));
      for (size_t i = 0; i < rows.size(); ++i) rows[i] = scale[i % kChannels] * normal(random);
      sums.assign(kChannels, 0.0f);
      policy::add_energy(rows, sums);
    }
    uint64_t bits[2];
    policy::choose_channels(energy[0], energy[1], kChannels * 6 / 10, bits);
    double all = 0, gone = 0;
    for (uint32_t c = 0; c < kChannels; ++c) {
      const double e = double{energy[0][c]} * double{energy[1][c]};
      all += e;
      if (((bits[c / 64] >> (c % 64)) & 1u) == 0) gone += e;
    }
    dropped += gone / all / kTrials;
  }
  return dropped;
}

TEST(MethodThinK, FewChannelsHoldMostOfTheEnergyWhereTheyDiffer) {
  EXPECT_NEAR(energy_dropped(0.5f), 0.051, 0.012);
  EXPECT_NEAR(energy_dropped(1.0f), 0.002, 0.0015);
  // Alike, but for what 64 rows leave to chance: the lowest 40 % hold somewhat less than that.
  EXPECT_NEAR(energy_dropped(0.0f), 0.31, 0.04);
  std::vector<float> alike(128, 2.0f);
  uint64_t bits[2];
  policy::choose_channels(alike, alike, 77, bits);
  EXPECT_EQ(bits[0], ~uint64_t{0}) << "of equals the lower channel stays";
  EXPECT_EQ(std::popcount(bits[1]), 13);
}

// ---- put together by YAML alone ----

std::string composed() {
  return "name: p\n"
         "formats: {prompt: f16, thoughts: {reasoning: f16, execution: f16, transition: f16}}\n"
         "rotation: none\n"
         "evict: {rule: rank, budget: 256}\n"
         "scores: {accumulate: window, window: 8, reduce: max-logit}\n"
         "rules:\n"
         "  - trigger: {prompt_end: true, every: 128}\n"
         "    signal: {attention: 0.07, pool: maximum, width: 7, redundancy: 0.93, above: 0.5}\n"
         "    protect: {recent: 8}\n"
         "  - trigger: {prompt_end: true, every: 32}\n"
         "    signal: {position: 1}\n"
         "    budget: {percent: 12}\n"
         "    action: recode\n"
         "    format: kivi2\n";
}

TEST(ComposedPolicy, RKvEvictsAndKiviCodesWhatStays) {
  RankWorld world(geometry_of(kTwoHeads), ops::good(composed()));
  world.prefill_random(300, 64);
  for (uint32_t round = 1; round <= 8; ++round) {
    world.run(128);
    check_invariants(world.sequence);
    uint64_t pages = 0;
    for (uint32_t lane = 0; lane < 4; ++lane) {
      const Tokens tokens = read_lane(world.sequence, lane);
      ASSERT_EQ(tokens.size(), 256u) << round;
      // At most 12 % and what fills no block are at 16 bits; R-KV takes of these too, but for 8.
      const uint32_t wide = count_in(tokens, Format::kF16);
      EXPECT_GE(wide, 8u);
      EXPECT_LT(wide, 30u + 44);
      pages += world.sequence.state()->lane(lane).pages().size();
    }
    // Evictions leave at most half of a block: 226 tokens in at most 11 blocks, 74 in 8-token pages
    // that may have holes of their own.
    EXPECT_LE(pages, 4u * (11 + 18)) << round;
  }
  EXPECT_GT(world.sequence.stats().evicted_slots, 4u * 1000);
  EXPECT_GT(world.sequence.stats().recoded_slots, 4u * 1000);
  world.sequence.release();
  EXPECT_EQ(world.pool.held(), 0u);
}

}  // namespace
}  // namespace thinkv::kernels
