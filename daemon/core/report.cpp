// The state as numbers, and the proof that it is consistent.
#include <algorithm>

#include "daemon/core/service_impl.h"

namespace thinkv::core {

void Service::Impl::snapshot(Snapshot* out) const {
  snapshot_pool(out);
  snapshot_tenants(out);
  snapshot_clients(out);
  out->policies.clear();
  for (const Policy& p : policies_.all()) {
    if (!p.current && p.sequences == 0) continue;
    out->policies.push_back({p.id, p.params, p.current, p.sequences});
  }
  out->counters = counters_;
}

void Service::Impl::snapshot_pool(Snapshot* out) const {
  const uint64_t extent_bytes = extents_.extent_bytes();
  out->extent_bytes = extent_bytes;
  out->extents_unassigned = extents_.in_state(ExtentState::kUnassigned);
  out->extents_creating = extents_.in_state(ExtentState::kCreating);
  out->extents_assigned = extents_.in_state(ExtentState::kAssigned);
  out->extents_retired = extents_.in_state(ExtentState::kRetired);
  out->bytes_total = pool_bytes();
  out->bytes_assigned = (out->extents_creating + out->extents_assigned) * extent_bytes;
  out->bytes_granted = granted_bytes_;
  out->bytes_peak = peak_bytes_;
  out->bytes_free = pool_bytes() - granted_bytes_ - out->extents_retired * extent_bytes;
  out->bytes_reserved_unused = unused_reserves() * extent_bytes;
  out->sequences = sequences_.count();
  out->lingering_processes = clients_.lingering();
  out->classes = {};
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    for (uint32_t t = 0; t < TenantTable::capacity(); ++t) {
      out->classes[c].granted_pages += extents_.granted_pages({TenantId(t), c});
      out->classes[c].free_pages += extents_.free_pages({TenantId(t), c});
    }
    for (uint32_t s = 0; s < ClientTable::capacity(); ++s) {
      out->classes[c].lease_pages += clients_.at(ClientSlot(s)).leases[c].in_ring;
    }
  }
}

void Service::Impl::snapshot_tenants(Snapshot* out) const {
  out->tenants.clear();
  for (uint32_t t = 0; t < TenantTable::capacity(); ++t) {
    const Tenant& tenant = tenants_.at(TenantId(t));
    if (tenant.state == Tenant::State::kEmpty) continue;
    TenantSnapshot& s = out->tenants.emplace_back();
    s.id = TenantId(t);
    s.name = tenant.config.name;
    s.configured = tenant.state == Tenant::State::kConfigured;
    s.reserve_bytes = tenant.config.reserve_bytes;
    s.limit_bytes = tenant.limit_bytes;
    s.weight = tenant.config.weight;
    s.priority = tenant.config.priority;
    s.used_bytes = tenant.used_bytes;
    s.peak_bytes = tenant.peak_bytes;
    s.extents = extents_.tenant_extents(TenantId(t));
    s.clients = tenant.clients;
    s.sequences = tenant.sequences;
    s.failed_quota = tenant.failed_quota;
    s.failed_exhausted = tenant.failed_exhausted;
    for (uint32_t i = 0; i < ClientTable::capacity(); ++i) {
      const Client& client = clients_.at(ClientSlot(i));
      if (client.empty() || client.tenant != TenantId(t)) continue;
      for (uint32_t c = 0; c < kPageClassCount; ++c) {
        s.lease_bytes += client.leases[c].in_ring * class_page_bytes(c);
      }
    }
  }
}

void Service::Impl::snapshot_clients(Snapshot* out) const {
  out->clients.clear();
  for (uint32_t i = 0; i < ClientTable::capacity(); ++i) {
    const Client& client = clients_.at(ClientSlot(i));
    if (client.empty()) continue;
    ClientSnapshot& s = out->clients.emplace_back();
    s.id = client.id;
    s.tenant = client.tenant;
    s.pid = client.pid;
    s.uid = client.uid;
    s.name = client.name;
    s.connected_ns = client.connected_ns;
    s.sequences = client.sequences;
    s.pending_requests = client.pending;
    for (uint32_t c = 0; c < kPageClassCount; ++c) {
      const Lease& lease = client.leases[c];
      s.classes[c] = {lease.granted, lease.in_ring, 0, lease.low, lease.high};
      s.granted_bytes += lease.granted * class_page_bytes(c);
      s.lease_bytes += lease.in_ring * class_page_bytes(c);
    }
    for (const Model& model : client.models) {
      s.models.push_back({model.id.value(), model.name, model.geometry});
    }
  }
}

// A full walk after each event is for the small pools of tests.
bool Service::Impl::walk_is_cheap() const {
  return uint64_t{extents_.extent_count()} * extents_.pages_per_extent(0) <= 4096;
}

const char* Service::Impl::check_clients() const {
  std::array<uint64_t, limits::kTenantsMax> used{};
  std::array<uint64_t, limits::kTenantsMax> sequences{};
  std::array<std::array<uint64_t, kPageClassCount>, limits::kTenantsMax> granted{};
  std::array<uint32_t, limits::kTenantsMax> clients{};
  std::array<uint32_t, limits::kClientsMax> open{};
  uint64_t total = 0;
  uint64_t pending = 0;
  for (uint32_t i = 0; i < ClientTable::capacity(); ++i) {
    const Client& client = clients_.at(ClientSlot(i));
    open[i] = client.sequences;
    pending += client.pending;
    if (client.empty()) {
      if (client.sequences + client.pending > 0) return "a client that is gone holds something";
      continue;
    }
    const uint32_t t = client.tenant.value();
    ++clients[t];
    sequences[t] += client.sequences;
    for (uint32_t c = 0; c < kPageClassCount; ++c) {
      const Lease& lease = client.leases[c];
      if (lease.in_ring > limits::kGrantRing) return "more pages than the grant ring holds";
      granted[t][c] += lease.granted;
      used[t] += lease.granted * class_page_bytes(c);
      total += lease.granted * class_page_bytes(c);
    }
  }
  if (total != granted_bytes_ || peak_bytes_ < total) return "bytes granted";
  if (pending != needs_.size()) return "requests that wait";
  for (uint32_t t = 0; t < TenantTable::capacity(); ++t) {
    const Tenant& tenant = tenants_.at(TenantId(t));
    if (tenant.used_bytes != used[t]) return "bytes used by a tenant";
    if (tenant.clients != clients[t]) return "clients of a tenant";
    if (tenant.sequences != sequences[t]) return "sequences of a tenant";
    for (uint32_t c = 0; c < kPageClassCount; ++c) {
      if (extents_.granted_pages({TenantId(t), c}) != granted[t][c]) return "pages of a tenant";
    }
  }
  return sequences_.check_invariants(open);
}

const char* Service::Impl::check(bool pages) const {
  if (const char* broken = check_clients()) return broken;
  uint64_t running = 0;
  for (const Policy& p : policies_.all()) running += p.sequences;
  if (running != sequences_.count()) return "sequences by policy";
  if (granted_bytes_ > pool_bytes()) return "more granted than there is";
  return pages ? extents_.check_invariants(true) : nullptr;
}

}  // namespace thinkv::core
