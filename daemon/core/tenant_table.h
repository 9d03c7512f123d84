// tenant_table.h: trust domains, who belongs to which, and what each may and does hold.
//
// Two accounts a tenant. In bytes of granted pages: used <= limit, charged before a grant. In whole
// extents: what must stay unassigned so that every other tenant can still have its reserve.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/core/config.h"
#include "daemon/core/slots.h"

namespace thinkv::core {

struct Tenant {
  enum class State : uint8_t { kEmpty, kConfigured, kRemoved };
  State state = State::kEmpty;
  TenantConfig config;
  uint64_t limit_bytes = 0;  // effective: never "0 means the pool"
  uint32_t reserve_extents = 0;
  uint32_t limit_extents = 0;  // assigned extents it may have, see apply()
  uint64_t used_bytes = 0;
  uint64_t peak_bytes = 0;
  uint32_t clients = 0;
  uint64_t sequences = 0;
  uint64_t failed_quota = 0;
  uint64_t failed_exhausted = 0;

  // Configured without a limit: limit_bytes is the pool.
  [[nodiscard]] bool unlimited() const {
    return state == State::kConfigured && config.limit_bytes == 0;
  }
  [[nodiscard]] uint64_t headroom_bytes() const {
    return limit_bytes > used_bytes ? limit_bytes - used_bytes : 0;
  }
};

class TenantTable {
 public:
  explicit TenantTable(const PoolOptions& pool) : pool_(pool) {}

  // Takes a validated configuration. Tenants are the same when their names are: they keep what
  // they hold. A removed tenant keeps its place while it has clients or
  // extents (extents_held[id]). Errors: kExhausted when old
  // and new tenants together are too many; then nothing changed.
  [[nodiscard]] Status configure(const Config& config,
                                 std::span<const uint32_t, limits::kTenantsMax> extents_held);

  // By user, then by group, then the default. None: nullopt.
  [[nodiscard]] std::optional<TenantId> match(uint32_t uid, uint32_t gid,
                                              std::span<const uint32_t> groups) const;

  [[nodiscard]] Tenant& at(TenantId id);
  [[nodiscard]] const Tenant& at(TenantId id) const;
  [[nodiscard]] static constexpr uint32_t capacity() { return limits::kTenantsMax; }

  void charge(TenantId id, uint64_t bytes);    // Requires: bytes <= headroom_bytes()
  void uncharge(TenantId id, uint64_t bytes);  // Requires: bytes <= used_bytes

 private:
  [[nodiscard]] std::optional<uint32_t> find(std::string_view name) const;
  void apply(uint32_t slot, const TenantConfig& config);

  PoolOptions pool_;
  std::array<Tenant, limits::kTenantsMax> tenants_;
  std::string default_tenant_;
};

// Whole extents that surely hold `bytes` of pages, whatever their class.
[[nodiscard]] uint32_t extents_for(const PoolOptions& pool, uint64_t bytes);

}  // namespace thinkv::core
