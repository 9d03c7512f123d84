// service_impl.h: the service's state and what its files share. Included by core/*.cpp alone.
//
//   service.cpp    events -> handlers, connections, models, policies, reload
//   request.cpp    ring requests
//   lease.cpp      grants: refills and explicit needs
//   departure.cpp  clients and processes that end
//   report.cpp     snapshot, invariants
#pragma once

#include <array>
#include <bitset>
#include <string>
#include <vector>

#include "daemon/core/client_table.h"
#include "daemon/core/extent_pool.h"
#include "daemon/core/policy_table.h"
#include "daemon/core/sequence_table.h"
#include "daemon/core/service.h"
#include "daemon/core/tenant_table.h"

namespace thinkv::core {

class Service::Impl {
 public:
  // Requires: validate() accepted both.
  Impl(const PoolOptions& pool, const Config& config);

  void step(const Event& event, uint64_t now_ns, Actions* actions);
  void snapshot(Snapshot* out) const;
  [[nodiscard]] Status check_reload(const Config& config, std::string* why) const;
  [[nodiscard]] const char* check_invariants() const { return check(true); }

 private:
  // A kNeedPages that waits for extents.
  struct Need {
    ClientSlot client;
    uint64_t user_data = 0;
    uint32_t page_class = 0;
    uint32_t pages = 0;  // that must be in the lease
  };
  enum class Outcome : uint8_t { kDone, kWait, kQuota, kExhausted };
  struct StarvedLease {
    ClientSlot client;
    uint32_t page_class = 0;
  };

  // ---- service.cpp
  void on(const ClientConnected& event);
  void on(const ModelRegistered& event);
  void on(const PolicyAsked& event);
  void on(const ConfigReloaded& event);
  void refuse(ClientId client, uint32_t request_id, const Error& error, std::string text = {});
  struct Tables {  // what a configuration makes of the ones in use
    PolicyTable policies;
    TenantTable tenants;
  };
  [[nodiscard]] Result<Tables> tables_of(const Config& config) const;
  [[nodiscard]] Status configure(const Config& config);

  // ---- request.cpp
  void on(const RequestArrived& event);
  void answer(const RequestArrived& event, ClientSlot slot);
  [[nodiscard]] Result<protocol::Completion> open_sequence(ClientSlot slot,
                                                           const protocol::Request& request);
  [[nodiscard]] Status set_budget(ClientSlot slot, const protocol::Request& request);
  [[nodiscard]] protocol::Completion client_stats(ClientSlot slot) const;
  void need_pages(ClientSlot slot, const protocol::Request& request);
  void close_sequence(SequenceId id);
  void complete(ClientSlot slot, uint16_t op, const protocol::Completion& completion);
  void fail(ClientSlot slot, const protocol::Request& request, const Error& error);

  // ---- lease.cpp
  void on(const GrantsConsumed& event);
  void on(const PagesReturned& event);
  void on(const ExtentReady& event);
  void on(const ExtentFailed& event);
  void update_watermarks(ClientSlot slot);
  void refill(ClientSlot slot, uint32_t page_class);
  [[nodiscard]] Outcome try_need(const Need& need);
  void finish_need(const Need& need, Outcome outcome);
  void grant(ClientSlot slot, uint32_t page_class, uint32_t count);
  void assign_extents(Shelf shelf, uint64_t count);
  // Extents that the tenant may still be assigned: its own unused reserve, and what no reserve
  // claims.
  [[nodiscard]] uint32_t assignable(TenantId id) const;
  [[nodiscard]] uint32_t unused_reserve(TenantId id) const;  // whole extents
  [[nodiscard]] uint32_t unused_reserves() const;            // of all tenants
  void settle();  // whoever waited for what this event made free
  void serve_needs();
  void serve_starved();

  // ---- departure.cpp
  void on(const ClientGone& event);
  void on(const ProcessExited& event);
  void on(const Shutdown& event);
  void end_client(ClientSlot slot, EndCause cause);
  void disconnect(ClientSlot slot, EndCause cause, ErrorCode code, std::string text);
  void drop_process_if_unneeded(ProcessSlot process);

  // ---- report.cpp
  [[nodiscard]] const char* check(bool pages) const;
  [[nodiscard]] const char* check_clients() const;
  [[nodiscard]] bool walk_is_cheap() const;
  void snapshot_pool(Snapshot* out) const;
  void snapshot_tenants(Snapshot* out) const;
  void snapshot_clients(Snapshot* out) const;
  [[nodiscard]] Shelf shelf_of(ClientSlot slot, uint32_t page_class) const {
    return Shelf{clients_.at(slot).tenant, page_class};
  }
  [[nodiscard]] uint64_t pool_bytes() const {
    return uint64_t{extents_.extent_count()} * extents_.extent_bytes();
  }
  template <class A>
  void act(A action) {
    out_->list.emplace_back(std::move(action));
  }

  const PoolOptions options_;
  ExtentPool extents_;
  TenantTable tenants_;
  PolicyTable policies_;
  ClientTable clients_;
  SequenceTable sequences_;
  Counters counters_;
  std::vector<Need> needs_;                                    // oldest first
  std::bitset<limits::kClientsMax> starved_[kPageClassCount];  // below their low watermark
  uint32_t clients_per_uid_ = limits::kClientsPerUidMax;
  uint64_t granted_bytes_ = 0;
  uint64_t peak_bytes_ = 0;
  uint64_t create_paused_until_ns_ = 0;  // after a failed creation
  bool pages_freed_ = false;             // this event may help those who wait
  bool release_due_ = false;             // this event may have left an extent without a use
  bool closing_ = false;

  uint64_t now_ns_ = 0;
  uint64_t steps_ = 0;
  Actions* out_ = nullptr;  // of the step that runs
  std::vector<ExtentId> scratch_extents_;
  std::vector<StarvedLease> scratch_starved_;
};

}  // namespace thinkv::core
