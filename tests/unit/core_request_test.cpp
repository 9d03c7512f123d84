// Ring requests: sequences, budgets, and everything a client can get wrong.
#include <gtest/gtest.h>

#include <functional>

#include "tests/support/core_harness.h"

namespace thinkv::testing {
namespace {

using protocol::Op;
using protocol::Request;

constexpr int32_t code(ErrorCode c) {
  return static_cast<int32_t>(c);
}

class CoreRequest : public ::testing::Test {
 protected:
  CoreRequest() : h_({64 * kMiB, 2 * kMiB}, simple_config()) {
    client_ = h_.connect(1);
    h_.register_model(client_, 64);
  }
  static Request make(Op op) {
    Request r{};
    r.op = static_cast<uint16_t>(op);
    r.size = sizeof(r);
    r.user_data = 99;
    return r;
  }
  CoreHarness h_;
  ClientId client_;
};

TEST_F(CoreRequest, PingIsAnsweredWithItsUserData) {
  const protocol::Completion c = h_.raw_request(client_, make(Op::kPing));
  EXPECT_EQ(c.status, 0);
  EXPECT_EQ(c.user_data, 99u);
}

TEST_F(CoreRequest, OpenedSequenceIsCountedAndClosedOnce) {
  const uint64_t id = h_.open_sequence(client_);
  EXPECT_NE(id, 0u);
  EXPECT_EQ(h_.tenant("a").sequences, 1u);
  EXPECT_EQ(h_.snapshot().policies[0].sequences, 1u);
  EXPECT_EQ(h_.request(client_, Op::kCloseSequence, id).status, 0);
  EXPECT_EQ(h_.tenant("a").sequences, 0u);
  EXPECT_EQ(h_.request(client_, Op::kCloseSequence, id).status, code(ErrorCode::kStale));
  const uint64_t next = h_.open_sequence(client_);
  EXPECT_NE(next, id);
  EXPECT_EQ(h_.request(client_, Op::kCloseSequence, id).status, code(ErrorCode::kStale));
}

TEST_F(CoreRequest, BudgetIsThePolicysUnlessGiven) {
  h_.open_sequence(client_);
  EXPECT_EQ(h_.client(client_).last().result[1], 256u);
  h_.open_sequence(client_, "p0", 1000);
  EXPECT_EQ(h_.client(client_).last().result[1], 1000u);
}

TEST_F(CoreRequest, SomeoneElsesSequenceIsNotFound) {
  const uint64_t id = h_.open_sequence(client_);
  const ClientId other = h_.connect(1);
  h_.register_model(other, 64);
  EXPECT_EQ(h_.request(other, Op::kCloseSequence, id).status, code(ErrorCode::kNotFound));
  EXPECT_EQ(h_.request(other, Op::kSetBudget, id, {5, 0, 0, 0}).status, code(ErrorCode::kNotFound));
  EXPECT_EQ(h_.tenant("a").sequences, 1u);
  EXPECT_EQ(h_.request(client_, Op::kSetBudget, id, {5, 0, 0, 0}).status, 0);
}

TEST_F(CoreRequest, ImpossibleHandlesAreNotFound) {
  h_.open_sequence(client_);
  for (const uint64_t handle : {uint64_t{0}, uint64_t{1}, uint64_t{12345}, ~uint64_t{0},
                                uint64_t{3} << 24, uint64_t{1} << 63, (uint64_t{1} << 24) | 7}) {
    EXPECT_EQ(h_.request(client_, Op::kCloseSequence, handle).status, code(ErrorCode::kNotFound))
        << handle;
  }
  EXPECT_EQ(h_.snapshot().sequences, 1u);
}

TEST_F(CoreRequest, OpenWithBadModelPolicyOrBudgetFails) {
  h_.step(core::PolicyAsked{.client = client_, .request_id = 1, .name = "p0"});
  const uint64_t policy = h_.client(client_).policy.policy_id;
  const auto open = [&](std::array<uint64_t, 4> args) {
    return h_.request(client_, Op::kOpenSequence, 0, args).status;
  };
  EXPECT_EQ(open({0, policy, 0, 0}), code(ErrorCode::kNotFound));
  EXPECT_EQ(open({2, policy, 0, 0}), code(ErrorCode::kNotFound));
  EXPECT_EQ(open({1, 0, 0, 0}), code(ErrorCode::kNotFound));
  EXPECT_EQ(open({1, policy + 1, 0, 0}), code(ErrorCode::kNotFound));
  EXPECT_EQ(open({1, ~uint64_t{0}, 0, 0}), code(ErrorCode::kNotFound));
  EXPECT_EQ(open({1, policy, limits::kTokensMax + 1, 0}), code(ErrorCode::kInvalidArgument));
  EXPECT_EQ(open({1, policy, 0, 1}), code(ErrorCode::kInvalidArgument));
  EXPECT_EQ(open({1, policy, limits::kTokensMax, 0}), 0);
}

TEST_F(CoreRequest, SetBudgetOutOfRangeFails) {
  const uint64_t id = h_.open_sequence(client_);
  EXPECT_EQ(h_.request(client_, Op::kSetBudget, id, {limits::kTokensMax + 1, 0, 0, 0}).status,
            code(ErrorCode::kInvalidArgument));
  EXPECT_EQ(h_.request(client_, Op::kSetBudget, id, {0, 0, 0, 0}).status, 0);
}

TEST_F(CoreRequest, UnknownOperationsAreRefusedAndCounted) {
  for (const uint32_t op : {0u, 7u, 8u, 255u, 65535u}) {
    Request r = make(Op::kPing);
    r.op = static_cast<uint16_t>(op);
    EXPECT_EQ(h_.raw_request(client_, r).status, code(ErrorCode::kUnsupported)) << op;
  }
  EXPECT_EQ(h_.snapshot().counters.requests[0][static_cast<size_t>(ErrorCode::kUnsupported)], 5u);
}

TEST_F(CoreRequest, ReservedFieldsMustBeZero) {
  const std::vector<std::function<void(Request&)>> spoilers = {
      [](Request& r) { r.flags = 1; },     [](Request& r) { r.size = 63; },
      [](Request& r) { r.size = 0; },      [](Request& r) { r.reserved0 = 1; },
      [](Request& r) { r.reserved1 = 1; }, [](Request& r) { r.arg[3] = 1; },
      [](Request& r) { r.handle = 1; },    [](Request& r) { r.arg[2] = 1; },
  };
  for (size_t i = 0; i < spoilers.size(); ++i) {
    Request r = make(Op::kNeedPages);
    spoilers[i](r);
    EXPECT_EQ(h_.raw_request(client_, r).status, code(ErrorCode::kInvalidArgument)) << i;
  }
  EXPECT_EQ(h_.raw_request(client_, make(Op::kNeedPages)).status, 0);
}

TEST_F(CoreRequest, StatsTellPagesQuotaAndPool) {
  const protocol::Completion c = h_.request(client_, Op::kClientStats);
  EXPECT_EQ(c.status, 0);
  EXPECT_EQ(c.result[0], 64u);
  EXPECT_EQ(c.result[1], 64u * 2304);
  EXPECT_EQ(c.result[2], 64 * kMiB);
  EXPECT_EQ(c.result[3], 64 * kMiB - 64u * 2304);
  EXPECT_EQ(c.result[4], 64 * kMiB);
}

TEST_F(CoreRequest, UnknownClientGetsNoAnswer) {
  h_.end(client_);
  h_.step(core::RequestArrived{client_, make(Op::kPing)});
  EXPECT_TRUE(h_.last_actions().list.empty());
  h_.step(core::PolicyAsked{.client = client_, .request_id = 1, .name = "p0"});
  EXPECT_TRUE(h_.last_actions().list.empty());
}

TEST_F(CoreRequest, UnknownPolicyListsTheKnownOnes) {
  h_.step(core::PolicyAsked{.client = client_, .request_id = 1, .name = "no\n\x01such"});
  EXPECT_EQ(h_.client(client_).refused, ErrorCode::kNotFound);
  EXPECT_EQ(h_.client(client_).text, "no policy named 'no??such'; there are: p0");
  h_.step(core::PolicyAsked{.client = client_, .request_id = 1, .name = std::string(5000, 'x')});
  EXPECT_LT(h_.client(client_).text.size(), sizeof(protocol::Refused::text));
}

}  // namespace
}  // namespace thinkv::testing
