#include "tests/support/core_harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

namespace thinkv::testing {
namespace {

uint64_t bytes_of_class(uint32_t page_class) {
  return page_bytes(kHeadDims[page_class]);
}

}  // namespace

core::TenantConfig tenant_config(const std::string& name, uint32_t uid, uint64_t reserve,
                                 uint64_t limit) {
  core::TenantConfig t;
  t.name = name;
  t.uids = {uid};
  t.reserve_bytes = reserve;
  t.limit_bytes = limit;
  return t;
}

PolicyParams policy_params(const std::string& name, uint32_t budget) {
  PolicyParams p{};
  std::strncpy(p.name, name.c_str(), kPolicyNameMax - 1);
  p.budget_tokens = budget;
  return p;
}

core::Config simple_config(uint64_t limit) {
  core::Config config;
  config.tenants = {tenant_config("a", 1, 0, limit)};
  config.default_tenant = "a";
  config.policies = {policy_params("p0", 256)};
  return config;
}

CoreHarness::CoreHarness(const core::PoolOptions& pool, const core::Config& config) {
  std::string why;
  auto created = core::Service::create(pool, config, &why);
  if (!created) {
    ADD_FAILURE() << why;
    std::abort();
  }
  service_ = std::move(created).value();
}

void CoreHarness::step(const core::Event& event) {
  run(event);
  while (!events_.empty()) {
    const core::Event next = events_.front();
    events_.pop_front();
    run(next);
  }
  check();
}

void CoreHarness::run(const core::Event& event) {
  service_->step(event, ++now_ns_, &actions_);
  // The model forgets before it looks at the actions: reclaimed pages may be granted at once.
  if (const auto* gone = std::get_if<core::ClientGone>(&event)) forget(gone->client, gone->cause);
  if (const auto* exited = std::get_if<core::ProcessExited>(&event)) {
    for (auto& [id, c] : clients_) {
      if (c.process == exited->process) forget(ClientId(id), core::EndCause::kKilled);
    }
    for (auto& [extent, memory] : backing_) memory.processes.erase(exited->process.value());
  }
  for (const core::Action& action : actions_.list) {
    if (const auto* d = std::get_if<core::Disconnect>(&action)) forget(d->client, d->cause);
  }
  for (const core::Action& action : actions_.list) {
    std::visit([this](const auto& a) { act(actions_, a); }, action);
  }
}

FakeClient& CoreHarness::expect_alive(ClientId id, const char* action) {
  FakeClient& c = client(id);
  EXPECT_TRUE(c.admitted && !c.ended) << action << " for client " << id.value();
  return c;
}

void CoreHarness::act(const core::Actions&, const core::Admit& a) {
  client(a.client).admitted = true;
  client(a.client).tenant = a.tenant;
}
void CoreHarness::act(const core::Actions&, const core::Refuse& a) {
  FakeClient& c = client(a.client);
  EXPECT_EQ(a.fatal, !c.admitted);
  EXPECT_NE(a.code, ErrorCode::kOk);
  EXPECT_FALSE(a.text.empty());
  EXPECT_LT(a.text.size(), sizeof(protocol::Refused::text));
  c.refused = a.code;
  c.text = a.text;
}
void CoreHarness::act(const core::Actions&, const core::ReplyModel& a) {
  expect_alive(a.client, "ReplyModel").model = a.reply;
}
void CoreHarness::act(const core::Actions&, const core::ReplyPolicy& a) {
  expect_alive(a.client, "ReplyPolicy").policy = a.reply;
}
void CoreHarness::act(const core::Actions&, const core::SendExtent& a) {
  FakeClient& c = expect_alive(a.client, "SendExtent");
  EXPECT_TRUE(device_.alive(ExtentId(a.message.extent_id)));
  EXPECT_FALSE(c.extents.contains(a.message.extent_id)) << "sent twice";
  EXPECT_EQ(a.message.generation, generations_[a.message.extent_id]);
  c.extents[a.message.extent_id] = a.message;
  Backing& memory = backing_[a.message.extent_id];
  EXPECT_TRUE(!memory.used || memory.tenant == c.tenant) << "memory crosses tenants";
  memory.used = true;
  memory.tenant = c.tenant;
  memory.processes.insert(c.process.value());
}
void CoreHarness::act(const core::Actions& actions, const core::GrantPages& a) {
  FakeClient& c = expect_alive(a.client, "GrantPages");
  EXPECT_GT(a.count, 0u);
  for (const uint32_t raw : actions.pages_of(a)) {
    const PageId page(raw);
    const auto extent = c.extents.find(page.extent().value());
    if (extent == c.extents.end()) {
      ADD_FAILURE() << "page of an extent that the client does not know";
      continue;
    }
    EXPECT_EQ(extent->second.page_class, a.page_class);
    EXPECT_LT(page.index(), extent->second.page_count);
    EXPECT_TRUE(owners_.emplace(raw, a.client.value()).second) << "page " << raw << " twice";
    used_[c.tenant.value()] += bytes_of_class(a.page_class);
    c.ring[a.page_class].push_back(raw);
  }
  EXPECT_LE(c.ring[a.page_class].size(), limits::kGrantRing);
}
void CoreHarness::act(const core::Actions&, const core::Complete& a) {
  expect_alive(a.client, "Complete").completions.push_back(a.completion);
}
void CoreHarness::act(const core::Actions&, const core::CreateExtent& a) {
  EXPECT_FALSE(device_.alive(a.extent));
  EXPECT_EQ(a.generation, ++generations_[a.extent.value()]);
  if (hold_) {
    held_creations_.push_back(a);
    return;
  }
  const Status made = device_.create_extent(a.extent, a.bytes);
  if (made) {
    backing_[a.extent.value()] = Backing{};
    events_.push_back(core::ExtentReady{a.extent});
  } else {
    events_.push_back(core::ExtentFailed{a.extent, made.error().os_error});
  }
}
void CoreHarness::act(const core::Actions&, const core::ReleaseExtent& a) {
  EXPECT_TRUE(device_.alive(a.extent));
  for (const auto& [raw, owner] : owners_) {
    EXPECT_NE(PageId(raw).extent(), a.extent) << "released under client " << owner;
  }
  EXPECT_TRUE(backing_[a.extent.value()].processes.empty()) << "released while a process maps it";
  backing_.erase(a.extent.value());
  device_.release_extent(a.extent);
}
void CoreHarness::act(const core::Actions&, const core::Disconnect& a) {
  client(a.client).text = a.text;
  client(a.client).refused = a.code;
}
void CoreHarness::act(const core::Actions&, const core::ReloadResult& a) {
  reload_result_ = a;
}

void CoreHarness::finish_creations() {
  const bool held = hold_;
  hold_ = false;
  const std::vector<core::CreateExtent> creations = std::move(held_creations_);
  held_creations_.clear();
  for (const core::CreateExtent& a : creations) {
    if (device_.create_extent(a.extent, a.bytes)) {
      backing_[a.extent.value()] = Backing{};
      step(core::ExtentReady{a.extent});
    } else {
      step(core::ExtentFailed{a.extent, ENOMEM});
    }
  }
  hold_ = held;
}

void CoreHarness::disown(uint32_t raw) {
  const FakeClient& c = clients_.at(owners_.at(raw));
  used_[c.tenant.value()] -= bytes_of_class(c.extents.at(PageId(raw).extent().value()).page_class);
  owners_.erase(raw);
}

void CoreHarness::forget(ClientId id, core::EndCause cause) {
  const auto found = clients_.find(id.value());
  if (found == clients_.end() || found->second.ended || !found->second.admitted) return;
  found->second.ended = true;
  found->second.end_cause = cause;
  std::vector<uint32_t> pages;
  for (const auto& [raw, owner] : owners_) {
    if (owner == id.value()) pages.push_back(raw);
  }
  for (const uint32_t raw : pages) disown(raw);
}

ClientId CoreHarness::connect(uint32_t uid, uint64_t process) {
  const ClientId id(next_client_++);
  FakeClient& c = clients_[id.value()];
  c.id = id;
  c.uid = uid;
  c.process = core::ProcessKey(process != 0 ? process : next_process_++);
  step(core::ClientConnected{.client = id,
                             .process = c.process,
                             .pid = 7,
                             .uid = uid,
                             .gid = uid,
                             .groups = {},
                             .name = "t"});
  return id;
}

void CoreHarness::register_model(ClientId id, uint32_t head_dim, uint32_t layers,
                                 uint32_t kv_heads) {
  step(core::ModelRegistered{.client = id,
                             .request_id = 5,
                             .geometry = {.layers = layers,
                                          .q_heads = kv_heads,
                                          .kv_heads = kv_heads,
                                          .head_dim = head_dim},
                             .name = "m"});
}

const protocol::Completion& CoreHarness::raw_request(ClientId id, const protocol::Request& r) {
  static const protocol::Completion kNone{
      .user_data = 0, .status = -1, .detail = 0, .result = {}, .reserved0 = 0};
  const size_t before = client(id).completions.size();
  step(core::RequestArrived{id, r});
  if (client(id).completions.size() == before) return kNone;  // waits
  EXPECT_EQ(client(id).last().user_data, r.user_data);
  return client(id).last();
}

const protocol::Completion& CoreHarness::request(ClientId id, protocol::Op op, uint64_t handle,
                                                 std::array<uint64_t, 4> args) {
  protocol::Request r{};
  r.op = static_cast<uint16_t>(op);
  r.size = sizeof(r);
  r.user_data = 0xABC0'0000u + now_ns_;
  r.handle = handle;
  std::copy(args.begin(), args.end(), r.arg);
  return raw_request(id, r);
}

const protocol::Completion& CoreHarness::need(ClientId id, uint32_t page_class, uint64_t pages) {
  return request(id, protocol::Op::kNeedPages, 0, {page_class, pages, 0, 0});
}

uint64_t CoreHarness::open_sequence(ClientId id, const std::string& policy, uint64_t budget) {
  step(core::PolicyAsked{.client = id, .request_id = 6, .name = policy});
  const protocol::Completion c =
      request(id, protocol::Op::kOpenSequence, 0, {1, client(id).policy.policy_id, budget, 0});
  EXPECT_EQ(c.status, 0);
  client(id).sequences.push_back(c.result[0]);
  return c.result[0];
}

void CoreHarness::consume(ClientId id, uint32_t page_class, size_t count) {
  FakeClient& c = client(id);
  count = std::min(count, c.ring[page_class].size());
  for (size_t i = 0; i < count; ++i) {
    c.held[page_class].push_back(c.ring[page_class].front());
    c.ring[page_class].pop_front();
  }
  step(core::GrantsConsumed{id, page_class, count});
}

void CoreHarness::give_back(ClientId id, uint32_t page_class, size_t count) {
  std::vector<uint32_t>& held = client(id).held[page_class];
  count = std::min(count, held.size());
  const std::vector<uint32_t> pages(held.end() - static_cast<std::ptrdiff_t>(count), held.end());
  held.resize(held.size() - count);
  for (const uint32_t page : pages) disown(page);
  step(core::PagesReturned{id, page_class, pages});
}

void CoreHarness::give_back_raw(ClientId id, uint32_t page_class, std::vector<uint32_t> pages) {
  step(core::PagesReturned{id, page_class, pages});
}

void CoreHarness::end(ClientId id, core::EndCause cause) {
  step(core::ClientGone{id, cause});
}
void CoreHarness::exit_process(core::ProcessKey process) {
  step(core::ProcessExited{process});
}
void CoreHarness::die(ClientId id) {
  end(id);
  exit_process(client(id).process);
}
core::ReloadResult CoreHarness::reload(const core::Config& config) {
  step(core::ConfigReloaded{&config});
  return reload_result_;
}

core::Snapshot CoreHarness::snapshot() const {
  core::Snapshot s;
  service_->snapshot(&s);
  return s;
}

core::TenantSnapshot CoreHarness::tenant(const std::string& name) const {
  for (const core::TenantSnapshot& t : snapshot().tenants) {
    if (t.name == name) return t;
  }
  ADD_FAILURE() << "no tenant " << name;
  return {};
}

std::vector<ClientId> CoreHarness::living() const {
  std::vector<ClientId> ids;
  for (const auto& [id, c] : clients_) {
    if (c.admitted && !c.ended) ids.push_back(c.id);
  }
  return ids;
}

void CoreHarness::check() {
  if (++steps_ % walk_every_ == 0) {
    const char* broken = service_->check_invariants();
    ASSERT_EQ(broken, nullptr) << broken;
  }
  const core::Snapshot s = snapshot();
  uint64_t total = 0;
  for (const core::TenantSnapshot& t : s.tenants) {
    EXPECT_EQ(t.used_bytes, used_[t.id.value()]) << t.name;
    total += t.used_bytes;
  }
  EXPECT_EQ(s.bytes_granted, total);
  EXPECT_EQ(s.extents_assigned, device_.alive_count());
  EXPECT_EQ(s.clients.size(), living().size());
}

}  // namespace thinkv::testing
