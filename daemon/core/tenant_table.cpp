#include "daemon/core/tenant_table.h"

#include <algorithm>

#include "thinkv/internal/check.h"

namespace thinkv::core {
namespace {

bool contains(const std::vector<uint32_t>& ids, uint32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

uint32_t extents_for(const PoolOptions& pool, uint64_t bytes) {
  // The class with the largest pages wastes most at the end of an extent.
  uint64_t usable = pool.extent_bytes;
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    usable = std::min(usable, pool.extent_bytes / class_page_bytes(c) * class_page_bytes(c));
  }
  const uint64_t extents = bytes / usable + (bytes % usable != 0 ? 1 : 0);
  return static_cast<uint32_t>(std::min<uint64_t>(extents, limits::kExtentsMax + 1));
}

std::optional<uint32_t> TenantTable::find(std::string_view name) const {
  for (uint32_t i = 0; i < tenants_.size(); ++i) {
    if (tenants_[i].state != Tenant::State::kEmpty && tenants_[i].config.name == name) return i;
  }
  return std::nullopt;
}

void TenantTable::apply(uint32_t slot, const TenantConfig& config) {
  Tenant& tenant = tenants_[slot];
  const uint64_t pool_bytes = uint64_t{pool_.extent_count()} * pool_.extent_bytes;
  tenant.state = Tenant::State::kConfigured;
  tenant.config = config;
  tenant.limit_bytes = config.limit_bytes == 0 ? pool_bytes : config.limit_bytes;
  tenant.reserve_extents = extents_for(pool_, config.reserve_bytes);
  // The limit counts pages, but extents stay with a tenant as long as they are mapped: without
  // this bound a tenant could change its page class again and again and pin the whole pool.
  tenant.limit_extents = extents_for(pool_, tenant.limit_bytes) + kPageClassCount - 1;
}

Status TenantTable::configure(const Config& config,
                              std::span<const uint32_t, limits::kTenantsMax> extents_held) {
  const auto in_use = [&](uint32_t i) {
    return tenants_[i].state != Tenant::State::kEmpty &&
           (tenants_[i].clients > 0 || extents_held[i] > 0);
  };
  const auto kept = [&](uint32_t i) {
    return std::any_of(config.tenants.begin(), config.tenants.end(), [&](const TenantConfig& t) {
      return tenants_[i].state != Tenant::State::kEmpty && t.name == tenants_[i].config.name;
    });
  };
  size_t places = config.tenants.size();
  for (uint32_t i = 0; i < tenants_.size(); ++i) places += in_use(i) && !kept(i) ? 1 : 0;
  if (places > tenants_.size()) {
    return make_error(ErrorCode::kExhausted,
                      "too many tenants: removed ones still hold clients or memory");
  }
  for (uint32_t i = 0; i < tenants_.size(); ++i) {
    if (tenants_[i].state == Tenant::State::kEmpty || kept(i)) continue;
    if (!in_use(i)) {
      tenants_[i] = Tenant{};
      continue;
    }
    // Its clients keep what they hold and get nothing more.
    tenants_[i].state = Tenant::State::kRemoved;
    tenants_[i].reserve_extents = 0;
    tenants_[i].config.reserve_bytes = 0;
    tenants_[i].limit_bytes = 0;
    tenants_[i].limit_extents = 0;
  }
  for (const TenantConfig& t : config.tenants) {
    std::optional<uint32_t> slot = find(t.name);
    for (uint32_t i = 0; !slot; ++i) {
      if (tenants_[i].state == Tenant::State::kEmpty) slot = i;
    }
    apply(*slot, t);
  }
  default_tenant_ = config.default_tenant;
  return {};
}

std::optional<TenantId> TenantTable::match(uint32_t uid, uint32_t gid,
                                           std::span<const uint32_t> groups) const {
  for (uint32_t i = 0; i < tenants_.size(); ++i) {
    if (tenants_[i].state != Tenant::State::kConfigured) continue;
    if (contains(tenants_[i].config.uids, uid)) return TenantId(i);
  }
  for (uint32_t i = 0; i < tenants_.size(); ++i) {
    if (tenants_[i].state != Tenant::State::kConfigured) continue;
    const std::vector<uint32_t>& gids = tenants_[i].config.gids;
    if (contains(gids, gid)) return TenantId(i);
    for (const uint32_t group : groups) {
      if (contains(gids, group)) return TenantId(i);
    }
  }
  if (default_tenant_.empty()) return std::nullopt;
  const std::optional<uint32_t> slot = find(default_tenant_);
  THINKV_CHECK(slot.has_value());  // validate() asks for it
  return TenantId(*slot);
}

Tenant& TenantTable::at(TenantId id) {
  THINKV_CHECK(id.value() < tenants_.size());
  return tenants_[id.value()];
}
const Tenant& TenantTable::at(TenantId id) const {
  return const_cast<TenantTable*>(this)->at(id);
}

void TenantTable::charge(TenantId id, uint64_t bytes) {
  Tenant& tenant = at(id);
  THINKV_CHECK(bytes <= tenant.headroom_bytes());
  tenant.used_bytes += bytes;
  tenant.peak_bytes = std::max(tenant.peak_bytes, tenant.used_bytes);
}

void TenantTable::uncharge(TenantId id, uint64_t bytes) {
  Tenant& tenant = at(id);
  THINKV_CHECK(bytes <= tenant.used_bytes);
  tenant.used_bytes -= bytes;
}

}  // namespace thinkv::core
