#include "daemon/daemon.h"

#include <spdlog/spdlog.h>
#include <sys/types.h>
#include <time.h>

#include <csignal>

#include "daemon/device/factory.h"
#include "daemon/ops/log.h"
#include "daemon/ops/notify.h"
#include "daemon/ops/scalars.h"
#include "daemon/ops/status.h"

namespace thinkv {
namespace {

uint64_t realtime_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}

double unix_seconds() {
  return static_cast<double>(realtime_ns()) / 1e9;
}

mode_t mode_of(ops::SocketAccess access) {
  switch (access) {
    case ops::SocketAccess::kUser:
      return 0600;
    case ops::SocketAccess::kGroup:
      return 0660;
    case ops::SocketAccess::kEveryone:
      return 0666;
  }
  return 0600;
}

ipc::ServerOptions server_options(const ops::Config& config) {
  ipc::ServerOptions options;
  options.clients_max = config.clients_max;
  options.clients_per_user_max = config.clients_per_user_max;
  options.messages_per_second = config.messages_per_second;
  options.slow_client_ns = config.slow_client_ms * 1'000'000u;
  return options;
}

device::DeviceOptions device_options(const ops::PoolSettings& pool) {
  device::DeviceOptions options;
  options.kind = pool.backend == ops::Backend::kCuda ? device::Kind::kCuda : device::Kind::kHost;
  options.gpu = pool.device;
  options.pool_bytes = pool.bytes;
  options.extent_bytes = pool.extent_bytes;
  return options;
}

ops::ServerReport report_of(const ipc::ServerCounters& from, size_t connections) {
  ops::ServerReport to;
  to.connections = connections;
  to.accepted = from.accepted;
  to.messages = from.messages;
  to.throttled = from.throttled;
  to.bells = from.bells;
  to.parks = from.parks;
  to.completions_full = from.completions_full;
  to.accept_failures = from.accept_failures;
  to.loop_lag_ns = from.loop_lag_ns;
  to.loop_lag_max_ns = from.loop_lag_max_ns;
  for (uint32_t i = 0; i < ipc::kRejectionCount; ++i) {
    to.rejected.emplace_back(ipc::rejection_name(static_cast<ipc::Rejection>(i)), from.rejected[i]);
  }
  return to;
}

ops::ClientReport report_of(const ipc::Server::ClientView& view) {
  const ipc::ReportedCounters& from = view.counters;
  ops::ClientReport to;
  to.id = view.id;
  to.tokens = from.tokens;
  to.live_slots = from.live_slots;
  to.evicted_slots = from.evicted_slots;
  to.reused_slots = from.reused_slots;
  to.steps = from.steps;
  to.demotions = from.demotions;
  to.over_budget_steps = from.over_budget_steps;
  to.thoughts = from.thoughts;
  to.held_bytes = from.held_bytes;
  to.f16_bytes = from.f16_bytes;
  to.requests_waiting = view.requests_waiting;
  to.unanswered = view.unanswered;
  return to;
}

// "gpu0 on backend cuda with 64 GiB, ..."
std::string describe(const ops::Config& config) {
  std::string text;
  for (const ops::PoolSettings& pool : config.pools) {
    text.append(text.empty() ? "" : ", ").append(pool.name).append(" on backend ");
    text.append(pool.backend == ops::Backend::kCuda ? "cuda" : "host").append(" with ");
    text.append(ops::format_bytes(pool.bytes));
  }
  return text;
}

std::vector<ops::PolicyReport> report_of(const ops::PolicySet& set) {
  std::vector<ops::PolicyReport> reports;
  for (const ops::Policy& policy : set.policies) {
    reports.push_back({policy.params.name, policy.description, policy.file});
  }
  return reports;
}

}  // namespace

std::optional<Settings> load_settings(const Overrides& overrides,
                                      std::vector<std::string>* problems) {
  Settings settings;
  settings.config = ops::default_config();
  if (!overrides.config_file.empty()) {
    ops::Diagnostics diagnostics(overrides.config_file);
    std::optional<ops::Config> loaded = ops::load_config(overrides.config_file, &diagnostics);
    problems->insert(problems->end(), diagnostics.lines().begin(), diagnostics.lines().end());
    if (!loaded) return std::nullopt;
    settings.config = std::move(*loaded);
  }
  ops::Config& config = settings.config;
  if (!overrides.socket_path.empty()) config.socket_path = overrides.socket_path;
  if (config.socket_path.empty()) config.socket_path = ops::default_socket_path();
  if (overrides.log_level) config.log_level = *overrides.log_level;
  std::vector<std::string> directories = config.policy_directories;
  if (directories.empty() && config.policy_files.empty()) {
    directories = ops::installed_policy_directories();
  }
  std::optional<ops::PolicySet> policies =
      ops::load_policies(directories, config.policy_files, problems);
  if (!policies) return std::nullopt;
  settings.policies = std::move(*policies);
  for (const ops::PoolSettings& pool : config.pools) {
    std::string why;
    if (core::validate({pool.bytes, pool.extent_bytes}, core_config(settings, pool), &why))
      continue;
    if (config.pools.size() > 1) why = "pool '" + pool.name + "': " + why;
    problems->push_back(config.file.empty() ? why : config.file + ": " + why);
    return std::nullopt;
  }
  return settings;
}

core::Config core_config(const Settings& settings, const ops::PoolSettings& pool) {
  core::Config config;
  for (const ops::TenantSettings& tenant : settings.config.tenants) {
    config.tenants.push_back({tenant.name, tenant.uids, tenant.gids, tenant.reserve.of(pool.bytes),
                              tenant.limit.of(pool.bytes), tenant.weight, tenant.priority});
  }
  config.default_tenant = settings.config.default_tenant;
  for (const ops::Policy& policy : settings.policies.policies) {
    config.policies.push_back(policy.params);
  }
  return config;
}

Daemon::Daemon(const Overrides& overrides, Settings settings)
    : overrides_(overrides), settings_(std::move(settings)) {}

Result<std::unique_ptr<Daemon>> Daemon::create(const Overrides& overrides, Settings settings,
                                               std::string* why) {
  std::unique_ptr<Daemon> daemon(new Daemon(overrides, std::move(settings)));
  const ops::Config& config = daemon->settings_.config;
  // First: a second daemon must not touch anything else.
  THINKV_ASSIGN_OR_RETURN(
      ipc::Listener listener,
      ipc::Listener::open(config.socket_path, mode_of(config.socket_access), why));
  ops::Report& report = daemon->report_;
  std::vector<ipc::ServedPool> served;
  for (const ops::PoolSettings& pool : config.pools) {
    THINKV_TRY(daemon->make_pool(pool, why));
    const Pool& made = daemon->pools_.back();
    const DeviceUuid gpu = made.device->uuid();
    served.push_back({pool.name, made.device->name(), gpu, pool.extent_bytes, made.service.get()});
    report.pools.push_back(
        {pool.name, made.device->name(), gpu.is_none() ? "" : device_uuid_text(gpu), {}});
  }
  ipc::ServerOptions options = server_options(config);
  options.boot_epoch = realtime_ns();
  daemon->server_ =
      std::make_unique<ipc::Server>(options, std::move(listener), std::move(served), daemon.get());
  report.socket = config.socket_path;
  report.config_file = config.file;
  report.boot_epoch = options.boot_epoch;
  report.start_time = unix_seconds();
  report.reload.success_time = report.start_time;
  report.policies = report_of(daemon->settings_.policies);
  daemon->started_ns_ = ipc::monotonic_ns();
  daemon->start_metrics();
  daemon->arm_signals();
  return daemon;
}

Status Daemon::make_pool(const ops::PoolSettings& settings, std::string* why) {
  Pool pool;
  const auto make = [&]() -> Status {
    THINKV_ASSIGN_OR_RETURN(pool.device, device::make_device(device_options(settings), why));
    THINKV_ASSIGN_OR_RETURN(pool.service,
                            core::Service::create({settings.bytes, settings.extent_bytes},
                                                  core_config(settings_, settings), why));
    return {};
  };
  const Status made = make();
  if (!made) {
    if (settings_.config.pools.size() > 1) *why = "pool '" + settings.name + "': " + *why;
    return made;
  }
  pools_.push_back(std::move(pool));
  return {};
}

// Without metrics the pool still serves: pages in use matter more than the view of them.
void Daemon::start_metrics() {
  const ops::Config& config = settings_.config;
  if (config.metrics_port == 0) {
    report_.metrics = "off";
    return;
  }
  std::string why;
  auto started = ops::Metrics::start(config.metrics_address, config.metrics_port, &why);
  if (!started) {
    spdlog::error("{}", why);
    report_.metrics = "failed: " + why;
    return;
  }
  metrics_ = std::move(*started);
  report_.metrics =
      "http://" + config.metrics_address + ":" + std::to_string(metrics_->port()) + "/metrics";
}

void Daemon::arm_signals() {
  if (!signals_) {
    signals_ = std::make_unique<boost::asio::signal_set>(server_->io(), SIGTERM, SIGINT, SIGHUP);
  }
  signals_->async_wait([this](const boost::system::error_code& error, int signal) {
    if (!error) on_signal(signal);
  });
}

void Daemon::on_signal(int signal) {
  arm_signals();
  if (signal == SIGHUP) return reload();
  spdlog::info("signal {}: stopping", signal);
  ops::notify_stopping();
  server_->shutdown();
}

Status Daemon::run() {
  const ops::Config& config = settings_.config;
  spdlog::info("serving on {}, pool {}, {} policies, metrics {}", config.socket_path,
               describe(config), settings_.policies.policies.size(), report_.metrics);
  tick();
  ops::notify_ready();
  const Status done = server_->run();
  spdlog::info("stopped");
  return done;
}

void Daemon::reload() {
  ops::notify_reloading();
  std::vector<std::string> problems;
  ops::ReloadState& state = report_.reload;
  state.successful = try_reload(&problems);
  state.problems.clear();
  for (const std::string& problem : problems) {
    spdlog::log(state.successful ? spdlog::level::warn : spdlog::level::err, "reload: {}", problem);
    state.problems.append(state.problems.empty() ? "" : "\n").append(problem);
  }
  if (state.successful) {
    ++state.succeeded;
    state.success_time = unix_seconds();
    spdlog::info("configuration reloaded");
  } else {
    ++state.failed;
    spdlog::error("reload refused: the configuration in use stays");
  }
  tick();
  ops::notify_ready();
}

bool Daemon::try_reload(std::vector<std::string>* problems) {
  std::optional<Settings> next = load_settings(overrides_, problems);
  if (!next) return false;
  const std::vector<std::string> fixed = ops::restart_keys(settings_.config, next->config);
  for (const std::string& key : fixed) problems->push_back(key + ": a change needs a restart");
  if (!fixed.empty()) return false;
  std::vector<core::Config> configs;
  for (const ops::PoolSettings& pool : next->config.pools) {
    configs.push_back(core_config(*next, pool));
  }
  const core::ReloadResult taken = server_->reload(configs);
  if (taken.code != ErrorCode::kOk) {
    problems->push_back(taken.text);
    return false;
  }
  settings_ = std::move(*next);
  server_->set_limits(server_options(settings_.config));
  ops::set_log_level(settings_.config.log_level);
  report_.policies = report_of(settings_.policies);
  return true;
}

Status Daemon::create_extent(PoolIndex pool, ExtentId extent, uint64_t bytes) {
  return pools_[pool.value()].device->create_extent(extent, bytes);
}

void Daemon::release_extent(PoolIndex pool, ExtentId extent) {
  pools_[pool.value()].device->release_extent(extent);
}

Result<int> Daemon::export_fd(PoolIndex pool, ExtentId extent) const {
  return pools_[pool.value()].device->export_fd(extent);
}

std::string Daemon::status_json() {
  fill_report();
  return ops::status_json(report_);
}

void Daemon::tick() {
  if (metrics_ == nullptr) return;
  fill_report();
  metrics_->publish(report_);
}

void Daemon::fill_report() {
  for (size_t i = 0; i < pools_.size(); ++i) {
    pools_[i].service->snapshot(&report_.pools[i].snapshot);
  }
  report_.now_ns = ipc::monotonic_ns();
  report_.uptime_ns = report_.now_ns - started_ns_;
  report_.clients.clear();
  for (const ipc::Server::ClientView& view : server_->clients()) {
    report_.clients.push_back(report_of(view));
  }
  report_.server = report_of(server_->counters(), server_->connection_count());
}

}  // namespace thinkv
