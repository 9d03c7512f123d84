// config.h: what the core must know from the configuration, already parsed: sizes in bytes, ids as
// numbers. The file format, its units and line numbers belong to ops/.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/result.h"

namespace thinkv::core {

// Fixed at start: a change needs a restart.
struct PoolOptions {
  uint64_t pool_bytes = 0;    // rounded down to whole extents
  uint64_t extent_bytes = 0;  // limits::kExtentBytesMin..Max, a multiple of kExtentBytesMin

  [[nodiscard]] constexpr uint32_t extent_count() const {
    return extent_bytes == 0 ? 0 : static_cast<uint32_t>(pool_bytes / extent_bytes);
  }
};

// A trust domain. `reserve` is held free for the tenant in whole extents, whoever asks; `limit` is
// what its clients may hold in granted pages together.
// A tenant that uses pages of several head dims at once can need up to two extents more than its
// reserve in bytes says: an extent holds pages of one class.
struct TenantConfig {
  std::string name;            // shorter than limits::kNameMax
  std::vector<uint32_t> uids;  // a client with one of these users belongs here; first match wins
  std::vector<uint32_t> gids;  // else one with one of these groups
  uint64_t reserve_bytes = 0;
  uint64_t limit_bytes = 0;  // 0: the whole pool
  uint32_t weight = 1;       // 1..1000: share of refills among tenants of one priority
  uint32_t priority = 0;     // 0..100: the higher is refilled first when pages are scarce
};

// What SIGHUP replaces.
struct Config {
  std::vector<TenantConfig> tenants;   // 1..limits::kTenantsMax, names unique
  std::string default_tenant;          // for users that match none; empty: they are refused
  std::vector<PolicyParams> policies;  // 1..limits::kPoliciesMax, names unique
  // Connected clients of one user, plus its processes that disconnected but still may map extents.
  uint32_t clients_per_uid = limits::kClientsPerUidMax;  // 1..limits::kClientsMax
};

// Whether the core can run with these. Errors: kInvalidArgument. On failure *why (may be null) says
// which tenant or policy and what is allowed; the Error alone cannot carry names.
[[nodiscard]] Status validate(const PoolOptions& pool, const Config& config, std::string* why);

}  // namespace thinkv::core
