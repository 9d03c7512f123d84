// config_tenants.cpp: `tenants` and `default_tenant` of thinkvd.yaml.
#include <grp.h>
#include <pwd.h>

#include <algorithm>

#include "daemon/ops/config_sections.h"
#include "daemon/ops/scalars.h"

namespace thinkv::ops {
namespace {

constexpr uint32_t kWeightMax = 1000;
constexpr uint32_t kPriorityMax = 100;
constexpr size_t kUsersPerTenantMax = 64;

// A share of each pool, "25%", or a size that every pool can hold.
void read_share(MapReader* tenant, std::string_view key, const Config& config, Share* out) {
  const YamlNode* node = tenant->node(key);
  if (node == nullptr) return;
  if (node->kind != YamlNode::Kind::kScalar || node->quoted) {
    return tenant->fail(*node, key, "a size (512MiB) or a share of the pool (50%) is expected");
  }
  const bool percent = !node->scalar.empty() && node->scalar.back() == '%';
  const Result<uint64_t> value = percent ? parse_percent(node->scalar) : parse_bytes(node->scalar);
  if (!value) {
    return tenant->fail(*node, key, MapReader::quote(node->scalar) + ": " + value.error().what);
  }
  const Share share{*value, percent};
  for (const PoolSettings& pool : config.pools) {
    if (share.of(pool.bytes) <= pool.bytes) continue;
    return tenant->fail(
        *node, key,
        MapReader::quote(node->scalar) + " is more than " + pool_bytes_text(config, pool));
  }
  *out = share;
}

// Names are looked up, numbers are taken as they are.
template <class Lookup>
void read_ids(MapReader* tenant, std::string_view key, const char* what, Lookup lookup,
              std::vector<uint32_t>* out) {
  std::vector<std::string> names;
  if (!tenant->texts(key, kUsersPerTenantMax, &names)) return;
  const YamlNode* list = tenant->node(key);
  for (size_t i = 0; i < names.size(); ++i) {
    const Result<uint64_t> number = parse_integer(names[i]);
    uint32_t id = 0;
    if (number && *number < UINT32_MAX) {
      id = static_cast<uint32_t>(*number);
    } else if (!lookup(names[i], &id)) {
      tenant->fail(list->items[i], key,
                   std::string("no ") + what + " " + MapReader::quote(names[i]) +
                       " on this machine; a name or a number is allowed");
      continue;
    }
    out->push_back(id);
  }
}

bool find_user(const std::string& name, uint32_t* uid) {
  const passwd* entry = ::getpwnam(name.c_str());
  if (entry == nullptr) return false;
  *uid = entry->pw_uid;
  return true;
}

bool find_group(const std::string& name, uint32_t* gid) {
  const group* entry = ::getgrnam(name.c_str());
  if (entry == nullptr) return false;
  *gid = entry->gr_gid;
  return true;
}

TenantSettings read_tenant(MapReader tenant, const Config& config) {
  TenantSettings settings;
  tenant.name("name", limits::kNameMax - 1, &settings.name);
  tenant.require("name");
  read_ids(&tenant, "users", "user", find_user, &settings.uids);
  read_ids(&tenant, "groups", "group", find_group, &settings.gids);
  read_share(&tenant, "reserve", config, &settings.reserve);
  read_share(&tenant, "limit", config, &settings.limit);
  tenant.integer32("weight", {1, kWeightMax}, &settings.weight);
  tenant.integer32("priority", {0, kPriorityMax}, &settings.priority);
  tenant.finish();
  return settings;
}

// In every pool, because a share of one can be less than a size and of another more.
void check_bounds(MapReader* root, const YamlNode& item, const Config& config,
                  const TenantSettings& tenant) {
  if (tenant.limit.amount == 0) root->fail(item, "tenants[].limit", "must be more than 0");
  const auto crossed = [&](const PoolSettings& pool) {
    return tenant.reserve.of(pool.bytes) > tenant.limit.of(pool.bytes);
  };
  if (std::any_of(config.pools.begin(), config.pools.end(), crossed)) {
    root->fail(item, "tenants[].reserve", "is more than the tenant's limit");
  }
}

void check_reserves(MapReader* root, const YamlNode& list, const Config& config) {
  for (const PoolSettings& pool : config.pools) {
    uint64_t reserved = 0;
    for (const TenantSettings& tenant : config.tenants) reserved += tenant.reserve.of(pool.bytes);
    if (reserved <= pool.bytes) continue;
    root->fail(list, "tenants",
               "the reserves add up to more than " + pool_bytes_text(config, pool));
  }
}

}  // namespace

void read_tenants(MapReader* root, Config* config, Diagnostics* diagnostics,
                  std::vector<std::string>* keys) {
  const YamlNode* list = root->node("tenants");
  if (list == nullptr || list->kind == YamlNode::Kind::kNull) {
    if (keys != nullptr)
      (void)read_tenant(MapReader(nullptr, "tenants[]", diagnostics, keys), *config);
    return;
  }
  if (list->kind != YamlNode::Kind::kList) {
    return root->fail(*list, "tenants",
                      std::string("a list is expected, not ") + list->kind_name());
  }
  if (list->items.empty() || list->items.size() > limits::kTenantsMax) {
    return root->fail(*list, "tenants",
                      "1 to " + std::to_string(limits::kTenantsMax) + " entries are allowed");
  }
  config->tenants.clear();
  for (const YamlNode& item : list->items) {
    TenantSettings settings =
        read_tenant(MapReader(&item, "tenants[]", diagnostics, keys), *config);
    const auto same = [&](const TenantSettings& other) { return other.name == settings.name; };
    if (std::any_of(config->tenants.begin(), config->tenants.end(), same)) {
      root->fail(item, "tenants[].name", MapReader::quote(settings.name) + " is given twice");
    }
    check_bounds(root, item, *config, settings);
    config->tenants.push_back(std::move(settings));
  }
  check_reserves(root, *list, *config);
}

void read_default_tenant(MapReader* root, Config* config) {
  std::string name;
  root->name("default_tenant", limits::kNameMax - 1, &name);
  if (name == "none") {
    config->default_tenant.clear();
    return;
  }
  if (!name.empty()) config->default_tenant = name;
  const auto same = [&](const TenantSettings& t) { return t.name == config->default_tenant; };
  if (std::any_of(config->tenants.begin(), config->tenants.end(), same)) return;
  std::string allowed = "none";
  for (const TenantSettings& tenant : config->tenants) allowed.append(", ").append(tenant.name);
  const YamlNode* at = root->node(name.empty() ? "tenants" : "default_tenant");
  if (at != nullptr) {
    root->fail(*at, "default_tenant",
               MapReader::quote(config->default_tenant) + " is not a tenant; allowed: " + allowed);
  }
}

}  // namespace thinkv::ops
