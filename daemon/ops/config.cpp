#include "daemon/ops/config.h"

#include <arpa/inet.h>
#include <grp.h>
#include <pwd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>

#include "daemon/ops/map_reader.h"
#include "daemon/ops/scalars.h"
#include "daemon/ops/yaml_tree.h"

namespace thinkv::ops {
namespace {

constexpr std::array kBackends = {Choice<Backend>{"host", Backend::kHost},
                                  Choice<Backend>{"cuda", Backend::kCuda}};
constexpr std::array kAccesses = {Choice<SocketAccess>{"user", SocketAccess::kUser},
                                  Choice<SocketAccess>{"group", SocketAccess::kGroup},
                                  Choice<SocketAccess>{"everyone", SocketAccess::kEveryone}};
constexpr std::array kLogLevels = {
    Choice<LogLevel>{"debug", LogLevel::kDebug}, Choice<LogLevel>{"info", LogLevel::kInfo},
    Choice<LogLevel>{"warning", LogLevel::kWarning}, Choice<LogLevel>{"error", LogLevel::kError}};

constexpr uint64_t kPoolBytesMax = uint64_t{16} << 40;
constexpr uint32_t kPolicyPlacesMax = 16;
constexpr uint32_t kWeightMax = 1000;
constexpr uint32_t kPriorityMax = 100;
constexpr size_t kUsersPerTenantMax = 64;

std::string absolute(const std::string& path, const std::string& file) {
  const std::filesystem::path given(path);
  if (given.is_absolute()) return given.lexically_normal().string();
  std::error_code error;
  const auto base = std::filesystem::absolute(std::filesystem::path(file), error).parent_path();
  return (base / given).lexically_normal().string();
}

void read_socket(MapReader socket, const std::string& file, Config* config) {
  std::string path;
  if (socket.text("path", limits::kSocketPathMax, &path) && path != "auto") {
    config->socket_path = absolute(path, file);
    if (config->socket_path.size() > limits::kSocketPathMax) {
      socket.fail(*socket.node("path"), "path",
                  "at most " + std::to_string(limits::kSocketPathMax) + " bytes are allowed");
    }
  }
  socket.choice<SocketAccess>("access", kAccesses, &config->socket_access);
  socket.finish();
}

// Only the form is checked here: whether that GPU is there is known when the daemon starts.
void read_device(MapReader* pool, Config* config) {
  constexpr size_t kTextMax = 64;
  std::string text;
  if (!pool->text("device", kTextMax, &text) || text == "auto") return;
  const Result<DeviceUuid> uuid = parse_device_uuid(text);
  if (!uuid) {
    pool->fail(*pool->node("device"), "device",
               MapReader::quote(text) +
                   " is not known; allowed: auto, or a UUID as nvidia-smi -L "
                   "prints it, GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx");
  } else if (config->backend != Backend::kCuda) {
    pool->fail(*pool->node("device"), "device", "only backend cuda has a device");
  } else {
    config->device = *uuid;
  }
}

void read_pool(MapReader pool, Config* config) {
  pool.choice<Backend>("backend", kBackends, &config->backend);
  read_device(&pool, config);
  pool.bytes("extent_bytes", {limits::kExtentBytesMin, limits::kExtentBytesMax},
             &config->extent_bytes);
  const bool given =
      pool.bytes("bytes", {limits::kExtentBytesMin, kPoolBytesMax}, &config->pool_bytes);
  const auto fail = [&](std::string_view key, const std::string& what) {
    if (const YamlNode* at = pool.node(key)) pool.fail(*at, key, what);
  };
  if (config->extent_bytes % limits::kExtentBytesMin != 0) {
    fail("extent_bytes", "must be a multiple of " + format_bytes(limits::kExtentBytesMin));
  } else if (config->pool_bytes % config->extent_bytes != 0) {
    fail(given ? "bytes" : "extent_bytes", "pool.bytes (" + format_bytes(config->pool_bytes) +
                                               ") must be a multiple of pool.extent_bytes (" +
                                               format_bytes(config->extent_bytes) + ")");
  } else if (config->pool_bytes / config->extent_bytes > limits::kExtentsMax) {
    fail(given ? "bytes" : "extent_bytes", "a pool has at most " +
                                               std::to_string(limits::kExtentsMax) +
                                               " extents: use a larger pool.extent_bytes");
  }
  pool.finish();
}

// A share of the pool: "25%" or a size.
void read_share(MapReader* tenant, std::string_view key, uint64_t pool_bytes, uint64_t* out) {
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
  const uint64_t bytes = percent ? pool_bytes * *value / 100 : *value;  // kPoolBytesMax x 100 fits
  if (bytes > pool_bytes) {
    return tenant->fail(*node, key,
                        MapReader::quote(node->scalar) + " is more than pool.bytes (" +
                            format_bytes(pool_bytes) + ")");
  }
  *out = bytes;
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
  settings.limit_bytes = config.pool_bytes;
  tenant.name("name", limits::kNameMax - 1, &settings.name);
  tenant.require("name");
  read_ids(&tenant, "users", "user", find_user, &settings.uids);
  read_ids(&tenant, "groups", "group", find_group, &settings.gids);
  read_share(&tenant, "reserve", config.pool_bytes, &settings.reserve_bytes);
  read_share(&tenant, "limit", config.pool_bytes, &settings.limit_bytes);
  tenant.integer32("weight", {1, kWeightMax}, &settings.weight);
  tenant.integer32("priority", {0, kPriorityMax}, &settings.priority);
  tenant.finish();
  return settings;
}

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
  uint64_t reserved = 0;
  for (const YamlNode& item : list->items) {
    TenantSettings settings =
        read_tenant(MapReader(&item, "tenants[]", diagnostics, keys), *config);
    const auto same = [&](const TenantSettings& other) { return other.name == settings.name; };
    if (std::any_of(config->tenants.begin(), config->tenants.end(), same)) {
      root->fail(item, "tenants[].name", MapReader::quote(settings.name) + " is given twice");
    }
    if (settings.limit_bytes == 0) root->fail(item, "tenants[].limit", "must be more than 0");
    if (settings.reserve_bytes > settings.limit_bytes) {
      root->fail(item, "tenants[].reserve", "is more than the tenant's limit");
    }
    reserved += settings.reserve_bytes;
    config->tenants.push_back(std::move(settings));
  }
  if (reserved > config->pool_bytes) {
    root->fail(
        *list, "tenants",
        "the reserves add up to more than pool.bytes (" + format_bytes(config->pool_bytes) + ")");
  }
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

void read_policies(MapReader policies, const std::string& file, Config* config) {
  std::vector<std::string> places;
  if (policies.texts("directories", kPolicyPlacesMax, &places)) {
    for (const std::string& place : places) {
      config->policy_directories.push_back(absolute(place, file));
    }
  }
  places.clear();
  if (policies.texts("files", kPolicyPlacesMax, &places)) {
    for (const std::string& place : places) config->policy_files.push_back(absolute(place, file));
  }
  policies.finish();
}

void read_metrics(MapReader metrics, Config* config) {
  std::string address;
  if (metrics.text("address", 45, &address)) {
    in_addr parsed{};
    if (::inet_pton(AF_INET, address.c_str(), &parsed) == 1) {
      config->metrics_address = address;
    } else {
      metrics.fail(*metrics.node("address"), "address",
                   MapReader::quote(address) + " is not an IPv4 address, as in 127.0.0.1");
    }
  }
  if (const YamlNode* port = metrics.node("port");
      port != nullptr && port->kind == YamlNode::Kind::kScalar && port->scalar == "off") {
    config->metrics_port = 0;
  } else if (port != nullptr) {
    const Result<uint64_t> number = parse_integer(port->scalar);
    if (number && *number >= 1 && *number <= 65535 && !port->quoted) {
      config->metrics_port = static_cast<uint32_t>(*number);
    } else {
      metrics.fail(*port, "port",
                   MapReader::quote(port->scalar) + " is not a port; allowed: 1 to 65535, off");
    }
  }
  metrics.finish();
}

void read_limits(MapReader bounds, Config* config) {
  bounds.integer32("clients", {1, limits::kClientsMax}, &config->clients_max);
  bounds.integer32("clients_per_user", {1, limits::kClientsMax}, &config->clients_per_user_max);
  bounds.integer32("messages_per_second", {10, 100'000}, &config->messages_per_second);
  bounds.duration_ms("slow_client", {100, 3'600'000}, &config->slow_client_ms);
  bounds.finish();
}

void read_config(const YamlNode* tree, Config* config, Diagnostics* diagnostics,
                 std::vector<std::string>* keys) {
  MapReader root(tree, "", diagnostics, keys);
  read_socket(root.child("socket"), config->file, config);
  read_pool(root.child("pool"), config);
  for (TenantSettings& tenant : config->tenants) tenant.limit_bytes = config->pool_bytes;
  read_tenants(&root, config, diagnostics, keys);
  read_default_tenant(&root, config);
  read_policies(root.child("policies"), config->file, config);
  read_metrics(root.child("metrics"), config);
  MapReader log = root.child("log");
  log.choice<LogLevel>("level", kLogLevels, &config->log_level);
  log.finish();
  read_limits(root.child("limits"), config);
  root.finish();
}

}  // namespace

Config default_config() {
  Config config;
  TenantSettings everyone;
  everyone.name = "default";
  everyone.limit_bytes = config.pool_bytes;
  config.tenants.push_back(std::move(everyone));
  return config;
}

std::optional<Config> parse_config(const std::string& text, const std::string& file,
                                   Diagnostics* diagnostics) {
  const std::optional<YamlNode> tree = parse_yaml(text, diagnostics);
  if (!tree) return std::nullopt;
  Config config = default_config();
  config.file = file;
  read_config(&*tree, &config, diagnostics, nullptr);
  if (!diagnostics->ok()) return std::nullopt;
  return config;
}

std::optional<Config> load_config(const std::string& file, Diagnostics* diagnostics) {
  const std::optional<std::string> text = read_text_file(file, diagnostics);
  if (!text) return std::nullopt;
  return parse_config(*text, file, diagnostics);
}

std::vector<std::string> config_keys() {
  std::vector<std::string> keys;
  Diagnostics none("");
  Config config = default_config();
  read_config(nullptr, &config, &none, &keys);
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  return keys;
}

std::vector<std::string> restart_keys(const Config& current, const Config& next) {
  std::vector<std::string> keys;
  if (current.socket_path != next.socket_path) keys.emplace_back("socket.path");
  if (current.socket_access != next.socket_access) keys.emplace_back("socket.access");
  if (current.backend != next.backend) keys.emplace_back("pool.backend");
  if (current.device != next.device) keys.emplace_back("pool.device");
  if (current.pool_bytes != next.pool_bytes) keys.emplace_back("pool.bytes");
  if (current.extent_bytes != next.extent_bytes) keys.emplace_back("pool.extent_bytes");
  if (current.metrics_address != next.metrics_address) keys.emplace_back("metrics.address");
  if (current.metrics_port != next.metrics_port) keys.emplace_back("metrics.port");
  return keys;
}

std::string default_socket_path() {
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  if (::geteuid() == 0 || runtime == nullptr || runtime[0] != '/') {
    return "/run/thinkvd/control.sock";
  }
  return std::string(runtime) + "/thinkv/control.sock";
}

const char* log_level_name(LogLevel level) {
  for (const Choice<LogLevel>& choice : kLogLevels) {
    if (choice.value == level) return choice.name.data();
  }
  return "info";
}

std::optional<LogLevel> log_level_from_name(std::string_view name) {
  for (const Choice<LogLevel>& choice : kLogLevels) {
    if (choice.name == name) return choice.value;
  }
  return std::nullopt;
}

}  // namespace thinkv::ops
