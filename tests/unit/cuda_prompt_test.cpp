// What an engine tells rank rules on the device about a prompt, in the emulator beside the host:
// its newest queries, and classes of tokens; and what happens where metadata is damaged.
#include <algorithm>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/rank_twin.h"

namespace thinkv::cuda {
namespace {

using testing::DeviceReader;
using testing::must_ship;
using testing::RankTally;
using testing::TwinBatch;

// Rows of several tiles and sets, above and below the kernel for few tokens.
TEST(CudaPrompt, QueriesOfLongPromptsAgreeWithTheHost) {
  for (const char* name : {"snapkv", "h2o", "thinkv", "dbudgetkv", "uncomp"}) {
    EXPECT_EQ(testing::run_long_prompt(must_ship(name, 300), kRankRowsFew + 200, 64, 1, 64), "")
        << name;
    EXPECT_EQ(testing::run_long_prompt(must_ship(name, 100), 333, 128, 2, 7), "") << name;
  }
}

TEST(CudaPrompt, MatrixEntropyAgreesWithTheHostInEveryWidth) {
  for (const uint32_t dim : kHeadDims) {
    for (const uint32_t queries : {0u, 1u, 33u, 64u}) {
      EXPECT_EQ(testing::run_prompt_entropy(must_ship("uncomp", 50), dim, queries), "")
          << dim << ", " << queries << " queries";
    }
  }
}

// Heads of few and of many directions: the groups differ, and a sequence without a prompt has none.
TEST(CudaPrompt, HeadsWithoutASignalShareTheBudgetEqually) {
  TwinBatch batch({.geometry = {.layers = 1, .q_heads = 4, .kv_heads = 4, .head_dim = 64},
                   .capacity = 2,
                   .extent_pages = 1024,
                   .plant_scores = true});
  batch.open(0, must_ship("uncomp", 40));
  batch.open(1, must_ship("uncomp", 40));
  batch.prefill(1, 100, 32);
  EXPECT_EQ(testing::compared_steps(batch, 60), "");
  const DeviceReader without(batch.pool(), batch.twin(0)->root);
  const DeviceReader with(batch.pool(), batch.twin(1)->root);
  std::vector<uint32_t> held;
  for (uint32_t lane = 0; lane < 4; ++lane) {
    EXPECT_EQ(without.lane(lane).live, 40u);
    held.push_back(with.lane(lane).live);
  }
  std::sort(held.begin(), held.end());
  EXPECT_EQ(held, (std::vector<uint32_t>{27, 27, 53, 53})) << "2 to 1, and 4 x 40 in all";
}

TEST(CudaPrompt, ThinkChoosesChannelsByQueriesAsTheHost) {
  RankTally tally;
  const PolicyParams think = must_ship("think", 24);
  for (const uint32_t dim : kHeadDims) {
    const ModelGeometry g{.layers = 2, .q_heads = 6, .kv_heads = 2, .head_dim = dim};
    EXPECT_EQ(testing::run_block_policy(think, g, tally, 20), "") << dim;
  }
  EXPECT_GT(tally.recoded, 0u);
}

// The two ways to choose are not the same, or the test above would say nothing.
TEST(CudaPrompt, ChannelsWithAndWithoutQueriesDiffer) {
  std::vector<uint32_t> chosen[2];
  for (const uint32_t queries : {0u, 32u}) {
    TwinBatch batch({.geometry = {.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 64},
                     .extent_pages = 256});
    batch.open(0, must_ship("think", 24));
    batch.prefill(0, 100, queries);
    EXPECT_EQ(testing::compared(batch, "the prompt"), "");
    const DeviceReader reader(batch.pool(), batch.twin(0)->root);
    ASSERT_EQ(reader.lane(0).channels_chosen, 1u);
    chosen[queries != 0].assign(reader.lane(0).channels, reader.lane(0).channels + 2);
  }
  EXPECT_NE(chosen[0], chosen[1]);
}

// ---- classes ----

PolicyParams protecting(uint8_t classes) {
  PolicyParams p = testing::plain_policy(Format::kF16);
  p.evict = EvictRule::kRank;
  p.budget_tokens = 20;
  p.rule_count = 1;
  p.rules[0].at_prompt_end = 1;
  p.rules[0].every = 16;
  p.rules[0].position = 1.0f;
  p.rules[0].classes = classes;
  return p;
}

TEST(CudaClasses, TokensOfAProtectedClassStay) {
  TwinBatch batch({.geometry = {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 64}});
  batch.open(0, protecting(2));
  std::vector<uint8_t> classes(60, 1);
  for (const uint32_t i : {3u, 10u, 11u, 40u}) classes[i] = 2;
  batch.classes(0, 0, classes);
  batch.prefill(0, 60);
  EXPECT_EQ(testing::compared_steps(batch, 40), "");
  batch.copy(0);
  std::string twice;
  const DeviceReader reader(batch.pool(), batch.twin(0)->root);
  const testing::LaneTokens tokens = reader.tokens(0, twice);
  for (const uint32_t i : {3u, 10u, 11u, 40u}) EXPECT_EQ(tokens.count(i), 1u) << i;
  EXPECT_EQ(tokens.count(4), 0u);
  batch.close(0);
  EXPECT_EQ(testing::compared(batch, "closed"), "");
}

TEST(CudaClasses, ArePagesOfTheMetadataAndNoMoreThanSaid) {
  const ModelGeometry g{.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 64};
  EXPECT_EQ(class_pages(g, 0), 0u);
  EXPECT_EQ(class_pages(g, 1), 2u) << "the directory, and a page of 2,304 positions";
  EXPECT_EQ(class_pages(g, 2304), 2u);
  EXPECT_EQ(class_pages(g, 2305), 3u);
  EXPECT_EQ(classes_max(g), 576u * 2304);
  TwinBatch batch({.geometry = g});
  batch.open(0, protecting(1));
  const DeviceReader reader(batch.pool(), batch.twin(0)->root);
  const uint32_t before = reader.header().metadata_pages;
  batch.classes(0, 2300, std::vector<uint8_t>(10, 1));
  EXPECT_EQ(reader.header().metadata_pages, before + 3);
  batch.classes(0, 0, std::vector<uint8_t>(3000, 1));
  EXPECT_EQ(reader.header().metadata_pages, before + 3);
  EXPECT_EQ(testing::compared(batch, "told"), "");
  const uint8_t one = 1;
  EXPECT_EQ(
      launch_classes(batch.pool().view(), batch.twin(0)->root, classes_max(g), &one, 1, nullptr),
      cudaErrorInvalidValue);
}

TEST(CudaClasses, WithoutPromisedPagesAreLostAndSaidToBe) {
  TwinBatch batch({.geometry = {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 64}});
  batch.open(0, protecting(1));
  batch.pool().supply(1);
  const std::vector<uint8_t> classes(100, 1);
  const BatchView view = batch.pool().view();
  ASSERT_EQ(launch_classes(view, batch.twin(0)->root, 0, classes.data(), 100, nullptr),
            cudaSuccess);
  EXPECT_EQ(batch.pool().lease().faults, kLeaseEmpty);
  ASSERT_EQ(launch_close(view, batch.twin(0)->root, nullptr), cudaSuccess);
  EXPECT_EQ(batch.pool().lease().faults, kLeaseEmpty) << "what is there is well";
}

// ---- damage ----

// A step of the batch with the same numbers everywhere, whatever its metadata.
void step_blindly(TwinBatch& batch) {
  const BatchView view = batch.pool().view();
  const ModelGeometry& g = view.geometry;
  testing::DeviceVector<float> rows(uint64_t{view.capacity} * g.kv_heads * g.head_dim);
  std::fill_n(rows.data(), rows.size(), 1.0f);
  batch.pool().supply(64);
  ASSERT_EQ(launch_begin(view, nullptr), cudaSuccess);
  ASSERT_EQ(launch_append(view, 0, rows.data(), rows.data(), Element::kF32, nullptr), cudaSuccess);
  ASSERT_EQ(launch_end(view, nullptr), cudaSuccess);
}

TEST(CudaClasses, BadMetadataIsReportedAndNotFollowed) {
  const uint32_t outside = PageId(ExtentId(3), 0).raw(), past_end = PageId(ExtentId(0), 512).raw();
  for (uint32_t damage = 0; damage < 4; ++damage) {
    SCOPED_TRACE(damage);
    TwinBatch batch({.geometry = {.layers = 1, .q_heads = 1, .kv_heads = 1, .head_dim = 64}});
    batch.open(0, protecting(1));
    batch.classes(0, 0, std::vector<uint8_t>(100, 1));
    batch.prefill(0, 60);
    for (uint32_t i = 0; i < 15; ++i) batch.step();
    const DeviceReader reader(batch.pool(), batch.twin(0)->root);
    auto* ids = reinterpret_cast<uint32_t*>(batch.pool().address(reader.header().class_directory));
    if (damage == 0) reader.header().class_directory = outside;
    if (damage == 1) ids[0] = past_end;
    if (damage == 2) ids[0] = PageId::kNoneRaw;
    if (damage == 3) reader.header().class_pages = 0xFFFF'FFFFu;
    ASSERT_NO_FATAL_FAILURE(step_blindly(batch));
    EXPECT_EQ(batch.pool().lease().faults, damage < 3 ? kBadMetadata : 0u);
    const std::vector<uint8_t> more(10, 1);
    const uint32_t root = batch.twin(0)->root;
    ASSERT_EQ(launch_classes(batch.pool().view(), root, 0, more.data(), 10, nullptr), cudaSuccess);
    EXPECT_EQ(batch.pool().lease().faults, kBadMetadata);
    ASSERT_EQ(launch_close(batch.pool().view(), root, nullptr), cudaSuccess);
  }
}

TEST(CudaPrompt, BadMetadataIsReportedAndNotFollowed) {
  const ModelGeometry g{.layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 64};
  for (const char* name : {"snapkv", "uncomp", "think"}) {
    for (uint32_t damage = 0; damage < 6; ++damage) {
      SCOPED_TRACE(std::string(name) + ", " + std::to_string(damage));
      TwinBatch batch({.geometry = g});
      const PolicyParams policy = must_ship(name, 40);
      batch.open(0, policy);
      const uint32_t root = batch.twin(0)->root;
      batch.pool().supply(prefill_pages(g, policy, 0, 50));
      testing::DeviceVector<float> rows(uint64_t{50} * 2 * 64);
      std::fill_n(rows.data(), rows.size(), 1.0f);
      const BatchView view = batch.pool().view();
      ASSERT_EQ(launch_prefill(view, root, 0, rows.data(), rows.data(), Element::kF32, 50, nullptr),
                cudaSuccess);
      const DeviceReader reader(batch.pool(), root);
      DeviceLane& lane = reader.lane(0);
      DeviceDescriptor& d = reader.descriptor(lane, 2);
      if (damage == 0) lane.buffer_page[0] = lane.buffer_page[1] = PageId::kNoneRaw;
      if (damage == 1) lane.pages = 3;
      if (damage == 2) d.page = PageId(ExtentId(3), 0).raw();
      if (damage == 3) d.format = static_cast<uint8_t>(Format::kK2V2);
      if (damage == 4) d.format = 200;
      if (damage == 5) lane.live = 49;
      ASSERT_EQ(launch_prefill_queries(view, root, policy, 0, rows.data(), Element::kF32, {50, 20},
                                       nullptr),
                cudaSuccess);
      // Energies of channels lie in the buffer's pages alone.
      const bool looked = policy::keeps_sums(policy) || damage == 0;
      EXPECT_EQ(batch.pool().lease().faults, looked ? kBadMetadata : 0u);
      batch.pool().lease().faults = 0;
      ASSERT_EQ(launch_prefill_end(view, root, policy, {50}, nullptr), cudaSuccess);
      ASSERT_EQ(launch_close(view, root, nullptr), cudaSuccess);
    }
  }
}

}  // namespace
}  // namespace thinkv::cuda
