// The client's side of the rings against a daemon thread on the same mapping (TSan sees both).
#include "client/channel.h"

#include <gtest/gtest.h>

#include <chrono>

#include "client/control_socket.h"
#include "tests/support/ring_daemon.h"

namespace thinkv::client {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

protocol::Request ping() {
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kPing);
  return request;
}

struct ChannelTest : testing::Test {
  test::Regions regions;
  ChannelOptions options{.daemon = regions.daemon.get(), .client = regions.client.get()};
  test::RingDaemon::Options daemon{.out = regions.daemon.get(), .in = regions.client.get()};
};

TEST_F(ChannelTest, CallsAreAnsweredInOrderWhileSpinning) {
  test::RingDaemon peer(daemon);
  peer.start();
  options.spin = milliseconds(500);
  Channel channel(options);
  for (uint64_t i = 1; i <= 5000; ++i) {
    const Result<protocol::Completion> done = channel.call(ping());
    ASSERT_TRUE(done) << done.error().what;
    ASSERT_EQ(done->user_data, i);
  }
  EXPECT_EQ(peer.seen(protocol::Op::kPing), 5000u);
}

TEST_F(ChannelTest, CallsAreAnsweredWhileEverySingleOneSleeps) {
  daemon.always_sleep = true;
  test::RingDaemon peer(daemon);
  peer.start();
  options.spin = microseconds(0);
  Channel channel(options);
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(channel.call(ping()));
  EXPECT_EQ(regions.client->sleeping.value.load(), 0u);
}

TEST_F(ChannelTest, NoAnswerBecomesUnavailableAfterTheTimeout) {
  daemon.mute = true;
  test::RingDaemon peer(daemon);
  peer.start();
  options.timeout = milliseconds(60);
  Channel channel(options);
  const auto start = Clock::now();
  const Result<protocol::Completion> done = channel.call(ping());
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code, ErrorCode::kUnavailable);
  EXPECT_STREQ(done.error().what, "thinkvd did not answer within 60 ms");
  EXPECT_GE(Clock::now() - start, milliseconds(60));
}

TEST_F(ChannelTest, DeadDaemonIsNoticedLongBeforeTheTimeout) {
  options.timeout = milliseconds(60'000);
  options.daemon_gone = [] { return true; };
  Channel channel(options);
  const auto start = Clock::now();
  const Result<protocol::Completion> done = channel.call(ping());
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code, ErrorCode::kUnavailable);
  EXPECT_LT(Clock::now() - start, milliseconds(5'000));
}

TEST_F(ChannelTest, ClosingFlagRefusesCallsWithItsReason) {
  regions.daemon->closing.value.store(static_cast<uint32_t>(ErrorCode::kPermission));
  Channel channel(options);
  const Result<protocol::Completion> done = channel.call(ping());
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code, ErrorCode::kUnavailable);
  EXPECT_NE(std::string(done.error().what).find("permission denied"), std::string::npos);
}

TEST_F(ChannelTest, LateCompletionsOfOtherCallsAreDropped) {
  // A completion that nobody waits for is in the ring before the first call.
  regions.daemon->completions[0].user_data = 999;
  regions.daemon->completions[1].user_data = 1;
  regions.daemon->completions[1].result[0] = 77;
  regions.daemon->completion_tail.value.store(2);
  Channel channel(options);
  const Result<protocol::Completion> done = channel.call(ping());
  ASSERT_TRUE(done) << done.error().what;
  EXPECT_EQ(done->result[0], 77u);
}

TEST_F(ChannelTest, ImpossibleIndicesMakeTheChannelBrokenNotTheProcess) {
  const auto broken = [&](std::atomic<uint64_t>& word) {
    word.store(uint64_t{1} << 40);
    Channel channel(options);
    std::vector<PageId> pages;
    const uint32_t pulled = channel.pull_grants(0, 4, pages);
    const PageId page(3);
    const uint32_t returned = channel.push_returns(0, {&page, 1});
    const Result<protocol::Completion> done = channel.call(ping());
    word.store(0);
    return pulled == 0 && !done && done.error().code == ErrorCode::kUnavailable && returned <= 1;
  };
  EXPECT_TRUE(broken(regions.daemon->request_head.value));
  EXPECT_TRUE(broken(regions.daemon->completion_tail.value));
  EXPECT_TRUE(broken(regions.daemon->grant_tail[0].value));
  EXPECT_TRUE(broken(regions.daemon->return_head[0].value));
}

TEST_F(ChannelTest, ParkedDaemonIsRungAndAnAwakeOneIsNot) {
  int bell[2];
  ASSERT_EQ(::pipe(bell), 0);
  options.bell_fd = bell[1];
  options.timeout = milliseconds(1);
  Channel channel(options);
  ASSERT_FALSE(channel.call(ping()));
  regions.daemon->parked.value.store(1);
  ASSERT_FALSE(channel.call(ping()));
  uint64_t count[2] = {};
  EXPECT_EQ(::read(bell[0], count, sizeof(count)), 8);
  EXPECT_EQ(count[0], 1u);
  ::close(bell[0]);
  ::close(bell[1]);
}

}  // namespace
}  // namespace thinkv::client
