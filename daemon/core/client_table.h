// client_table.h: connected clients, and the processes that may map extents.
//
// A client is a connection; a process can have several, one after the other or at once, and may
// keep its mappings after the last one ended. So extents are tied to processes, pages to clients.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/core/event.h"
#include "daemon/core/slots.h"
#include "thinkv/internal/geometry.h"

namespace thinkv::core {

// Pages of one class that a client has.
struct Lease {
  uint32_t models = 0;  // registered models of this class; 0: the client may not have pages of it
  uint32_t low = 0;     // refill below this
  uint32_t high = 0;    // up to this
  // Granted, not known to be taken out of the grant ring. Can exceed `granted` for a moment, when
  // returns are seen before the consumption that made them possible.
  uint64_t in_ring = 0;
  uint64_t granted = 0;  // by the ledger
};

struct Model {
  ModelId id;
  ModelGeometry geometry;
  std::string name;
};

struct Client {
  ClientId id;  // 0: empty place
  TenantId tenant;
  ProcessSlot process;
  uint32_t pid = 0;
  uint32_t uid = 0;
  uint64_t connected_ns = 0;
  std::string name;
  std::array<Lease, kPageClassCount> leases{};
  std::vector<Model> models;
  uint32_t sequences = 0;
  uint32_t pending = 0;  // kNeedPages not answered yet

  [[nodiscard]] bool empty() const { return id.value() == 0; }
};

struct Process {
  ProcessKey key;
  bool used = false;
  uint32_t uid = 0;
  uint32_t clients = 0;  // connected; 0: lingers until it exits
};

class ClientTable {
 public:
  ClientTable() { clients_.resize(limits::kClientsMax); }

  [[nodiscard]] std::optional<ClientSlot> find(ClientId id) const;
  [[nodiscard]] Client& at(ClientSlot slot);
  [[nodiscard]] const Client& at(ClientSlot slot) const;
  [[nodiscard]] static constexpr uint32_t capacity() { return limits::kClientsMax; }
  // Why this client cannot be added: kExhausted.
  [[nodiscard]] Status room_for(const ClientConnected& event, uint32_t clients_per_uid) const;
  // Requires: room_for said yes.
  ClientSlot add(const ClientConnected& event, TenantId tenant, uint64_t now_ns);
  // The process stays, with one client less.
  void remove(ClientSlot slot);

  [[nodiscard]] std::optional<ProcessSlot> find_process(ProcessKey key) const;
  [[nodiscard]] Process& process(ProcessSlot slot);
  // Requires: no client of it is connected.
  void remove_process(ProcessSlot slot);
  [[nodiscard]] uint32_t count() const { return count_; }
  [[nodiscard]] uint32_t lingering() const;

 private:
  std::vector<Client> clients_;
  std::array<Process, kProcessesMax> processes_{};
  std::unordered_map<ClientId, ClientSlot> by_id_;
  uint32_t count_ = 0;
};

}  // namespace thinkv::core
