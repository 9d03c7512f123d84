// Random operations on many small sequences of one bounded pool against a dictionary model.
//
// The model of a lane is a map position -> decoded K and V, worked out when the token is written
// or recoded, by the reference codec in a page of the model's own. It knows nothing of pages and
// slots. Checked: the live positions, every decoded value bit for bit, page ownership and
// conservation, counters, and that a call that fails for want of pages has changed nothing.
#include <algorithm>
#include <cstdio>
#include <optional>

#include "tests/support/format_model.h"
#include "tests/support/random_rules.h"
#include "tests/support/seed.h"
#include "tests/support/sequence_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::LaneModel;
using testing::StoredToken;
using testing::through_format;
using testing::TokenSource;
using testing::VectorPageSource;
using testing::VectorPool;

constexpr uint32_t kOperations = testing::random_rounds(100'000);
constexpr uint32_t kSequences = 12;

// One sequence and what it should be.
class Subject {
 public:
  Subject(VectorPool& pool, std::mt19937_64& random)
      : pool_(&pool), random_(&random), source_(std::make_unique<VectorPageSource>(pool)) {
    geometry_ = testing::geometry_of(
        {.layers = 1 + below(2), .kv_heads = 1 + below(2), .group = 1 + below(3), .head_dim = 64});
    geometry_.value_type = below(2) == 0 ? ValueType::kFp16 : ValueType::kBf16;
    policy_ = random_policy();
    wide_ = geometry_.value_type == ValueType::kBf16 ? Format::kBf16 : Format::kF16;
    tokens_ = std::make_unique<TokenSource>(geometry_, random());
    lanes_.resize(geometry_.lanes());
  }

  // Result: false where the pool had no pages for it.
  bool open() {
    auto sequence = Sequence::create(*source_, host(), geometry_, policy_);
    if (!sequence) {
      EXPECT_EQ(sequence.error().code, ErrorCode::kExhausted);
      return false;
    }
    sequence_.emplace(std::move(sequence).value());
    return true;
  }
  [[nodiscard]] const Sequence& sequence() const { return *sequence_; }
  [[nodiscard]] uint64_t refusals() const { return refusals_; }
  [[nodiscard]] uint64_t blocks() const { return blocks_; }

  void operate() {
    const uint32_t dice = below(100);
    if (tokens_seen_ == 0 && dice < 50) return prefill();
    if (dice < 72) return step();
    if (dice < 80) return evict();
    if (dice < 86) return quantize();
    if (dice < 92) return half_step();
    if (dice < 95) return reattach();
    if (dice < 97) return token_classes();
    return set_budget();
  }

  // Everything against the model.
  void verify() {
    for (uint32_t i = 0; i < lanes_.size(); ++i) {
      ASSERT_EQ(testing::read_lane(*sequence_, i), lanes_[i]) << "lane " << i;
    }
    const SequenceStats stats = sequence_->stats();
    uint64_t live = 0;
    for (const LaneModel& lane : lanes_) live += lane.size();
    EXPECT_EQ(stats.live_slots, live);
    EXPECT_EQ(stats.tokens, tokens_seen_);
    EXPECT_EQ(stats.evicted_slots + live, uint64_t{tokens_seen_} * lanes_.size());
    EXPECT_EQ(stats.recoded_slots, recoded_);
    const bool cuts = sequence_->state()->policy().evict == EvictRule::kRank;
    EXPECT_TRUE(cuts || stats.gathered_bytes == 0);
    EXPECT_LE(stats.reused_slots, stats.evicted_slots + recoded_);
    EXPECT_EQ(source_->promised(), 0u) << "a promise outlived its call";
  }

 private:
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((*random_)() % n); }
  Format random_format() { return static_cast<Format>(1 + below(kFormatCount - 1)); }

  PolicyParams random_policy() {
    PolicyParams p = testing::plain_policy(random_format());
    p.prompt_format = random_format();
    p.sink_format = random_format();
    p.sink_tokens = below(3) == 0 ? below(20) : 0;
    p.rotate = below(4) == 0 ? 0 : 1;
    const uint32_t kind = below(3);
    if (kind == 0) return p;
    if (kind == 1) {
      testing::draw_rules(p, *random_, below(2) == 0);
      return p;
    }
    p.evict = EvictRule::kTbe;
    p.select = static_cast<SelectRule>(below(4));
    p.grain = static_cast<SelectGrain>(below(2));
    p.floor_rule = static_cast<FloorRule>(below(2));
    p.segment_tokens = 16 * (1 + below(3));
    p.schedule_length = 2;
    p.schedule[0] = 8;
    p.schedule[1] = 3;
    p.budget_tokens = 20 + below(60);
    p.score_every = static_cast<uint16_t>(1 + below(3));
    return p;
  }

  Format resolve(Format format) const { return is_16bit(format) ? wide_ : format; }
  Format format_of(uint32_t position, Format otherwise) const {
    return resolve(position < policy_.sink_tokens ? policy_.sink_format : otherwise);
  }

  // A refused call must leave everything as it was.
  bool accepted(const Status& status, uint64_t held_before) {
    if (status) return true;
    EXPECT_EQ(status.error().code, ErrorCode::kExhausted) << status.error().what;
    EXPECT_EQ(pool_->held(), held_before);
    ++refusals_;
    verify();
    return false;
  }

  // head `head` of token `token` of [tokens, kv_heads, dim], rotated as the policy wants.
  std::vector<float> row(const std::vector<float>& x, uint32_t token, uint32_t head) const {
    const size_t dim = geometry_.head_dim;
    const auto begin =
        x.begin() + static_cast<std::ptrdiff_t>((size_t{token} * geometry_.kv_heads + head) * dim);
    std::vector<float> values(begin, begin + static_cast<std::ptrdiff_t>(dim));
    if (policy_.rotate != 0) reference().rotate(values.data(), 1, geometry_.head_dim);
    return values;
  }

  // Mixed magnitudes, now and then a value that is not a number.
  std::vector<float> draw(uint32_t count) {
    std::vector<float> x = tokens_->kv(count);
    if (below(8) == 0) {
      for (float& value : x) value *= 0x1p-20f;
    }
    if (below(32) == 0) x[below(static_cast<uint32_t>(x.size()))] = 1e30f;
    return x;
  }

  void prefill() {
    const uint32_t count = 1 + below(70);
    const uint32_t queries =
        below(2) == 0 ? 0 : 1 + below(std::min<uint32_t>(count, kScoreWindowMax));
    for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      const auto k = draw(count), v = draw(count);
      const uint64_t held = pool_->held();
      if (const Status done = sequence_->prefill(layer, k.data(), v.data(), count); !done) {
        // What earlier layers wrote can only be completed or released: start again.
        EXPECT_EQ(done.error().code, ErrorCode::kExhausted);
        EXPECT_EQ(pool_->held(), held);
        ++refusals_;
        return reopen();
      }
      for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
        LaneModel& lane = lanes_[layer * geometry_.kv_heads + head];
        for (uint32_t t = 0; t < count; ++t) {
          lane[t] = through_format(row(k, t, head), row(v, t, head),
                                   format_of(t, policy_.prompt_format), false);
        }
      }
      if (queries == 0) continue;
      const auto q = tokens_->rows(queries, geometry_.q_heads);
      ASSERT_TRUE(sequence_->prefill_queries(layer, q.data(), queries).has_value());
    }
    const uint64_t held = pool_->held();
    if (const Status ended = sequence_->prefill_end(); !ended) {
      EXPECT_EQ(ended.error().code, ErrorCode::kExhausted);
      EXPECT_EQ(pool_->held(), held);
      ++refusals_;
      return reopen();
    }
    tokens_seen_ = prompt_ = segment_start_ = count;
    if (policy_.evict == EvictRule::kRank) adopt_rules();
  }

  void reopen() {
    sequence_->release();
    tokens_seen_ = prompt_ = segment_start_ = 0;
    recoded_ = 0;
    for (LaneModel& lane : lanes_) lane.clear();
    if (!open()) closed_ = true;
  }

  // Buffered tokens leave for their format.
  void flush(LaneModel& lane) {
    for (auto& [position, token] : lane) {
      if (!token.buffered) continue;
      token =
          through_format(token.k, token.v, format_of(position, policy_.thought_format[0]), false);
    }
  }
  static uint32_t buffered(const LaneModel& lane) {
    uint32_t count = 0;
    for (const auto& [position, token] : lane) count += token.buffered ? 1 : 0;
    return count;
  }

  void append(uint32_t layer, bool keep) {
    const auto k = draw(1), v = draw(1);
    ASSERT_TRUE(sequence_->append(layer, k.data(), v.data()).has_value());
    for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
      LaneModel& lane = lanes_[layer * geometry_.kv_heads + head];
      if (buffered(lane) == kBufferTokens) flush(lane);
      if (!keep) continue;
      lane[tokens_seen_] = through_format(row(k, 0, head), row(v, 0, head), wide_, true);
    }
  }

  void step() {
    const uint64_t held = pool_->held();
    if (!accepted(sequence_->begin_step(), held)) return;
    std::vector<float> out(size_t{geometry_.q_heads} * geometry_.head_dim);
    const bool attends = below(2) == 0;
    for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      append(layer, true);
      if (!attends) continue;
      const auto q = tokens_->q();
      ASSERT_TRUE(sequence_->attend(layer, q.data(), out.data(), nullptr).has_value());
    }
    ASSERT_TRUE(sequence_->end_step().has_value());
    tokens_seen_ += 1;
    if (tokens_seen_ - segment_start_ == policy_.segment_tokens) {
      segment_start_ = tokens_seen_;
      for (LaneModel& lane : lanes_) flush(lane);
    }
    if (policy_.evict == EvictRule::kTbe) adopt_evictions();
    if (policy_.evict == EvictRule::kRank) {
      // Rules that fire at a multiple of 16 find the buffers flushed.
      const bool flushed = sequence_->state()->lanes.front()->buffer_count == 0;
      EXPECT_TRUE(!flushed || (tokens_seen_ - prompt_) % kBufferTokens == 0);
      for (LaneModel& lane : lanes_) {
        if (flushed) flush(lane);
      }
      adopt_rules();
    }
  }

  // Which tokens the policy drops is the policy's; that it only drops closed, generated ones, to a
  // floor, and the same ones in every head where it must, is checked here.
  void adopt_evictions() {
    const uint32_t open = segment_start_ == tokens_seen_ ? tokens_seen_ : segment_start_;
    for (uint32_t i = 0; i < lanes_.size(); ++i) {
      const LaneModel actual = testing::read_lane(*sequence_, i);
      for (auto it = lanes_[i].begin(); it != lanes_[i].end();) {
        if (actual.count(it->first) != 0) {
          ++it;
          continue;
        }
        ASSERT_GE(it->first, prompt_) << "the policy evicted a token of the prompt";
        ASSERT_LT(it->first, open) << "the policy evicted from the open segment";
        it = lanes_[i].erase(it);
      }
      ASSERT_EQ(actual.size(), lanes_[i].size()) << "a token came back";
    }
  }

  // Which tokens rules drop or recode is theirs; that they leave the buffer, the protected and all
  // values alone, and count what they do, is checked here.
  void adopt_rules() {
    const std::vector<LaneModel> before = lanes_;
    for (uint32_t i = 0; i < lanes_.size(); ++i) {
      const LaneModel actual = testing::read_lane(*sequence_, i);
      std::set<uint32_t> in_blocks;  // written now
      for (auto it = lanes_[i].begin(); it != lanes_[i].end();) {
        const auto found = actual.find(it->first);
        if (found == actual.end()) {
          ASSERT_FALSE(it->second.buffered) << "a rule evicted from the buffer";
          ASSERT_FALSE(protected_by_all(it->first)) << "a rule evicted what it protects";
          it = lanes_[i].erase(it);
          continue;
        }
        if (is_block(found->second.format) && found->second != it->second) {
          ASSERT_FALSE(it->second.buffered);
          in_blocks.insert(it->first);
        } else if (found->second.format != it->second.format) {
          ASSERT_FALSE(it->second.buffered);
          ASSERT_EQ(found->second.format, policy_.rules[0].recode_format);
          it->second =
              through_format(it->second.k, it->second.v, policy_.rules[0].recode_format, false);
          ASSERT_EQ(found->second, it->second);
        }
        ++it;
      }
      ASSERT_EQ(actual.size(), lanes_[i].size()) << "a token came back";
      adopt_blocks(i, before, in_blocks);
    }
    recoded_ = sequence_->stats().recoded_slots;
  }

  // Every block with one of these tokens is what the oracle makes of its tokens as they were.
  void adopt_blocks(uint32_t index, const std::vector<LaneModel>& before,
                    const std::set<uint32_t>& fresh) {
    if (fresh.empty()) return;
    size_t found = 0;
    const Lane lane = sequence_->state()->lane(index);
    lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
      const auto view = static_cast<Format>(page.format);
      if (!is_block(view)) return;
      std::vector<uint32_t> positions;
      bool written = false;  // a dead slot may still name a token that has moved
      for (uint32_t s = 0; s < lane.layout(page).slots; ++s) {
        positions.push_back(lane.position(page, s));
        written = written || (((page.live >> s) & 1u) != 0 && fresh.count(positions.back()) != 0);
      }
      if (!written) return;
      ASSERT_TRUE(std::is_sorted(positions.begin(), positions.end()));
      const LaneModel coded = through_block(view, index, before, positions, page);
      for (const auto& [position, token] : coded) {
        if (fresh.count(position) == 0) continue;
        lanes_[index][position] = token;
        ++found;
      }
      ++blocks_;
    });
    EXPECT_EQ(found, fresh.size());
  }

  // The tokens at these positions of a lane as a block of that view holds them.
  LaneModel through_block(Format view, uint32_t index, const std::vector<LaneModel>& before,
                          const std::vector<uint32_t>& positions, const PageDescriptor& page) {
    const uint32_t dim = geometry_.head_dim;
    const uint32_t first = is_second(view) ? index - geometry_.kv_heads : index;
    testing::BlockModel block{.view = view, .head_dim = dim, .positions = positions};
    for (const uint32_t p : positions) {
      block.add(before[first].at(p), 0);
      if (is_pair(view) || is_second(view)) block.add(before[first + geometry_.kv_heads].at(p), 1);
    }
    const uint32_t bits = format_info(view).k.bits;
    block.eta = bits <= 2 ? policy_.block_eta[bits - 1] : 0.0f;
    // Which channels stay is the policy's.
    const std::byte* bytes = sequence_->state()->pages.address(page.page);
    std::memcpy(&block.channels, bytes + block_layout(view, dim).channel_offset, 8);
    return block.coded();
  }
  bool protected_by_all(uint32_t position) const {
    bool all = true;
    for (uint32_t i = 0; i < policy_.rule_count; ++i) {
      const RankRule& r = policy_.rules[i];
      // A share of a budget that this model does not know may be none.
      const uint32_t newest = r.recent_percent == 0 ? r.recent : 0;
      all = all && (position < r.sinks || position + newest >= tokens_seen_);
    }
    return all;
  }

  // As often as the policy reads them or not.
  void token_classes() {
    const std::vector<uint8_t> classes(1 + below(90), static_cast<uint8_t>(below(4)));
    const uint64_t held = pool_->held();
    static_cast<void>(accepted(sequence_->token_classes(below(tokens_seen_ + 1), classes), held));
  }

  void half_step() {
    const uint64_t held = pool_->held();
    if (!accepted(sequence_->begin_step(), held)) return;
    const uint32_t layers = below(geometry_.layers + 1);
    for (uint32_t layer = 0; layer < layers; ++layer) append(layer, false);
    sequence_->cancel_step();
  }

  void evict() {
    if (tokens_seen_ == 0) return;
    std::vector<uint32_t> positions(1 + below(24));
    for (uint32_t& position : positions) position = below(tokens_seen_ + 4);
    uint64_t expected = 0;
    for (LaneModel& lane : lanes_) {
      for (const uint32_t position : positions) {
        if (position + kBufferTokens < tokens_seen_) expected += lane.erase(position);
      }
    }
    EXPECT_EQ(sequence_->evict(positions).value(), expected);
  }

  void quantize() {
    if (tokens_seen_ == 0) return;
    const uint32_t first = below(tokens_seen_);
    const uint32_t last = first + below(tokens_seen_ - first);
    const Format format = resolve(random_format());
    const uint64_t held = pool_->held();
    const Result<uint64_t> done = sequence_->quantize(first, last, format);
    if (!done) {
      static_cast<void>(accepted(done.error(), held));
      return;
    }
    uint64_t expected = 0;
    for (LaneModel& lane : lanes_) {
      for (auto it = lane.lower_bound(first); it != lane.end() && it->first <= last; ++it) {
        if (it->second.buffered || it->second.format == format) continue;
        it->second = through_format(it->second.k, it->second.v, format, false);
        ++expected;
      }
    }
    EXPECT_EQ(*done, expected);
    recoded_ += expected;
  }

  void reattach() {
    const PageId root = sequence_->detach();
    auto attached = Sequence::attach(*source_, host(), root);
    ASSERT_TRUE(attached.has_value());
    *sequence_ = std::move(attached).value();
  }

  void set_budget() {
    ASSERT_TRUE(
        sequence_->set_budget(below(2) == 0 ? kBudgetOfPolicy : 10 + below(100)).has_value());
  }

 public:
  [[nodiscard]] bool closed() const { return closed_; }

 private:
  VectorPool* pool_;
  std::mt19937_64* random_;
  std::unique_ptr<VectorPageSource> source_;
  ModelGeometry geometry_;
  PolicyParams policy_;
  Format wide_ = Format::kF16;
  std::unique_ptr<TokenSource> tokens_;
  std::optional<Sequence> sequence_;
  std::vector<LaneModel> lanes_;
  uint32_t tokens_seen_ = 0;
  uint32_t prompt_ = 0;
  uint32_t segment_start_ = 0;
  uint64_t recoded_ = 0;
  uint64_t refusals_ = 0;
  uint64_t blocks_ = 0;  // written, seen by the model
  bool closed_ = false;
};

void check_pool(const VectorPool& pool, const std::vector<std::unique_ptr<Subject>>& subjects) {
  std::set<uint32_t> owned;
  uint64_t held = 0;
  for (const auto& subject : subjects) {
    if (!subject) continue;
    testing::check_invariants(subject->sequence(), owned);
    const SequenceStats stats = subject->sequence().stats();
    held += stats.pages + stats.metadata_pages;
  }
  EXPECT_EQ(pool.held(), held) << "pages taken and not given back are not those held";
}

TEST(SequenceProperty, AgreesWithADictionary) {
  const uint64_t seed = testing::seed_from_environment(20251001);
  std::mt19937_64 random(seed);
  VectorPool pool({.head_dim = 64, .capacity = 260, .shuffle_seed = random() | 1});
  std::vector<std::unique_ptr<Subject>> subjects(kSequences);
  uint64_t refusals = 0, reopened = 0, blocks = 0;
  for (uint32_t i = 0; i < kOperations && !::testing::Test::HasFailure(); ++i) {
    SCOPED_TRACE("operation " + std::to_string(i) + " of seed " + std::to_string(seed));
    std::unique_ptr<Subject>& subject = subjects[random() % kSequences];
    if (!subject) {
      subject = std::make_unique<Subject>(pool, random);
      if (!subject->open()) subject.reset();
      ++reopened;
      continue;
    }
    subject->operate();
    const bool close = subject->closed() || random() % 160 == 0;
    if (!subject->closed() && (close || random() % 4 == 0)) subject->verify();
    if (close) {
      refusals += subject->refusals();
      blocks += subject->blocks();
      subject.reset();
    }
    if (i % 64 == 0) check_pool(pool, subjects);
  }
  for (auto& subject : subjects) {
    if (subject) refusals += subject->refusals();
    subject.reset();
  }
  EXPECT_EQ(pool.held(), 0u);
  EXPECT_EQ(pool.free_pages(), 260u);
  constexpr uint32_t kEnough = kOperations / 1000;
  EXPECT_GT(refusals, kEnough) << "the pool was never full: the test tests too little";
  EXPECT_GT(reopened, kEnough);
  EXPECT_GT(blocks, kEnough) << "hardly a block was written: the test tests too little";
  std::printf("%u operations, %llu refusals for want of pages, %llu openings\n", kOperations,
              static_cast<unsigned long long>(refusals), static_cast<unsigned long long>(reopened));
}

}  // namespace
}  // namespace thinkv::kernels
