// Random clients, friendly and hostile, over several tenants, against the harness's naive model.
//
// After every operation (CoreHarness::check): no page with two owners, use by tenant equals the
// model's, conservation; every 32nd, the core's own walk of every page. Here: quotas, reserves, and
// that nothing is left when everybody is gone. THINKV_SEED=n replays a run; the seed is printed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>

#include "tests/support/core_harness.h"

namespace thinkv::testing {
namespace {

constexpr uint64_t kExtent = 2 * kMiB;
constexpr uint64_t kExtents = 12;
constexpr int kOperations = 100'000;
constexpr uint32_t kUsers = 4;  // user 4 falls to the default tenant

uint64_t seed() {
  const char* text = std::getenv("THINKV_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : std::random_device{}();
}

class RandomRun {
 public:
  explicit RandomRun(uint64_t seed)
      : random_(seed), config_(base_config()), h_({kExtents * kExtent, kExtent}, config_) {
    h_.walk_every(32);
  }

  void operate() {
    const uint32_t dice = below(100);
    const std::vector<ClientId> living = h_.living();
    if (living.empty() || (dice < 4 && living.size() < 10)) return connect();
    const ClientId id = living[below(living.size())];
    const uint32_t c = below(kPageClassCount);
    FakeClient& client = h_.client(id);
    if (client.model.model_id == 0) return h_.register_model(id, kHeadDims[c], 1 + below(40), 2);
    if (dice < 6) return h_.register_model(id, kHeadDims[c], 1 + below(40), 2);
    if (dice < 30) return need(id, c);
    if (dice < 55) return h_.consume(id, c, below(300));
    if (dice < 80) return h_.give_back(id, c, below(300));
    if (dice < 86) return sequence(id);
    if (dice < 88) return hostile(id, c);
    if (dice < 91) return end(id);
    if (dice < 93) return exit_somebody();
    if (dice < 94) return reload();
    if (dice < 96) return h_.device().fail_from(h_.device().creations() + 1 + below(3));
    if (dice < 98) return h_.advance(uint64_t{below(2000)} * 1'000'000);
    h_.hold_creations(!held_);
    held_ = !held_;
    h_.finish_creations();
  }

  void finish() {
    h_.hold_creations(false);
    h_.finish_creations();
    for (const ClientId id : h_.living()) h_.die(id);
    while (!lingering_.empty()) exit_somebody();
    const core::Snapshot s = h_.snapshot();
    EXPECT_EQ(s.bytes_granted, 0u);
    EXPECT_EQ(s.sequences, 0u);
    EXPECT_EQ(s.clients.size(), 0u);
    EXPECT_EQ(s.lingering_processes, 0u);
    EXPECT_EQ(s.extents_unassigned, kExtents);
    EXPECT_EQ(h_.device().alive_count(), 0u);
    EXPECT_EQ(s.counters.pages_granted, s.counters.pages_returned + s.counters.pages_reclaimed);
    EXPECT_EQ(s.counters.sequences_opened, s.counters.sequences_closed);
  }

  // Quotas hold, except where a reload lowered the limit below what was in use; what is in use then
  // only falls.
  void check_quotas() {
    for (const core::TenantSnapshot& t : h_.snapshot().tenants) {
      const uint64_t before = used_before_[t.name];
      EXPECT_TRUE(t.used_bytes <= t.limit_bytes || t.used_bytes <= before)
          << t.name << " uses " << t.used_bytes << " of " << t.limit_bytes;
      used_before_[t.name] = t.used_bytes;
    }
  }

  // Tenant "a" has the only reserve, and only its own user in class 0 after everybody of it left:
  // then the whole reserve can be had, whatever the others hold.
  void check_reserve() {
    for (const ClientId id : h_.living()) {
      if (h_.client(id).tenant == tenant_a()) h_.die(id);
    }
    for (size_t i = lingering_.size(); i-- > 0;) {
      if (lingering_[i].second != 1) continue;
      h_.exit_process(lingering_[i].first);
      lingering_.erase(lingering_.begin() + static_cast<std::ptrdiff_t>(i));
    }
    h_.device().fail_from(0);
    h_.hold_creations(false);
    held_ = false;
    h_.finish_creations();
    h_.advance(2'000'000'000);
    const ClientId id = h_.connect(1);
    h_.register_model(id, 64, 1, 1);
    h_.need(id, 0, config_.tenants[0].reserve_bytes / 2304);
    EXPECT_EQ(h_.client(id).last().status, 0) << "reserve not obtainable";
    h_.die(id);
  }

  [[nodiscard]] core::Snapshot snapshot() const { return h_.snapshot(); }

 private:
  static core::Config base_config() {
    core::Config config;
    config.tenants = {tenant_config("a", 1, 4 * kMiB, 10 * kMiB),
                      tenant_config("b", 2, 0, 6 * kMiB), tenant_config("c", 3)};
    config.tenants[2].priority = 5;
    config.tenants[1].weight = 7;
    config.default_tenant = "c";
    config.policies = {policy_params("p0", 256), policy_params("p1")};
    return config;
  }
  static bool holds(const FakeClient& client, uint32_t page) {
    for (uint32_t c = 0; c < kPageClassCount; ++c) {
      const auto is_page = [page](uint32_t p) { return p == page; };
      if (std::any_of(client.held[c].begin(), client.held[c].end(), is_page) ||
          std::any_of(client.ring[c].begin(), client.ring[c].end(), is_page)) {
        return true;
      }
    }
    return false;
  }
  uint32_t below(uint64_t n) { return static_cast<uint32_t>(random_() % n); }
  TenantId tenant_a() const { return h_.tenant("a").id; }

  void connect() {
    const uint32_t uid = 1 + below(kUsers);
    // Now and then a process that was a client before.
    for (const auto& [process, owner] : lingering_) {
      if (owner == uid && below(3) == 0) {
        h_.connect(uid, process.value());
        return;
      }
    }
    h_.connect(uid);
  }
  void need(ClientId id, uint32_t c) {
    const size_t before = h_.client(id).completions.size();
    h_.need(id, c, below(10) == 0 ? below(40'000) : below(900));
    if (h_.client(id).completions.size() == before) return;
    const protocol::Completion& done = h_.client(id).last();
    if (done.status == 0) {
      EXPECT_LE(done.result[0], h_.client(id).ring[c].size());
    }
  }
  void sequence(ClientId id) {
    FakeClient& client = h_.client(id);
    if (client.sequences.empty() || below(2) == 0) {
      h_.open_sequence(id, below(2) == 0 ? "p0" : "p1", below(5000));
      return;
    }
    const size_t which = below(client.sequences.size());
    const uint64_t handle = client.sequences[which];
    const auto living = h_.living();
    const ClientId other = living[below(living.size())];
    const auto status = h_.request(other, protocol::Op::kCloseSequence, handle).status;
    EXPECT_EQ(status == 0, other == id);
    if (status == 0) {
      client.sequences.erase(client.sequences.begin() + static_cast<std::ptrdiff_t>(which));
    }
  }
  void hostile(ClientId id, uint32_t c) {
    const core::ProcessKey process = h_.client(id).process;
    const uint32_t uid = h_.client(id).uid;
    const auto living = h_.living();
    FakeClient& other = h_.client(living[below(living.size())]);
    switch (below(4)) {
      case 0: {
        uint32_t page = static_cast<uint32_t>(random_());
        while (holds(h_.client(id), page)) page = static_cast<uint32_t>(random_());
        h_.give_back_raw(id, c, {page});
        break;
      }
      case 1:
        h_.step(core::GrantsConsumed{id, c, 40'000});
        break;
      case 2:
        if (other.id == id || other.held[c].empty()) return;
        h_.give_back_raw(id, c, {other.held[c].back()});
        break;
      default:
        if (h_.client(id).held[c].empty()) return;
        h_.give_back_raw(id, c, {h_.client(id).held[c].back(), h_.client(id).held[c].back()});
    }
    if (h_.client(id).ended) {
      EXPECT_EQ(h_.client(id).end_cause, core::EndCause::kProtocol);
      lingering_.emplace_back(process, uid);
    } else {
      ADD_FAILURE() << "hostile client lives";
    }
  }
  void end(ClientId id) {
    const core::ProcessKey process = h_.client(id).process;
    const uint32_t uid = h_.client(id).uid;
    if (below(2) == 0) return h_.die(id);
    h_.end(id, static_cast<core::EndCause>(below(core::kEndCauseCount)));
    lingering_.emplace_back(process, uid);
  }
  void exit_somebody() {
    if (lingering_.empty()) return;
    const size_t which = below(lingering_.size());
    h_.exit_process(lingering_[which].first);
    lingering_.erase(lingering_.begin() + static_cast<std::ptrdiff_t>(which));
  }
  void reload() {
    // Reserve of "a" and the tenants stay: check_reserve relies on them.
    config_.tenants[1].limit_bytes = (1 + below(8)) * kMiB;
    config_.policies[1].budget_tokens = below(1000);
    if (below(4) == 0) config_.policies.clear();
    const bool good = !config_.policies.empty();
    EXPECT_EQ(h_.reload(config_).code == ErrorCode::kOk, good);
    if (!good) config_.policies = base_config().policies;
  }

  std::mt19937_64 random_;
  core::Config config_;
  CoreHarness h_;
  bool held_ = false;
  std::vector<std::pair<core::ProcessKey, uint32_t>> lingering_;  // disconnected, alive; their user
  std::map<std::string, uint64_t> used_before_;
};

TEST(CorePoolProperty, AgreesWithTheNaiveModel) {
  const uint64_t first = seed();
  std::printf("THINKV_SEED=%llu\n", static_cast<unsigned long long>(first));
  constexpr int kRuns = 20;
  core::Counters sum;
  for (int run = 0; run < kRuns; ++run) {
    SCOPED_TRACE("run " + std::to_string(run) + " of THINKV_SEED=" + std::to_string(first));
    RandomRun r(first + static_cast<uint64_t>(run));
    for (int op = 0; op < kOperations / kRuns; ++op) {
      r.operate();
      r.check_quotas();
      if (op % 500 == 499) {
        r.check_reserve();
        r.check_quotas();  // it grants pages: what falls later falls from here
      }
      if (::testing::Test::HasFailure()) FAIL() << "operation " << op;
    }
    r.finish();
    const core::Counters c = r.snapshot().counters;
    sum.pages_granted += c.pages_granted;
    sum.violations += c.violations;
    sum.failed_quota += c.failed_quota;
    sum.failed_exhausted += c.failed_exhausted;
    sum.extents_failed += c.extents_failed;
    sum.extents_released += c.extents_released;
    sum.reloads += c.reloads;
  }
  // The run went through what it is about.
  EXPECT_GT(sum.pages_granted, 1'000'000u);
  EXPECT_GT(sum.violations, 100u);
  EXPECT_GT(sum.failed_quota, 100u);
  EXPECT_GT(sum.failed_exhausted, 100u);
  EXPECT_GT(sum.extents_failed, 20u);
  EXPECT_GT(sum.extents_released, 100u);
  EXPECT_GT(sum.reloads, 50u);
}

}  // namespace
}  // namespace thinkv::testing
