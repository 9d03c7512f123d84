// Policies that recode to blocks of tokens, on the device in the emulator beside the host: the
// shipped ones in every width, and rules drawn by chance.
#include <algorithm>
#include <set>
#include <string>

#include "gtest/gtest.h"

#include "tests/support/rank_twin.h"
#include "tests/support/seed.h"

namespace thinkv::cuda {
namespace {

using testing::RankTally;

ModelGeometry geometry_of(uint32_t layers, uint32_t dim, ValueType type = ValueType::kFp16) {
  return {.layers = layers, .q_heads = 4, .kv_heads = 2, .head_dim = dim, .value_type = type};
}

// The policy with a small budget, so that most tokens are in blocks.
PolicyParams policy_of(const char* name, Format format = Format::kNone) {
  PolicyParams params = testing::must_ship(name, 24);
  for (uint32_t i = 0; i < params.rule_count && format != Format::kNone; ++i) {
    params.rules[i].recode_format = i + 1u == params.rule_count ? format : single_of(format);
  }
  return params;
}

void expect_same(const PolicyParams& policy, const ModelGeometry& geometry) {
  ASSERT_TRUE(supported(geometry, policy).has_value());
  RankTally tally;
  EXPECT_EQ(testing::run_block_policy(policy, geometry, tally), "");
  EXPECT_GT(tally.recoded, geometry.lanes() * 150u) << "the rules do nothing";
}

TEST(MethodKivi, OnTheDeviceAsOnTheHost) {
  expect_same(policy_of("kivi"), geometry_of(2, 64));
  expect_same(policy_of("kivi"), geometry_of(1, 256, ValueType::kBf16));
}
TEST(MethodKivi, FourAndOneBitsOnTheDeviceAsOnTheHost) {
  expect_same(policy_of("kivi", Format::kKivi4), geometry_of(1, 128));
  expect_same(policy_of("kivi", Format::kKivi1), geometry_of(1, 128));
}
TEST(MethodThinK, OnTheDeviceAsOnTheHost) {
  expect_same(policy_of("think"), geometry_of(2, 64));
  expect_same(policy_of("think"), geometry_of(1, 256, ValueType::kBf16));
}
TEST(MethodXQuant, OnTheDeviceAsOnTheHost) {
  expect_same(policy_of("xquant"), geometry_of(5, 64));
  expect_same(policy_of("xquant"), geometry_of(4, 128, ValueType::kBf16));
}
TEST(MethodXQuant, OneBitOnTheDeviceAsOnTheHost) {
  expect_same(policy_of("xquant", Format::kPair1), geometry_of(4, 64));
}

// More tokens than the kernel for few of them has room for.
TEST(BlockPolicies, LongPromptsAgreeWithTheHost) {
  for (const char* name : testing::kBlockPolicies) {
    EXPECT_EQ(testing::run_long_prompt(policy_of(name), kRankRowsFew + 200, 64, 4), "") << name;
  }
}

// Rows outside of the block of threads' own memory.
TEST(BlockPolicies, PromptsThatNoBlockHoldsAgreeWithTheHost) {
  for (const char* name : testing::kBlockPolicies) {
    EXPECT_EQ(testing::run_long_prompt(policy_of(name), kRankRowsMax + 200, 64, 4), "") << name;
  }
}

// Zeros, outliers, tiny and huge numbers and NaN: ranges of width 0, channels of equal energy.
TEST(BlockPolicies, WildNumbersAgreeWithTheHost) {
  for (const char* name : testing::kBlockPolicies) {
    testing::TwinBatch batch({.geometry = geometry_of(4, 64), .extent_pages = 1024, .wild = true});
    batch.open(0, policy_of(name));
    batch.prefill(0, 100);
    EXPECT_EQ(testing::compared(batch, "the prompt"), "") << name;
    for (uint32_t i = 0; i < 66; ++i) batch.step();
    EXPECT_EQ(testing::compared(batch, "66 steps"), "") << name;
  }
}

// Slots of 44 tokens, of which pairs of 32 leave rests in both lanes: these move together.
TEST(BlockPolicies, BothLanesOfAPairAreCompacted) {
  PolicyParams policy = policy_of("xquant");
  policy.prompt_format = Format::kK4V2;
  testing::TwinBatch batch({.geometry = geometry_of(4, 128), .extent_pages = 1024});
  batch.open(0, policy);
  batch.prefill(0, 200);
  EXPECT_EQ(testing::compared(batch, "the prompt"), "");
  EXPECT_GT(batch.twin(0)->host->stats().gathered_bytes, 0u);
}

// A step of all rows with the same numbers, whatever the state of their metadata.
void step_blindly(testing::TwinBatch& batch) {
  const BatchView view = batch.pool().view();
  const ModelGeometry& g = view.geometry;
  testing::DeviceVector<float> rows(uint64_t{view.capacity} * g.kv_heads * g.head_dim);
  std::fill_n(rows.data(), rows.size(), 1.0f);
  batch.pool().supply(512);
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  for (uint32_t layer = 0; layer < g.layers; ++layer) {
    ASSERT_EQ(launch_append(view, layer, rows.data(), rows.data(), Element::kF32, nullptr),
              cudaSuccess);
  }
  ASSERT_EQ(launch_end(view, nullptr), cudaSuccess);
  testing::device_wait();
}

// One word of the metadata is damaged before a rule fires: it recodes nothing by it, and says so
// where it must.
TEST(BlockPolicies, BadMetadataOfAPairIsNotFollowed) {
  for (uint32_t damage = 0; damage < 5; ++damage) {
    SCOPED_TRACE(damage);
    testing::TwinBatch batch({.geometry = geometry_of(4, 64), .capacity = 2, .extent_pages = 1024});
    for (const uint32_t row : {0u, 1u}) {
      batch.open(row, policy_of("xquant"));
      batch.prefill(row, 70);
    }
    for (uint32_t i = 0; i < 31; ++i) batch.step();
    ASSERT_EQ(testing::compared(batch, "before"), "");
    const testing::DeviceReader reader(batch.pool(), batch.twin(0)->root);
    DeviceLane& first = reader.lane(4);                 // of layer 2
    DeviceDescriptor *pair = nullptr, *wide = nullptr;  // of the oldest tokens
    for (uint32_t i = 0; i < first.pages; ++i) {
      DeviceDescriptor& d = reader.descriptor(first, i);
      auto*& oldest = is_pair(static_cast<Format>(d.format)) ? pair : wide;
      if (oldest == nullptr || d.first_position < oldest->first_position) oldest = &d;
    }
    ASSERT_TRUE(pair != nullptr && wide != nullptr);
    Format& format = reader.header().policy.rules[1].recode_format;
    if (damage == 0) wide->live &= wide->live - 1;
    if (damage == 1) pair->page = PageId::kNoneRaw;
    if (damage == 2) wide->format = kAllFormatCount;
    if (damage == 3) format = Format::kPair2Second;
    if (damage == 4) format = static_cast<Format>(200);
    const uint64_t before = reader.header().counters.recoded_slots;
    ASSERT_NO_FATAL_FAILURE(step_blindly(batch));
    const uint32_t faults = batch.pool().lease().faults;
    EXPECT_EQ(faults, damage < 3 ? kBadMetadata : 0u);
    if (damage >= 3) {
      EXPECT_EQ(reader.header().counters.recoded_slots, before);
    }
    // The neighbour has what the host would have.
    std::string wrong;
    std::set<uint32_t> owned;
    const testing::DeviceReader other(batch.pool(), batch.twin(1)->root);
    other.check(owned, wrong);
    EXPECT_EQ(wrong, "");
    EXPECT_EQ(other.header().counters.recoded_slots, 4u * 44 + 4u * 64);
    for (const uint32_t row : {0u, 1u}) {
      ASSERT_EQ(launch_close(batch.pool().view(), batch.twin(row)->root, nullptr), cudaSuccess);
    }
  }
}

// Of what a rule's lanes put aside, the page of a pair that died meanwhile is the second's.
TEST(BlockPolicies, APairThatIsEmptyWhenARuleFiresGoesOnce) {
  testing::TwinBatch batch({.geometry = geometry_of(4, 64), .capacity = 1, .extent_pages = 1024});
  batch.open(0, policy_of("xquant"));
  batch.prefill(0, 70);
  for (uint32_t i = 0; i < 31; ++i) batch.step();
  const testing::DeviceReader reader(batch.pool(), batch.twin(0)->root);
  for (const uint32_t index : {4u, 6u}) {  // the same kv head of layers 2 and 3
    DeviceLane& lane = reader.lane(index);
    for (uint32_t i = 0; i < lane.pages; ++i) {
      DeviceDescriptor& d = reader.descriptor(lane, i);
      if (!is_block(static_cast<Format>(d.format))) continue;
      lane.live -= 32;
      lane.live_prompt -= 32;
      d.live = 0;
    }
  }
  ASSERT_NO_FATAL_FAILURE(step_blindly(batch));
  EXPECT_EQ(batch.pool().lease().faults, 0u);
  std::string wrong;
  std::set<uint32_t> owned;
  reader.check(owned, wrong);
  EXPECT_EQ(wrong, "");
  EXPECT_EQ(batch.pool().lease().used_total, owned.size());
  const Lease& lease = batch.pool().lease();
  for (uint32_t i = 0; i < lease.count; ++i) {
    EXPECT_NE(lease.pages[i], PageId::kNoneRaw);
    EXPECT_TRUE(owned.insert(lease.pages[i]).second) << "a page is free and held, or free twice";
  }
}

TEST(BlockPoliciesRandom, RulesAgreeWithTheHost) {
  constexpr uint64_t kDraws = testing::random_rounds(30);
  const uint64_t first = testing::seed_from_environment(20260107);
  RankTally tally;
  for (uint64_t i = 0; i < kDraws; ++i) {
    ASSERT_EQ(testing::run_drawn_rules(first + i, tally, true), "")
        << "replay: THINKV_SEED=" << first + i;
  }
  tally.print("rules with blocks drawn by chance");
  EXPECT_GT(tally.evicted, 10 * kDraws) << "the rules do too little";
  EXPECT_GT(tally.recoded, 100 * kDraws);
}

}  // namespace
}  // namespace thinkv::cuda
