// Entropy-coded streams (kvcomp as shipped, and others) on the device in the emulator beside the
// host: the same bytes after every step, the same values in attention's pages, and what damaged
// streams do.
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/coded_twin.h"
#include "tests/support/seed.h"

namespace thinkv::cuda {
namespace {

using testing::CodedTally;
using testing::DevicePool;
using testing::DeviceReader;
using testing::geometry_of;
using testing::TwinBatch;

PolicyParams kvcomp() {
  return testing::must_ship("kvcomp", 0);
}

void expect_same(const PolicyParams& policy, const ModelGeometry& geometry,
                 Element element = Element::kF32, bool wild = false) {
  ASSERT_TRUE(supported(geometry, policy).has_value());
  CodedTally tally;
  EXPECT_EQ(testing::run_coded_policy(policy, geometry, tally, element, wild), "");
  EXPECT_GT(wild ? tally.raw : tally.coded, 100u) << "nothing was coded";
  EXPECT_GT(tally.evicted, 0u);
}

TEST(MethodKvComp, OnTheDeviceAsOnTheHost) {
  expect_same(kvcomp(), geometry_of(2, 2, 64));
}
TEST(MethodKvComp, WiderHeadsAndBf16) {
  expect_same(kvcomp(), geometry_of(1, 1, 128, ValueType::kBf16), Element::kBf16);
}
TEST(MethodKvComp, HeadDim256) {
  expect_same(kvcomp(), geometry_of(1, 1, 256), Element::kF16);
}

TEST(MethodKvComp, RotatedRowsAreCodedAsTheHostHasThem) {
  PolicyParams policy = kvcomp();
  policy.rotate = 1;
  policy.entropy = {.key_step = 0.5f, .value_step = 0.005f, .recent = 192};
  expect_same(policy, geometry_of(1, 2, 64, ValueType::kBf16));
}
// Infinities, NaN, constants, outliers and subnormals: many blocks are raw.
TEST(MethodKvComp, WhateverTheValuesAre) {
  expect_same(kvcomp(), geometry_of(1, 2, 64), Element::kF32, true);
  expect_same(kvcomp(), geometry_of(1, 1, 128, ValueType::kBf16), Element::kF32, true);
}
TEST(MethodKvComp, LongPromptsAgreeWithTheHost) {
  CodedTally tally;
  // More than a page of blocks, and of ids of pages.
  EXPECT_EQ(testing::run_coded_prompt(kvcomp(), geometry_of(1, 2, 64), 64 * 150 + 130, tally), "");
  EXPECT_EQ(tally.coded, 2u * 2 * 151) << "two comparisons, two lanes";
}

TEST(MethodKvComp, PoliciesPromptsAndEvictionsByChance) {
  const uint64_t seed = testing::seed_from_environment(20261129);
  constexpr uint64_t kDraws = testing::random_rounds(8);
  CodedTally tally;
  for (uint64_t i = 0; i < kDraws; ++i) {
    EXPECT_EQ(testing::run_drawn_streams(seed + i, tally), "") << "THINKV_SEED=" << seed + i;
  }
  EXPECT_GT(tally.coded, 20 * kDraws);
}

// A pool with two sequences of kvcomp that have coded blocks, one of which a test damages.
class Damage {
 public:
  explicit Damage(uint32_t row = 0)
      : batch_({.geometry = geometry_of(1, 2, 64), .capacity = 2, .streams = true}), row_(row) {
    for (const uint32_t r : {0u, 1u}) {
      batch_.open(r, kvcomp());
      batch_.prefill(r, 330);
    }
    for (uint32_t i = 0; i < 53; ++i) batch_.step();  // of 384 tokens
  }
  [[nodiscard]] DevicePool& pool() { return batch_.pool(); }
  [[nodiscard]] DeviceReader reader() { return {pool(), batch_.twin(row_)->root}; }
  [[nodiscard]] DeviceReader other() { return {pool(), batch_.twin(1 - row_)->root}; }
  [[nodiscard]] const std::string& wrong() const { return batch_.wrong(); }

  // A step with all its launches, at whose end a block leaves the pages, and the requests.
  void run_everything() {
    pool().supply(256);
    std::vector<float> rows(2 * 2 * 64, 1.0f);
    const BatchView view = pool().view();
    ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
    ASSERT_EQ(launch_append(view, 0, rows.data(), rows.data(), Element::kF32, nullptr),
              cudaSuccess);
    ASSERT_EQ(launch_read_streams(view, 0, nullptr), cudaSuccess);
    ASSERT_EQ(launch_end(view, nullptr), cudaSuccess);
    const std::vector<uint32_t> positions = testing::positions_from(64, 128);
    ASSERT_EQ(launch_evict(view, pool().root(row_), positions.data(), 64, nullptr), cudaSuccess);
    const uint32_t copied = pool().take();
    ASSERT_EQ(launch_copy(view, pool().root(row_), copied, nullptr), cudaSuccess);
    ASSERT_EQ(launch_close(view, pool().root(row_), nullptr), cudaSuccess);
  }

 private:
  TwinBatch batch_;
  uint32_t row_;
};

// The neighbour's stream is what it was, and one block longer.
void expect_unharmed(Damage& world, uint32_t blocks) {
  std::string wrong;
  std::set<uint32_t> owned;
  world.other().check(owned, wrong);
  EXPECT_EQ(wrong, "");
  EXPECT_EQ(world.other().stream(0)->blocks, blocks);
}

TEST(CudaCoded, DamagedMetadataIsReportedAndNotFollowed) {
  for (uint32_t damage = 0; damage < 15; ++damage) {
    SCOPED_TRACE(damage);
    Damage world;
    ASSERT_EQ(world.wrong(), "");
    const DeviceReader reader = world.reader();
    DeviceStream& stream = *reader.stream(0);
    kernels::StreamBlock& block = reader.block(stream, 1);
    const uint32_t outside = PageId(ExtentId(3), 0).raw(),
                   past_end = PageId(ExtentId(0), 512).raw();
    const uint32_t blocks = stream.blocks;
    if (damage == 0) reader.lane(0).stream_page = outside;
    if (damage == 1) stream.blocks = 0xFFFF'FFFFu;
    if (damage == 2) stream.block_pages = kStreamBlockPagesMax + 1;
    if (damage == 3) stream.list_pages = 0x8000'0000u;
    if (damage == 4) stream.end_unit = 0xFFFF'FFFFu;
    if (damage == 5) stream.block_page[0] = past_end;
    if (damage == 6) stream.list_page[0] = outside;
    if (damage == 7) block.unit = 0xFFFF'FFF0u;
    if (damage == 8) block.bytes = 0xFFFF'FFFFu;
    if (damage == 9) block.bytes = 5;
    if (damage == 10) block.bytes = 0;
    if (damage == 11) block.raw = 1;
    if (damage == 12) block.raw = 2;
    if (damage == 13) reader.listed_page(stream, 1) = outside;
    if (damage == 14) reader.listed_page(stream, 1) = PageId::kNoneRaw;
    world.run_everything();
    EXPECT_NE(world.pool().lease().faults & kBadMetadata, 0u);
    expect_unharmed(world, blocks + 1);
  }
}

TEST(CudaCoded, DamagedCodebooksAreReportedAndNotRead) {
  for (uint32_t damage = 0; damage < 6; ++damage) {
    SCOPED_TRACE(damage);
    Damage world;
    DeviceStream& stream = *world.reader().stream(0);
    const uint32_t blocks = stream.blocks;
    if (damage == 0) std::memset(stream.codes, 0, sizeof stream.codes);
    if (damage == 1) std::memset(stream.codes[1], 0xFF, sizeof stream.codes[1]);
    if (damage == 2) std::memset(stream.codes[0], 1, sizeof stream.codes[0]);
    if (damage == 3) std::memset(stream.codes[0], 15, sizeof stream.codes[0]);  // bits without use
    if (damage == 4) stream.codes[1][77] ^= 1;
    if (damage == 5) stream.codes[0][255] = 16;
    world.run_everything();
    EXPECT_NE(world.pool().lease().faults & kBadMetadata, 0u);
    expect_unharmed(world, blocks + 1);
  }
}

// Bytes of blocks that say nothing: what cannot be a block is told, and reading ends.
TEST(CudaCoded, SpoiledBytesAreToldAndEnd) {
  Damage world;
  const BatchView view = world.pool().view();
  const DeviceReader reader = world.reader();
  DeviceStream& stream = *reader.stream(0);
  uint32_t told = 0;
  for (uint32_t round = 0; round < 40; ++round) {
    SCOPED_TRACE(round);
    const kernels::StreamBlock& block = reader.block(stream, round % stream.blocks);
    const uint64_t begin = uint64_t{block.unit} * kernels::kStreamUnitBytes;
    std::vector<unsigned char> before;
    for (uint64_t i = 0; i < block.bytes; ++i) {
      before.push_back(reader.stream_byte(stream, begin + i));
    }
    std::mt19937_64 random(round);
    if (round < 8) {  // the length of a run
      reader.stream_byte(stream, begin + 2 * round + round % 2) ^= 1;
    } else {  // all of it, from some byte on
      const uint64_t from = round < 12 ? 0 : random() % block.bytes;
      for (uint64_t i = from; i < block.bytes; ++i) {
        reader.stream_byte(stream, begin + i) = static_cast<unsigned char>(random());
      }
    }
    world.pool().lease().faults = 0;
    ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
    ASSERT_EQ(launch_read_streams(view, 0, nullptr), cudaSuccess);
    const bool said = world.pool().lease().faults == kBadMetadata;
    EXPECT_TRUE(said || round >= 12) << "runs that do not fill the block";
    told += said ? 1 : 0;
    for (uint64_t i = 0; i < block.bytes; ++i) {
      reader.stream_byte(stream, begin + i) = before[i];
    }
  }
  EXPECT_GT(told, 20u) << "codes that go on behind the end of their run";
  world.pool().lease().faults = 0;
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  ASSERT_EQ(launch_read_streams(view, 0, nullptr), cudaSuccess);
  EXPECT_EQ(world.pool().lease().faults, 0u);
}

TEST(CudaCoded, ABrokenPromiseKeepsTheTokensInTheirPages) {
  Damage world;
  DevicePool& pool = world.pool();
  const uint32_t blocks = world.reader().stream(0)->blocks;
  pool.supply(0);
  std::vector<float> rows(2 * 2 * 64, 1.0f);
  const BatchView view = pool.view();
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  ASSERT_EQ(launch_append(view, 0, rows.data(), rows.data(), Element::kF32, nullptr), cudaSuccess);
  ASSERT_EQ(launch_end(view, nullptr), cudaSuccess);
  EXPECT_EQ(pool.lease().faults, kLeaseEmpty);
  EXPECT_EQ(world.reader().stream(0)->blocks, blocks);
  EXPECT_EQ(world.reader().lane(0).live, 384u);
}

TEST(CudaCoded, ABatchThatDoesNotReadStreamsSaysSo) {
  Damage world;
  BatchView view = world.pool().view();
  view.stream_pages = nullptr;
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  EXPECT_EQ(world.pool().lease().faults, kListFull);
  EXPECT_EQ(launch_read_streams(view, 0, nullptr), cudaErrorInvalidValue);
}

// What a step of one sequence can take: a raw block with a border of pages on either side, and
// what names them.
TEST(CudaCodedSizes, AStepThatCodesIsPromisedARawBlock) {
  const ModelGeometry g = geometry_of(2, 2, 64);
  const PolicyParams p = kvcomp();
  const uint32_t raw = (64 * 64 * 4 + 2303) / 2304 + 1;
  // 16-bit pages hold 8 tokens; the token of the step is number 384 = 6 x 64.
  EXPECT_EQ(step_pages(g, p, {.prompt = 330, .generated = 53, .lane_pages_max = 30}),
            g.lanes() * (raw + 1 + 1));
  EXPECT_EQ(step_pages(g, p, {.prompt = 330, .generated = 54, .lane_pages_max = 30}), 0u);
  EXPECT_EQ(step_pages(g, p, {.prompt = 330, .generated = 47, .lane_pages_max = 30}),
            g.lanes() * 2);
  EXPECT_EQ(open_pages(g, p), open_pages(g, testing::plain_policy(Format::kF16)) + g.lanes());
  EXPECT_LE(coded_prompt_max(8, 128) * 8 * 128, 0xFFFF'FFFFull);
}

}  // namespace
}  // namespace thinkv::cuda
