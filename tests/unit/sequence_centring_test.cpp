// Centred keys: the mean of the prompt's keys is taken off every key of its lane. Attention and its
// lse stay what they were, the codes' noise falls, and the centre lives with the sequence.
#include <cmath>
#include <limits>

#include "kernels/policy/centre.h"
#include "tests/support/sequence_fixture.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::kernels {
namespace {

using testing::check_invariants;
using testing::geometry_of;
using testing::read_lane;
using testing::TokenSource;
using testing::VectorPageSource;
using testing::VectorPool;

constexpr uint32_t kPrompt = 200;
constexpr uint32_t kSinks = 4;

PolicyParams centred(Format format, bool rotate) {
  PolicyParams p = testing::plain_policy(format);
  p.rotate = rotate ? 1 : 0;
  p.centre = 1;
  p.sink_tokens = kSinks;
  p.sink_format = Format::kF16;
  return p;
}

// Tokens whose keys lie around a vector of their lane, far from 0; sinks around 0.
struct World {
  ModelGeometry geometry;
  VectorPool pool;
  VectorPageSource source;
  TokenSource tokens;
  std::vector<float> offset;  // [kv_heads, head_dim]
  Sequence sequence;

  World(const ModelGeometry& shape, const PolicyParams& policy, uint64_t seed = 5)
      : geometry(shape),
        pool({.head_dim = shape.head_dim, .capacity = 2000, .shuffle_seed = 3}),
        source(pool),
        tokens(shape, seed),
        offset(tokens.kv()),
        sequence(Sequence::create(source, host(), shape, policy).value()) {
    for (float& x : offset) x *= 3.0f;
  }

  std::vector<float> keys(uint32_t first, uint32_t count) {
    std::vector<float> k = tokens.kv(count);
    for (size_t i = 0; i < k.size(); ++i) {
      const size_t token = first + i / offset.size();
      if (token >= kSinks) k[i] += offset[i % offset.size()];
    }
    return k;
  }
  void fill(uint32_t count = kPrompt) {
    for (uint32_t layer = 0; layer < geometry.layers; ++layer) {
      const std::vector<float> k = keys(0, count), v = tokens.kv(count);
      ASSERT_TRUE(sequence.prefill(layer, k.data(), v.data(), count));
    }
    ASSERT_TRUE(sequence.prefill_end());
  }
  // Output and lse of every step: [steps][layers, q_heads, head_dim + 1].
  std::vector<float> run(uint32_t steps) {
    std::vector<float> all;
    const size_t row = size_t{geometry.q_heads} * geometry.head_dim;
    for (uint32_t i = 0; i < steps; ++i) {
      EXPECT_TRUE(sequence.begin_step());
      for (uint32_t layer = 0; layer < geometry.layers; ++layer) {
        const std::vector<float> k = keys(sequence.tokens(), 1), v = tokens.kv(), q = tokens.q();
        EXPECT_TRUE(sequence.append(layer, k.data(), v.data()));
        std::vector<float> out(row), lse(geometry.q_heads);
        EXPECT_TRUE(sequence.attend(layer, q.data(), out.data(), lse.data()));
        all.insert(all.end(), out.begin(), out.end());
        all.insert(all.end(), lse.begin(), lse.end());
      }
      EXPECT_TRUE(sequence.end_step());
    }
    return all;
  }
};

double error_of(const std::vector<float>& found, const std::vector<float>& wanted) {
  double squares = 0.0, all = 0.0;
  for (size_t i = 0; i < found.size(); ++i) {
    squares += std::pow(double{found[i]} - double{wanted[i]}, 2);
    all += std::pow(double{wanted[i]}, 2);
  }
  return std::sqrt(squares / all);
}

PolicyParams exact_policy(bool rotate) {
  PolicyParams p = testing::plain_policy(Format::kF16);
  p.rotate = rotate ? 1 : 0;
  return p;
}

class Centring : public ::testing::TestWithParam<std::tuple<uint32_t, bool>> {};

TEST_P(Centring, AttentionAndItsLseStayWhatTheyWere) {
  const auto [dim, rotate] = GetParam();
  const auto geometry = geometry_of({.layers = 2, .kv_heads = 2, .group = 3, .head_dim = dim});
  World plain(geometry, exact_policy(rotate)), wide(geometry, centred(Format::kF16, rotate));
  plain.fill();
  wide.fill();
  EXPECT_LT(error_of(wide.run(60), plain.run(60)), 2e-3);  // roundings of 16 bits
}

TEST_P(Centring, CodesLoseLess) {
  const auto [dim, rotate] = GetParam();
  const auto geometry = geometry_of({.layers = 1, .kv_heads = 2, .group = 3, .head_dim = dim});
  PolicyParams off = centred(Format::kK4V4, rotate);
  off.centre = 0;
  World plain(geometry, exact_policy(rotate)), coded(geometry, off),
      less(geometry, centred(Format::kK4V4, rotate));
  for (World* world : {&plain, &coded, &less}) world->fill();
  const std::vector<float> wanted = plain.run(40);
  const double before = error_of(coded.run(40), wanted), after = error_of(less.run(40), wanted);
  EXPECT_LT(after, 0.6 * before);
}

TEST_P(Centring, KeysAreKeptWithoutTheMeanOfThePromptBehindItsSinks) {
  const auto [dim, rotate] = GetParam();
  const auto geometry = geometry_of({.layers = 1, .kv_heads = 2, .group = 1, .head_dim = dim});
  World world(geometry, centred(Format::kF16, rotate));
  const std::vector<float> k = world.keys(0, kPrompt), v = world.tokens.kv(kPrompt);
  ASSERT_TRUE(world.sequence.prefill(0, k.data(), v.data(), kPrompt));
  ASSERT_TRUE(world.sequence.prefill_end());
  for (uint32_t head = 0; head < 2; ++head) {
    std::vector<double> mean(dim, 0.0);
    for (const auto& [position, token] : read_lane(world.sequence, head)) {
      if (position < kSinks) continue;
      for (uint32_t d = 0; d < dim; ++d) mean[d] += double{token.k[d]} / (kPrompt - kSinks);
    }
    for (const double channel : mean) EXPECT_NEAR(channel, 0.0, 4e-3);
    // A key comes back by the centre: 16-bit roundings apart.
    std::vector<float> key(k.begin() + (7 * 2 + head) * dim, k.begin() + (7 * 2 + head + 1) * dim);
    if (rotate) host().rotate(key.data(), 1, dim);
    world.sequence.state()->centres.take_off(head, key.data(), 1);
    const std::vector<float> kept = read_lane(world.sequence, head).at(7).k;
    for (uint32_t d = 0; d < dim; ++d) EXPECT_NEAR(kept[d], key[d], 4e-3);
  }
}

TEST_P(Centring, TheCentreGoesWithTheSequence) {
  const auto [dim, rotate] = GetParam();
  const auto geometry = geometry_of({.layers = 2, .kv_heads = 3, .group = 1, .head_dim = dim});
  World stays(geometry, centred(Format::kK4V4, rotate)),
      moves(geometry, centred(Format::kK4V4, rotate));
  stays.fill();
  moves.fill();
  EXPECT_EQ(stays.run(20), moves.run(20));
  const PageId root = moves.sequence.detach();
  moves.sequence = Sequence::attach(moves.source, host(), root).value();
  EXPECT_EQ(stays.run(40), moves.run(40));
  check_invariants(moves.sequence);
  moves.sequence.release();
  EXPECT_EQ(moves.pool.held(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Centring,
                         ::testing::Combine(::testing::Values(64u, 128u, 256u), ::testing::Bool()));

TEST(CentredKeys, WithoutAPromptBehindTheSinksNothingChanges) {
  const auto geometry = geometry_of({.layers = 1, .kv_heads = 2, .group = 2});
  for (const uint32_t prompt : {0u, kSinks}) {
    PolicyParams off = centred(Format::kK4V4, true);
    off.centre = 0;
    World with(geometry, centred(Format::kK4V4, true)), without(geometry, off);
    if (prompt > 0) with.fill(prompt);
    if (prompt > 0) without.fill(prompt);
    EXPECT_EQ(with.run(50), without.run(50));
  }
}

TEST(CentredKeys, AChannelThatIsNoNumberHasNoCentre) {
  const auto geometry = geometry_of({});
  World world(geometry, centred(Format::kF16, false));
  std::vector<float> k = world.keys(0, kPrompt);
  const std::vector<float> v = world.tokens.kv(kPrompt);
  k[10 * 64 + 5] = std::numeric_limits<float>::quiet_NaN();
  k[11 * 64 + 6] = std::numeric_limits<float>::infinity();
  ASSERT_TRUE(world.sequence.prefill(0, k.data(), v.data(), kPrompt));
  ASSERT_TRUE(world.sequence.prefill_end());
  std::vector<float> zero(64, 0.0f);
  world.sequence.state()->centres.take_off(0, zero.data(), 1);
  EXPECT_EQ(zero[5], 0.0f);
  EXPECT_EQ(zero[6], 0.0f);
  EXPECT_GT(std::fabs(zero[7]), 0.1f);
}

TEST(CentredKeys, TheMeanIsAddedInTheStatedOrder) {
  // 33 rows: row 32 comes to the sum of row 0 first, where 1 is lost beside 2^24.
  std::vector<float> x(33, 0.0f);
  x[0] = 0x1p24f;
  x[32] = 1.0f;
  x[16] = -0x1p24f;
  EXPECT_EQ(policy::channel_mean(x.data(), 1, 33), 0.0f);
  x[32] = 2.0f;
  EXPECT_EQ(policy::channel_mean(x.data(), 1, 33), 2.0f / 33.0f);
  EXPECT_EQ(policy::channel_mean(x.data(), 1, 0), 0.0f);
}

TEST(CentredKeys, IsRefusedWhereScoresAreReadBeforeTheSoftmax) {
  const PolicyParams good = centred(Format::kK4V4, true);
  EXPECT_TRUE(policy_params_valid(good));
  PolicyParams p = good;
  p.score_reduce = 2;
  EXPECT_FALSE(policy_params_valid(p));
  p = good;
  p.label_layer_count = 1;
  EXPECT_FALSE(policy_params_valid(p));
  p = good;
  p.centre = 2;
  EXPECT_FALSE(policy_params_valid(p));
}

}  // namespace
}  // namespace thinkv::kernels
