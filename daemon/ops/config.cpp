#include "daemon/ops/config.h"

#include <arpa/inet.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>

#include "daemon/ops/config_sections.h"
#include "daemon/ops/map_reader.h"
#include "daemon/ops/scalars.h"
#include "daemon/ops/yaml_tree.h"

namespace thinkv::ops {
namespace {

constexpr std::array kAccesses = {Choice<SocketAccess>{"user", SocketAccess::kUser},
                                  Choice<SocketAccess>{"group", SocketAccess::kGroup},
                                  Choice<SocketAccess>{"everyone", SocketAccess::kEveryone}};
constexpr std::array kLogLevels = {
    Choice<LogLevel>{"debug", LogLevel::kDebug}, Choice<LogLevel>{"info", LogLevel::kInfo},
    Choice<LogLevel>{"warning", LogLevel::kWarning}, Choice<LogLevel>{"error", LogLevel::kError}};

constexpr uint32_t kPolicyPlacesMax = 16;

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
  read_pools(&root, config, diagnostics, keys);
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
  add_pool_keys(current, next, &keys);
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
