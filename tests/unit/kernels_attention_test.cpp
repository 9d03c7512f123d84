// Attention against the formula in double on the decoded values, and what must not matter to it.
#include "unit/kernels_lane.h"
#include "unit/kernels_support.h"

#include <algorithm>
#include <numeric>

namespace thinkv::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Query {
  uint32_t group;
  std::vector<float> q;
  uint32_t window = 0, sinks = 0, position = 0;
  float near_zero = 0.01f;
  GqaReduce reduce = GqaReduce::kMeanProbability;
};

Query make_query(Rng& rng, uint32_t group, uint32_t head_dim) {
  return {.group = group, .q = gaussian(rng, group * head_dim, 2.0f)};
}

struct Answer {
  std::vector<float> out, lse, probabilities;
  SparsityCount sparsity{77, 77};
  bool operator==(const Answer& other) const {
    return same_bits(out, other.out) && same_bits(lse, other.lse) &&
           same_bits(probabilities, other.probabilities) && sparsity.live == other.sparsity.live &&
           sparsity.near_zero == other.sparsity.near_zero;
  }
};

float softmax_scale(uint32_t head_dim) {
  return 1.0f / std::sqrt(static_cast<float>(head_dim));
}

Answer attend(const KernelSet& set, const Lane& lane, const Query& query) {
  const std::vector<PageView> views = lane.views();
  Answer answer;
  answer.out.assign(query.group * lane.head_dim, std::nanf(""));
  answer.lse.assign(query.group, std::nanf(""));
  answer.probabilities.assign(views.size() * kSlotsPerPageMax, std::nanf(""));
  set.attend({.pages = views,
              .head_dim = lane.head_dim,
              .group = query.group,
              .q = query.q.data(),
              .softmax_scale = softmax_scale(lane.head_dim),
              .out = answer.out.data(),
              .lse = answer.lse.data(),
              .window = query.window,
              .sinks = query.sinks,
              .query_position = query.position,
              .sparsity = &answer.sparsity,
              .near_zero = query.near_zero,
              .probabilities = answer.probabilities.data(),
              .reduce = query.reduce});
  return answer;
}

// The formula, straight: every slot that counts, in double.
struct Exact {
  std::vector<double> out, lse;
  double value_rms = 0;
  std::vector<std::pair<size_t, std::vector<double>>> rows;  // entry of probabilities, p by head
};

Exact formula(const Lane& lane, const Query& query) {
  const uint32_t d = lane.head_dim;
  Exact exact;
  std::vector<std::vector<float>> values;
  for (size_t p = 0; p < lane.pages.size(); ++p) {
    const Decoded decoded = decode_all(reference(), lane.layout(p), lane.pages[p]);
    for (uint32_t slot = 0; slot < lane.layout(p).slots; ++slot) {
      if (((lane.live[p] >> slot) & 1u) == 0) continue;
      uint32_t at = 0;
      std::memcpy(&at, lane.pages[p].bytes() + lane.layout(p).position_offset + 4 * slot, 4);
      const bool recent = int64_t{at} + query.window > int64_t{query.position};
      if (query.window != 0 && !recent && at >= query.sinks) continue;
      std::vector<double> logits;
      for (uint32_t h = 0; h < query.group; ++h) {
        double dot = 0;
        for (uint32_t i = 0; i < d; ++i) {
          dot += double{query.q[h * d + i]} * double{decoded.k[slot * d + i]};
        }
        logits.push_back(dot * double{softmax_scale(d)});
      }
      exact.rows.emplace_back(p * kSlotsPerPageMax + slot, logits);
      values.emplace_back(decoded.v.begin() + slot * d, decoded.v.begin() + (slot + 1) * d);
    }
  }
  exact.out.assign(query.group * d, 0.0);
  exact.lse.assign(query.group, -std::numeric_limits<double>::infinity());
  for (uint32_t h = 0; h < query.group && !exact.rows.empty(); ++h) {
    double top = exact.rows[0].second[h], sum = 0;
    for (const auto& row : exact.rows) top = std::max(top, row.second[h]);
    for (const auto& row : exact.rows) sum += std::exp(row.second[h] - top);
    exact.lse[h] = top + std::log(sum);
    for (size_t r = 0; r < exact.rows.size(); ++r) {
      double& p = exact.rows[r].second[h];
      p = std::exp(p - exact.lse[h]);
      for (uint32_t i = 0; i < d; ++i) exact.out[h * d + i] += p * double{values[r][i]};
    }
  }
  size_t n = 0;
  for (const auto& value : values) {
    for (const float x : value) exact.value_rms += double{x} * double{x};
    n += value.size();
  }
  exact.value_rms = n == 0 ? 0 : std::sqrt(exact.value_rms / static_cast<double>(n));
  return exact;
}

// Bounds of the kernels guide: 1e-3 rms(V) absolute, 2/128 relative, cosine 5e-6, LSE 1e-5. This
// is fp32 throughout, so the absolute bound is met with a hundredth of that.
void expect_close(const Answer& answer, const Exact& exact) {
  const size_t heads = exact.lse.size(), d = answer.out.size() / heads;
  for (size_t h = 0; h < heads; ++h) {
    if (std::isinf(exact.lse[h])) {
      ASSERT_EQ(answer.lse[h], -kInfinity);
    } else {
      ASSERT_NEAR(answer.lse[h], exact.lse[h], 1e-5);
    }
    double dot = 0, aa = 0, bb = 0;
    for (size_t i = h * d; i < (h + 1) * d; ++i) {
      const double a = double{answer.out[i]}, b = exact.out[i];
      ASSERT_LE(std::fabs(a - b), 1e-5 * exact.value_rms + 1e-5 * std::fabs(b)) << h << " " << i;
      dot += a * b;
      aa += a * a;
      bb += b * b;
    }
    if (bb > 0) {
      ASSERT_LT(1.0 - dot / std::sqrt(aa * bb), 5e-6);
    }
  }
}

double probability_sum(const Answer& answer) {
  return std::accumulate(answer.probabilities.begin(), answer.probabilities.end(), 0.0);
}

const std::vector<Format> kMixed = {Format::kK4V4,  Format::kF16,  Format::kK2V2,
                                    Format::kNvfp4, Format::kK8V4, Format::kTernary,
                                    Format::kBf16,  Format::kK4V2, Format::kK8V8};

class Attention : public testing::TestWithParam<const KernelSet*> {
 protected:
  Rng rng_{41};
};

TEST_P(Attention, MatchesTheFormulaAtEveryLengthAroundTiles) {
  for (const uint32_t d : kHeadDims) {
    for (const uint32_t tokens : {0u, 1u, 15u, 16u, 17u, 31u, 32u, 33u, 63u, 64u, 65u, 200u}) {
      for (const Format format : {Format::kK4V4, Format::kK4V2, Format::kF16}) {
        SCOPED_TRACE(testing::Message() << d << " " << tokens << " " << format_info(format).name);
        const Lane lane = make_lane(rng_, {.head_dim = d, .tokens = tokens, .formats = {format}});
        const Query query = make_query(rng_, 3, d);
        expect_close(attend(*GetParam(), lane, query), formula(lane, query));
      }
    }
  }
}

TEST_P(Attention, MatchesTheFormulaInEveryFormat) {
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    const Lane lane = make_lane(rng_, {.head_dim = layout->head_dim,
                                       .tokens = 3 * layout->slots - 5,
                                       .formats = {layout->format},
                                       .live_percent = 70});
    const Query query = make_query(rng_, 4, layout->head_dim);
    expect_close(attend(*GetParam(), lane, query), formula(lane, query));
  }
}

TEST_P(Attention, MatchesTheFormulaForEveryGroup) {
  for (const uint32_t group : {1u, 2u, 3u, 4u, 5u, 7u, 8u, 16u}) {
    SCOPED_TRACE(group);
    const Lane lane = make_lane(rng_, {.head_dim = 128, .tokens = 300, .formats = kMixed});
    const Query query = make_query(rng_, group, 128);
    expect_close(attend(*GetParam(), lane, query), formula(lane, query));
  }
}

TEST_P(Attention, MatchesTheFormulaAtEveryDensity) {
  for (const uint32_t percent : {0u, 1u, 50u, 99u, 100u}) {
    SCOPED_TRACE(percent);
    const Lane lane = make_lane(
        rng_, {.head_dim = 64, .tokens = 700, .formats = kMixed, .live_percent = percent});
    const Query query = make_query(rng_, 3, 64);
    expect_close(attend(*GetParam(), lane, query), formula(lane, query));
  }
}

TEST_P(Attention, MatchesTheFormulaOnALongLane) {
  const Lane lane = make_lane(rng_, {.head_dim = 64, .tokens = 4096, .formats = kMixed});
  const Query query = make_query(rng_, 3, 64);
  expect_close(attend(*GetParam(), lane, query), formula(lane, query));
}

TEST_P(Attention, NothingLiveGivesZeroAndMinusInfinity) {
  for (const uint32_t tokens : {0u, 40u}) {
    const Lane lane = make_lane(rng_, {.tokens = tokens, .live_percent = 0});
    const Answer answer = attend(*GetParam(), lane, make_query(rng_, 2, 64));
    for (const float x : answer.out) EXPECT_EQ(x, 0.0f);
    for (const float x : answer.lse) EXPECT_EQ(x, -kInfinity);
    for (const float x : answer.probabilities) EXPECT_EQ(x, 0.0f);
    EXPECT_EQ(answer.sparsity.live, 0u);
    EXPECT_EQ(answer.sparsity.near_zero, 0u);
  }
}

TEST_P(Attention, WindowsAndSinksSelectByPosition) {
  const Lane lane =
      make_lane(rng_, {.head_dim = 64, .tokens = 300, .formats = kMixed, .live_percent = 80});
  for (const uint32_t window : {1u, 16u, 100u, 1000u, ~0u}) {
    for (const uint32_t sinks : {0u, 4u}) {
      SCOPED_TRACE(testing::Message() << window << " " << sinks);
      Query query = make_query(rng_, 3, 64);
      query.window = window;
      query.sinks = sinks;
      query.position = 299;
      const Answer answer = attend(*GetParam(), lane, query);
      const Exact exact = formula(lane, query);
      expect_close(answer, exact);
      EXPECT_EQ(answer.sparsity.live, exact.rows.size());
    }
  }
}

// A window that no token is in: like an empty lane.
TEST_P(Attention, AWindowPastTheEndSeesNothing) {
  const Lane lane = make_lane(rng_, {.tokens = 50});
  Query query = make_query(rng_, 1, 64);
  query.window = 8;
  query.position = 1000;
  EXPECT_EQ(attend(*GetParam(), lane, query).lse[0], -kInfinity);
}

// Every byte that no live slot owns is filled with patterns that are NaN in fp16, bf16, fp32 and
// e4m3. Bitwise equal: they are not read at all.
TEST_P(Attention, PoisonOutsideLiveSlotsChangesNoBit) {
  for (const uint32_t d : kHeadDims) {
    for (const uint32_t window : {0u, 64u}) {
      const Lane clean =
          make_lane(rng_, {.head_dim = d, .tokens = 500, .formats = kMixed, .live_percent = 40});
      Query query = make_query(rng_, 5, d);
      query.window = window;
      query.position = 499;
      for (const int pattern : {0xFF, 0x7F, 0x7E}) {
        Lane poisoned = clean;
        for (size_t p = 0; p < poisoned.pages.size(); ++p) {
          const std::vector<int> owner = byte_owners(poisoned.layout(p));
          for (uint32_t byte = 0; byte < poisoned.pages[p].size(); ++byte) {
            const bool live = owner[byte] >= 0 && ((poisoned.live[p] >> owner[byte]) & 1u) != 0;
            if (!live) poisoned.pages[p].bytes()[byte] = static_cast<std::byte>(pattern);
          }
        }
        EXPECT_TRUE(attend(*GetParam(), clean, query) == attend(*GetParam(), poisoned, query));
      }
    }
  }
}

// Mask bits past the last slot of a format name no slot.
TEST_P(Attention, LiveBitsPastTheLastSlotAreIgnored) {
  Lane lane = make_lane(rng_, {.tokens = 64});
  const Query query = make_query(rng_, 2, 64);
  const Answer before = attend(*GetParam(), lane, query);
  for (uint64_t& live : lane.live) live |= ~uint64_t{0} << 32;
  EXPECT_TRUE(before == attend(*GetParam(), lane, query));
}

TEST_P(Attention, MovingPagesChangesNoBit) {
  const Lane lane = make_lane(rng_, {.tokens = 300, .formats = kMixed, .live_percent = 60});
  const Query query = make_query(rng_, 3, 64);
  const Lane moved = lane;  // the same bytes at other addresses
  ASSERT_NE(lane.pages[0].bytes(), moved.pages[0].bytes());
  EXPECT_TRUE(attend(*GetParam(), lane, query) == attend(*GetParam(), moved, query));
}

// Another order of slots and pages may only change the order of sums: of n terms in fp32, each at
// most max|V|, the probabilities adding to 1: 2 n 2^-24 max|V| is far above what is seen.
TEST_P(Attention, PermutingSlotsAndPagesChangesOnlyRounding) {
  const uint32_t d = 64, n = 320;
  const PageLayout& layout = page_layout(Format::kK4V4, d);
  const std::vector<float> k = gaussian(rng_, n * d), v = gaussian(rng_, n * d);
  const Query query = make_query(rng_, 3, d);
  std::vector<uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0u);
  std::vector<Answer> answers;
  for (uint32_t trial = 0; trial < 5; ++trial) {
    Lane lane{.head_dim = d, .pages = {}, .formats = {}, .live = {}};
    for (uint32_t at = 0; at < n; at += layout.slots) {
      TestPage& page = lane.pages.emplace_back(d);
      for (uint32_t i = 0; i < layout.slots; ++i) {
        const uint8_t slot = static_cast<uint8_t>(i);
        const uint32_t token = order[at + i];
        reference().encode({.page = page.bytes(),
                            .format = Format::kK4V4,
                            .head_dim = d,
                            .slots = {&slot, 1},
                            .k = k.data() + token * d,
                            .v = v.data() + token * d,
                            .positions = &token});
      }
      lane.formats.push_back(Format::kK4V4);
      lane.live.push_back(layout.full_mask());
    }
    answers.push_back(attend(*GetParam(), lane, query));
    std::shuffle(order.begin(), order.end(), rng_);
  }
  const float top = *std::max_element(v.begin(), v.end());
  for (const Answer& answer : answers) {
    for (size_t i = 0; i < answer.out.size(); ++i) {
      ASSERT_NEAR(answer.out[i], answers[0].out[i], 2 * n * 0x1p-24f * top);
    }
  }
}

TEST_P(Attention, EmittedProbabilitiesAreThoseOfTheFormula) {
  const Lane lane = make_lane(rng_, {.tokens = 400, .formats = kMixed, .live_percent = 50});
  Query query = make_query(rng_, 4, 64);
  const Exact exact = formula(lane, query);
  for (const GqaReduce reduce : {GqaReduce::kMeanProbability, GqaReduce::kMaxProbability}) {
    query.reduce = reduce;
    Answer answer = attend(*GetParam(), lane, query);
    for (const auto& [entry, p] : exact.rows) {
      const double mean = std::accumulate(p.begin(), p.end(), 0.0) / query.group;
      const double expected =
          reduce == GqaReduce::kMeanProbability ? mean : *std::max_element(p.begin(), p.end());
      ASSERT_NEAR(answer.probabilities[entry], expected, 1e-5);
      answer.probabilities[entry] = 0.0f;
    }
    EXPECT_EQ(probability_sum(answer), 0.0) << "slots that do not count";
  }
}

TEST_P(Attention, EmittedProbabilitiesSumToOneWhereTheyAreADistribution) {
  const Lane lane = make_lane(rng_, {.tokens = 400, .formats = kMixed, .live_percent = 50});
  Query query = make_query(rng_, 4, 64);
  EXPECT_NEAR(probability_sum(attend(*GetParam(), lane, query)), 1.0, 1e-5);
  query.reduce = GqaReduce::kMaxLogit;
  EXPECT_NEAR(probability_sum(attend(*GetParam(), lane, query)), 1.0, 1e-5);
  query.reduce = GqaReduce::kMaxProbability;
  const double sum = probability_sum(attend(*GetParam(), lane, query));
  EXPECT_GT(sum, 1.0 + 1e-3) << "four different heads do not agree";
  EXPECT_LT(sum, 4.0);
}

// Two heads see dims 0 and 1; a slot's K holds its logits. Maxima over heads: 10, 10, 0, 9, 5.5,
// 5.3. ln(0.01) = -4.605, so 5.5 is above 1 % of the row's maximum and 5.3 is below.
class PlantedLogits {
 public:
  PlantedLogits() : page_(64) {
    const float planted[6][2] = {{10, 0}, {0, 10}, {0, 0}, {9, -20}, {5.5f, 0}, {-1, 5.3f}};
    for (uint32_t i = 0; i < 7; ++i) {
      std::vector<float> k(64, 0.0f);
      const std::vector<float> v(64, 1.0f);
      k[0] = i < 6 ? planted[i][0] : 1000.0f;  // slot 6 is dead
      k[1] = i < 6 ? planted[i][1] : 1000.0f;
      const uint8_t slot = static_cast<uint8_t>(i);
      reference().encode({.page = page_.bytes(),
                          .format = Format::kF16,
                          .head_dim = 64,
                          .slots = {&slot, 1},
                          .k = k.data(),
                          .v = v.data(),
                          .positions = &i});
    }
    q_[0] = 1.0f;
    q_[64 + 1] = 1.0f;
  }
  [[nodiscard]] Answer attend(const KernelSet& set, uint32_t group, float near_zero,
                              GqaReduce reduce) {
    const PageView view{page_.bytes(), 0b011'1111, Format::kF16};
    Answer answer;
    answer.out.resize(128);
    answer.lse.resize(2);
    answer.probabilities.resize(kSlotsPerPageMax);
    set.attend({.pages = {&view, 1},
                .head_dim = 64,
                .group = group,
                .q = q_.data(),
                .softmax_scale = 1.0f,
                .out = answer.out.data(),
                .lse = answer.lse.data(),
                .sparsity = &answer.sparsity,
                .near_zero = near_zero,
                .probabilities = answer.probabilities.data(),
                .reduce = reduce});
    return answer;
  }

 private:
  TestPage page_;
  std::vector<float> q_ = std::vector<float>(128, 0.0f);
};

TEST_P(Attention, SparsityCountsTheMaximumOverHeads) {
  PlantedLogits planted;
  const GqaReduce any = GqaReduce::kMeanProbability;
  const SparsityCount both = planted.attend(*GetParam(), 2, 0.01f, any).sparsity;
  EXPECT_EQ(both.live, 6u);
  EXPECT_EQ(both.near_zero, 2u);  // 0 and 5.3
  const SparsityCount first = planted.attend(*GetParam(), 1, 0.01f, any).sparsity;
  EXPECT_EQ(first.near_zero, 3u);  // 0, 0 and -1: the second head is not asked
  EXPECT_EQ(planted.attend(*GetParam(), 2, 0.0f, any).sparsity.near_zero, 0u);
  EXPECT_EQ(planted.attend(*GetParam(), 2, 1.0f, any).sparsity.near_zero,
            4u);  // all but the maxima
}

TEST_P(Attention, MaxLogitEmissionIsTheSoftmaxOfTheMaxima) {
  PlantedLogits planted;
  const Answer answer = planted.attend(*GetParam(), 2, 0.01f, GqaReduce::kMaxLogit);
  const double maxima[6] = {10, 10, 0, 9, 5.5, double{5.30078125}};  // 5.3 in fp16
  double sum = 0;
  for (const double m : maxima) sum += std::exp(m);
  for (uint32_t i = 0; i < 6; ++i) {
    EXPECT_NEAR(answer.probabilities[i], std::exp(maxima[i]) / sum, 1e-6) << i;
  }
  EXPECT_EQ(answer.probabilities[6], 0.0f);
}

// exp would overflow without the running maximum; one token then takes all.
TEST_P(Attention, LargeLogitsDoNotOverflow) {
  const Lane lane = make_lane(rng_, {.tokens = 100, .formats = {Format::kK8V8}});
  Query query = make_query(rng_, 2, 64);
  for (float& x : query.q) x *= 500.0f;
  const Answer answer = attend(*GetParam(), lane, query);
  for (const float x : answer.out) EXPECT_TRUE(std::isfinite(x));
  for (const float x : answer.lse) EXPECT_GT(x, 100.0f);
  EXPECT_NEAR(probability_sum(answer), 1.0, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Sets, Attention, testing::ValuesIn(all_sets()), [](const auto& param) {
  std::string name = param.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(AttentionHost, HostIsTheWidestSetOfThisMachine) {
  const KernelSet* const wide = host_avx2_set();
  EXPECT_EQ(&host(), wide != nullptr ? wide : &host_baseline_set());
}

TEST(AttentionDeathTest, RefusesWhatNoCallerMayAsk) {
  std::vector<float> q(17 * 64, 0.0f), out(17 * 64), lse(17);
  for (const KernelSet* set : all_sets()) {
    AttendParams params{.pages = {},
                        .head_dim = 64,
                        .group = 0,
                        .q = q.data(),
                        .softmax_scale = 1.0f,
                        .out = out.data(),
                        .lse = lse.data()};
    EXPECT_DEATH(set->attend(params), "group");
    params.group = 17;
    EXPECT_DEATH(set->attend(params), "group");
    params.group = 1;
    params.head_dim = 80;
    EXPECT_DEATH(set->attend(params), "head_dim_supported");
  }
}

}  // namespace
}  // namespace thinkv::kernels
