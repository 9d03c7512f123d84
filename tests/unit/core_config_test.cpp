// What configurations the core accepts, and what a reload changes.
#include <gtest/gtest.h>

#include "tests/support/core_harness.h"

namespace thinkv::testing {
namespace {

constexpr uint64_t kExtent = 2 * kMiB;
constexpr core::PoolOptions kPool{.pool_bytes = 4 * kExtent, .extent_bytes = kExtent};

void expect_invalid(const core::PoolOptions& pool, const core::Config& config,
                    const std::string& part) {
  std::string why;
  const Status status = core::validate(pool, config, &why);
  ASSERT_FALSE(status.has_value()) << part;
  EXPECT_EQ(status.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(why.find(part), std::string::npos) << why;
  EXPECT_FALSE(core::validate(pool, config, nullptr).has_value());
  EXPECT_FALSE(core::Service::create(pool, config).has_value());
}

TEST(CoreConfig, PoolSizesAreChecked) {
  const core::Config config = simple_config();
  EXPECT_TRUE(core::validate(kPool, config, nullptr).has_value());
  expect_invalid({0, kExtent}, config, "1 to 4096 extents, not 0");
  expect_invalid({kExtent - 1, kExtent}, config, "not 0");
  expect_invalid({4097 * kExtent, kExtent}, config, "not 4097");
  expect_invalid({kExtent, 0}, config, "extent size");
  expect_invalid({kExtent, kMiB}, config, "extent size");
  expect_invalid({kExtent, 3 * kMiB}, config, "extent size");
  expect_invalid({1024 * kExtent, 2048 * kMiB}, config, "extent size");
}

TEST(CoreConfig, TenantsAreChecked) {
  const auto with = [](auto change) {
    core::Config config = simple_config();
    change(config);
    return config;
  };
  using Config = core::Config;
  expect_invalid(kPool, with([](Config& c) { c.tenants.clear(); }), "1 to 32 tenants");
  expect_invalid(kPool, with([](Config& c) { c.tenants.resize(33); }), "1 to 32 tenants");
  expect_invalid(kPool, with([](Config& c) { c.tenants[0].name = ""; }), "1 to 63 bytes");
  expect_invalid(kPool, with([](Config& c) { c.tenants[0].name.assign(64, 'x'); }), "1 to 63");
  expect_invalid(kPool, with([](Config& c) { c.tenants.push_back(c.tenants[0]); }), "there twice");
  expect_invalid(kPool, with([](Config& c) { c.tenants[0].weight = 0; }), "weight");
  expect_invalid(kPool, with([](Config& c) { c.tenants[0].priority = 101; }), "priority");
  expect_invalid(kPool, with([](Config& c) { c.tenants[0].limit_bytes = 5 * kExtent; }), "limit");
  expect_invalid(kPool, with([](Config& c) { c.tenants[0].reserve_bytes = ~uint64_t{0}; }),
                 "reserve is more than the limit");
  expect_invalid(kPool, with([](Config& c) {
                   c.tenants[0].limit_bytes = kMiB;
                   c.tenants[0].reserve_bytes = kMiB + 1;
                 }),
                 "reserve is more than the limit");
  expect_invalid(kPool, with([](Config& c) {
                   c.tenants.push_back(tenant_config("b", 2, 3 * kExtent));
                   c.tenants[0].reserve_bytes = kMiB;
                 }),
                 "whole extents, the pool has 4");  // 3 extents of bytes need 4, plus 1
  expect_invalid(kPool, with([](Config& c) { c.default_tenant = "zzz"; }), "'zzz'");
  expect_invalid(kPool, with([](Config& c) { c.clients_per_uid = 0; }), "clients per user");
  expect_invalid(kPool, with([](Config& c) { c.clients_per_uid = 257; }), "clients per user");
}

TEST(CoreConfig, PoliciesAreChecked) {
  core::Config config = simple_config();
  config.policies.clear();
  expect_invalid(kPool, config, "1 to 128 policies");
  config.policies = {policy_params("x"), policy_params("x")};
  expect_invalid(kPool, config, "'x' is there twice");
  config.policies = {policy_params("x")};
  config.policies[0].segment_tokens = 17;
  expect_invalid(kPool, config, "policy number 1");
}

TEST(CoreConfig, TenantIsFoundByUserThenGroupThenDefault) {
  core::Config config = simple_config();
  config.tenants = {tenant_config("users", 1), tenant_config("groups", 9999),
                    tenant_config("rest", 9998)};
  config.tenants[1].gids = {50};
  config.default_tenant = "rest";
  auto service = core::Service::create(kPool, config).value();
  core::Actions actions;
  uint64_t next = 0;
  const auto tenant_of = [&](uint32_t uid, uint32_t gid, std::vector<uint32_t> groups) {
    ++next;
    service->step(core::ClientConnected{.client = ClientId(next),
                                        .process = core::ProcessKey(next),
                                        .uid = uid,
                                        .gid = gid,
                                        .groups = groups,
                                        .name = {}},
                  next, &actions);
    return std::get<core::Admit>(actions.list.at(0)).tenant_name;
  };
  EXPECT_EQ(tenant_of(1, 50, {}), "users");
  EXPECT_EQ(tenant_of(2, 50, {}), "groups");
  EXPECT_EQ(tenant_of(2, 3, {7, 50}), "groups");
  EXPECT_EQ(tenant_of(2, 3, {7}), "rest");
}

TEST(CoreReload, ChangedPolicyGetsANewIdAndTheOldOneRunsOn) {
  CoreHarness h(kPool, simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  const uint64_t running = h.open_sequence(c);
  const uint32_t old_id = h.client(c).policy.policy_id;
  core::Config changed = simple_config();
  changed.policies = {policy_params("p0", 512), policy_params("p1")};
  ASSERT_EQ(h.reload(changed).code, ErrorCode::kOk);
  h.open_sequence(c);
  EXPECT_NE(h.client(c).policy.policy_id, old_id);
  EXPECT_EQ(h.client(c).last().result[1], 512u);
  EXPECT_EQ(h.request(c, protocol::Op::kSetBudget, running, {0, 0, 0, 0}).status, 0);
  EXPECT_EQ(h.snapshot().policies.size(), 3u);
  h.request(c, protocol::Op::kCloseSequence, running);
  EXPECT_EQ(h.snapshot().policies.size(), 2u);
}

TEST(CoreReload, UnchangedPolicyKeepsItsId) {
  CoreHarness h(kPool, simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  h.open_sequence(c);
  const uint32_t id = h.client(c).policy.policy_id;
  ASSERT_EQ(h.reload(simple_config()).code, ErrorCode::kOk);
  h.open_sequence(c);
  EXPECT_EQ(h.client(c).policy.policy_id, id);
}

TEST(CoreReload, OldPolicyIdIsStaleOnceItsPlaceIsTaken) {
  CoreHarness h(kPool, simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  for (uint32_t i = 0; i < 2 * limits::kPoliciesMax; ++i) {
    core::Config config = simple_config();
    config.policies = {policy_params("p0", 1000 + i)};
    ASSERT_EQ(h.reload(config).code, ErrorCode::kOk);
  }
  EXPECT_EQ(h.request(c, protocol::Op::kOpenSequence, 0, {1, 1, 0, 0}).status,
            static_cast<int32_t>(ErrorCode::kStale));
}

TEST(CoreReload, TooManyReplacedPoliciesInUseLeaveTheOldOnes) {
  CoreHarness h(kPool, simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  for (uint32_t i = 0; i < limits::kPoliciesMax - 1; ++i) {
    h.open_sequence(c);
    core::Config config = simple_config();
    config.policies = {policy_params("p0", 1000 + i)};
    ASSERT_EQ(h.reload(config).code, ErrorCode::kOk) << i;
  }
  h.open_sequence(c);
  core::Config config = simple_config();
  config.policies = {policy_params("p0", 7)};
  config.tenants[0].limit_bytes = kMiB;
  const core::ReloadResult result = h.reload(config);
  EXPECT_EQ(result.code, ErrorCode::kExhausted);
  EXPECT_FALSE(result.text.empty());
  EXPECT_EQ(h.tenant("a").limit_bytes, 4 * kExtent);  // nothing of it was taken over
  EXPECT_EQ(h.snapshot().counters.reloads_failed, 1u);
}

TEST(CoreReload, ACheckSaysWhatAReloadWouldSayAndChangesNothing) {
  CoreHarness h(kPool, simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  for (uint32_t i = 0; i < limits::kPoliciesMax - 1; ++i) {
    h.open_sequence(c);
    core::Config config = simple_config();
    config.policies = {policy_params("p0", 1000 + i)};
    ASSERT_EQ(h.reload(config).code, ErrorCode::kOk) << i;
  }
  h.open_sequence(c);
  core::Config config = simple_config(kMiB);
  config.policies = {policy_params("p0", 7)};
  std::string why;
  const Status full = h.service().check_reload(config, &why);
  ASSERT_FALSE(full);
  EXPECT_EQ(full.error().code, ErrorCode::kExhausted);
  EXPECT_EQ(why, h.reload(config).text);
  config.policies.clear();
  EXPECT_EQ(h.service().check_reload(config, &why).error().code, ErrorCode::kInvalidArgument);
  core::Config lower = simple_config(kMiB);
  lower.policies = {policy_params("p0", 1000 + limits::kPoliciesMax - 2)};
  EXPECT_TRUE(h.service().check_reload(lower, &why));
  EXPECT_EQ(h.tenant("a").limit_bytes, 4 * kExtent);
  EXPECT_EQ(h.snapshot().counters.reloads, limits::kPoliciesMax - 1);
}

TEST(CoreReload, BadConfigurationChangesNothing) {
  CoreHarness h(kPool, simple_config());
  core::Config config = simple_config(kMiB);
  config.policies.clear();
  EXPECT_EQ(h.reload(config).code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(h.tenant("a").limit_bytes, 4 * kExtent);
}

TEST(CoreReload, LowerLimitStopsGrantsAndTakesNothingAway) {
  CoreHarness h(kPool, simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  h.need(c, 0, 500);
  ASSERT_EQ(h.reload(simple_config(100 * 2304)).code, ErrorCode::kOk);
  EXPECT_EQ(h.tenant("a").used_bytes, 500u * 2304);
  EXPECT_EQ(h.need(c, 0, 501).status, static_cast<int32_t>(ErrorCode::kQuotaExceeded));
  h.consume(c, 0, 500);
  EXPECT_TRUE(h.client(c).ring[0].empty());
  h.give_back(c, 0, 450);
  EXPECT_EQ(h.tenant("a").used_bytes, 100u * 2304);  // 50 kept, 50 by the refill
  ASSERT_EQ(h.reload(simple_config()).code, ErrorCode::kOk);
  EXPECT_EQ(h.client(c).ring[0].size(), 64u);
}

TEST(CoreReload, RemovedTenantKeepsWhatItHoldsAndGetsNothingMore) {
  CoreHarness h(kPool, simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  core::Config config = simple_config();
  config.tenants = {tenant_config("new", 1)};
  config.default_tenant = "new";
  ASSERT_EQ(h.reload(config).code, ErrorCode::kOk);
  EXPECT_FALSE(h.tenant("a").configured);
  EXPECT_EQ(h.tenant("a").used_bytes, 64u * 2304);
  EXPECT_EQ(h.need(c, 0, 65).status, static_cast<int32_t>(ErrorCode::kQuotaExceeded));
  const ClientId next = h.connect(1);
  h.register_model(next, 64);
  EXPECT_EQ(h.tenant("new").used_bytes, 64u * 2304);
  h.die(c);
  ASSERT_EQ(h.reload(config).code, ErrorCode::kOk);
  EXPECT_EQ(h.snapshot().tenants.size(), 1u);
}

}  // namespace
}  // namespace thinkv::testing
