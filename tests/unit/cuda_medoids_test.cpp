// The k-means of the device, in the emulator, against the oracle: the same rows, always.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/refresh.h"
#include "kernels/kernels.h"
#include "tests/support/medoids_kernel.cuh"

namespace thinkv::cuda {
namespace {

struct Case {
  uint32_t n = 0, dim = 0, target = 0;
  std::vector<float> keys = {};
  std::vector<float> weights = {};  // empty: none
  uint32_t iterations = 4;
};

// width: dims that are in shared memory at a time; 0, all.
std::vector<uint8_t> device_keep(const Case& c, uint32_t threads = kMedoidThreads,
                                 uint32_t width = 0) {
  std::vector<uint8_t> keep(c.n, 9);
  const testing::MedoidCase parameters{.keys = c.keys.data(),
                                       .weights = c.weights.empty() ? nullptr : c.weights.data(),
                                       .n = c.n,
                                       .dim = c.dim,
                                       .target = c.target,
                                       .iterations = c.iterations,
                                       .keep = keep.data(),
                                       .width = width};
  const LaunchSize size{
      .blocks = 1, .threads = threads, .shared_bytes = testing::medoid_case_bytes(parameters)};
  EXPECT_EQ(launch(testing::medoids_kernel, size, nullptr, parameters), cudaSuccess);
  return keep;
}

std::vector<uint8_t> oracle_keep(const Case& c) {
  std::vector<uint8_t> keep(c.n, 9);
  kernels::reference().medoids({.keys = c.keys.data(),
                                .weights = c.weights.empty() ? nullptr : c.weights.data(),
                                .n = c.n,
                                .dim = c.dim,
                                .target = c.target,
                                .iterations = c.iterations,
                                .keep = keep.data()});
  return keep;
}

std::vector<float> gaussian(std::mt19937_64& random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& value : x) value = normal(random);
  return x;
}

// With the keys in shared memory, and with as few dims of them as may be.
void expect_same(const Case& c, const char* what) {
  const std::vector<uint8_t> expected = oracle_keep(c);
  for (const uint32_t width : {0u, kMedoidWidthLeast}) {
    EXPECT_EQ(device_keep(c, kMedoidThreads, width), expected)
        << what << ": n " << c.n << ", dim " << c.dim << ", target " << c.target << ", width "
        << width;
  }
}

TEST(CudaMedoids, SameRowsAsTheOracleForRandomKeys) {
  const uint64_t seed = 41;
  std::mt19937_64 random(seed);
  SCOPED_TRACE(seed);
  const uint32_t dims[] = {1, 7, 20, 33, 64, 128, 200};
  for (uint32_t trial = 0; trial < 28; ++trial) {
    Case c{.n = 1 + static_cast<uint32_t>(random() % 140), .dim = dims[trial % 7], .target = 0};
    c.target = 1 + static_cast<uint32_t>(random() % c.n);
    c.keys = gaussian(random, size_t{c.n} * c.dim);
    c.iterations = 1 + trial % 5;
    if (trial % 2 == 0) {
      c.weights = gaussian(random, c.n);
      for (float& w : c.weights) w = std::fabs(w) + 0x1p-24f;
    }
    expect_same(c, "random");
  }
}

TEST(CudaMedoids, EveryDemotionOfThePapersSchedule) {
  std::mt19937_64 random(42);
  Case c{.n = 128, .dim = 128, .target = 64, .keys = gaussian(random, 128 * 128)};
  for (; c.target >= 4; c.target /= 2) {
    const std::vector<uint8_t> kept = oracle_keep(c);
    ASSERT_EQ(device_keep(c), kept) << c.target;
    std::vector<float> left;
    for (uint32_t i = 0; i < c.n; ++i) {
      if (kept[i] != 0) left.insert(left.end(), &c.keys[i * c.dim], &c.keys[i * c.dim] + c.dim);
    }
    c.n = c.target;
    c.keys = left;
  }
}

// Grid points: distances tie all the time, and clusters run empty.
TEST(CudaMedoids, TiesAndEmptyClustersGoTheOraclesWay) {
  std::mt19937_64 random(43);
  for (uint32_t trial = 0; trial < 16; ++trial) {
    Case c{.n = 20 + static_cast<uint32_t>(random() % 80), .dim = 3, .target = 0};
    c.target = 2 + static_cast<uint32_t>(random() % (c.n / 2));
    c.keys.resize(size_t{c.n} * c.dim);
    for (float& x : c.keys) x = static_cast<float>(random() % 3);
    if (trial % 2 == 0) c.weights.assign(c.n, 0.5f);
    expect_same(c, "grid");
  }
}

TEST(CudaMedoids, EqualKeysGiveTheTarget) {
  Case c{.n = 70, .dim = 64, .target = 33, .keys = std::vector<float>(70 * 64, 3.0f)};
  expect_same(c, "equal");
  c.target = 70;
  expect_same(c, "equal, all kept");
}

TEST(CudaMedoids, KeysThatAreNotNumbersGoTheOraclesWay) {
  std::mt19937_64 random(44);
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  Case all{.n = 40, .dim = 8, .target = 13, .keys = std::vector<float>(40 * 8, nan)};
  expect_same(all, "all NaN");
  for (uint32_t trial = 0; trial < 12; ++trial) {
    Case c{.n = 50, .dim = 64, .target = 10 + trial, .keys = gaussian(random, 50 * 64)};
    for (uint32_t i = 0; i < 1 + trial; ++i) {
      c.keys[random() % c.keys.size()] = trial % 3 == 0 ? infinity : nan;
    }
    c.keys[5] = trial % 2 == 0 ? 1e30f : 0.0f;  // squares overflow
    if (trial % 4 < 2) c.weights.assign(50, 0.25f);
    expect_same(c, "some");
  }
}

TEST(CudaMedoids, ManyRowsUpToWhatFits) {
  std::mt19937_64 random(45);
  for (const uint32_t n : {257u, 500u, 640u}) {
    Case c{.n = n,
           .dim = 64,
           .target = std::min(n, 800 - n),
           .keys = gaussian(random, size_t{n} * 64)};
    c.iterations = 1;
    ASSERT_TRUE(medoids_fit(medoid_vector_bytes(90), c.n, c.target, 64));
    expect_same(c, "many");
  }
}

// Keys of all heads of a layer: too many dims to be there at once, whatever part of them is.
TEST(CudaMedoids, KeysOfAWholeLayer) {
  std::mt19937_64 random(47);
  Case c{.n = 40, .dim = 1024, .target = 37, .keys = gaussian(random, 40 * 1024)};
  c.iterations = 2;
  const std::vector<uint8_t> expected = oracle_keep(c);
  for (const uint32_t width : {32u, 128u, 256u}) {
    EXPECT_EQ(device_keep(c, kMedoidThreads, width), expected) << width;
  }
}

// Rounding decides which row is nearest: the same values in another order are another distance.
TEST(CudaMedoids, StreamedSumsKeepTheOraclesOrder) {
  std::mt19937_64 random(48);
  for (uint32_t trial = 0; trial < 8; ++trial) {
    Case c{.n = 24, .dim = 96, .target = 6, .keys = gaussian(random, 24 * 96)};
    for (size_t i = 0; i < c.keys.size(); i += 1 + random() % 3) c.keys[i] *= 0x1p12f;
    for (uint32_t row = 0; row < c.n; row += 2) {  // the same values, elsewhere in the row
      const auto at = c.keys.begin() + row * c.dim;
      std::copy(at, at + c.dim, at + c.dim);
      std::rotate(at + c.dim, at + c.dim + 8 * (1 + random() % 8), at + 2 * c.dim);
    }
    expect_same(c, "rounding");
  }
}

// More items than the threads hold sums for, more centres than there are together, a whole empty
// cluster in between.
TEST(CudaMedoids, StreamedInSeveralPasses) {
  std::mt19937_64 random(49);
  Case c{.n = 150, .dim = 32, .target = 70, .keys = gaussian(random, 150 * 32)};
  for (uint32_t i = 0; i < 60 * 32; ++i) c.keys[i] = 2.0f;
  c.weights.assign(c.n, 1.5f);
  const std::vector<uint8_t> expected = oracle_keep(c);
  for (const uint32_t threads : {32u, 96u, kMedoidThreads}) {
    EXPECT_EQ(device_keep(c, threads, 32), expected) << threads;
  }
}

TEST(CudaMedoids, AnyWholeNumberOfWarpsDoes) {
  std::mt19937_64 random(46);
  const Case c{.n = 61, .dim = 64, .target = 17, .keys = gaussian(random, 61 * 64)};
  for (const uint32_t threads : {32u, 96u, 1024u}) {
    EXPECT_EQ(device_keep(c, threads), oracle_keep(c)) << threads;
  }
}

}  // namespace
}  // namespace thinkv::cuda
