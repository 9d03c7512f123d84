// The compaction of a lane on the device, in the emulator, against Lane::compact(): the same slots
// of the same pages, byte for byte, the same bytes counted, the same pages given back in the same
// order.
#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/compact.cuh"
#include "kernels/slot_copy.h"
#include "tests/support/device_twin.h"

namespace thinkv::cuda {
namespace {

using testing::DeviceReader;
using testing::geometry_of;
using testing::plain_policy;
using testing::TwinBatch;

struct CompactCase {
  uint32_t row;
  uint32_t lane;
  bool sweeps;
  bool sums;  // rows of fp32 behind the descriptors of a lane that is not scored, where they fit
  uint64_t* bytes;
};

__global__ void __launch_bounds__(128) compact_kernel(const BatchView view, const CompactCase c) {
  __shared__ CompactShared shared;
  LaneView lane = lane_view(view, sequence_at(view, view.roots[c.row]), c.lane);
  if (lane.lane == nullptr) return;
  uint32_t score_bytes = lane.score_bytes;
  if (c.sums) {
    score_bytes = sizeof(float);
    lane.per_table = page_bytes(lane.head_dim) / (32 + 64 * score_bytes);
  }
  const uint64_t bytes = c.sweeps ? compact_lane(lane, score_bytes, shared)
                                  : move_to_fullest(lane, score_bytes, shared);
  if (threadIdx.x == 0) *c.bytes = bytes;
}

uint64_t compact_on_device(TwinBatch& batch, uint32_t lane, bool sweeps = true, bool sums = false) {
  uint64_t bytes = ~uint64_t{0};
  const CompactCase c{0, lane, sweeps, sums, &bytes};
  EXPECT_EQ(launch(compact_kernel, {.blocks = 1, .threads = 128}, nullptr, batch.pool().view(), c),
            cudaSuccess);
  return bytes;
}

// Ids of the pages of a lane, by index.
std::vector<uint32_t> page_ids(const DeviceReader& reader, uint32_t lane) {
  std::vector<uint32_t> ids;
  for (uint32_t i = 0; i < reader.lane(lane).pages; ++i) {
    ids.push_back(reader.descriptor(reader.lane(lane), i).page);
  }
  return ids;
}
std::vector<uint32_t> page_ids(const kernels::Lane& lane) {
  std::vector<uint32_t> ids;
  lane.pages().for_each([&](uint32_t, const kernels::PageDescriptor& d) { ids.push_back(d.page); });
  return ids;
}

// Live slots, byte for byte: codes and scales of a slot, copied alone into a page of zeros.
std::vector<std::byte> slot_bytes(const void* page, const PageLayout& layout, uint32_t slot) {
  alignas(64) std::byte alone[page_bytes(256)] = {};
  const auto* from = static_cast<const std::byte*>(page);
  kernels::copy_slot(layout, from, slot, alone, slot);
  return {alone, alone + layout.bytes_used};
}

void expect_same_bytes(TwinBatch& batch, uint32_t index) {
  const kernels::SequenceState& state = batch.twin(0)->state();
  const DeviceReader reader(batch.pool(), batch.twin(0)->root);
  const kernels::Lane lane = state.lane(index);
  ASSERT_EQ(lane.pages().size(), reader.lane(index).pages);
  for (uint32_t i = 0; i < lane.pages().size(); ++i) {
    const kernels::PageDescriptor& d = lane.pages()[i];
    const void* mine = batch.pool().address(reader.descriptor(reader.lane(index), i).page);
    for (uint64_t left = d.live; left != 0; left &= left - 1) {
      const auto slot = static_cast<uint32_t>(std::countr_zero(left));
      ASSERT_EQ(slot_bytes(mine, lane.layout(d), slot),
                slot_bytes(state.pages.address(d.page), lane.layout(d), slot))
          << "page " << i << ", slot " << slot;
    }
  }
}

// What left the table, the last index first: the order of both sides' sweeps. Pages of a lane are
// those of the other side's lane at the same index, before and after.
void expect_given_back(const std::vector<uint32_t>& before, const std::vector<uint32_t>& after,
                       uint32_t lease_before, const Lease& lease) {
  std::vector<uint32_t> gone;
  for (size_t i = before.size(); i-- > 0;) {
    if (std::find(after.begin(), after.end(), before[i]) == after.end()) gone.push_back(before[i]);
  }
  ASSERT_GE(lease.count, lease_before + gone.size());
  const std::vector<uint32_t> given(lease.pages + lease_before,
                                    lease.pages + lease_before + gone.size());
  EXPECT_EQ(given, gone);
}

// Compacts a lane on both sides and compares. Result: bytes moved.
uint64_t compact_both(TwinBatch& batch, uint32_t index) {
  const kernels::SequenceState& state = batch.twin(0)->state();
  const DeviceReader reader(batch.pool(), batch.twin(0)->root);
  const std::vector<uint32_t> mine = page_ids(reader, index), theirs = page_ids(state.lane(index));
  const uint32_t leased = batch.pool().lease().count;
  const uint64_t expected = state.lane(index).compact();
  EXPECT_EQ(compact_on_device(batch, index), expected);
  EXPECT_EQ(batch.pool().lease().faults, 0u);
  const std::vector<uint32_t> left = page_ids(reader, index), host = page_ids(state.lane(index));
  EXPECT_EQ(left.size(), host.size());
  for (size_t i = 0; i < std::min(left.size(), host.size()); ++i) {  // the same pages stay
    const auto at = std::find(mine.begin(), mine.end(), left[i]) - mine.begin();
    const auto on_host = std::find(theirs.begin(), theirs.end(), host[i]) - theirs.begin();
    EXPECT_EQ(at, on_host) << i;
  }
  expect_given_back(mine, left, leased, batch.pool().lease());
  expect_same_bytes(batch, index);
  return expected;
}

// Every lane, then a comparison of all that both sides have.
uint64_t compact_all(TwinBatch& batch) {
  uint64_t moved = 0;
  batch.pool().supply(0);
  for (uint32_t i = 0; i < batch.geometry().lanes(); ++i) moved += compact_both(batch, i);
  batch.compare();
  EXPECT_EQ(batch.wrong(), "");
  return moved;
}

// `share` of 100 of the tokens [first, end), by chance.
void evict_by_chance(TwinBatch& batch, uint32_t first, uint32_t end, uint32_t share) {
  std::vector<uint32_t> gone;
  for (uint32_t i = first; i < end; ++i) {
    if (batch.below(100) < share) gone.push_back(i);
  }
  if (!gone.empty()) batch.evict(0, gone);
}

constexpr Format kFormatsOfSlots[] = {Format::kF16,  Format::kBf16,  Format::kK8V8,
                                      Format::kK8V4, Format::kK4V4,  Format::kK4V2,
                                      Format::kK2V2, Format::kNvfp4, Format::kTernary};

class CudaCompact : public ::testing::TestWithParam<std::tuple<Format, uint32_t>> {};

TEST_P(CudaCompact, MovesAsTheHostWhateverIsLeft) {
  const auto [format, dim] = GetParam();
  const ValueType type = format == Format::kBf16 ? ValueType::kBf16 : ValueType::kFp16;
  for (const uint32_t share : {10u, 50u, 80u, 97u}) {
    SCOPED_TRACE(share);
    TwinBatch batch({.geometry = geometry_of(1, 2, dim, type), .extent_pages = 256, .seed = share});
    batch.open(0, plain_policy(format));
    batch.prefill(0, 300);
    evict_by_chance(batch, 0, 284, share);
    const uint64_t moved = compact_all(batch);
    EXPECT_TRUE(moved > 0 || share < 50);
    EXPECT_EQ(compact_all(batch), 0u);               // nothing is left to move
    for (uint32_t i = 0; i < 20; ++i) batch.step();  // free slots are written again
    batch.compare();
    EXPECT_EQ(batch.wrong(), "");
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, CudaCompact,
                         ::testing::Combine(::testing::ValuesIn(kFormatsOfSlots),
                                            ::testing::ValuesIn(kHeadDims)));

TEST(CudaCompactLane, FormatsAreCompactedEachForItself) {
  for (uint32_t seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE(seed);
    TwinBatch batch({.geometry = geometry_of(2, 1, 64), .extent_pages = 256, .seed = seed});
    batch.open(0, plain_policy(Format::kK8V8));
    batch.prefill(0, 260);
    for (const Format format : {Format::kK4V4, Format::kK2V2, Format::kF16}) {
      const uint32_t first = batch.below(200);
      batch.recode(0, first, first + 1 + batch.below(40), format);
    }
    evict_by_chance(batch, 0, 244, 60);
    EXPECT_GT(compact_all(batch), 0u);
  }
}

PolicyParams scored_policy() {
  PolicyParams p = plain_policy(Format::kK4V4);
  p.evict = EvictRule::kTbe;
  p.select = SelectRule::kAttention;
  p.schedule_length = 1;
  p.schedule[0] = 32;
  p.budget_tokens = 4096;
  return p;
}

TEST(CudaCompactLane, ScoresMoveWithTheirTokens) {
  for (const uint32_t dim : kHeadDims) {
    SCOPED_TRACE(dim);
    TwinBatch batch({.geometry = geometry_of(1, 2, dim), .seed = dim, .plant_scores = true});
    batch.open(0, scored_policy());
    batch.prefill(0, 500);
    for (uint32_t i = 0; i < 18; ++i) batch.step();
    evict_by_chance(batch, 0, 480, 75);
    EXPECT_GT(compact_all(batch), 0u);
  }
}

// More pages than a batch of keys holds, on either side of the border between filled and emptied.
TEST(CudaCompactLane, LanesOfManyPages) {
  for (const uint32_t share : {25u, 85u}) {
    SCOPED_TRACE(share);
    TwinBatch batch({.geometry = geometry_of(1, 1, 64), .extent_pages = 1024, .seed = share});
    batch.open(0, plain_policy(Format::kF16));
    batch.prefill(0, 8000);
    ASSERT_GT(batch.twin(0)->state().lane(0).pages().size(), 3 * kCompactBatch);
    evict_by_chance(batch, 0, 7984, share);
    EXPECT_GT(compact_all(batch), 0u);
  }
}

// Sums in fp32, as rank rules keep them. The rows lie where a table page has room for them.
TEST(CudaCompactLane, SumsOfFourBytesMoveWithTheirTokens) {
  for (const uint32_t dim : kHeadDims) {
    SCOPED_TRACE(dim);
    TwinBatch batch({.geometry = geometry_of(1, 1, dim), .extent_pages = 64, .seed = dim});
    batch.open(0, plain_policy(Format::kK4V4));
    batch.prefill(0, 240);
    evict_by_chance(batch, 0, 224, 70);
    const DeviceReader reader(batch.pool(), batch.twin(0)->root);
    const DeviceLane& lane = reader.lane(0);
    const uint32_t per_table = page_bytes(dim) / (32 + 64 * 4);
    ASSERT_LE(lane.pages, per_table);
    auto* table = reinterpret_cast<DeviceDescriptor*>(batch.pool().address(lane.table[0]));
    auto* sums = reinterpret_cast<float*>(table + per_table);
    const auto for_each = [&](auto visit) {
      for (uint32_t i = 0; i < lane.pages; ++i) {
        for (uint64_t left = table[i].live; left != 0; left &= left - 1) {
          const auto slot = static_cast<uint32_t>(std::countr_zero(left));
          visit(
              testing::slot_position(batch.pool().address(table[i].page), Format::kK4V4, dim, slot),
              sums[i * 64 + slot]);
        }
      }
    };
    const auto sum_of = [](uint32_t position) { return std::sqrt(0.5f + float(position)); };
    for_each([&](uint32_t position, float& sum) { sum = sum_of(position); });
    EXPECT_GT(compact_on_device(batch, 0, false, true), 0u);
    uint32_t tokens = 0, holding = 0;
    for_each([&](uint32_t position, const float& sum) {
      EXPECT_EQ(sum, sum_of(position)) << position;
      ++tokens;
    });
    for (uint32_t i = 0; i < lane.pages; ++i) holding += table[i].live != 0 ? 1 : 0;
    EXPECT_EQ(tokens, lane.live - lane.buffer_count);
    EXPECT_EQ(holding, (tokens + 31) / 32);
  }
}

// A page id out of bounds raises the fault, and the tokens that are not moved stay.
TEST(CudaCompactLane, ABadPageIdMovesNothingThere) {
  TwinBatch batch({.geometry = geometry_of(1, 1, 64), .extent_pages = 64});
  batch.open(0, plain_policy(Format::kK4V4));
  batch.prefill(0, 240);
  evict_by_chance(batch, 0, 224, 70);
  const DeviceReader reader(batch.pool(), batch.twin(0)->root);
  const DeviceLane& lane = reader.lane(0);
  uint32_t before = 0, after = 0;
  for (uint32_t i = 0; i < lane.pages; ++i) {
    reader.descriptor(lane, i).page = PageId::kNoneRaw - 1;
    before += static_cast<uint32_t>(std::popcount(reader.descriptor(lane, i).live));
  }
  EXPECT_EQ(compact_on_device(batch, 0, false), 0u);
  EXPECT_EQ(batch.pool().lease().faults, kBadMetadata);
  for (uint32_t i = 0; i < lane.pages; ++i) {
    after += static_cast<uint32_t>(std::popcount(reader.descriptor(lane, i).live));
  }
  EXPECT_EQ(after, before);
}

}  // namespace
}  // namespace thinkv::cuda
