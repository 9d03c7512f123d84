// Clients and processes that end. Whatever a client did or left undone, nothing of it stays behind.
#include <algorithm>

#include "daemon/core/service_impl.h"
#include "thinkv/internal/check.h"

namespace thinkv::core {

void Service::Impl::end_client(ClientSlot slot, EndCause cause) {
  Client& client = clients_.at(slot);
  const TenantId tenant = client.tenant;
  const ProcessSlot process = client.process;
  while (sequences_.any(slot)) close_sequence(sequences_.first(slot));
  THINKV_CHECK(client.sequences == 0);
  std::erase_if(needs_, [slot](const Need& need) { return need.client == slot; });

  const std::array<uint64_t, kPageClassCount> freed = extents_.reclaim(slot);
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    THINKV_CHECK(freed[c] == client.leases[c].granted);
    const uint64_t bytes = freed[c] * class_page_bytes(c);
    tenants_.uncharge(tenant, bytes);
    granted_bytes_ -= bytes;
    counters_.pages_reclaimed += freed[c];
    starved_[c].reset(slot.value());
  }
  clients_.remove(slot);
  --tenants_.at(tenant).clients;
  ++counters_.ended[static_cast<size_t>(cause)];
  drop_process_if_unneeded(process);
  pages_freed_ = true;
}

// A process that never received an extent has nothing to outlive it.
void Service::Impl::drop_process_if_unneeded(ProcessSlot process) {
  if (clients_.process(process).clients == 0 && !extents_.mapped(process)) {
    clients_.remove_process(process);
  }
}

void Service::Impl::disconnect(ClientSlot slot, EndCause cause, ErrorCode code, std::string text) {
  const ClientId id = clients_.at(slot).id;
  if (cause == EndCause::kProtocol) ++counters_.violations;
  end_client(slot, cause);
  act(Disconnect{.client = id, .code = code, .cause = cause, .text = std::move(text)});
}

void Service::Impl::on(const ClientGone& event) {
  const std::optional<ClientSlot> slot = clients_.find(event.client);
  if (!slot) return;
  if (event.cause == EndCause::kProtocol) ++counters_.violations;
  end_client(*slot, event.cause);
}

void Service::Impl::on(const ProcessExited& event) {
  std::optional<ProcessSlot> process = clients_.find_process(event.process);
  if (!process) return;
  for (uint32_t s = 0; s < ClientTable::capacity(); ++s) {
    const Client& client = clients_.at(ClientSlot(s));
    if (!client.empty() && client.process == *process) end_client(ClientSlot(s), EndCause::kKilled);
  }
  extents_.forget_process(*process);
  // end_client already dropped it if it had no extent.
  if (clients_.process(*process).used) clients_.remove_process(*process);
  release_due_ = true;
}

void Service::Impl::on(const Shutdown&) {
  closing_ = true;
  for (uint32_t s = 0; s < ClientTable::capacity(); ++s) {
    if (clients_.at(ClientSlot(s)).empty()) continue;
    disconnect(ClientSlot(s), EndCause::kShutdown, ErrorCode::kUnavailable, "the daemon stops");
  }
}

}  // namespace thinkv::core
