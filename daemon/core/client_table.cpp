#include "daemon/core/client_table.h"

#include <algorithm>

#include "thinkv/internal/check.h"

namespace thinkv::core {

std::optional<ClientSlot> ClientTable::find(ClientId id) const {
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) return std::nullopt;
  return found->second;
}

Client& ClientTable::at(ClientSlot slot) {
  THINKV_CHECK(slot.value() < clients_.size());
  return clients_[slot.value()];
}
const Client& ClientTable::at(ClientSlot slot) const {
  return const_cast<ClientTable*>(this)->at(slot);
}
Process& ClientTable::process(ProcessSlot slot) {
  THINKV_CHECK(slot.value() < processes_.size());
  return processes_[slot.value()];
}

Status ClientTable::room_for(const ClientConnected& event, uint32_t clients_per_uid) const {
  if (count_ == clients_.size()) {
    return make_error(ErrorCode::kExhausted, "the daemon serves its maximum of 256 clients");
  }
  uint32_t of_uid = 0;
  bool process_known = false;
  bool process_place = false;
  for (const Process& p : processes_) {
    process_place = process_place || !p.used;
    process_known = process_known || (p.used && p.key == event.process);
    if (!p.used || p.uid != event.uid) continue;
    // A lingering process counts as one: it still pins extents. Not the connecting one itself.
    of_uid += p.clients > 0 ? p.clients : (p.key == event.process ? 0 : 1);
  }
  if (of_uid >= clients_per_uid) {
    return make_error(ErrorCode::kExhausted,
                      "this user has its maximum of clients, or of processes that were clients");
  }
  if (!process_known && !process_place) {
    return make_error(ErrorCode::kExhausted,
                      "too many processes that disconnected may still map the pool");
  }
  return {};
}

ClientSlot ClientTable::add(const ClientConnected& event, TenantId tenant, uint64_t now_ns) {
  const auto place =
      std::find_if(clients_.begin(), clients_.end(), [](const Client& c) { return c.empty(); });
  THINKV_CHECK(place != clients_.end());
  THINKV_CHECK(event.client.value() != 0 && !by_id_.contains(event.client));
  std::optional<ProcessSlot> process_slot = find_process(event.process);
  for (uint32_t i = 0; !process_slot; ++i) {
    if (!process(ProcessSlot(i)).used) process_slot = ProcessSlot(i);
  }
  Process& owner = process(*process_slot);
  if (!owner.used)
    owner = Process{.key = event.process, .used = true, .uid = event.uid, .clients = 0};
  ++owner.clients;
  *place = Client{};
  place->id = event.client;
  place->tenant = tenant;
  place->process = *process_slot;
  place->pid = event.pid;
  place->uid = event.uid;
  place->connected_ns = now_ns;
  place->name = event.name.substr(0, limits::kNameMax - 1);
  const ClientSlot slot(static_cast<uint32_t>(place - clients_.begin()));
  by_id_.emplace(event.client, slot);
  ++count_;
  return slot;
}

void ClientTable::remove(ClientSlot slot) {
  Client& client = at(slot);
  THINKV_CHECK(!client.empty());
  Process& owner = process(client.process);
  THINKV_CHECK(owner.clients > 0);
  --owner.clients;
  by_id_.erase(client.id);
  client = Client{};
  --count_;
}

std::optional<ProcessSlot> ClientTable::find_process(ProcessKey key) const {
  for (uint32_t i = 0; i < processes_.size(); ++i) {
    if (processes_[i].used && processes_[i].key == key) return ProcessSlot(i);
  }
  return std::nullopt;
}

void ClientTable::remove_process(ProcessSlot slot) {
  THINKV_CHECK(process(slot).clients == 0);
  process(slot) = Process{};
}

uint32_t ClientTable::lingering() const {
  return static_cast<uint32_t>(
      std::count_if(processes_.begin(), processes_.end(),
                    [](const Process& p) { return p.used && p.clients == 0; }));
}

}  // namespace thinkv::core
