// Leases, page sources and the extent map, against a daemon thread on the same mapping.
#include "client/lease.h"

#include <gtest/gtest.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "client/lease_source.h"
#include "tests/support/ring_daemon.h"

namespace thinkv::client {
namespace {

constexpr uint64_t kExtentBytes = uint64_t{2} << 20;
constexpr uint32_t kClass = 0;
constexpr uint32_t kPages = 600;

struct LeaseTest : testing::Test {
  test::Regions regions;
  test::RingDaemon peer{{.out = regions.daemon.get(),
                         .in = regions.client.get(),
                         .page_class = kClass,
                         .pages = kPages}};
  Channel channel{{.daemon = regions.daemon.get(),
                   .client = regions.client.get(),
                   .timeout = std::chrono::milliseconds(20'000)}};
  ExtentMap extents;
  std::mutex mutex;
  bool send_extent = true;
  std::optional<Lease> lease;

  void SetUp() override {
    lease.emplace(LeaseOptions{.channel = &channel,
                               .extents = &extents,
                               .page_class = kClass,
                               .receive_extents = [this]() -> Status {
                                 if (!send_extent) return {};
                                 const UniqueFd fd = test::sealed_memfd(kExtentBytes);
                                 return extents.add(test::extent_message(kClass, kExtentBytes),
                                                    fd.get());
                               }});
    peer.start();
  }
};

TEST_F(LeaseTest, TakesFromTheDaemonOnceAndThenLocally) {
  std::vector<PageId> pages;
  ASSERT_TRUE(lease->take(40, pages));
  EXPECT_EQ(pages.size(), 40u);
  lease->give(pages);
  pages.clear();
  ASSERT_TRUE(lease->take(40, pages));
  EXPECT_EQ(peer.seen(protocol::Op::kNeedPages), 1u);
  EXPECT_EQ(lease->used(), 40u);
}

TEST_F(LeaseTest, SurplusAboveTheHighWatermarkGoesBack) {
  lease->set_high(10);
  std::vector<PageId> pages;
  ASSERT_TRUE(lease->take(100, pages));
  lease->give(pages);
  EXPECT_EQ(lease->held(), 10u);
  peer.stop();
  EXPECT_EQ(peer.free_pages(), kPages - 10);
  EXPECT_EQ(peer.faults(), 0u);
}

TEST_F(LeaseTest, AskingForMoreThanThereIsTakesNothing) {
  std::vector<PageId> pages;
  const Status taken = lease->take(kPages + 1, pages);
  ASSERT_FALSE(taken);
  EXPECT_EQ(taken.error().code, ErrorCode::kExhausted);
  EXPECT_TRUE(pages.empty());
  EXPECT_EQ(lease->used(), 0u);
  EXPECT_TRUE(lease->take(kPages, pages));
}

TEST_F(LeaseTest, GrantWithoutItsExtentIsTheDaemonsFault) {
  send_extent = false;
  std::vector<PageId> pages;
  const Status taken = lease->take(1, pages);
  ASSERT_FALSE(taken);
  EXPECT_EQ(taken.error().code, ErrorCode::kUnavailable);
  EXPECT_TRUE(pages.empty());
}

TEST_F(LeaseTest, FailedReserveGivesUpThePromiseAndItsPages) {
  LeaseSource source(mutex, *lease, extents);
  ASSERT_TRUE(source.reserve(20));
  ASSERT_FALSE(source.reserve(kPages + 1));
  LeaseSource other(mutex, *lease, extents);
  EXPECT_TRUE(other.reserve(kPages));
}

TEST_F(LeaseTest, TakeWithoutAPromiseIsOurOwnDefect) {
  LeaseSource source(mutex, *lease, extents);
  ASSERT_TRUE(source.reserve(1));
  static_cast<void>(source.take());
  EXPECT_DEATH(static_cast<void>(source.take()), "check failed");
}

// Eight threads with a source each over one lease: pages are disjoint, contents never mix, and in
// the end all are back.
TEST_F(LeaseTest, ThreadsShareOneLeaseWithoutSharingAPage) {
  constexpr uint32_t kThreads = 8;
  std::atomic<uint32_t> mixed{0};
  std::atomic<uint32_t> refused{0};
  const auto work = [&](uint32_t id) {
    LeaseSource source(mutex, *lease, extents);
    uint32_t random = id * 2654435761u + 1;
    for (int round = 0; round < 300; ++round) {
      random = random * 1664525u + 1013904223u;
      const uint32_t count = 1 + (random >> 16) % 90;  // 8 x 90 > kPages: some reserves fail
      if (!source.reserve(count)) {
        refused.fetch_add(1);
        source.settle();
        continue;
      }
      std::vector<PageId> mine;
      for (uint32_t i = 0; i < count; ++i) {
        mine.push_back(source.take());
        std::memcpy(source.address(mine.back()), &id, sizeof(id));
      }
      for (const PageId page : mine) {
        uint32_t seen = 0;
        std::memcpy(&seen, source.address(page), sizeof(seen));
        if (seen != id) mixed.fetch_add(1);
        source.give_back(page);
      }
      source.settle();
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t id = 0; id < kThreads; ++id) threads.emplace_back(work, id);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(mixed.load(), 0u);
  EXPECT_EQ(lease->used(), 0u);
  std::vector<PageId> all;
  ASSERT_TRUE(lease->take(kPages, all));
  EXPECT_EQ(std::set<PageId>(all.begin(), all.end()).size(), kPages);
  EXPECT_EQ(peer.faults(), 0u);
}

TEST(ExtentMap, RefusesWhatDoesNotFitItsDescriptor) {
  ExtentMap map;
  const UniqueFd fd = test::sealed_memfd(kExtentBytes);
  const protocol::Extent good = test::extent_message(kClass, kExtentBytes);
  const auto refuses = [&](auto change) {
    protocol::Extent bad = good;
    change(bad);
    return !map.add(bad, fd.get());
  };
  EXPECT_TRUE(refuses([](auto& e) { e.extent_id = limits::kExtentsMax; }));
  EXPECT_TRUE(refuses([](auto& e) { e.page_class = kPageClassCount; }));
  EXPECT_TRUE(refuses([](auto& e) { e.page_bytes += 4; }));
  EXPECT_TRUE(refuses([](auto& e) { e.page_count = 0; }));
  EXPECT_TRUE(refuses([](auto& e) { e.page_count += 1; }));
  EXPECT_TRUE(refuses([](auto& e) { e.extent_bytes *= 2; }));
  EXPECT_TRUE(refuses([](auto& e) { e.extent_bytes = 4096; }));
  const UniqueFd unsealed = test::sealed_memfd(kExtentBytes, 0);
  EXPECT_FALSE(map.add(good, unsealed.get()));
  EXPECT_FALSE(map.add(good, -1));
  EXPECT_FALSE(map.mapped(ExtentId(0)));
  ASSERT_TRUE(map.add(good, fd.get()));
  EXPECT_FALSE(map.add(good, fd.get())) << "the same generation twice";
}

TEST(ExtentMap, HoldsOnlyPagesInsideAnExtentOfTheirClass) {
  ExtentMap map;
  const UniqueFd fd = test::sealed_memfd(kExtentBytes);
  const protocol::Extent extent = test::extent_message(kClass, kExtentBytes);
  ASSERT_TRUE(map.add(extent, fd.get()));
  EXPECT_TRUE(map.holds(PageId(ExtentId(0), extent.page_count - 1), kClass));
  EXPECT_FALSE(map.holds(PageId(ExtentId(0), extent.page_count), kClass));
  EXPECT_FALSE(map.holds(PageId(ExtentId(0), 0), kClass + 1));
  EXPECT_FALSE(map.holds(PageId(ExtentId(1), 0), kClass));
  EXPECT_FALSE(map.holds(kNoPage, kClass));
}

TEST(ExtentMap, AnotherGenerationReplacesTheMemory) {
  ExtentMap map;
  const UniqueFd first = test::sealed_memfd(kExtentBytes);
  const UniqueFd second = test::sealed_memfd(kExtentBytes);
  protocol::Extent extent = test::extent_message(kClass, kExtentBytes);
  ASSERT_TRUE(map.add(extent, first.get()));
  *map.address(PageId(0)) = std::byte{7};
  extent.generation = 2;
  ASSERT_TRUE(map.add(extent, second.get()));
  EXPECT_EQ(*map.address(PageId(0)), std::byte{0});
}

}  // namespace
}  // namespace thinkv::client
