// config.h: thinkvd.yaml as a validated value.
//
// Loading is all or nothing: either every key of the file is known, well-typed and in range, or
// the caller gets the list of problems and no configuration. Defaults here are those that
// config/thinkvd.yaml shows (a test compares them).
// Threads: values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "daemon/ops/diagnostics.h"
#include "thinkv/internal/device_uuid.h"
#include "thinkv/internal/limits.h"

namespace thinkv::ops {

enum class Backend : uint8_t { kHost, kCuda };
enum class SocketAccess : uint8_t { kUser, kGroup, kEveryone };  // file mode 0600, 0660, 0666
enum class LogLevel : uint8_t { kDebug, kInfo, kWarning, kError };

struct PoolSettings {
  std::string name = "default";
  Backend backend = Backend::kHost;
  std::optional<DeviceUuid> device;  // the GPU of backend cuda; nullopt: the first one
  uint64_t bytes = uint64_t{1} << 30;
  uint64_t extent_bytes = uint64_t{64} << 20;
  friend bool operator==(const PoolSettings&, const PoolSettings&) = default;
};

// A size, or a share of whatever pool it is applied to.
struct Share {
  uint64_t amount = 0;  // bytes, or percent
  bool percent = false;
  // Requires: pool_bytes is at most 2^57, so that the product fits.
  [[nodiscard]] uint64_t of(uint64_t pool_bytes) const {
    return percent ? pool_bytes * amount / 100 : amount;
  }
  friend bool operator==(const Share&, const Share&) = default;
};

// Holds in each pool by itself: a tenant has its reserve and its limit once in every pool.
struct TenantSettings {
  std::string name;
  std::vector<uint32_t> uids;
  std::vector<uint32_t> gids;
  Share reserve = {0, true};  // always obtainable by this tenant
  Share limit = {100, true};  // never exceeded by it
  uint32_t weight = 1;
  uint32_t priority = 50;  // lower is compressed first, higher is refilled first
  friend bool operator==(const TenantSettings&, const TenantSettings&) = default;
};

struct Config {
  std::string file;         // what it was loaded from; empty: the defaults
  std::string socket_path;  // empty: /run/thinkvd/control.sock for root, else the user's
  SocketAccess socket_access = SocketAccess::kGroup;

  // 1 to limits::kPoolsMax; names and GPUs are unique. Several on GPUs: each has its device.
  std::vector<PoolSettings> pools = {PoolSettings{}};

  std::vector<TenantSettings> tenants;     // at least the default tenant
  std::string default_tenant = "default";  // of users that no tenant names; empty: refused

  std::vector<std::string> policy_directories;  // absolute; empty: the installed ones
  std::vector<std::string> policy_files;        // absolute; beside the directories

  std::string metrics_address = "127.0.0.1";
  uint32_t metrics_port = 9464;  // 0: off
  LogLevel log_level = LogLevel::kInfo;

  uint32_t clients_max = limits::kClientsMax;
  uint32_t clients_per_user_max = limits::kClientsPerUidMax;
  uint32_t messages_per_second = 1000;  // of one client, on the control socket
  uint64_t slow_client_ms = 30'000;     // completions unread for so long: disconnected
};

// The configuration without a file: one tenant, `default`, that may use the whole of one pool.
[[nodiscard]] Config default_config();

// `text` as if read from `file` (relative paths are relative to its folder).
[[nodiscard]] std::optional<Config> parse_config(const std::string& text, const std::string& file,
                                                 Diagnostics* diagnostics);
[[nodiscard]] std::optional<Config> load_config(const std::string& file, Diagnostics* diagnostics);

// Every key that a file may hold, as dotted paths, sorted.
[[nodiscard]] std::vector<std::string> config_keys();

// What messages call the pool's size: "pool.bytes", or with several pools whose it is.
[[nodiscard]] std::string pool_bytes_text(const Config& config, const PoolSettings& pool);

// Keys whose new value only a restart applies. Empty: `next` can replace `current` at once.
[[nodiscard]] std::vector<std::string> restart_keys(const Config& current, const Config& next);

// Where the socket is when neither a flag, the environment nor the file says so.
[[nodiscard]] std::string default_socket_path();

[[nodiscard]] const char* log_level_name(LogLevel level);
[[nodiscard]] std::optional<LogLevel> log_level_from_name(std::string_view name);

}  // namespace thinkv::ops
