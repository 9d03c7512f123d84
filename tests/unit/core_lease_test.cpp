// Grants: refills, needs, quotas, reserves, extents that come late or never.
#include <gtest/gtest.h>

#include "tests/support/core_harness.h"

namespace thinkv::testing {
namespace {

constexpr uint64_t kExtent = 2 * kMiB;
constexpr uint32_t kPages64 = kExtent / 2304;  // 910
constexpr uint64_t kPage64 = 2304;
constexpr int32_t kQuota = static_cast<int32_t>(ErrorCode::kQuotaExceeded);
constexpr int32_t kExhausted = static_cast<int32_t>(ErrorCode::kExhausted);
constexpr int32_t kInvalid = static_cast<int32_t>(ErrorCode::kInvalidArgument);

core::PoolOptions pool_of(uint64_t extents) {
  return {extents * kExtent, kExtent};
}

core::Config two_tenants(uint64_t reserve_a, uint64_t reserve_b, uint64_t limit_a = 0) {
  core::Config config = simple_config();
  config.tenants = {tenant_config("a", 1, reserve_a, limit_a), tenant_config("b", 2, reserve_b)};
  config.default_tenant.clear();
  return config;
}

TEST(CoreLease, RegisteringAModelFillsTheLeaseToTheHighWatermark) {
  CoreHarness h(pool_of(2), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64, 16, 8);  // 128 lanes
  EXPECT_EQ(h.client(c).model.lease_low_pages, 128u);
  EXPECT_EQ(h.client(c).model.lease_high_pages, 384u);
  EXPECT_EQ(h.client(c).model.page_bytes, 2304u);
  EXPECT_EQ(h.client(c).ring[0].size(), 384u);
  EXPECT_EQ(h.tenant("a").used_bytes, 384 * kPage64);
  EXPECT_EQ(h.tenant("a").lease_bytes, 384 * kPage64);
}

TEST(CoreLease, RefillsOnlyBelowTheLowWatermark) {
  CoreHarness h(pool_of(2), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64, 16, 8);
  h.consume(c, 0, 256);
  EXPECT_EQ(h.client(c).ring[0].size(), 128u);
  h.consume(c, 0, 1);
  EXPECT_EQ(h.client(c).ring[0].size(), 384u);
}

TEST(CoreLease, WatermarksAddUpOverModelsOfAClass) {
  CoreHarness h(pool_of(4), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64, 16, 8);
  h.register_model(c, 64, 16, 8);
  EXPECT_EQ(h.client(c).model.model_id, 2u);
  EXPECT_EQ(h.client(c).model.lease_high_pages, 768u);
  h.register_model(c, 128, 4, 2);  // another class: its own lease
  EXPECT_EQ(h.client(c).model.lease_high_pages, limits::kLeasePagesMin);
  EXPECT_EQ(h.client(c).ring[1].size(), limits::kLeasePagesMin);
}

TEST(CoreLease, SeventeenthModelAndBadGeometryAreRefused) {
  CoreHarness h(pool_of(2), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 96);
  EXPECT_EQ(h.client(c).refused, ErrorCode::kUnsupported);
  EXPECT_EQ(h.client(c).model.model_id, 0u);
  for (uint32_t i = 0; i < limits::kModelsPerClientMax; ++i) h.register_model(c, 64, 1, 1);
  EXPECT_EQ(h.client(c).model.model_id, limits::kModelsPerClientMax);
  h.client(c).refused = ErrorCode::kOk;
  h.register_model(c, 64, 1, 1);
  EXPECT_EQ(h.client(c).refused, ErrorCode::kInvalidArgument);
}

TEST(CoreLease, NeedIsMetAboveTheWatermark) {
  CoreHarness h(pool_of(4), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  const protocol::Completion done = h.need(c, 0, 2000);  // three extents
  EXPECT_EQ(h.client(c).last().status, 0);
  EXPECT_EQ(h.client(c).last().result[0], 2000u);
  EXPECT_EQ(h.client(c).ring[0].size(), 2000u);
  EXPECT_EQ(h.client(c).extents.size(), 3u);
  (void)done;  // it waited for extents, the completion came with them
  h.need(c, 0, 1500);
  EXPECT_EQ(h.client(c).last().status, 0);
  EXPECT_EQ(h.client(c).ring[0].size(), 2000u);  // already there
}

TEST(CoreLease, NeedBeyondThePoolFailsAndGrantsNothing) {
  CoreHarness h(pool_of(1), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  EXPECT_EQ(h.need(c, 0, kPages64 + 1).status, kExhausted);
  EXPECT_EQ(h.client(c).ring[0].size(), 64u);
  EXPECT_EQ(h.client(c).last().result[0], kExtent);
  EXPECT_EQ(h.client(c).last().result[1], 64 * kPage64);
  EXPECT_EQ(h.client(c).last().result[2], (kPages64 + 1 - 64) * kPage64);
  EXPECT_EQ(h.need(c, 0, kPages64).status, 0);
  EXPECT_EQ(h.snapshot().counters.failed_exhausted, 1u);
  EXPECT_EQ(h.snapshot().bytes_peak, kPages64 * kPage64);
}

TEST(CoreLease, NeedOverTheLimitSaysLimitUsedAndRequested) {
  const uint64_t limit = 100 * kPage64;
  CoreHarness h(pool_of(4), simple_config(limit));
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  const protocol::Completion failed = h.need(c, 0, 101);
  EXPECT_EQ(failed.status, kQuota);
  EXPECT_EQ(failed.result[0], limit);
  EXPECT_EQ(failed.result[1], 64 * kPage64);
  EXPECT_EQ(failed.result[2], 37 * kPage64);
  EXPECT_EQ(h.need(c, 0, 100).status, 0);
  EXPECT_EQ(h.tenant("a").failed_quota, 1u);
  EXPECT_EQ(h.tenant("a").used_bytes, limit);
}

TEST(CoreLease, NeedOfBadClassOrSizeIsInvalid) {
  CoreHarness h(pool_of(1), simple_config());
  const ClientId c = h.connect(1);
  EXPECT_EQ(h.need(c, 0, 1).status, kInvalid);  // no model yet
  h.register_model(c, 64);
  EXPECT_EQ(h.need(c, 1, 1).status, kInvalid);
  EXPECT_EQ(h.need(c, 3, 1).status, kInvalid);
  EXPECT_EQ(h.request(c, protocol::Op::kNeedPages, 0, {~uint64_t{0}, 1, 0, 0}).status, kInvalid);
  EXPECT_EQ(h.need(c, 0, limits::kGrantRing + 1).status, kInvalid);
  EXPECT_EQ(h.need(c, 0, ~uint64_t{0}).status, kInvalid);
  EXPECT_EQ(h.need(c, 0, 0).status, 0);
}

TEST(CoreLease, RefillsShrinkUnderScarcityAndNeverFailTheClient) {
  const uint64_t limit = 500 * kPage64;
  CoreHarness h(pool_of(1), simple_config(limit));
  const ClientId c = h.connect(1);
  h.register_model(c, 64, 16, 8);  // low 128, high 384
  // A quarter of 500 is less than what is urgent: the low watermark and no more.
  EXPECT_EQ(h.client(c).ring[0].size(), 128u);
  for (int i = 0; i < 20; ++i) h.consume(c, 0, 50);
  EXPECT_EQ(h.client(c).held[0].size() + h.client(c).ring[0].size(), 500u);
  EXPECT_FALSE(h.client(c).ended);
  EXPECT_GT(h.snapshot().counters.refills_cut, 0u);
  h.give_back(c, 0, 300);
  EXPECT_GT(h.client(c).ring[0].size(), 0u);  // the returned pages refill who starved
}

TEST(CoreLease, AnotherTenantsUnusedReserveCannotBeTaken) {
  CoreHarness h(pool_of(4), two_tenants(0, 2 * kMiB));  // b: 2 MiB of pages need two extents
  const ClientId a = h.connect(1);
  h.register_model(a, 64);
  EXPECT_EQ(h.need(a, 0, 3 * kPages64).status, kExhausted);
  h.need(a, 0, 2 * kPages64);
  EXPECT_EQ(h.client(a).last().status, 0);
  EXPECT_EQ(h.need(a, 0, 2 * kPages64 + 1).status, kExhausted);
  const ClientId b = h.connect(2);
  h.register_model(b, 64);
  h.need(b, 0, 2 * kMiB / kPage64);
  EXPECT_EQ(h.client(b).last().status, 0);
}

TEST(CoreLease, ReserveOfAbsentTenantIsShownAsReserved) {
  CoreHarness h(pool_of(4), two_tenants(0, kMiB));
  EXPECT_EQ(h.snapshot().bytes_reserved_unused, kExtent);
  const ClientId b = h.connect(2);
  h.register_model(b, 64);
  EXPECT_EQ(h.snapshot().bytes_reserved_unused, 0u);
  EXPECT_EQ(h.snapshot().bytes_assigned, kExtent);
}

TEST(CoreLease, FullerExtentsAreUsedFirst) {
  CoreHarness h(pool_of(3), simple_config());
  const ClientId first = h.connect(1);
  h.register_model(first, 64);
  h.need(first, 0, kPages64 + 100);
  const ClientId second = h.connect(1);
  h.register_model(second, 64);
  EXPECT_EQ(h.client(second).extents.size(), 1u);
  h.consume(first, 0, 2000);
  const size_t before = h.snapshot().extents_assigned;
  h.need(second, 0, 200);
  EXPECT_EQ(h.snapshot().extents_assigned, before);
}

TEST(CoreLease, NeedWaitsForItsExtents) {
  CoreHarness h(pool_of(4), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  h.hold_creations(true);
  EXPECT_EQ(h.need(c, 0, 2 * kPages64 + 1).status, -1);  // no answer yet
  EXPECT_EQ(h.snapshot().clients[0].pending_requests, 1u);
  EXPECT_EQ(h.snapshot().extents_creating, 2u);
  h.finish_creations();
  EXPECT_EQ(h.client(c).last().status, 0);
  EXPECT_EQ(h.client(c).ring[0].size(), 2 * kPages64 + 1);
}

TEST(CoreLease, ExtentMadeForAClientThatDiedGoesBack) {
  CoreHarness h(pool_of(4), simple_config());
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  h.hold_creations(true);
  h.need(c, 0, 2 * kPages64);
  h.die(c);
  h.finish_creations();
  EXPECT_EQ(h.snapshot().extents_unassigned, 4u);
  EXPECT_EQ(h.device().alive_count(), 0u);
}

// Whichever creation fails: nothing is lost, the need is answered, and after the pause it works.
TEST(CoreLease, NthCreationFailsForAllN) {
  for (uint64_t n = 1; n <= 5; ++n) {
    CoreHarness h(pool_of(6), simple_config());
    h.device().fail_from(n);
    const ClientId c = h.connect(1);
    h.register_model(c, 64);
    h.need(c, 0, 4 * kPages64);
    ASSERT_EQ(h.client(c).completions.size(), 1u) << n;
    const bool failed = h.device().creations() >= n;
    EXPECT_EQ(h.client(c).last().status, failed ? kExhausted : 0) << n;
    EXPECT_EQ(h.snapshot().counters.extents_failed, failed ? 1u : 0u) << n;
    h.advance(2'000'000'000);
    h.need(c, 0, 4 * kPages64);
    EXPECT_EQ(h.client(c).last().status, 0) << n;
    h.die(c);
    EXPECT_EQ(h.owned_pages(), 0u);
    EXPECT_EQ(h.snapshot().extents_unassigned, 6u) << n;
  }
}

TEST(CoreLease, DeviceWithoutMemoryIsNotAskedAtEveryRefill) {
  CoreHarness h(pool_of(6), simple_config());
  h.device().fail_from(1, 1000);
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(h.need(c, 0, 10).status, kExhausted);
  EXPECT_EQ(h.device().creations(), 1u);
}

TEST(CoreLease, RetiredExtentIsNeverTriedAgain) {
  CoreHarness h(pool_of(1), simple_config());
  h.hold_creations(true);
  const ClientId c = h.connect(1);
  h.register_model(c, 64);
  h.step(core::ExtentFailed{ExtentId(0), 5, true});
  h.advance(5'000'000'000);
  EXPECT_EQ(h.need(c, 0, 1).status, kExhausted);
  EXPECT_EQ(h.snapshot().extents_retired, 1u);
  EXPECT_EQ(h.snapshot().bytes_free, 0u);
}

TEST(CoreLease, HigherPriorityIsRefilledFirst) {
  core::Config config = two_tenants(0, 0);
  config.tenants[0].limit_bytes = config.tenants[1].limit_bytes = 0;
  config.tenants[1].priority = 10;
  CoreHarness h(pool_of(1), config);
  const ClientId holder = h.connect(1);
  h.register_model(holder, 64);  // the only extent
  const ClientId low = h.connect(1);
  h.register_model(low, 128);  // class 1: no extent left, starves
  const ClientId high = h.connect(2);
  h.register_model(high, 64);
  EXPECT_TRUE(h.client(low).ring[1].empty() && h.client(high).ring[0].empty());
  h.die(holder);
  EXPECT_EQ(h.client(high).ring[0].size(), 64u);
  EXPECT_TRUE(h.client(low).ring[1].empty());
}

TEST(CoreLease, AmongEqualsWhoUsesLeastForItsWeightIsRefilledFirst) {
  core::Config config = simple_config();
  config.tenants = {tenant_config("a", 1), tenant_config("b", 2), tenant_config("c", 3)};
  config.tenants[1].weight = 1;
  config.tenants[2].weight = 4;
  CoreHarness h(pool_of(3), config);
  const ClientId holder = h.connect(1);
  h.register_model(holder, 64);
  const ClientId b = h.connect(2);
  h.register_model(b, 64);
  h.need(b, 0, 100);
  const ClientId c = h.connect(3);
  h.register_model(c, 64);
  h.need(c, 0, 200);  // twice the use, four times the weight
  h.register_model(b, 128);
  h.register_model(c, 128);
  EXPECT_TRUE(h.client(b).ring[1].empty() && h.client(c).ring[1].empty());
  h.die(holder);
  EXPECT_EQ(h.client(c).ring[1].size(), 64u);
  EXPECT_TRUE(h.client(b).ring[1].empty());
}

// The limit is two extents of pages; more than that is only allowed for the other two classes. Six
// would be pinned here, all empty, by the mappings of one process.
TEST(CoreLease, TenantCannotPinThePoolByChangingItsPageClass) {
  CoreHarness h(pool_of(8), simple_config(2 * kPages64 * kPage64));
  const ClientId c = h.connect(1);
  const std::array<uint64_t, 3> two_extents = {1200, 600, 300};
  for (uint32_t i = 0; i < 3; ++i) {
    h.register_model(c, kHeadDims[i], 1, 1);
    h.need(c, i, two_extents[i]);
    EXPECT_EQ(h.client(c).last().status, i < 2 ? 0 : kQuota) << i;
    h.consume(c, i, 2000);
    h.give_back(c, i, 2000);
  }
  EXPECT_EQ(h.tenant("a").extents, 5u);
}

}  // namespace
}  // namespace thinkv::testing
