#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include "daemon/core/page_map.h"

namespace thinkv::core {
namespace {

TEST(PageMap, TakesLowestPagesFirst) {
  PageMap map(200);
  map.reset(150);
  std::vector<uint32_t> out(70);
  EXPECT_EQ(map.take(1, out), 70u);
  std::vector<uint32_t> expected(70);
  std::iota(expected.begin(), expected.end(), 0u);
  EXPECT_EQ(out, expected);
  EXPECT_EQ(map.free_count(), 80u);
  EXPECT_EQ(map.check_invariants(), nullptr);
}

TEST(PageMap, GivesNoMoreThanItHas) {
  PageMap map(200);
  map.reset(100);
  std::vector<uint32_t> out(150, 0xFFFFFFFFu);
  EXPECT_EQ(map.take(1, out), 100u);
  EXPECT_EQ(out[100], 0xFFFFFFFFu);
  EXPECT_EQ(map.take(2, out), 0u);
  EXPECT_EQ(map.check_invariants(), nullptr);
}

TEST(PageMap, ReclaimTakesOnlyTheOwnersPages) {
  PageMap map(1000);
  map.reset(1000);
  std::vector<uint32_t> out(1);
  for (uint32_t i = 0; i < 1000; ++i) ASSERT_EQ(map.take(i % 3 == 0 ? 7 : 8, out), 1u);
  EXPECT_EQ(map.reclaim(7), 334u);
  EXPECT_EQ(map.reclaim(7), 0u);
  EXPECT_EQ(map.check_invariants(), nullptr);
  for (uint32_t i = 0; i < 1000; ++i) EXPECT_EQ(map.owner(i), i % 3 == 0 ? 0 : 8) << i;
}

TEST(PageMap, ReclaimAllFreesEveryPageAndNoMore) {
  PageMap map(1000);
  map.reset(777);
  std::vector<uint32_t> out(500);
  map.take(3, out);
  map.reclaim_all();
  EXPECT_EQ(map.free_count(), 777u);
  EXPECT_EQ(map.check_invariants(), nullptr);
  out.resize(1000);
  EXPECT_EQ(map.take(4, out), 777u);
}

// The four-lane comparison must not confuse owners that differ in one bit, or the highest bits.
TEST(PageMap, ReclaimTellsSimilarOwnersApart) {
  const std::vector<uint16_t> owners = {1, 2, 0x0100, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0xFFFE};
  PageMap map(512);
  map.reset(512);
  std::vector<uint32_t> out(1);
  for (uint32_t i = 0; i < 512; ++i) map.take(owners[i % owners.size()], out);
  for (const uint16_t owner : owners) {
    EXPECT_EQ(map.reclaim(owner), 64u) << owner;
    EXPECT_EQ(map.check_invariants(), nullptr);
  }
  EXPECT_EQ(map.free_count(), 512u);
}

TEST(PageMap, AgreesWithSetModel) {
  std::mt19937 random(42);
  for (const uint32_t pages : {1u, 63u, 64u, 65u, 4096u, 4097u, 20000u}) {
    PageMap map(pages + 7);
    map.reset(pages);
    std::set<uint32_t> free;
    for (uint32_t i = 0; i < pages; ++i) free.insert(i);
    std::vector<uint32_t> granted;
    for (int op = 0; op < 300; ++op) {
      if (random() % 2 == 0) {
        std::vector<uint32_t> out(random() % (pages / 4 + 2));
        out.resize(map.take(3, out));
        for (const uint32_t page : out) {
          ASSERT_EQ(page, *free.begin());
          free.erase(free.begin());
          granted.push_back(page);
        }
      } else {
        std::shuffle(granted.begin(), granted.end(), random);
        for (size_t n = granted.empty() ? 0 : random() % granted.size(); n > 0; --n) {
          map.give_back(granted.back());
          free.insert(granted.back());
          granted.pop_back();
        }
      }
      ASSERT_EQ(map.free_count(), free.size());
    }
    ASSERT_EQ(map.check_invariants(), nullptr) << pages;
  }
}

TEST(PageMapDeathTest, GivingBackAFreePageStops) {
  PageMap map(64);
  map.reset(64);
  EXPECT_DEATH(map.give_back(3), "owners_\\[index\\] != kFree");
}

}  // namespace
}  // namespace thinkv::core
