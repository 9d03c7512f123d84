// k-means medoids: what survives of a segment.
#include "unit/kernels_support.h"

#include <numeric>

namespace thinkv::kernels {
namespace {

std::vector<uint8_t> keep(const KernelSet& set, const std::vector<float>& keys, uint32_t dim,
                          uint32_t target, const float* weights = nullptr) {
  const uint32_t n = static_cast<uint32_t>(keys.size() / dim);
  std::vector<uint8_t> kept(n, 9);
  set.medoids({.keys = keys.data(),
               .weights = weights,
               .n = n,
               .dim = dim,
               .target = target,
               .keep = kept.data()});
  return kept;
}

uint32_t count(const std::vector<uint8_t>& kept) {
  for (const uint8_t k : kept) EXPECT_LE(k, 1);
  return std::accumulate(kept.begin(), kept.end(), 0u);
}

class Medoids : public testing::TestWithParam<const KernelSet*> {};

// Clusters in runs, as thoughts are in time; centres 100 apart, members within about 1.
TEST_P(Medoids, OneSurvivorOfEachSeparatedCluster) {
  Rng rng(31);
  for (const uint32_t target : {2u, 4u, 8u, 16u, 64u}) {
    const uint32_t n = 128, dim = 64, run = n / target;
    std::vector<float> keys = gaussian(rng, n * dim, 0.1f);
    for (uint32_t i = 0; i < n; ++i) {
      keys[i * dim + i / run % dim] += 100.0f;
    }
    const std::vector<uint8_t> kept = keep(*GetParam(), keys, dim, target);
    for (uint32_t c = 0; c < target; ++c) {
      EXPECT_EQ(std::accumulate(kept.begin() + c * run, kept.begin() + (c + 1) * run, 0), 1) << c;
    }
  }
}

// One dimension, two clusters: the kept row is the one nearest the mean.
TEST_P(Medoids, KeepsTheRowNearestTheCentre) {
  const std::vector<float> keys = {0, 1, 2, 3, 9, 100, 104, 105, 106, 110};
  EXPECT_EQ(keep(*GetParam(), keys, 1, 2), (std::vector<uint8_t>{0, 0, 0, 1, 0, 0, 0, 1, 0, 0}));
}

TEST_P(Medoids, KeepsExactlyTheTarget) {
  Rng rng(32);
  for (const uint32_t n : {1u, 2u, 3u, 17u, 128u, 200u}) {
    const std::vector<float> keys = gaussian(rng, n * 20);
    for (const uint32_t target : {1u, 2u, n / 2, n - 1, n}) {
      if (target == 0 || target > n) continue;
      EXPECT_EQ(count(keep(*GetParam(), keys, 20, target)), target) << n;
    }
  }
}

TEST_P(Medoids, DuplicatesStillGiveDistinctRows) {
  const std::vector<float> keys(40 * 8, 3.0f);
  EXPECT_EQ(count(keep(*GetParam(), keys, 8, 13)), 13u);
}

TEST_P(Medoids, NotANumberKeysStillGiveTheTarget) {
  const std::vector<float> keys(40 * 8, std::nanf(""));
  EXPECT_EQ(count(keep(*GetParam(), keys, 8, 13)), 13u);
}

TEST_P(Medoids, TargetOneIsTheMedoidOfAll) {
  const std::vector<float> keys = {-10, -1, 0.5f, 1, 10};
  EXPECT_EQ(keep(*GetParam(), keys, 1, 1), (std::vector<uint8_t>{0, 0, 1, 0, 0}));
}

// Starts are 4, 4 and 0; the second is empty in the first round, because ties go to the lower
// cluster. It keeps its centre, takes the fours once the first has moved to 5, and so frees the 9.
TEST_P(Medoids, AnEmptyClusterKeepsItsCentre) {
  const std::vector<float> keys = {4, 4, 4, 4, 9, 0};
  EXPECT_EQ(keep(*GetParam(), keys, 1, 3), (std::vector<uint8_t>{1, 0, 0, 0, 1, 1}));
}

// Mean 3 of {0, 2, 3.5, 6.5}: row 2 is nearest. A weight of 100 on row 3 moves the centre there.
TEST_P(Medoids, WeightsMoveTheChoice) {
  const std::vector<float> keys = {0, 2, 3.5f, 6.5f};
  EXPECT_EQ(keep(*GetParam(), keys, 1, 1), (std::vector<uint8_t>{0, 0, 1, 0}));
  const std::vector<float> heavy = {1, 1, 1, 100};
  EXPECT_EQ(keep(*GetParam(), keys, 1, 1, heavy.data()), (std::vector<uint8_t>{0, 0, 0, 1}));
  const std::vector<float> equal = {5, 5, 5, 5};
  EXPECT_EQ(keep(*GetParam(), keys, 1, 1, equal.data()), keep(*GetParam(), keys, 1, 1));
}

TEST_P(Medoids, TiesGoToTheLowerRow) {
  const std::vector<float> keys = {-1, 1};
  EXPECT_EQ(keep(*GetParam(), keys, 1, 1), (std::vector<uint8_t>{1, 0}))
      << "the start is row 1, the centre 0 after one round, both rows at distance 1";
}

TEST_P(Medoids, SameChoiceAsTheReferenceEveryTime) {
  Rng rng(33);
  for (uint32_t trial = 0; trial < 60; ++trial) {
    const uint32_t n = 1 + below(rng, 160), dim = 1 + below(rng, 200), target = 1 + below(rng, n);
    const std::vector<float> keys = gaussian(rng, size_t{n} * dim);
    std::vector<float> weights = gaussian(rng, n);
    for (float& w : weights) w = std::fabs(w) + 0.01f;
    const float* const w = trial % 2 == 0 ? weights.data() : nullptr;
    const std::vector<uint8_t> expected = keep(reference(), keys, dim, target, w);
    EXPECT_EQ(keep(*GetParam(), keys, dim, target, w), expected) << n << " " << dim;
    EXPECT_EQ(keep(*GetParam(), keys, dim, target, w), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Sets, Medoids, testing::ValuesIn(all_sets()), [](const auto& param) {
  std::string name = param.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(MedoidStart, RowsAreDistinctAndInRange) {
  for (uint32_t n = 1; n <= 130; ++n) {
    for (uint32_t target = 1; target <= n; ++target) {
      for (uint32_t j = 0; j < target; ++j) {
        const uint32_t row = medoid_start_row(j, n, target);
        ASSERT_LT(row, n);
        if (j > 0) {
          ASSERT_GT(row, medoid_start_row(j - 1, n, target));
        }
      }
    }
  }
}

TEST(MedoidsDeathTest, RefusesImpossibleTargets) {
  const std::vector<float> keys(8, 0.0f);
  for (const KernelSet* set : all_sets()) {
    EXPECT_DEATH(static_cast<void>(keep(*set, keys, 2, 0)), "target");
    EXPECT_DEATH(static_cast<void>(keep(*set, keys, 2, 5)), "target");
  }
}

}  // namespace
}  // namespace thinkv::kernels
