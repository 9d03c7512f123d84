// The CUDA decode attention on the emulator against the oracle: every format, shape and option that
// the kernels branch on. A GPU runs more and longer lanes (tests/gpu/attend_gpu.cu).
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "tests/gpu/attend_case.h"

namespace thinkv::gputest {
namespace {

// The emulated GPU's memory is the host's; pages want 64-byte alignment.
template <class T>
struct HostArray {
  explicit HostArray(const std::vector<T>& values) : count(values.size()), owner(allocate(count)) {
    data = owner.get();
    if (count != 0) std::memcpy(data, values.data(), count * sizeof(T));
  }
  [[nodiscard]] std::vector<T> host() const { return {data, data + count}; }

  size_t count;
  T* data = nullptr;

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  [[nodiscard]] static T* allocate(size_t n) {
    return static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64));
  }
  std::unique_ptr<T, Free> owner;
};

void expect_right(AttendCase c, uint64_t seed) {
  const AttendInput in(c, seed);
  const AttendOutput got =
      run_case<HostArray>(c, in, [](cudaError_t error) { ASSERT_EQ(error, cudaSuccess); });
  const Worst worst = compare(c, in, got);
  EXPECT_TRUE(worst.ok()) << c.describe() << ": of the bounds: value " << worst.value << " cosine "
                          << worst.cosine << " lse " << worst.lse << " score " << worst.score
                          << " sparsity " << worst.sparsity;
}

// `lanes`: what the shape is chosen for.
[[nodiscard]] cuda::AttendShape small_shape(uint32_t head_dim, uint32_t ctas, uint32_t lanes = 1) {
  cuda::AttendShape shape = cuda::attend_shape(132, lanes, head_dim, lanes % 2 == 0);
  shape.ctas = ctas;
  return shape;
}

const std::vector<Format> kMixed = {Format::kF16,   Format::kK4V4,    Format::kK2V2,
                                    Format::kBf16,  Format::kK4V2,    Format::kK8V4,
                                    Format::kNvfp4, Format::kTernary, Format::kK8V8};

class CudaAttend : public testing::TestWithParam<uint32_t> {};

TEST_P(CudaAttend, EveryFormatAtEveryFill) {
  uint64_t seed = 1;
  for (uint32_t f = 1; f < kFormatCount; ++f) {
    for (const double live : {1.0, 0.5}) {
      AttendCase c{.head_dim = GetParam(), .group = 2 + f % 3};
      c.formats = {static_cast<Format>(f)};
      c.lengths = {0, 1, 17, 31, 64, 65, 200};
      c.live = live;
      c.shape = small_shape(c.head_dim, 1);
      expect_right(c, seed++);
    }
  }
}

TEST_P(CudaAttend, FormatsMixedInALane) {
  for (const uint32_t group : {1u, 7u, 8u}) {
    AttendCase c{.head_dim = GetParam(), .group = group, .formats = kMixed};
    c.lengths = {1, 300, 0, 33};
    c.live = 0.9;
    c.rotate = group == 7;
    c.shape = small_shape(c.head_dim, 2);
    expect_right(c, group);
  }
}

TEST_P(CudaAttend, EveryBlockFormatAtEveryFill) {
  uint64_t seed = 1;
  for (uint32_t f = kFormatCount; f < kAllFormatCount; ++f) {
    for (const double live : {1.0, 0.5}) {
      AttendCase c{.head_dim = GetParam(), .group = 1 + 3 * (f % 4)};
      c.formats = {static_cast<Format>(f)};
      c.lengths = {0, 1, 10, 17, 44, 64, 200};
      c.live = live;
      c.shape = small_shape(c.head_dim, 1);
      expect_right(c, seed++);
    }
  }
}

// Blocks beside the pages that they are made from, and what else the kernels can be asked for.
TEST_P(CudaAttend, BlocksAmongOtherPages) {
  const std::vector<std::vector<Format>> mixes = {
      {Format::kKivi4, Format::kF16, Format::kKivi2, Format::kK4V4, Format::kKivi1},
      {Format::kPair2, Format::kF16, Format::kPair2Second, Format::kPair1, Format::kPair1Second},
      {Format::kThink, Format::kF16, Format::kK2V2},
      {Format::kThinkBf16, Format::kBf16, Format::kKivi2}};
  for (uint32_t turn = 0; turn < 8; ++turn) {
    AttendCase c{.head_dim = GetParam(), .group = 1 + 5 * (turn % 3), .kv_heads = 2};
    c.formats = mixes[turn % 4];
    c.lengths = {300, 70, 90, 20, 0, 260};
    c.live = 0.8;
    c.rotate = turn == 3;
    c.window = turn >= 4 ? 64 : 0;
    c.sinks = turn;
    if (turn % 2 == 1) c.emit = cuda::kEmitScores | cuda::kEmitSparsity;
    c.shape = small_shape(c.head_dim, 2);
    expect_right(c, turn);
  }
}

TEST_P(CudaAttend, GroupsAboveEight) {
  for (const uint32_t group : {9u, 16u}) {
    AttendCase c{.head_dim = GetParam(), .group = group, .formats = kMixed};
    c.lengths = {100, 250, 3};
    c.live = 0.8;
    c.rotate = true;
    c.emit = cuda::kEmitScores | cuda::kEmitSparsity;
    c.shape = small_shape(c.head_dim, 1);
    expect_right(c, group);
  }
}

TEST_P(CudaAttend, LanesCutBetweenWarpsAndCtas) {
  for (const bool rotate : {false, true}) {
    AttendCase c{.head_dim = GetParam(), .group = 3, .formats = {Format::kK4V4, Format::kK2V2}};
    c.lengths = {2500, 10, 0, 0, 700, 1};
    c.rotate = rotate;
    for (const uint32_t lanes : {1u, 4096u}) {
      c.shape = small_shape(c.head_dim, 3, lanes);
      expect_right(c, 5);
    }
  }
}

// More CTAs than pages: some of those inside a lane have none of it.
TEST_P(CudaAttend, FewPagesForManyCtas) {
  for (const uint32_t ctas : {2u, 7u, 40u}) {
    AttendCase c{.head_dim = GetParam(), .group = 4, .formats = {Format::kK2V2}};
    c.lengths = {600, 64, 0, 200};
    c.rotate = ctas == 7;
    c.shape = small_shape(c.head_dim, ctas);
    expect_right(c, ctas);
  }
}

TEST_P(CudaAttend, NothingLive) {
  AttendCase c{.head_dim = GetParam(), .formats = kMixed, .lengths = {300, 0, 5}};
  c.live = 0.0;
  c.emit = cuda::kEmitSparsity;
  c.shape = small_shape(c.head_dim, 1);
  expect_right(c, 6);
}

TEST_P(CudaAttend, ElementTypes) {
  for (uint32_t turn = 0; turn < 9; ++turn) {
    AttendCase c{.head_dim = GetParam(), .lengths = {40}};
    c.q_element = static_cast<Element>(turn / 3);
    c.out_element = static_cast<Element>(turn % 3);
    c.lse = turn != 4;
    c.rotate = turn % 2 == 1;
    c.shape = small_shape(c.head_dim, 1);
    expect_right(c, turn);
  }
}

TEST_P(CudaAttend, WindowWithSinks) {
  for (const uint32_t sinks : {0u, 3u}) {
    AttendCase c{.head_dim = GetParam(), .formats = kMixed, .lengths = {500, 20}};
    c.window = 64;
    c.sinks = sinks;
    c.live = 0.9;
    c.emit = cuda::kEmitScores | cuda::kEmitSparsity;
    c.shape = small_shape(c.head_dim, 1);
    expect_right(c, 7 + sinks);
  }
}

// Sequences with and without a flag in one launch, each way of reducing over the query heads.
TEST_P(CudaAttend, Emission) {
  for (uint32_t turn = 0; turn < 9; ++turn) {
    AttendCase c{.head_dim = GetParam(), .group = 1 + turn % 5, .kv_heads = 2, .formats = kMixed};
    c.lengths = {100, 70, 90, 20, 0, 260};
    c.live = 0.7;
    c.emit = static_cast<uint8_t>(1 + turn % 3);
    c.reduce = static_cast<kernels::GqaReduce>(turn / 3);
    c.shape = small_shape(c.head_dim, 2);
    expect_right(c, turn);
  }
}

TEST_P(CudaAttend, EmissionOfSums) {
  for (uint32_t turn = 0; turn < 6; ++turn) {
    AttendCase c{.head_dim = GetParam(), .group = 1 + turn, .kv_heads = 2, .formats = kMixed};
    c.lengths = {100, 70, 90, 20, 0, 260};
    c.live = 0.7;
    c.emit = cuda::kEmitSums;
    if (turn % 2 == 1) c.emit |= cuda::kEmitSparsity;
    c.reduce = static_cast<kernels::GqaReduce>(turn / 2);
    c.shape = small_shape(c.head_dim, 2);
    expect_right(c, turn);
  }
}

// Most of a page dead: slots of its second half count where neighbours in the first do not.
TEST_P(CudaAttend, EmissionOfSparsePages) {
  AttendCase c{.head_dim = GetParam(), .group = 4, .kv_heads = 2, .formats = {Format::kK2V2}};
  c.lengths = {600};
  c.live = 0.2;
  c.emit = cuda::kEmitScores | cuda::kEmitSparsity;
  c.shape = small_shape(c.head_dim, 2);
  expect_right(c, 3);
}

INSTANTIATE_TEST_SUITE_P(HeadDims, CudaAttend, testing::Values(64u, 128u, 256u));

TEST(CudaAttendLaunch, RefusesWhatIsNotBuilt) {
  cuda::AttendParams p{};
  p.lanes = p.kv_heads = p.group = 1;
  p.head_dim = 96;
  EXPECT_EQ(cuda::launch_attend(p, {1, 16}, nullptr), cudaErrorInvalidValue);
  p.head_dim = 128;
  p.group = 17;
  EXPECT_EQ(cuda::launch_attend(p, {1, 16}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace thinkv::gputest
