// Handles: stale, foreign, busy, forked; close waits for running calls.
#include "client/handles.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace thinkv::client {
namespace {

HandleTable& table() {
  return HandleTable::instance();
}
constexpr HandleKind kKind = HandleKind::kSequence;

ErrorCode pin_error(Handle handle, HandleKind kind, Use use = Use::kShared) {
  const Result<void*> pinned = table().pin(handle, kind, use);
  if (!pinned) return pinned.error().code;
  table().unpin(handle);
  return ErrorCode::kOk;
}

TEST(Handles, OpenHandleGivesItsObject) {
  int object = 0;
  const Handle handle = table().add(kKind, &object).value();
  const Result<void*> pinned = table().pin(handle, kKind, Use::kShared);
  ASSERT_TRUE(pinned);
  EXPECT_EQ(pinned.value(), &object);
  table().unpin(handle);
  EXPECT_EQ(table().begin_close(handle, kKind), &object);
  table().end_close(handle);
}

TEST(Handles, ClosedHandleIsStaleEvenAfterItsPlaceIsReused) {
  int object = 0;
  const Handle old = table().add(kKind, &object).value();
  ASSERT_NE(table().begin_close(old, kKind), nullptr);
  table().end_close(old);
  EXPECT_EQ(pin_error(old, kKind), ErrorCode::kStale);
  const Handle reused = table().add(kKind, &object).value();
  EXPECT_NE(reused, old);
  EXPECT_EQ(pin_error(old, kKind), ErrorCode::kStale);
  EXPECT_EQ(table().begin_close(old, kKind), nullptr);
  EXPECT_EQ(pin_error(reused, kKind), ErrorCode::kOk);
  ASSERT_NE(table().begin_close(reused, kKind), nullptr);
  table().end_close(reused);
}

TEST(Handles, NullOtherKindsAndStrayPointersAreInvalid) {
  int object = 0;
  const Handle handle = table().add(kKind, &object).value();
  EXPECT_EQ(pin_error(0, kKind), ErrorCode::kInvalidArgument);
  EXPECT_EQ(pin_error(handle, HandleKind::kModel), ErrorCode::kInvalidArgument);
  EXPECT_EQ(pin_error(reinterpret_cast<Handle>(&object), kKind), ErrorCode::kInvalidArgument);
  EXPECT_EQ(pin_error(handle | 0xFFFF'FF00u, kKind), ErrorCode::kInvalidArgument);
  EXPECT_EQ(pin_error(~Handle{0}, kKind), ErrorCode::kInvalidArgument);
  EXPECT_EQ(table().begin_close(0, kKind), nullptr);
  EXPECT_EQ(table().begin_close(handle, HandleKind::kStep), nullptr);
  ASSERT_NE(table().begin_close(handle, kKind), nullptr);
  table().end_close(handle);
}

TEST(Handles, ExclusiveUseExcludesOthersAndSharedUseDoesNot) {
  int object = 0;
  const Handle handle = table().add(kKind, &object).value();
  ASSERT_TRUE(table().pin(handle, kKind, Use::kExclusive));
  EXPECT_EQ(pin_error(handle, kKind, Use::kExclusive), ErrorCode::kInvalidArgument);
  EXPECT_EQ(pin_error(handle, kKind, Use::kShared), ErrorCode::kOk);
  table().unpin(handle);
  EXPECT_EQ(pin_error(handle, kKind, Use::kExclusive), ErrorCode::kOk);
  ASSERT_NE(table().begin_close(handle, kKind), nullptr);
  table().end_close(handle);
}

TEST(Handles, ForkedChildIsToldToOpenItsOwn) {
  int object = 0;
  const Handle handle = table().add(kKind, &object).value();
  const pid_t child = ::fork();
  if (child == 0) {
    const bool stale = pin_error(handle, kKind) == ErrorCode::kStale;
    const bool kept = table().begin_close(handle, kKind) == nullptr;
    const Result<Handle> own = table().add(kKind, &object);
    ::_exit(stale && kept && own && pin_error(own.value(), kKind) == ErrorCode::kOk ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(pin_error(handle, kKind), ErrorCode::kOk);
  ASSERT_NE(table().begin_close(handle, kKind), nullptr);
  table().end_close(handle);
}

void touch_until_stale(Handle handle) {
  for (;;) {
    const Result<void*> pinned = table().pin(handle, kKind, Use::kExclusive);
    if (pinned) {
      *static_cast<uint64_t*>(pinned.value()) += 1;
      table().unpin(handle);
    } else if (pinned.error().code == ErrorCode::kStale) {
      return;
    }
  }
}

// Users pin and touch, closers close: no use after the close, exactly one closer gets the object.
TEST(Handles, CloseWaitsForCallsAndHappensOnce) {
  for (int round = 0; round < 100; ++round) {
    auto object = std::make_unique<uint64_t>(0);
    const Handle handle = table().add(kKind, object.get()).value();
    std::atomic<uint32_t> destroyed{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([handle] { touch_until_stale(handle); });
      threads.emplace_back([&] {
        if (table().begin_close(handle, kKind) != nullptr) {
          destroyed.fetch_add(1);
          object.reset();
          table().end_close(handle);
        }
        EXPECT_EQ(pin_error(handle, kKind), ErrorCode::kStale);
      });
    }
    for (std::thread& thread : threads) thread.join();
    ASSERT_EQ(destroyed.load(), 1u);
  }
}

}  // namespace
}  // namespace thinkv::client
