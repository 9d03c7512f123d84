// daemon.h: the parts of thinkvd put together: configuration, core, device, server, metrics.
//
// Threads: one, the event loop; the metrics endpoint has its own and reads copies.
#pragma once

#include <utility>

#include <boost/asio/signal_set.hpp>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/core/service.h"
#include "daemon/device/device.h"
#include "daemon/ipc/server.h"
#include "daemon/ops/config.h"
#include "daemon/ops/metrics.h"
#include "daemon/ops/policy_file.h"
#include "daemon/ops/report.h"

namespace thinkv {

// What the environment and the flags say; stronger than the file, also after a reload.
struct Overrides {
  std::string config_file;  // empty: the defaults
  std::string socket_path;
  std::optional<ops::LogLevel> log_level;
};

struct Settings {
  ops::Config config;
  ops::PolicySet policies;
};

// The file, its policies and the overrides. nullopt: see `problems`, one a line.
[[nodiscard]] std::optional<Settings> load_settings(const Overrides& overrides,
                                                    std::vector<std::string>* problems);
// What the core of one of the pools must know.
[[nodiscard]] core::Config core_config(const Settings& settings, const ops::PoolSettings& pool);

class Daemon final : public ipc::Host {
 public:
  // Everything is there and listening. Errors: kUnavailable (another daemon), kInvalidArgument,
  // kPermission, and those of device::make_device; *why is a sentence for a person.
  static Result<std::unique_ptr<Daemon>> create(const Overrides& overrides, Settings settings,
                                                std::string* why);
  // Until SIGTERM or SIGINT. SIGHUP reloads.
  [[nodiscard]] Status run();

  [[nodiscard]] Status create_extent(PoolIndex pool, ExtentId extent, uint64_t bytes) override;
  void release_extent(PoolIndex pool, ExtentId extent) override;
  [[nodiscard]] Result<int> export_fd(PoolIndex pool, ExtentId extent) const override;
  [[nodiscard]] std::string status_json() override;
  void tick() override;

 private:
  Daemon(const Overrides& overrides, Settings settings);
  [[nodiscard]] Status make_pool(const ops::PoolSettings& settings, std::string* why);
  void start_metrics();
  void arm_signals();
  void on_signal(int signal);
  void reload();
  // False: the old configuration stays; *problems says why.
  [[nodiscard]] bool try_reload(std::vector<std::string>* problems);
  void fill_report();

  Overrides overrides_;
  Settings settings_;
  struct Pool {
    std::unique_ptr<device::Device> device;
    std::unique_ptr<core::Service> service;
  };
  std::vector<Pool> pools_;  // in the order of the configuration
  std::unique_ptr<ipc::Server> server_;
  std::unique_ptr<boost::asio::signal_set> signals_;
  std::unique_ptr<ops::Metrics> metrics_;
  ops::Report report_;  // reused
  uint64_t started_ns_ = 0;
};

}  // namespace thinkv
