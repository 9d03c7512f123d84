// report.h: everything that the status and the metrics show, as one value.
//
// Filled by the event loop from the core's snapshot and the server's counters; read as a copy by
// whoever formats it. Threads: a value.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "daemon/core/snapshot.h"

namespace thinkv::ops {

struct ReloadState {
  bool successful = true;
  double success_time = 0.0;  // Unix seconds
  uint64_t succeeded = 0;
  uint64_t failed = 0;
  std::string problems;  // of the last failed one
};

// What a client says about itself, and its rings.
struct ClientReport {
  uint64_t id = 0;
  uint64_t tokens = 0;
  uint64_t live_slots = 0;
  uint64_t evicted_slots = 0;
  uint64_t reused_slots = 0;
  uint64_t steps = 0;
  uint64_t demotions = 0;
  uint64_t over_budget_steps = 0;
  std::array<uint64_t, kThoughtCount> thoughts{};
  uint64_t held_bytes = 0;
  uint64_t f16_bytes = 0;
  uint32_t requests_waiting = 0;
  uint32_t unanswered = 0;
};

struct ServerReport {
  uint64_t connections = 0;
  uint64_t accepted = 0;
  uint64_t messages = 0;
  uint64_t throttled = 0;
  uint64_t bells = 0;
  uint64_t parks = 0;
  uint64_t completions_full = 0;
  uint64_t accept_failures = 0;
  uint64_t loop_lag_ns = 0;
  uint64_t loop_lag_max_ns = 0;
  std::vector<std::pair<std::string, uint64_t>> rejected;  // by reason
};

struct PolicyReport {
  std::string name;
  std::string description;
  std::string file;
};

struct PoolReport {
  std::string name;
  std::string backend;
  std::string device;  // the GPU's UUID; empty on the host backend
  core::Snapshot snapshot;
};

struct Report {
  std::string socket;
  std::string config_file;
  std::string metrics;  // where, or why not
  uint64_t boot_epoch = 0;
  double start_time = 0.0;  // Unix seconds
  uint64_t now_ns = 0;      // the clock of the snapshot's times
  uint64_t uptime_ns = 0;
  std::vector<PoolReport> pools;
  std::vector<ClientReport> clients;
  std::vector<PolicyReport> policies;
  ServerReport server;
  ReloadState reload;
};

[[nodiscard]] const char* op_name(size_t op);  // index of Counters::requests

}  // namespace thinkv::ops
