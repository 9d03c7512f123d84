#include "kernels/host/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

namespace thinkv::kernels {
namespace {

TEST(ThreadPool, CallsEveryIndexOnce) {
  ThreadPool pool({.threads = 3});
  for (const uint32_t count : {0u, 1u, 2u, 3u, 1000u}) {
    std::vector<int> calls(count, 0);  // plain ints: two calls of one index would be a race
    for (int round = 0; round < 20; ++round) {
      pool.parallel_for(count, [&](uint32_t i) { ++calls[i]; });
    }
    for (const int n : calls) ASSERT_EQ(n, 20);
  }
}

TEST(ThreadPool, OneThreadRunsInOrderOnTheCaller) {
  ThreadPool pool({.threads = 1});
  std::vector<uint32_t> order;
  const auto caller = std::this_thread::get_id();
  pool.parallel_for(5, [&](uint32_t i) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    order.push_back(i);
  });
  EXPECT_EQ(order, (std::vector<uint32_t>{0, 1, 2, 3, 4}));
}

TEST(ThreadPool, ZeroMeansOneAHardwareThread) {
  EXPECT_EQ(ThreadPool({.threads = 0}).threads(),
            std::max(1u, std::thread::hardware_concurrency()));
}

TEST(ThreadPool, NestedLoopsRunInsteadOfWaitingForThemselves) {
  ThreadPool pool({.threads = 2});
  std::atomic<uint32_t> calls{0};
  pool.parallel_for(8, [&](uint32_t) { pool.parallel_for(8, [&](uint32_t) { ++calls; }); });
  EXPECT_EQ(calls, 64u);
}

TEST(ThreadPool, ServesSeveralCallersAtOnce) {
  ThreadPool pool({.threads = 2});
  std::vector<uint64_t> sums(4, 0);
  std::vector<std::thread> callers;
  for (uint64_t& sum : sums) {
    callers.emplace_back([&pool, &sum] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<uint64_t> total{0};
        pool.parallel_for(50, [&](uint32_t i) { total += i; });
        sum += total;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const uint64_t sum : sums) EXPECT_EQ(sum, 200u * 1225u);
}

TEST(ThreadPool, NeverUsedPoolCanBeDestroyed) {
  ThreadPool pool({.threads = 4});
}

TEST(ThreadPool, ForkedChildWorksAloneAndExits) {
  ThreadPool pool({.threads = 3});
  pool.parallel_for(10, [](uint32_t) {});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    uint32_t calls = 0;
    pool.parallel_for(10, [&](uint32_t) { ++calls; });
    pool.~ThreadPool();
    ::_exit(calls == 10 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  uint32_t calls = 0;
  ThreadPool({.threads = 1}).parallel_for(3, [&](uint32_t) { ++calls; });
  EXPECT_EQ(calls, 3u);
}

}  // namespace
}  // namespace thinkv::kernels
