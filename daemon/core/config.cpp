#include "daemon/core/config.h"

#include <algorithm>
#include <string_view>

#include "daemon/core/tenant_table.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::core {
namespace {

Error invalid(const char* what, std::string* why, std::string text) {
  if (why != nullptr) *why = std::move(text);
  return make_error(ErrorCode::kInvalidArgument, what);
}

Status validate_pool(const PoolOptions& pool, std::string* why) {
  if (pool.extent_bytes < limits::kExtentBytesMin || pool.extent_bytes > limits::kExtentBytesMax ||
      pool.extent_bytes % limits::kExtentBytesMin != 0) {
    return invalid("extent size", why,
                   "the extent size must be 2 MiB to 1 GiB, a multiple of 2 MiB");
  }
  const uint64_t extents = pool.pool_bytes / pool.extent_bytes;
  if (extents < 1 || extents > limits::kExtentsMax) {
    return invalid("pool size", why,
                   "the pool must have 1 to 4096 extents, not " + std::to_string(extents));
  }
  return {};
}

Status validate_tenant(const TenantConfig& tenant, uint64_t pool_bytes, std::string* why) {
  const std::string who = "tenant '" + tenant.name + "': ";
  if (tenant.name.empty() || tenant.name.size() >= limits::kNameMax) {
    return invalid("tenant name", why, who + "the name must have 1 to 63 bytes");
  }
  if (tenant.weight < 1 || tenant.weight > 1000) {
    return invalid("tenant weight", why, who + "weight must be 1 to 1000");
  }
  if (tenant.priority > 100) {
    return invalid("tenant priority", why, who + "priority must be 0 to 100");
  }
  if (tenant.limit_bytes > pool_bytes) {
    return invalid("tenant limit", why,
                   who + "limit is more than the pool's whole extents, " +
                       std::to_string(pool_bytes) + " bytes");
  }
  if (tenant.reserve_bytes > (tenant.limit_bytes == 0 ? pool_bytes : tenant.limit_bytes)) {
    return invalid("tenant reserve", why, who + "reserve is more than the limit");
  }
  return {};
}

Status validate_tenants(const PoolOptions& pool, const Config& config, std::string* why) {
  if (config.tenants.empty() || config.tenants.size() > limits::kTenantsMax) {
    return invalid("tenants", why, "there must be 1 to 32 tenants");
  }
  const uint64_t pool_bytes = uint64_t{pool.extent_count()} * pool.extent_bytes;
  uint64_t reserved = 0;
  bool has_default = config.default_tenant.empty();
  for (size_t i = 0; i < config.tenants.size(); ++i) {
    const TenantConfig& tenant = config.tenants[i];
    THINKV_TRY(validate_tenant(tenant, pool_bytes, why));
    for (size_t j = 0; j < i; ++j) {
      if (config.tenants[j].name == tenant.name) {
        return invalid("tenant name", why, "tenant '" + tenant.name + "' is there twice");
      }
    }
    reserved += extents_for(pool, tenant.reserve_bytes);
    has_default = has_default || tenant.name == config.default_tenant;
  }
  if (!has_default) {
    return invalid("default tenant", why,
                   "the default tenant '" + config.default_tenant + "' is not in the list");
  }
  if (reserved > pool.extent_count()) {
    return invalid("reserves", why,
                   "the reserves need " + std::to_string(reserved) +
                       " whole extents, the pool has " + std::to_string(pool.extent_count()));
  }
  if (config.clients_per_uid < 1 || config.clients_per_uid > limits::kClientsMax) {
    return invalid("clients per user", why, "clients per user must be 1 to 256");
  }
  return {};
}

Status validate_policies(const Config& config, std::string* why) {
  if (config.policies.empty() || config.policies.size() > limits::kPoliciesMax) {
    return invalid("policies", why, "there must be 1 to 128 policies");
  }
  for (size_t i = 0; i < config.policies.size(); ++i) {
    const PolicyParams& policy = config.policies[i];
    if (!policy_params_valid(policy)) {
      return invalid("policy", why, "policy number " + std::to_string(i + 1) + " is not valid");
    }
    for (size_t j = 0; j < i; ++j) {
      if (std::string_view(config.policies[j].name) == policy.name) {
        return invalid("policy", why, "policy '" + std::string(policy.name) + "' is there twice");
      }
    }
  }
  return {};
}

}  // namespace

Status validate(const PoolOptions& pool, const Config& config, std::string* why) {
  THINKV_TRY(validate_pool(pool, why));
  THINKV_TRY(validate_tenants(pool, config, why));
  return validate_policies(config, why);
}

}  // namespace thinkv::core
