// Random prompts and steps on sequences with a host tier against the rows that were given.
//
// Checked: every token of a sparse lane is in its pages or in its tier, never in both, with the
// bits that it was given; attention is that over the pages and the rows that the step's query or
// hint chooses; a refused or cancelled step changes nothing; pages are conserved and bytes counted.
#include <optional>

#include "tests/support/seed.h"
#include "tests/support/stream_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::read_lane;
using testing::StoredToken;
using testing::VectorPageSource;
using testing::VectorPool;

constexpr uint32_t kSequences = 160;
constexpr uint32_t kDim = 64;

using LaneModel = std::map<uint32_t, StoredToken>;

class Subject {
 public:
  Subject(VectorPool& pool, std::mt19937_64& random)
      : pool_(&pool), random_(&random), source_(std::make_unique<VectorPageSource>(pool)) {
    geometry_ = testing::geometry_of(
        {.layers = 1 + below(3), .kv_heads = 1 + below(2), .group = 1 + below(3)});
    geometry_.value_type = below(2) == 0 ? ValueType::kFp16 : ValueType::kBf16;
    wide_ = geometry_.value_type == ValueType::kBf16 ? Format::kBf16 : Format::kF16;
    policy_ = testing::plain_policy(Format::kF16);
    policy_.rotate = 0;
    policy_.tier.host_bytes = uint64_t{1} << 30;
    policy_.tier.dense_layers[0] = below(8);
    policy_.tier.dense_format = below(2) == 0 ? Format::kK4V4 : Format::kK2V2;
    policy_.tier.start = static_cast<uint16_t>(below(20));
    policy_.tier.recent = static_cast<uint16_t>(below(70));
    policy_.tier.fetch = static_cast<uint16_t>(1 + below(90));
    policy_.tier.channels = static_cast<uint8_t>(1 + below(12));
    tokens_ = std::make_unique<testing::TokenSource>(geometry_, random());
    lanes_.resize(geometry_.lanes());
  }

  // A whole life. Result: false where the pool was short.
  bool live() {
    auto made = Sequence::create(*source_, host(), geometry_, policy_);
    if (!made) return false;
    sequence_.emplace(std::move(made).value());
    if (below(8) != 0 && !prefill()) return false;
    for (uint32_t i = below(60); i > 0; --i) {
      if (!step()) return false;
      if (::testing::Test::HasFatalFailure()) return true;
    }
    verify();
    return true;
  }

 private:
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((*random_)() % n); }
  [[nodiscard]] const TierLane& tier(uint32_t lane) const { return sequence_->state()->tier[lane]; }

  void remember(uint32_t layer, uint32_t position, const std::vector<float>& k,
                const std::vector<float>& v, uint32_t token) {
    for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
      StoredToken t{wide_, false, {}, {}};
      for (uint32_t c = 0; c < kDim; ++c) {
        const size_t at = (size_t{token} * geometry_.kv_heads + head) * kDim + c;
        t.k.push_back(testing::to_16bit(k[at], wide_));
        t.v.push_back(testing::to_16bit(v[at], wide_));
      }
      lanes_[layer * geometry_.kv_heads + head].insert_or_assign(position, std::move(t));
    }
  }

  bool prefill() {
    const uint32_t count = 1 + below(400);
    for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const auto k = tokens_->kv(count), v = tokens_->kv(count);
      const uint64_t held = pool_->held();
      if (const Status done = sequence_->prefill(layer, k.data(), v.data(), count); !done) {
        EXPECT_EQ(done.error().code, ErrorCode::kExhausted);
        EXPECT_EQ(pool_->held(), held);
        return false;
      }
      for (uint32_t t = 0; t < count; ++t) remember(layer, t, k, v, t);
    }
    EXPECT_TRUE(sequence_->prefill_end().has_value());
    seen_ = count;
    return true;
  }

  bool step() {
    const uint64_t held = pool_->held();
    if (const Status begun = sequence_->begin_step(); !begun) {
      EXPECT_EQ(begun.error().code, ErrorCode::kExhausted);
      EXPECT_EQ(pool_->held(), held);
      verify();
      return false;
    }
    const bool cancels = below(6) == 0;
    for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const auto k = tokens_->kv(), v = tokens_->kv();
      EXPECT_TRUE(sequence_->append(layer, k.data(), v.data()).has_value());
      remember(layer, seen_, k, v, 0);
      attend(layer);
    }
    if (cancels) {
      sequence_->cancel_step();
      for (LaneModel& lane : lanes_) lane.erase(seen_);
      return true;
    }
    EXPECT_TRUE(sequence_->end_step().has_value());
    seen_ += 1;
    return true;
  }

  void attend(uint32_t layer) {
    const auto q = tokens_->q();
    const auto guess = tokens_->q();
    const bool hints = below(3) == 0;
    if (hints) {
      ASSERT_TRUE(sequence_->prefetch(layer, guess.data()).has_value());
    }
    std::vector<float> out(q.size());
    ASSERT_TRUE(sequence_->attend(layer, q.data(), out.data(), nullptr).has_value());
    if (policy_.tier.dense(layer)) return;
    const size_t values = size_t{geometry_.group()} * kDim;
    for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
      const uint32_t lane = layer * geometry_.kv_heads + head;
      LaneModel seen = read_lane(*sequence_, lane);
      if (tier(lane).tokens() > 0) {
        TierScratch scratch;
        const float* by = (hints ? guess : q).data() + head * values;
        tier(lane).choose(policy_.tier, by, geometry_.group(), scratch);
        ASSERT_EQ(scratch.rows.size(), std::min<uint32_t>(policy_.tier.fetch, tier(lane).tokens()));
        for (const uint32_t row : scratch.rows) {
          const uint32_t position = tier(lane).first() + row;
          ASSERT_TRUE(seen.emplace(position, lanes_[lane].at(position)).second) << position;
        }
      }
      for (uint32_t g = 0; g < geometry_.group(); ++g) {
        const size_t at = head * values + size_t{g} * kDim;
        const auto expected = testing::attend_over(seen, q.data() + at, kDim);
        for (uint32_t d = 0; d < kDim; ++d) ASSERT_NEAR(out[at + d], expected[d], 2e-3);
      }
    }
  }

  void verify() {
    testing::check_invariants(*sequence_);
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < lanes_.size(); ++i) {
      auto all = read_lane(*sequence_, i);
      const bool dense = policy_.tier.dense(i / geometry_.kv_heads);
      ASSERT_TRUE(!dense || tier(i).tokens() == 0);
      bytes += tier(i).bytes();
      std::vector<float> k(kDim), v(kDim);
      for (uint32_t row = 0; row < tier(i).tokens(); ++row) {
        tier(i).read(row, k.data(), v.data());
        ASSERT_TRUE(all.emplace(tier(i).first() + row, StoredToken{wide_, false, k, v}).second);
      }
      ASSERT_EQ(all.size(), lanes_[i].size());
      if (dense) continue;
      for (const auto& [position, token] : all) {
        ASSERT_TRUE(token.k == lanes_[i].at(position).k && token.v == lanes_[i].at(position).v);
      }
    }
    EXPECT_EQ(sequence_->stats().tier_bytes, bytes);
    EXPECT_EQ(source_->promised(), 0u) << "a promise outlived its call";
  }

  VectorPool* pool_;
  std::mt19937_64* random_;
  std::unique_ptr<VectorPageSource> source_;
  ModelGeometry geometry_;
  PolicyParams policy_;
  Format wide_ = Format::kF16;
  std::unique_ptr<testing::TokenSource> tokens_;
  std::optional<Sequence> sequence_;
  std::vector<LaneModel> lanes_;
  uint32_t seen_ = 0;
};

TEST(TierProperty, EveryTokenIsInAPageOrInTheTier) {
  std::mt19937_64 random(testing::seed_from_environment(1));
  uint32_t short_of_pages = 0;
  for (uint32_t i = 0; i < kSequences; ++i) {
    const auto pages = static_cast<uint32_t>(20 + random() % 300);
    VectorPool pool({.head_dim = kDim, .capacity = pages, .shuffle_seed = 7});
    {
      Subject subject(pool, random);
      short_of_pages += subject.live() ? 0 : 1;
    }
    if (::testing::Test::HasFailure()) return;
    ASSERT_EQ(pool.held(), 0u);
  }
  EXPECT_GT(short_of_pages, 0u);
  EXPECT_LT(short_of_pages, kSequences / 2);
}

}  // namespace
}  // namespace thinkv::kernels
