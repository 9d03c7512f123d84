// session.h: one connection to the daemon: its socket, its mappings, its rings, its leases.
//
// All functions take the session's mutex, so they may be called from any thread; a call that asks
// the daemon holds it until the answer is there. Nothing here is called in a step that finds its
// pages in the lease, except to move them.
#pragma once

#include <array>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "client/channel.h"
#include "client/control_socket.h"
#include "client/device_window.h"
#include "client/extent_map.h"
#include "client/lease.h"
#include "client/lease_source.h"
#include "client/mapped_range.h"
#include "thinkv/internal/geometry.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/internal/protocol.h"

namespace thinkv::client {

struct SessionOptions {
  std::string socket_path;
  std::string client_name;  // cut to limits::kNameMax - 1 bytes
  std::chrono::milliseconds timeout{10'000};
  // Its name or its GPU's UUID; empty: the only pool, else that of this thread's current GPU.
  std::string pool = {};
};

struct PolicyEntry {
  uint32_t id = 0;
  PolicyParams params;
};

// What a sequence adds to the client's counters, by difference. Wraps: a sequence that shrinks
// adds the two's complement.
struct CounterDelta {
  uint64_t tokens = 0;
  uint64_t live_slots = 0;
  uint64_t evicted_slots = 0;
  uint64_t reused_slots = 0;
  uint64_t steps = 0;
  uint64_t demotions = 0;
  uint64_t over_budget_steps = 0;
  uint64_t thoughts[kThoughtCount] = {};
  uint64_t held_bytes = 0;
  uint64_t f16_bytes = 0;
};

struct PoolUse {
  uint64_t granted_bytes = 0;  // to this client
  uint64_t leased_bytes = 0;   // of those, not used by a sequence
  uint64_t tenant_used_bytes = 0;
  uint64_t tenant_limit_bytes = 0;
  uint64_t pool_free_bytes = 0;
  uint64_t pool_bytes = 0;
};

class Session {
 public:
  // Errors: kUnavailable, kVersionMismatch, kPermission, kExhausted (too many clients, or no
  // memory on the GPU), kUnsupported (no driver, or the pool's GPU is not visible), kDeviceFailed,
  // kNotFound (no such pool), kInvalidArgument (several pools, and which one is not clear).
  [[nodiscard]] static Result<std::unique_ptr<Session>> open(const SessionOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // The daemon's id of the model; equal geometry and name share one registration, because a
  // registration lasts as long as the connection and their number is limited.
  [[nodiscard]] Result<uint32_t> register_model(const ModelGeometry& geometry,
                                                const std::string& name);
  // Asked again when older than one second, so that a reload is seen. Errors: kNotFound.
  [[nodiscard]] Result<PolicyEntry> policy(const std::string& name);
  [[nodiscard]] Result<uint64_t> open_sequence(uint32_t model_id, uint32_t policy_id,
                                               uint32_t budget_tokens);
  // Best effort: a daemon that is gone has closed it already.
  void close_sequence(uint64_t id);
  [[nodiscard]] Status set_budget(uint64_t id, uint32_t budget_tokens);
  [[nodiscard]] Status ping();
  [[nodiscard]] Result<PoolUse> pool_use();
  [[nodiscard]] Result<std::string> status_json();

  [[nodiscard]] std::unique_ptr<LeaseSource> make_source(uint32_t page_class);
  void add_counters(const CounterDelta& delta);
  [[nodiscard]] const char* backend() const { return welcome_.backend; }
  [[nodiscard]] const char* pool() const { return welcome_.pool; }  // its name
  // Where the extents lie on the GPU; null on the host backend.
  [[nodiscard]] const DeviceWindow* device_window() const { return window_.get(); }
  // For latency measurements: 0 makes every round trip sleep.
  void set_spin(std::chrono::microseconds spin);

 private:
  Session(ControlSocket socket, std::chrono::milliseconds timeout)
      : socket_(std::move(socket)), timeout_(timeout) {}

  struct Registered {
    ModelGeometry geometry;
    std::string name;
    uint32_t id;
  };
  struct CachedPolicy {
    PolicyEntry entry;
    Clock::time_point asked;
  };

  // Says Hello, a second time on a new connection where the pool must be chosen; the Welcome is in
  // inbox_ then.
  [[nodiscard]] Status attach(const SessionOptions& options);
  // The answer, Welcome or Pools, is in inbox_.
  [[nodiscard]] Status say_hello(const SessionOptions& options, const std::string& pool);
  [[nodiscard]] Status take_welcome(ControlMessage& message);
  [[nodiscard]] Status map_regions(ControlMessage& message);
  void start_rings();
  // On the cuda backend: finds the GPU and reserves addresses for the pool.
  [[nodiscard]] Status open_window();
  // Waits for the reply to request_id_ in inbox_; Extents that arrive before it are added.
  [[nodiscard]] Status await_reply(protocol::MessageType wanted);
  [[nodiscard]] Status handle_pushed(ControlMessage& message);
  [[nodiscard]] Status receive_extents();
  template <class Body>
  [[nodiscard]] Status ask(protocol::MessageType type, const Body& body,
                           protocol::MessageType wanted);
  [[nodiscard]] Result<protocol::Completion> call(const protocol::Request& request,
                                                  const char* what);

  std::mutex mutex_;  // guards everything below
  ControlSocket socket_;
  std::chrono::milliseconds timeout_;
  protocol::Welcome welcome_{};
  UniqueFd bell_;
  MappedRange daemon_range_;
  MappedRange client_range_;
  shm::ClientRegion* client_region_ = nullptr;
  std::unique_ptr<DeviceWindow> window_;
  ExtentMap extents_;
  std::optional<Channel> channel_;
  std::vector<Lease> leases_;  // one a page class; the addresses are stable after open
  std::array<uint32_t, kPageClassCount> high_pages_{};
  ControlMessage inbox_;
  uint32_t request_id_ = 0;
  std::vector<Registered> models_;
  std::unordered_map<std::string, CachedPolicy> policies_;
};

}  // namespace thinkv::client
