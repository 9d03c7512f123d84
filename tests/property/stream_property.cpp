// Random operations on sequences with entropy-coded streams against a model of their tokens.
//
// The model of a lane is a map position -> the 16-bit rows that were given; it knows nothing of
// blocks and pages. Checked: which positions live, every value within half a step of the unit that
// it was coded in, the attention over them, page ownership and conservation, and that a refused
// call has changed nothing.
#include <optional>

#include "tests/support/seed.h"
#include "tests/support/stream_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::read_lane;
using testing::read_stream;
using testing::StoredToken;
using testing::VectorPageSource;
using testing::VectorPool;

constexpr uint32_t kOperations = testing::random_rounds(1500);
constexpr uint32_t kSequences = 6;
constexpr uint32_t kDim = 64;

using LaneModel = std::map<uint32_t, StoredToken>;

class Subject {
 public:
  Subject(VectorPool& pool, std::mt19937_64& random)
      : pool_(&pool), random_(&random), source_(std::make_unique<VectorPageSource>(pool)) {
    geometry_ = testing::geometry_of({.layers = 1 + below(2), .kv_heads = 1 + below(2)});
    geometry_.value_type = below(2) == 0 ? ValueType::kFp16 : ValueType::kBf16;
    wide_ = geometry_.value_type == ValueType::kBf16 ? Format::kBf16 : Format::kF16;
    policy_ = testing::plain_policy(Format::kF16);
    policy_.rotate = 0;
    const float shares[] = {0.01f, 0.05f, 0.2f, 0.5f};
    policy_.entropy.key_step = shares[below(4)];
    policy_.entropy.value_step = shares[below(4)];
    policy_.entropy.recent = 128 + 64 * below(3);
    tokens_ = std::make_unique<testing::TokenSource>(geometry_, random());
    lanes_.resize(geometry_.lanes());
  }

  bool open() {
    auto made = Sequence::create(*source_, host(), geometry_, policy_);
    if (!made) {
      EXPECT_EQ(made.error().code, ErrorCode::kExhausted);
      return false;
    }
    sequence_.emplace(std::move(made).value());
    return true;
  }
  [[nodiscard]] const Sequence& sequence() const { return *sequence_; }
  [[nodiscard]] uint64_t refusals() const { return refusals_; }
  [[nodiscard]] uint64_t evictions() const { return evictions_; }

  // Result: false where the sequence ended.
  bool operate() {
    const uint32_t dice = below(100);
    if (seen_ == 0 && dice < 70) return prefill();
    if (dice < 78) {
      for (uint32_t i = below(24); i > 0; --i) step();
    } else if (dice < 84) {
      half_step();
    } else if (dice < 92) {
      evict();
    } else {
      reattach();
    }
    return true;
  }

  void verify() {
    for (uint32_t i = 0; i < lanes_.size(); ++i) {
      const auto coded = read_stream(*sequence_, i);
      auto all = read_lane(*sequence_, i);
      // A coded token is as near as its codes are; one in a page is exact.
      for (const auto& [position, token] : all) ASSERT_EQ(token.k, lanes_[i].at(position).k);
      for (const auto& [position, token] : coded) {
        ASSERT_EQ(position < coded_end(), true) << position;
        ASSERT_TRUE(all.emplace(position, token).second);
        ASSERT_EQ(lanes_[i].count(position), 1u) << position;
      }
      ASSERT_EQ(all.size(), lanes_[i].size()) << "lane " << i;
      check_values(lanes_[i], coded);
    }
    EXPECT_EQ(source_->promised(), 0u) << "a promise outlived its call";
    const SequenceStats stats = sequence_->stats();
    EXPECT_EQ(stats.live_slots, lanes_[0].size() * lanes_.size());
    EXPECT_EQ(stats.evicted_slots + stats.live_slots, uint64_t{seen_} * lanes_.size());
  }

 private:
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((*random_)() % n); }
  [[nodiscard]] uint32_t coded_end() const {
    const uint32_t open = (seen_ / 64 + 1) * 64;
    return open > policy_.entropy.recent ? open - policy_.entropy.recent : 0;
  }

  // Values within half a step, the rounding of the step to bf16 and that of the values to 16 bits.
  // Exact where a value of the block was not finite.
  void check_values(const LaneModel& model, const LaneModel& coded) const {
    for (auto it = coded.begin(); it != coded.end();) {
      const uint32_t first = it->first;
      std::vector<float> low(kDim, 1e30f), high(kDim, -1e30f);
      for (uint32_t t = first; t < first + 64; ++t) {
        for (uint32_t c = 0; c < kDim; ++c) {
          low[c] = std::min(low[c], model.at(t).k[c]);
          high[c] = std::max(high[c], model.at(t).k[c]);
        }
      }
      for (uint32_t t = first; t < first + 64; ++t, ++it) {
        const StoredToken& is = it->second;
        const StoredToken& was = model.at(t);
        const auto [v_low, v_high] = std::minmax_element(was.v.begin(), was.v.end());
        for (uint32_t c = 0; c < kDim; ++c) {
          check_value(is.k[c], was.k[c], policy_.entropy.key_step * (high[c] - low[c]));
          check_value(is.v[c], was.v[c], policy_.entropy.value_step * (*v_high - *v_low));
        }
      }
    }
  }
  void check_value(float is, float was, float step) const {
    if (is == was || !std::isfinite(step)) return;
    const float ulp = wide_ == Format::kBf16 ? 0x1p-8f : 0x1p-11f;
    // Prompts are coded from fp32, so the model's 16-bit value is half an ulp off itself.
    ASSERT_LE(std::fabs(is - was), 0.502f * step + ulp * (std::fabs(is) + std::fabs(was)) + 1e-7f);
  }

  StoredToken stored(const std::vector<float>& k, const std::vector<float>& v, uint32_t token,
                     uint32_t head) const {
    StoredToken t{wide_, false, {}, {}};
    const size_t row = (size_t{token} * geometry_.kv_heads + head) * kDim;
    for (uint32_t c = 0; c < kDim; ++c) {
      t.k.push_back(testing::to_16bit(k[row + c], wide_));
      t.v.push_back(testing::to_16bit(v[row + c], wide_));
    }
    return t;
  }

  std::vector<float> draw(uint32_t count) {
    std::vector<float> x = tokens_->kv(count);
    const float scales[] = {1.0f, 100.0f, 0x1p-10f, 0.0f};
    if (below(4) == 0) {
      for (size_t i = below(kDim); i < x.size(); i += kDim) x[i] = x[i] * scales[below(4)] + 9.0f;
    }
    if (below(16) == 0) x[below(static_cast<uint32_t>(x.size()))] = 1e38f;  // no fp16
    return x;
  }

  bool accepted(const Status& status, uint64_t held) {
    if (status) return true;
    EXPECT_EQ(status.error().code, ErrorCode::kExhausted) << status.error().what;
    EXPECT_EQ(pool_->held(), held);
    ++refusals_;
    verify();
    return false;
  }

  bool prefill() {
    const uint32_t count = 1 + below(500);
    for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const auto k = draw(count), v = draw(count);
      const uint64_t held = pool_->held();
      if (const Status done = sequence_->prefill(layer, k.data(), v.data(), count); !done) {
        EXPECT_EQ(done.error().code, ErrorCode::kExhausted);
        EXPECT_EQ(pool_->held(), held);
        ++refusals_;
        return false;
      }
      for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
        LaneModel& lane = lanes_[layer * geometry_.kv_heads + head];
        for (uint32_t t = 0; t < count; ++t) lane[t] = stored(k, v, t, head);
      }
    }
    EXPECT_TRUE(sequence_->prefill_end().has_value());
    seen_ = count;
    return true;
  }

  void step() {
    const uint64_t held = pool_->held();
    if (!accepted(sequence_->begin_step(), held)) return;
    for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const auto k = draw(1), v = draw(1);
      ASSERT_TRUE(sequence_->append(layer, k.data(), v.data()).has_value());
      for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
        lanes_[layer * geometry_.kv_heads + head][seen_] = stored(k, v, 0, head);
      }
      if (below(8) == 0) attend(layer);
    }
    ASSERT_TRUE(sequence_->end_step().has_value());
    seen_ += 1;
  }

  void attend(uint32_t layer) {
    const auto q = tokens_->q();
    std::vector<float> out(q.size());
    ASSERT_TRUE(sequence_->attend(layer, q.data(), out.data(), nullptr).has_value());
    for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
      const uint32_t lane = layer * geometry_.kv_heads + head;
      auto tokens = read_stream(*sequence_, lane);
      tokens.merge(read_lane(*sequence_, lane));
      float largest = 0.0f;
      for (const auto& [position, token] : tokens) {
        for (const float value : token.k) largest = std::max(largest, std::fabs(value));
        for (const float value : token.v) largest = std::max(largest, std::fabs(value));
      }
      if (!(largest < 1e3f)) continue;  // logits that double and float round apart
      const auto expected = testing::attend_over(tokens, q.data() + head * kDim, kDim);
      for (uint32_t d = 0; d < kDim; ++d) {
        ASSERT_NEAR(out[head * kDim + d], expected[d], 2e-3 * (1 + largest));
      }
    }
  }

  void half_step() {
    const uint64_t held = pool_->held();
    if (!accepted(sequence_->begin_step(), held)) return;
    const auto k = draw(1), v = draw(1);
    ASSERT_TRUE(sequence_->append(0, k.data(), v.data()).has_value());
    sequence_->cancel_step();
  }

  void evict() {
    const uint32_t first = 64 * below(seen_ / 64 + 1);
    std::vector<uint32_t> positions;
    for (uint32_t p = first; p < first + 64; ++p) positions.push_back(p);
    if (below(3) == 0) positions.erase(positions.begin() + below(64));
    const bool coded = first < coded_end();
    uint64_t living = lanes_[0].count(first);
    const auto done = sequence_->evict(positions);
    const bool newest = seen_ <= kBufferTokens || first >= seen_ - kBufferTokens;
    if (newest) {
      ASSERT_EQ(done.value(), 0u);
      return;
    }
    if (!coded || (living != 0 && positions.size() != 64)) {
      ASSERT_EQ(done.error().code, ErrorCode::kUnsupported);
      return;
    }
    ASSERT_EQ(done.value(), living * 64 * lanes_.size());
    for (LaneModel& lane : lanes_) {
      for (uint32_t p = first; p < first + 64; ++p) lane.erase(p);
    }
    evictions_ += living;
  }

  void reattach() {
    const PageId root = sequence_->detach();
    auto attached = Sequence::attach(*source_, host(), root);
    ASSERT_TRUE(attached.has_value());
    *sequence_ = std::move(attached).value();
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
  uint64_t refusals_ = 0;
  uint64_t evictions_ = 0;
};

TEST(StreamProperty, AgreesWithAModelOfTheTokens) {
  std::mt19937_64 random(testing::seed_from_environment(1));
  VectorPool pool({.head_dim = kDim, .capacity = 400, .shuffle_seed = 7});
  std::vector<std::unique_ptr<Subject>> subjects;
  uint64_t refusals = 0, evictions = 0;
  const auto retire = [&](size_t i) {
    refusals += subjects[i]->refusals();
    evictions += subjects[i]->evictions();
    subjects.erase(subjects.begin() + static_cast<std::ptrdiff_t>(i));
  };
  for (uint32_t i = 0; i < kOperations; ++i) {
    while (subjects.size() < kSequences) {
      auto subject = std::make_unique<Subject>(pool, random);
      if (!subject->open()) break;
      subjects.push_back(std::move(subject));
    }
    ASSERT_FALSE(subjects.empty());
    const size_t pick = random() % subjects.size();
    const bool lives = subjects[pick]->operate();
    if (::testing::Test::HasFatalFailure()) return;
    if (lives && i % 4 == 0) subjects[pick]->verify();
    if (i % 64 == 0) {
      std::set<uint32_t> owned;
      for (const auto& subject : subjects) testing::check_invariants(subject->sequence(), owned);
    }
    if (!lives || random() % 40 == 0) retire(pick);
    if (::testing::Test::HasFailure()) return;
  }
  while (!subjects.empty()) retire(0);
  EXPECT_EQ(pool.held(), 0u);
  EXPECT_GT(refusals, 0u) << "the pool was never short";
  EXPECT_GT(evictions, 0u) << "no block was ever evicted";
}

}  // namespace
}  // namespace thinkv::kernels
