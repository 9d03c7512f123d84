// A session against a daemon that is wrong in one way each (tests/support/fake_daemon.h).
#include "client/session.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "tests/support/fake_daemon.h"

namespace thinkv::client {
namespace {

using test::FakeDaemon;
using test::FakeFaults;

SessionOptions to(const FakeDaemon& daemon) {
  return {.socket_path = daemon.path(),
          .client_name = "unit test",
          .timeout = std::chrono::milliseconds(5'000)};
}

constexpr ModelGeometry kGeometry{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 64};

ErrorCode open_error(const FakeFaults& faults, std::string* text = nullptr) {
  FakeDaemon daemon(faults);
  const Result<std::unique_ptr<Session>> session = Session::open(to(daemon));
  if (session) return ErrorCode::kOk;
  if (text != nullptr) *text = session.error().what;
  return session.error().code;
}

TEST(Session, OpensRegistersAndAsks) {
  FakeDaemon daemon({});
  Result<std::unique_ptr<Session>> session = Session::open(to(daemon));
  ASSERT_TRUE(session) << session.error().what;
  EXPECT_STREQ((*session)->backend(), "host");
  ASSERT_TRUE((*session)->register_model(kGeometry, "m"));
  EXPECT_TRUE((*session)->ping());
  const Result<PolicyEntry> policy = (*session)->policy("anything");
  ASSERT_TRUE(policy) << policy.error().what;
  EXPECT_EQ(policy->id, 5u);
}

TEST(Session, EqualModelsShareOneRegistration) {
  FakeDaemon daemon({});
  Result<std::unique_ptr<Session>> session = Session::open(to(daemon));
  ASSERT_TRUE(session) << session.error().what;
  const uint32_t first = (*session)->register_model(kGeometry, "m").value();
  EXPECT_EQ((*session)->register_model(kGeometry, "m").value(), first);
  ModelGeometry other = kGeometry;
  other.layers = 3;
  EXPECT_NE((*session)->register_model(other, "m").value(), first);
}

TEST(Session, RefusedHelloGivesTheDaemonsCodeAndWords) {
  std::string text;
  EXPECT_EQ(open_error({.refuse_hello = ErrorCode::kVersionMismatch}, &text),
            ErrorCode::kVersionMismatch);
  EXPECT_EQ(text, "refused for a test");
}

TEST(Session, WelcomeOfAnotherProtocolIsAVersionMismatch) {
  std::string text;
  EXPECT_EQ(open_error({.protocol_major = 9}, &text), ErrorCode::kVersionMismatch);
  EXPECT_NE(text.find("speaks protocol 9"), std::string::npos) << text;
}

TEST(Session, RegionsThatAreNotAsAnnouncedAreRefused) {
  EXPECT_EQ(open_error({.region_bytes_less = 4096}), ErrorCode::kVersionMismatch);
  EXPECT_EQ(open_error({.announce_more = 4096}), ErrorCode::kUnavailable);
  EXPECT_EQ(open_error({.seals = 0}), ErrorCode::kUnavailable);
  EXPECT_EQ(open_error({.wrong_magic = true}), ErrorCode::kVersionMismatch);
  EXPECT_EQ(open_error({.wrong_epoch = true}), ErrorCode::kVersionMismatch);
}

TEST(Session, PoolThatThisLibraryCannotUseIsAVersionMismatch) {
  std::string text;
  EXPECT_EQ(open_error({.backend = "tpu"}, &text), ErrorCode::kVersionMismatch);
  EXPECT_NE(text.find("backend 'tpu'"), std::string::npos) << text;
  for (const uint64_t bytes : {uint64_t{0}, limits::kExtentBytesMin + 4096,
                               limits::kExtentBytesMin / 2, limits::kExtentBytesMax * 2}) {
    EXPECT_EQ(open_error({.extent_bytes = bytes}), ErrorCode::kVersionMismatch) << bytes;
  }
}

TEST(Session, SilentDaemonTimesOut) {
  FakeDaemon daemon({.silent = true});
  SessionOptions options = to(daemon);
  options.timeout = std::chrono::milliseconds(50);
  const Result<std::unique_ptr<Session>> session = Session::open(options);
  ASSERT_FALSE(session);
  EXPECT_EQ(session.error().code, ErrorCode::kUnavailable);
}

TEST(Session, ImpossiblePolicyIsNotUsed) {
  FakeDaemon daemon({.bad_policy = true});
  Result<std::unique_ptr<Session>> session = Session::open(to(daemon));
  ASSERT_TRUE(session) << session.error().what;
  const Result<PolicyEntry> policy = (*session)->policy("x");
  ASSERT_FALSE(policy);
  EXPECT_EQ(policy.error().code, ErrorCode::kUnavailable);
}

TEST(Session, DaemonThatGoesAwayMakesCallsUnavailable) {
  auto daemon = std::make_unique<FakeDaemon>(FakeFaults{});
  Result<std::unique_ptr<Session>> session = Session::open(to(*daemon));
  ASSERT_TRUE(session) << session.error().what;
  daemon.reset();
  const Status pinged = (*session)->ping();
  ASSERT_FALSE(pinged);
  EXPECT_EQ(pinged.error().code, ErrorCode::kUnavailable);
  EXPECT_FALSE((*session)->register_model(kGeometry, "later"));
}

}  // namespace
}  // namespace thinkv::client
