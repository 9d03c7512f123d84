// core_harness.h: plays the shell, the device and the clients around a core::Service, and keeps a
// naive model (maps and sets) of who holds what. Every step checks the core against the model.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/core/service.h"
#include "tests/support/fake_device.h"

namespace thinkv::testing {

inline constexpr uint64_t kMiB = uint64_t{1} << 20;

// What a client knows, and what it did with it.
struct FakeClient {
  ClientId id;
  core::ProcessKey process;
  TenantId tenant;
  uint32_t uid = 0;
  bool admitted = false;
  bool ended = false;
  core::EndCause end_cause = core::EndCause::kClean;
  ErrorCode refused = ErrorCode::kOk;
  std::string text;  // of the last Refused or Disconnect
  protocol::ModelRegistered model{};
  protocol::PolicyReply policy{};
  std::map<uint32_t, protocol::Extent> extents;  // by id
  std::array<std::deque<uint32_t>, kPageClassCount> ring;
  std::array<std::vector<uint32_t>, kPageClassCount> held;  // taken out of the ring
  std::vector<protocol::Completion> completions;
  std::vector<uint64_t> sequences;

  [[nodiscard]] const protocol::Completion& last() const { return completions.back(); }
};

class CoreHarness {
 public:
  CoreHarness(const core::PoolOptions& pool, const core::Config& config);

  void step(const core::Event& event);  // and what follows from it
  // Creations are answered only by finish_creations().
  void hold_creations(bool hold) { hold_ = hold; }
  void finish_creations();
  void advance(uint64_t ns) { now_ns_ += ns; }

  ClientId connect(uint32_t uid, uint64_t process = 0);  // process 0: one of its own
  void register_model(ClientId id, uint32_t head_dim, uint32_t layers = 4, uint32_t kv_heads = 2);
  const protocol::Completion& request(ClientId id, protocol::Op op, uint64_t handle = 0,
                                      std::array<uint64_t, 4> args = {});
  const protocol::Completion& raw_request(ClientId id, const protocol::Request& request);
  const protocol::Completion& need(ClientId id, uint32_t page_class, uint64_t pages);
  uint64_t open_sequence(ClientId id, const std::string& policy = "p0", uint64_t budget = 0);
  void consume(ClientId id, uint32_t page_class, size_t count);
  void give_back(ClientId id, uint32_t page_class, size_t count);
  void give_back_raw(ClientId id, uint32_t page_class, std::vector<uint32_t> pages);
  void end(ClientId id, core::EndCause cause = core::EndCause::kKilled);
  void exit_process(core::ProcessKey process);
  void die(ClientId id);  // connection and process
  core::ReloadResult reload(const core::Config& config);

  [[nodiscard]] FakeClient& client(ClientId id) { return clients_.at(id.value()); }
  [[nodiscard]] core::Snapshot snapshot() const;
  [[nodiscard]] core::TenantSnapshot tenant(const std::string& name) const;
  [[nodiscard]] FakeDevice& device() { return device_; }
  [[nodiscard]] core::Service& service() { return *service_; }
  [[nodiscard]] size_t owned_pages() const { return owners_.size(); }
  [[nodiscard]] const core::Actions& last_actions() const { return actions_; }
  [[nodiscard]] std::vector<ClientId> living() const;
  // The core's walk of every page: after each `steps`-th step (1 until told). The comparison with
  // the model is after every step.
  void walk_every(uint64_t steps) { walk_every_ = steps; }
  void check();

 private:
  struct Backing {  // of one extent, while its memory exists
    TenantId tenant;
    bool used = false;  // tenant is known
    std::set<uint64_t> processes;
  };
  void run(const core::Event& event);
  void act(const core::Actions& actions, const core::Admit& a);
  void act(const core::Actions& actions, const core::Refuse& a);
  void act(const core::Actions& actions, const core::ReplyModel& a);
  void act(const core::Actions& actions, const core::ReplyPolicy& a);
  void act(const core::Actions& actions, const core::SendExtent& a);
  void act(const core::Actions& actions, const core::GrantPages& a);
  void act(const core::Actions& actions, const core::Complete& a);
  void act(const core::Actions& actions, const core::CreateExtent& a);
  void act(const core::Actions& actions, const core::ReleaseExtent& a);
  void act(const core::Actions& actions, const core::Disconnect& a);
  void act(const core::Actions& actions, const core::ReloadResult& a);
  void forget(ClientId id, core::EndCause cause);  // the model's half of the end of a client
  void disown(uint32_t raw);
  FakeClient& expect_alive(ClientId id, const char* action);

  std::unique_ptr<core::Service> service_;
  FakeDevice device_;
  core::Actions actions_;
  uint64_t now_ns_ = 1;
  uint64_t next_client_ = 1;
  uint64_t next_process_ = 1'000'000;
  bool hold_ = false;
  std::map<uint64_t, FakeClient> clients_;
  std::unordered_map<uint32_t, uint64_t> owners_;  // raw page -> client
  std::map<uint32_t, uint64_t> used_;              // tenant -> bytes
  uint64_t walk_every_ = 1;
  uint64_t steps_ = 0;
  std::map<uint32_t, Backing> backing_;  // extent -> memory
  std::map<uint32_t, uint32_t> generations_;
  std::deque<core::Event> events_;  // answers of the device
  std::vector<core::CreateExtent> held_creations_;
  core::ReloadResult reload_result_;
};

[[nodiscard]] core::TenantConfig tenant_config(const std::string& name, uint32_t uid,
                                               uint64_t reserve = 0, uint64_t limit = 0);
[[nodiscard]] PolicyParams policy_params(const std::string& name, uint32_t budget = 0);
// One tenant "a" for uid 1, default; one policy "p0".
[[nodiscard]] core::Config simple_config(uint64_t limit = 0);

}  // namespace thinkv::testing
