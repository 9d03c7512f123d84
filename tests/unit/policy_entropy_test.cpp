// The truncated entropy of a head's rows against closed forms and spectra, the rounds of its
// rotations, and the logarithm that host and device share.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "kernels/policy/matrix_entropy.h"

namespace thinkv::policy {
namespace {

TEST(RankEntropy, AgreesWithTheClosedForms) {
  constexpr uint32_t kDim = 128;
  // Both signs of a row, so that the mean is 0. spectrum[i]: the i-th eigenvalue, up to a factor.
  const auto rows_of = [](const std::vector<double>& spectrum) {
    std::vector<float> rows;
    for (int sign = 1; sign >= -1; sign -= 2) {
      for (uint32_t i = 0; i < kDim; ++i) {
        for (uint32_t d = 0; d < kDim; ++d) {
          const bool odd = std::popcount(i & d) % 2 != 0;  // a Hadamard matrix
          const double root = d < spectrum.size() ? std::sqrt(spectrum[d]) : 0.0;
          rows.push_back(static_cast<float>(sign * (odd ? -root : root)));
        }
      }
    }
    return rows;
  };
  const auto entropy = [&](const std::vector<double>& spectrum, uint32_t values) {
    std::vector<float> rows = rows_of(spectrum);
    return truncated_entropy(rows, kDim, values);
  };
  const std::vector<double> flat(kDim, 1.0);
  EXPECT_NEAR(entropy(flat, 128), 1.000f, 5e-4f);
  EXPECT_NEAR(entropy(flat, 32), 0.250f, 5e-4f);
  EXPECT_NEAR(entropy({1.0}, 32), 0.0f, 1e-5f);
  EXPECT_NEAR(entropy(std::vector<double>(8, 1.0), 32), 0.429f, 5e-4f);
  std::vector<double> falling(kDim);
  for (uint32_t i = 0; i < kDim; ++i) falling[i] = std::pow(0.9, i);
  EXPECT_NEAR(entropy(falling, 32), 0.623f, 5e-4f);
  EXPECT_LT(entropy(flat, 32), entropy(std::vector<double>(32, 1.0), 32))
      << "the truncation: not monotone in the rank";
}

TEST(RankEntropy, OfRotatedRowsIsWhatTheirSpectrumSays) {
  // Rows as centred pairs +-r: with n orthogonal directions of energy w_i the entropy is that of w.
  constexpr uint32_t kDim = 64;
  std::mt19937 random(17);
  std::normal_distribution<double> normal;
  for (const uint32_t directions : {1u, 3u, 17u, 32u}) {
    std::vector<std::vector<double>> basis;
    for (uint32_t i = 0; i < directions; ++i) {
      std::vector<double> v(kDim);
      for (double& x : v) x = normal(random);
      for (const auto& other : basis) {
        double dot = 0.0;
        for (uint32_t d = 0; d < kDim; ++d) dot += v[d] * other[d];
        for (uint32_t d = 0; d < kDim; ++d) v[d] -= dot * other[d];
      }
      double norm = 0.0;
      for (const double x : v) norm += x * x;
      for (double& x : v) x /= std::sqrt(norm);
      basis.push_back(v);
    }
    std::vector<float> rows;
    double expected = 0.0;
    const uint32_t pairs = directions * (directions + 1) / 2;
    for (uint32_t i = 0; i < directions; ++i) {  // direction i comes i + 1 times, with both signs
      const double share = (i + 1.0) / pairs;
      expected -= share * std::log(share) / std::log(static_cast<double>(kDim));
      for (uint32_t copy = 0; copy < 2 * (i + 1); ++copy) {
        const double length = (copy % 2 == 0 ? 1.0 : -1.0) * (0.5 + copy);
        for (uint32_t d = 0; d < kDim; ++d) {
          rows.push_back(static_cast<float>(length * basis[i][d]));
        }
        const double back = (copy % 2 == 0 ? -1.0 : 1.0) * (0.5 + copy);
        for (uint32_t d = 0; d < kDim; ++d) rows.push_back(static_cast<float>(back * basis[i][d]));
      }
    }
    EXPECT_NEAR(truncated_entropy(rows, kDim), expected, 2e-6) << directions;
  }
}

TEST(RankEntropy, ARoundOfPairsHasEveryIndexOnceAndASweepEveryPair) {
  for (const uint32_t side : {2u, 4u, 64u, 128u}) {
    std::set<std::pair<uint32_t, uint32_t>> met;
    for (uint32_t round = 0; round + 1 < side; ++round) {
      std::set<uint32_t> there;
      for (uint32_t i = 0; i < side / 2; ++i) {
        const JacobiPair pair = jacobi_pair(side, round, i);
        there.insert({pair.p, pair.q});
        met.insert({std::min(pair.p, pair.q), std::max(pair.p, pair.q)});
      }
      ASSERT_EQ(there.size(), side);
      ASSERT_LT(*there.rbegin(), side);
    }
    EXPECT_EQ(met.size(), side * (side - 1) / 2);
  }
}

TEST(ExactLog, IsLogWithinTwoRoundings) {
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> exponent(-700.0, 100.0);
  for (uint32_t i = 0; i < 200000; ++i) {
    const double x =
        i % 2 == 0 ? std::exp(exponent(random)) : 1.0 - std::exp(exponent(random) / 70);
    if (!(x > 0.0)) continue;
    const double exact = std::log(x);
    ASSERT_LE(std::fabs(exact_log(x) - exact), 4e-16 * std::max(std::fabs(exact), 1.0)) << x;
  }
  EXPECT_EQ(exact_log(1.0), 0.0);
  EXPECT_NEAR(exact_log(0x1p-1060), -1060 * std::log(2.0), 1e-12);
}

TEST(RankEntropy, NothingToMeasureIsZero) {
  std::vector<float> one(64, 1.0f), same(size_t{4} * 64, 2.0f);
  EXPECT_EQ(truncated_entropy(one, 64), 0.0f);
  EXPECT_EQ(truncated_entropy(same, 64), 0.0f);
}

}  // namespace
}  // namespace thinkv::policy
