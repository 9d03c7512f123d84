// Leases: refilled in the background between watermarks, or on an explicit need.
//
// Refills may get less, or nothing, and nobody is told. A need is all or nothing and says why not.
#include <algorithm>

#include "daemon/core/service_impl.h"
#include "thinkv/internal/check.h"

namespace thinkv::core {
namespace {

// After the device refused memory: making extents takes milliseconds of the event loop, so a
// machine without memory must not be asked at every refill.
constexpr uint64_t kCreatePauseNs = 1'000'000'000;

// A refill above the low watermark takes at most this part of what the tenant could still get, so
// that the last pages are left for needs.
constexpr uint64_t kRefillShare = 4;

constexpr uint64_t divide_up(uint64_t a, uint64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

void Service::Impl::on(const GrantsConsumed& event) {
  const std::optional<ClientSlot> slot = clients_.find(event.client);
  if (!slot) return;
  THINKV_CHECK(event.page_class < kPageClassCount);
  Lease& lease = clients_.at(*slot).leases[event.page_class];
  if (event.count > lease.in_ring) {
    return disconnect(*slot, EndCause::kProtocol, ErrorCode::kInvalidArgument,
                      "the client took more pages than it was granted");
  }
  lease.in_ring -= event.count;
  refill(*slot, event.page_class);
}

void Service::Impl::on(const PagesReturned& event) {
  const std::optional<ClientSlot> slot = clients_.find(event.client);
  if (!slot) return;
  THINKV_CHECK(event.page_class < kPageClassCount);
  Client& client = clients_.at(*slot);
  Lease& lease = client.leases[event.page_class];
  uint64_t returned = 0;
  bool valid = true;
  for (const uint32_t raw : event.pages) {
    valid = extents_.give_back(*slot, event.page_class, raw);
    if (!valid) break;
    ++returned;
  }
  const uint64_t bytes = returned * class_page_bytes(event.page_class);
  lease.granted -= returned;
  tenants_.uncharge(client.tenant, bytes);
  granted_bytes_ -= bytes;
  counters_.pages_returned += returned;
  pages_freed_ = pages_freed_ || returned > 0;
  if (!valid) {
    disconnect(*slot, EndCause::kProtocol, ErrorCode::kInvalidArgument,
               "the client returned a page that it does not hold");
  }
}

void Service::Impl::on(const ExtentReady& event) {
  extents_.ready(event.extent);
  ++counters_.extents_created;
  pages_freed_ = true;
  release_due_ = true;  // whoever it was made for may be gone
}

void Service::Impl::on(const ExtentFailed& event) {
  extents_.failed(event.extent, event.retire);
  ++counters_.extents_failed;
  create_paused_until_ns_ = now_ns_ + kCreatePauseNs;
  pages_freed_ = true;  // needs that waited for it must be answered
  release_due_ = true;
}

void Service::Impl::update_watermarks(ClientSlot slot) {
  Client& client = clients_.at(slot);
  for (Lease& lease : client.leases) lease.models = lease.low = lease.high = 0;
  for (const Model& model : client.models) {
    Lease& lease = client.leases[page_class(model.geometry.head_dim)];
    const uint32_t lanes = model.geometry.lanes();
    ++lease.models;
    lease.low += std::max(limits::kLeasePagesMin, limits::kLeaseLowPerLane * lanes);
    lease.high += std::max(limits::kLeasePagesMin, limits::kLeaseHighPerLane * lanes);
  }
  for (Lease& lease : client.leases) {
    lease.low = std::min(lease.low, limits::kGrantRing);
    lease.high = std::min(lease.high, limits::kGrantRing);
  }
}

uint32_t Service::Impl::unused_reserve(TenantId id) const {
  const uint32_t has = extents_.tenant_extents(id);
  const uint32_t reserve = tenants_.at(id).reserve_extents;
  return reserve > has ? reserve - has : 0;
}

uint32_t Service::Impl::unused_reserves() const {
  uint32_t sum = 0;
  for (uint32_t t = 0; t < TenantTable::capacity(); ++t) sum += unused_reserve(TenantId(t));
  return sum;
}

uint32_t Service::Impl::assignable(TenantId id) const {
  if (now_ns_ < create_paused_until_ns_) return 0;
  const uint32_t unassigned = extents_.in_state(ExtentState::kUnassigned);
  const uint32_t claimed = unused_reserves();
  const uint32_t spare = unassigned > claimed ? unassigned - claimed : 0;
  const uint32_t has = extents_.tenant_extents(id);
  const uint32_t limit = tenants_.at(id).limit_extents;
  return std::min({unassigned, unused_reserve(id) + spare, limit > has ? limit - has : 0});
}

void Service::Impl::assign_extents(Shelf shelf, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    const ExtentId extent = extents_.assign(shelf);
    act(CreateExtent{extent, extents_.extent_bytes(), extents_.generation(extent)});
  }
}

// Requires: the shelf has `count` free pages and the tenant's limit allows them.
void Service::Impl::grant(ClientSlot slot, uint32_t page_class, uint32_t count) {
  if (count == 0) return;
  Client& client = clients_.at(slot);
  Lease& lease = client.leases[page_class];
  THINKV_CHECK(lease.in_ring + count <= limits::kGrantRing);
  const uint64_t bytes = uint64_t{count} * class_page_bytes(page_class);
  tenants_.charge(client.tenant, bytes);
  const GrantPages action{.client = client.id,
                          .page_class = page_class,
                          .first = static_cast<uint32_t>(out_->pages.size()),
                          .count = count};
  scratch_extents_.clear();
  const uint32_t taken = extents_.take(shelf_of(slot, page_class), {slot, client.process}, count,
                                       &out_->pages, &scratch_extents_);
  THINKV_CHECK(taken == count);
  for (const ExtentId extent : scratch_extents_) {
    SendExtent send{.client = client.id};
    send.message.extent_id = extent.value();
    send.message.page_class = page_class;
    send.message.page_bytes = class_page_bytes(page_class);
    send.message.page_count = extents_.pages_per_extent(page_class);
    send.message.extent_bytes = extents_.extent_bytes();
    send.message.generation = extents_.generation(extent);
    act(send);
  }
  act(action);
  lease.in_ring += count;
  lease.granted += count;
  granted_bytes_ += bytes;
  peak_bytes_ = std::max(peak_bytes_, granted_bytes_);
  counters_.pages_granted += count;
}

void Service::Impl::refill(ClientSlot slot, uint32_t page_class) {
  const Client& client = clients_.at(slot);
  const Lease& lease = client.leases[page_class];
  auto starved = starved_[page_class][slot.value()];
  starved = false;
  if (lease.models == 0 || lease.in_ring >= lease.low) return;
  const Shelf shelf = shelf_of(slot, page_class);
  const uint64_t want = lease.high - lease.in_ring;
  const uint64_t urgent = lease.low - lease.in_ring;
  const uint64_t free = extents_.free_pages(shelf);
  const uint64_t coming =
      uint64_t{extents_.creating(shelf)} * extents_.pages_per_extent(page_class);
  uint64_t obtainable = free;
  if (free < kRefillShare * want) {
    obtainable +=
        coming + uint64_t{assignable(client.tenant)} * extents_.pages_per_extent(page_class);
  }
  obtainable = std::min(obtainable,
                        tenants_.at(client.tenant).headroom_bytes() / class_page_bytes(page_class));
  const uint64_t allowed =
      std::min(want, std::max(std::min(urgent, obtainable), obtainable / kRefillShare));
  if (allowed < want) ++counters_.refills_cut;
  const uint64_t now = std::min(allowed, free);
  grant(slot, page_class, static_cast<uint32_t>(now));
  if (now >= urgent) return;
  starved = true;
  // New extents only for what is urgent: nobody would take the rest when they are ready.
  const uint64_t lacking = allowed - now;
  if (lacking > coming) {
    assign_extents(shelf, divide_up(lacking - coming, extents_.pages_per_extent(page_class)));
  }
}

Service::Impl::Outcome Service::Impl::try_need(const Need& need) {
  const Client& client = clients_.at(need.client);
  const Lease& lease = client.leases[need.page_class];
  if (lease.in_ring >= need.pages) return Outcome::kDone;
  const uint64_t missing = need.pages - lease.in_ring;
  const Tenant& tenant = tenants_.at(client.tenant);
  // A tenant without a limit of its own meets the pool's end, not a quota.
  const Outcome over = tenant.unlimited() ? Outcome::kExhausted : Outcome::kQuota;
  if (missing * class_page_bytes(need.page_class) > tenant.headroom_bytes()) return over;
  const Shelf shelf = shelf_of(need.client, need.page_class);
  const uint64_t free = extents_.free_pages(shelf);
  if (free >= missing) {
    grant(need.client, need.page_class, static_cast<uint32_t>(missing));
    return Outcome::kDone;
  }
  const uint64_t per_extent = extents_.pages_per_extent(need.page_class);
  const uint64_t coming = extents_.creating(shelf) * per_extent;
  if (free + coming >= missing) return Outcome::kWait;
  const uint64_t wanted = divide_up(missing - free - coming, per_extent);
  if (extents_.tenant_extents(client.tenant) + wanted > tenant.limit_extents) return over;
  if (wanted > assignable(client.tenant)) return Outcome::kExhausted;
  assign_extents(shelf, wanted);
  return Outcome::kWait;
}

// result on success: pages in the lease. On failure: limit, used and requested bytes.
void Service::Impl::finish_need(const Need& need, Outcome outcome) {
  const Client& client = clients_.at(need.client);
  const Lease& lease = client.leases[need.page_class];
  Tenant& tenant = tenants_.at(client.tenant);
  protocol::Completion completion{};
  completion.user_data = need.user_data;
  if (outcome == Outcome::kDone) {
    completion.result[0] = lease.in_ring;
  } else {
    const bool quota = outcome == Outcome::kQuota;
    completion.status =
        static_cast<int32_t>(quota ? ErrorCode::kQuotaExceeded : ErrorCode::kExhausted);
    completion.result[0] = quota ? tenant.limit_bytes : pool_bytes();
    completion.result[1] = quota ? tenant.used_bytes : granted_bytes_;
    completion.result[2] = (need.pages - lease.in_ring) * class_page_bytes(need.page_class);
    ++(quota ? counters_.failed_quota : counters_.failed_exhausted);
    ++(quota ? tenant.failed_quota : tenant.failed_exhausted);
  }
  complete(need.client, static_cast<uint16_t>(protocol::Op::kNeedPages), completion);
}

void Service::Impl::serve_needs() {
  size_t kept = 0;
  for (size_t i = 0; i < needs_.size(); ++i) {
    const Need need = needs_[i];
    const Outcome outcome = try_need(need);
    if (outcome == Outcome::kWait) {
      needs_[kept++] = need;
      continue;
    }
    --clients_.at(need.client).pending;
    finish_need(need, outcome);
  }
  needs_.resize(kept);
}

// Highest priority first; among equals who uses least for its weight; then the oldest client.
void Service::Impl::serve_starved() {
  scratch_starved_.clear();
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    if (starved_[c].none()) continue;
    for (uint32_t s = 0; s < ClientTable::capacity(); ++s) {
      if (starved_[c].test(s)) scratch_starved_.push_back({ClientSlot(s), c});
    }
  }
  if (scratch_starved_.empty()) return;
  std::sort(scratch_starved_.begin(), scratch_starved_.end(),
            [this](const StarvedLease& a, const StarvedLease& b) {
              const Client& ca = clients_.at(a.client);
              const Client& cb = clients_.at(b.client);
              const Tenant& ta = tenants_.at(ca.tenant);
              const Tenant& tb = tenants_.at(cb.tenant);
              if (ta.config.priority != tb.config.priority) {
                return ta.config.priority > tb.config.priority;
              }
              const uint64_t wa = ta.used_bytes * tb.config.weight;
              const uint64_t wb = tb.used_bytes * ta.config.weight;
              if (wa != wb) return wa < wb;
              if (ca.id != cb.id) return ca.id < cb.id;
              return a.page_class < b.page_class;
            });
  for (const StarvedLease& lease : scratch_starved_) refill(lease.client, lease.page_class);
}

void Service::Impl::settle() {
  if (pages_freed_) {
    pages_freed_ = false;
    serve_needs();
    serve_starved();
  }
  if (!release_due_) return;
  release_due_ = false;
  scratch_extents_.clear();
  extents_.release_unused(&scratch_extents_);
  if (scratch_extents_.empty()) return;
  for (const ExtentId extent : scratch_extents_) act(ReleaseExtent{extent});
  counters_.extents_released += scratch_extents_.size();
  // Other tenants may have them now.
  serve_needs();
  serve_starved();
}

}  // namespace thinkv::core
