// ClientLink against a client that maps the same memory: what it may do, and what it tries.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/ipc/client_link.h"

namespace thinkv::ipc {
namespace {

class Link : public testing::Test {
 protected:
  void SetUp() override {
    auto made = ClientLink::create(42);
    ASSERT_TRUE(made);
    link = std::move(*made);
    void* out_map = ::mmap(nullptr, sizeof(shm::DaemonRegion), PROT_READ, MAP_SHARED,
                           link->daemon_region_fd(), 0);
    void* in_map = ::mmap(nullptr, sizeof(shm::ClientRegion), PROT_READ | PROT_WRITE, MAP_SHARED,
                          link->client_region_fd(), 0);
    ASSERT_NE(out_map, MAP_FAILED);
    ASSERT_NE(in_map, MAP_FAILED);
    out = static_cast<const shm::DaemonRegion*>(out_map);
    in = static_cast<shm::ClientRegion*>(in_map);
  }
  void TearDown() override {
    ::munmap(const_cast<shm::DaemonRegion*>(out), sizeof *out);
    ::munmap(in, sizeof *in);
  }
  void push_requests(uint64_t count) {
    const uint64_t tail = in->request_tail.value.load();
    for (uint64_t i = 0; i < count; ++i) {
      protocol::Request request{};
      request.op = static_cast<uint16_t>(protocol::Op::kPing);
      request.size = sizeof request;
      request.user_data = tail + i;
      in->requests[(tail + i) % limits::kRequestRing] = request;
    }
    in->request_tail.value.store(tail + count, std::memory_order_release);
  }

  std::unique_ptr<ClientLink> link;
  const shm::DaemonRegion* out = nullptr;
  shm::ClientRegion* in = nullptr;
};

TEST_F(Link, HeadersAreFilled) {
  EXPECT_EQ(out->magic, shm::kMagicDaemon);
  EXPECT_EQ(in->magic, shm::kMagicClient);
  EXPECT_EQ(out->boot_epoch, 42u);
}

TEST_F(Link, NothingIsSeenBeforePublish) {
  push_requests(1);
  ASSERT_EQ(link->requests_ready(), 1u);
  EXPECT_EQ(link->take_request().user_data, 0u);
  ASSERT_TRUE(link->push_completion({}));
  EXPECT_EQ(out->completion_tail.value.load(), 0u);
  EXPECT_EQ(out->request_head.value.load(), 0u);
  const uint32_t bell = out->doorbell.value.load();
  link->publish();
  EXPECT_EQ(out->completion_tail.value.load(), 1u);
  EXPECT_EQ(out->request_head.value.load(), 1u);
  EXPECT_NE(out->doorbell.value.load(), bell);
}

TEST_F(Link, RequestsWaitWhileCompletionsHaveNoPlace) {
  push_requests(limits::kRequestRing);
  for (uint32_t i = 0; i < limits::kRequestRing; ++i) {
    ASSERT_GT(link->requests_ready(), 0u);
    (void)link->take_request();
    ASSERT_TRUE(link->push_completion({}));
  }
  link->publish();
  push_requests(limits::kRequestRing);
  EXPECT_EQ(link->requests_ready(), 0u);
  EXPECT_TRUE(link->stalled());
  EXPECT_FALSE(link->broken());
  in->completion_head.value.store(1);
  EXPECT_EQ(link->requests_ready(), 1u);
  EXPECT_FALSE(link->stalled());
}

TEST_F(Link, UnansweredRequestsKeepTheirPlaces) {
  push_requests(limits::kRequestRing);
  ASSERT_GT(link->requests_ready(), 0u);
  for (uint32_t i = 0; i < limits::kRequestRing; ++i) (void)link->take_request();
  link->publish();
  EXPECT_EQ(link->unanswered(), limits::kRequestRing);
  push_requests(1);
  EXPECT_EQ(link->requests_ready(), 0u);
}

class LinkIndex : public Link, public testing::WithParamInterface<std::pair<size_t, uint64_t>> {};

TEST_P(LinkIndex, ImpossibleBreaksTheLink) {
  const auto [offset, value] = GetParam();
  // A request first: completions are only looked at when there is one.
  if (offset != offsetof(shm::ClientRegion, request_tail)) push_requests(1);
  reinterpret_cast<std::atomic<uint64_t>*>(reinterpret_cast<char*>(in) + offset)->store(value);
  std::array<uint32_t, 16> pages{};
  (void)link->requests_ready();
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    (void)link->take_consumed(c);
    (void)link->take_returns(c, pages);
  }
  EXPECT_TRUE(link->broken());
}

INSTANTIATE_TEST_SUITE_P(
    Words, LinkIndex,
    testing::Values(
        std::pair{offsetof(shm::ClientRegion, request_tail), uint64_t{257}},
        std::pair{offsetof(shm::ClientRegion, request_tail), ~uint64_t{0}},
        std::pair{offsetof(shm::ClientRegion, completion_head), uint64_t{1}},
        std::pair{offsetof(shm::ClientRegion, grant_head), uint64_t{1}},
        std::pair{offsetof(shm::ClientRegion, grant_head) + 2 * sizeof(shm::Index), uint64_t{1}},
        std::pair{offsetof(shm::ClientRegion, return_tail) + sizeof(shm::Index), uint64_t{65537}}));

TEST_F(Link, AnIndexThatMovesBackwardsBreaksTheLink) {
  push_requests(3);
  ASSERT_EQ(link->requests_ready(), 3u);
  in->request_tail.value.store(2);
  EXPECT_EQ(link->requests_ready(), 0u);
  EXPECT_TRUE(link->broken());
}

TEST_F(Link, GrantsAndReturns) {
  const std::vector<uint32_t> pages = {7, 8, 9};
  ASSERT_TRUE(link->push_grants(1, pages));
  link->publish();
  ASSERT_EQ(out->grant_tail[1].value.load(), 3u);
  EXPECT_EQ(out->grants[1][2].load(), 9u);
  EXPECT_EQ(out->grant_tail[0].value.load(), 0u);
  in->grant_head[1].value.store(2);
  EXPECT_EQ(link->take_consumed(1), 2u);
  EXPECT_EQ(link->take_consumed(1), 0u);
  in->returns[1][0].store(8);
  in->return_tail[1].value.store(1);
  std::array<uint32_t, 4> got{};
  ASSERT_EQ(link->take_returns(1, got), 1u);
  EXPECT_EQ(got[0], 8u);
}

TEST_F(Link, AFullGrantRingTakesNoMore) {
  std::vector<uint32_t> pages(limits::kGrantRing);
  std::iota(pages.begin(), pages.end(), 0u);
  ASSERT_TRUE(link->push_grants(0, pages));
  EXPECT_FALSE(link->push_grants(0, std::span(pages).first(1)));
}

TEST_F(Link, ParksOnlyWithoutWork) {
  EXPECT_TRUE(link->try_park());
  EXPECT_EQ(out->parked.value.load(), 1u);
  link->unpark();
  push_requests(1);
  EXPECT_FALSE(link->try_park());
  EXPECT_EQ(out->parked.value.load(), 0u);
}

TEST_F(Link, SilencingAnEmptyBlockingBellReturns) {
  const int flags = ::fcntl(link->bell_fd(), F_GETFL);
  ASSERT_EQ(::fcntl(link->bell_fd(), F_SETFL, flags & ~O_NONBLOCK), 0);
  link->silence_bell();  // read() would wait for ever here
  const uint64_t one = 1;
  ASSERT_EQ(::write(link->bell_fd(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  link->silence_bell();
  pollfd entry{link->bell_fd(), POLLIN, 0};
  EXPECT_EQ(::poll(&entry, 1, 0), 0);
}

TEST_F(Link, ClientCannotWriteOrResizeTheDaemonsRegion) {
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, link->daemon_region_fd(), 0),
            MAP_FAILED);
  EXPECT_NE(::mprotect(const_cast<shm::DaemonRegion*>(out), 4096, PROT_READ | PROT_WRITE), 0);
  EXPECT_NE(::ftruncate(link->daemon_region_fd(), 0), 0);
  EXPECT_NE(::ftruncate(link->client_region_fd(), 0), 0);
  EXPECT_NE(::fcntl(link->client_region_fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
}

// Rewrites its region while the daemon reads: nothing but a broken link may come of it.
TEST_F(Link, AFlippingClientDoesNoHarm) {
  std::atomic<bool> stop = false;
  std::thread flipper([&] {
    uint64_t x = 1;
    while (!stop.load()) {
      x = x * 6364136223846793005u + 1442695040888963407u;
      in->requests[x % limits::kRequestRing].op = static_cast<uint16_t>(x >> 32);
      in->counters.tokens.store(x, std::memory_order_relaxed);
      in->returns[0][x % limits::kReturnRing].store(static_cast<uint32_t>(x));
      in->request_tail.value.store((x >> 40) % 300);
      in->return_tail[0].value.store((x >> 30) % 70000);
    }
  });
  std::vector<uint32_t> pages(1024);
  uint64_t taken = 0;
  for (int i = 0; i < 20000; ++i) {
    for (uint32_t n = std::min(link->requests_ready(), 4u); n > 0; --n) {
      (void)link->take_request();
      (void)link->push_completion({});
      ++taken;
    }
    (void)link->take_returns(0, pages);
    (void)link->counters();
    link->publish();
  }
  stop = true;
  flipper.join();
  EXPECT_LE(taken, 20000u * 4u);
}

}  // namespace
}  // namespace thinkv::ipc
