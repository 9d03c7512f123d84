// Blocks and vectors in meta pages: no overlap, growth, what they promise to need, what comes back.
#include <deque>

#include "tests/support/sequence_fixture.h"

namespace thinkv::kernels {
namespace {

using testing::VectorPageSource;
using testing::VectorPool;

struct Heap {
  explicit Heap(uint32_t head_dim, uint32_t capacity = 4096)
      : pool({.head_dim = head_dim, .capacity = capacity}),
        source(pool),
        pages(source),
        heap(pages, page_bytes(head_dim)) {
    THINKV_CHECK(pages.reserve(1).has_value());
    heap.create();
  }
  VectorPool pool;
  VectorPageSource source;
  Pages pages;
  MetaHeap heap;
};

TEST(MetaHeap, BlocksAreZeroedDisjointAndNeverNeedMoreThanPromised) {
  for (const uint32_t head_dim : kHeadDims) {
    Heap h(head_dim);
    std::mt19937_64 random(9);
    struct Block {
      BlockRef ref;
      uint32_t granules;
      uint8_t mark;
    };
    std::deque<Block> blocks;
    for (uint32_t round = 0; round < 3000; ++round) {
      if (!blocks.empty() && random() % 100 < 45) {
        std::swap(blocks.front(), blocks[random() % blocks.size()]);
        const Block& block = blocks.front();
        const std::byte* bytes = h.heap.address(block.ref);
        for (uint32_t i = 0; i < block.granules * kGranuleBytes; ++i) {
          ASSERT_EQ(bytes[i], std::byte{block.mark}) << "another block wrote here";
        }
        h.heap.free(block.ref, block.granules);
        blocks.pop_front();
        continue;
      }
      const uint32_t granules = 1u << (random() % 6);
      MetaNeed need(h.heap.granules_per_page());
      need.add_blocks(granules);
      ASSERT_TRUE(h.pages.reserve(need.pages()).has_value());
      const Block block{h.heap.allocate(granules), granules, static_cast<uint8_t>(random())};
      std::byte* bytes = h.heap.address(block.ref);
      for (uint32_t i = 0; i < granules * kGranuleBytes; ++i) {
        ASSERT_EQ(bytes[i], std::byte{0});
        bytes[i] = std::byte{block.mark};
      }
      blocks.push_back(block);
    }
    for (const Block& block : blocks) h.heap.free(block.ref, block.granules);
    EXPECT_EQ(h.heap.pages(), 1u) << "empty pages go back";
    EXPECT_EQ(h.pool.held(), 1u);
    h.heap.destroy();
    EXPECT_EQ(h.pool.held(), 0u);
  }
}

TEST(MetaHeap, ANeedOfManyBlocksIsEnough) {
  std::mt19937_64 random(4);
  for (uint32_t round = 0; round < 300; ++round) {
    Heap h(kHeadDims[round % 3]);
    MetaNeed need(h.heap.granules_per_page());
    std::vector<uint32_t> sizes(1 + random() % 60);
    for (uint32_t& size : sizes) {
      size = std::min<uint32_t>(1u << (random() % 8), h.heap.block_granules_max());
      need.add_blocks(size);
    }
    ASSERT_TRUE(h.pages.reserve(need.pages()).has_value());
    for (const uint32_t size : sizes) {  // a take beyond the promise stops the test
      ASSERT_NE(h.heap.allocate(size).page, PageId::kNoneRaw);
    }
  }
}

TEST(MetaHeap, NothingNeedsNothing) {
  MetaNeed need(36);
  EXPECT_EQ(need.pages(), 0u);
  need.add_blocks(4, 0);
  EXPECT_EQ(need.pages(), 0u);
  need.add_pages(3);
  EXPECT_EQ(need.pages(), 3u);
}

TEST(MetaHeapDeathTest, ATakeWithoutAPromiseStops) {
  Heap h(64);
  EXPECT_DEATH(static_cast<void>(h.heap.take_table()), "promised_ > 0");
}

TEST(MetaHeapDeathTest, FreeingTwiceStops) {
  Heap h(64);
  const BlockRef block = h.heap.allocate(2);
  h.heap.free(block, 2);
  EXPECT_DEATH(h.heap.free(block, 2), "granule_used");
}

template <class T>
class SharedVectorOf : public ::testing::Test {};
struct Small {
  uint32_t value;
  uint32_t pad[3];
};
struct Large {
  uint32_t value;
  uint32_t pad[31];
};
using Elements = ::testing::Types<Small, Large>;
TYPED_TEST_SUITE(SharedVectorOf, Elements);

// Up and down through all forms, beside a second vector, against std::vector.
TYPED_TEST(SharedVectorOf, AgreesWithAPlainVector) {
  for (const uint32_t head_dim : kHeadDims) {
    Heap h(head_dim);
    VectorHeader header{}, neighbour_header{};
    SharedVector<TypeParam>::initialise(header);
    SharedVector<TypeParam>::initialise(neighbour_header);
    SharedVector<TypeParam> vector(header, h.heap), neighbour(neighbour_header, h.heap);
    std::vector<uint32_t> model, neighbour_model;
    std::mt19937_64 random(head_dim);
    const auto push = [&](SharedVector<TypeParam>& v, std::vector<uint32_t>& m, uint32_t count) {
      MetaNeed need(h.heap.granules_per_page());
      v.add_need(count, need);
      ASSERT_TRUE(h.pages.reserve(need.pages()).has_value());
      v.grow_for(count);
      for (uint32_t i = 0; i < count; ++i) {
        m.push_back(static_cast<uint32_t>(random()));
        TypeParam item{};
        item.value = m.back();
        v.push(item);
      }
    };
    for (uint32_t round = 0; round < 1500; ++round) {
      const bool growing = round < 700 || (round / 100) % 2 == 0;
      push(neighbour, neighbour_model, round % 9 == 0 ? 1 : 0);
      if (random() % 100 < (growing ? 70u : 20u)) {
        push(vector, model, 1 + static_cast<uint32_t>(random() % 4));
      } else if (!model.empty()) {
        const auto i = static_cast<uint32_t>(random() % model.size());
        if (random() % 8 == 0) {
          vector.remove_ordered(i);
          model.erase(model.begin() + i);
        } else {
          vector.remove_unordered(i);
          model[i] = model.back();
          model.pop_back();
        }
      }
      ASSERT_EQ(vector.size(), model.size());
      if (round % 50 != 0) continue;
      vector.for_each([&](uint32_t i, TypeParam& item) { ASSERT_EQ(item.value, model[i]); });
      neighbour.for_each(
          [&](uint32_t i, TypeParam& item) { ASSERT_EQ(item.value, neighbour_model[i]); });
    }
    vector.destroy();
    neighbour.destroy();
    EXPECT_EQ(h.pool.held(), 1u);
  }
}

TEST(SharedVector, GivesTablesBackButKeepsOneSpare) {
  Heap h(64);
  VectorHeader header{};
  SharedVector<Large>::initialise(header);
  SharedVector<Large> vector(header, h.heap);
  MetaNeed need(h.heap.granules_per_page());
  vector.add_need(180, need);  // ten tables of 18
  ASSERT_TRUE(h.pages.reserve(need.pages()).has_value());
  vector.grow_for(180);
  for (uint32_t i = 0; i < 180; ++i) vector.push(Large{.value = i, .pad = {}});
  const uint32_t full = h.heap.pages();
  for (uint32_t i = 0; i < 90; ++i) vector.pop();
  EXPECT_EQ(h.heap.pages(), full - 4);
  for (uint32_t i = 0; i < 90; ++i) EXPECT_EQ(vector[i].value, i);
}

}  // namespace
}  // namespace thinkv::kernels
