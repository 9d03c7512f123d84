// server.h: the daemon's event loop: sockets, rings and processes in, the core's actions out.
//
// One thread runs everything. Control sockets, bells, pidfds and timers wait in an io_context;
// rings of clients that were active within the last 50 us are polled between its turns ("hot"),
// all others are marked parked and ring their bell. Nothing a client does makes the loop wait:
// reads and writes never block, every queue and every turn has a bound (limits.h).
// Threads: all calls from the loop's thread, except where a function says otherwise.
#pragma once

#include <utility>

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/core/service.h"
#include "daemon/ipc/connection.h"
#include "daemon/ipc/listener.h"
#include "daemon/ipc/pool_choice.h"
#include "daemon/ipc/process_table.h"

namespace thinkv::ipc {

// What the server needs done but does not do itself. A pool is meant by its place in the list that
// the server was given.
class Host {
 public:
  virtual ~Host() = default;
  [[nodiscard]] virtual Status create_extent(PoolIndex pool, ExtentId extent, uint64_t bytes) = 0;
  virtual void release_extent(PoolIndex pool, ExtentId extent) = 0;
  // Borrowed until release_extent.
  [[nodiscard]] virtual Result<int> export_fd(PoolIndex pool, ExtentId extent) const = 0;
  [[nodiscard]] virtual std::string status_json() = 0;
  virtual void tick() = 0;  // about every 200 ms
};

struct ServerOptions {
  uint64_t boot_epoch = 0;
  uint32_t clients_max = limits::kClientsMax;
  uint32_t clients_per_user_max = limits::kClientsPerUidMax;
  uint32_t messages_per_second = 1000;
  uint64_t slow_client_ns = 30'000'000'000u;
};

enum class Rejection : uint8_t {
  kVersion,
  kLimit,
  kProtocol,
  kPermission,
  kResources,
  kTimeout,
  kPool  // none of that name
};
inline constexpr uint32_t kRejectionCount = 7;
[[nodiscard]] const char* rejection_name(Rejection reason);

// Since start.
struct ServerCounters {
  uint64_t accepted = 0;
  std::array<uint64_t, kRejectionCount> rejected{};
  uint64_t messages = 0;
  uint64_t throttled = 0;
  uint64_t bells = 0;
  uint64_t parks = 0;
  uint64_t completions_full = 0;  // turns in which a client's completion ring had no place
  uint64_t accept_failures = 0;   // no descriptor left
  uint64_t loop_lag_ns = 0;       // of the last tick
  uint64_t loop_lag_max_ns = 0;
};

class Server {
 public:
  // Requires: at least one pool.
  Server(const ServerOptions& options, Listener listener, std::vector<ServedPool> pools,
         Host* host);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  [[nodiscard]] boost::asio::io_context& io() { return io_; }
  // Until shutdown() is done. Errors: kInternal, what Asio threw.
  [[nodiscard]] Status run();
  // Tells clients, closes them, and lets run() return when they are served, at most 1 s later.
  void shutdown();
  // One configuration for each pool: all of them are taken, or none.
  [[nodiscard]] core::ReloadResult reload(std::span<const core::Config> configs);
  void set_limits(const ServerOptions& options);

  [[nodiscard]] const ServerCounters& counters() const { return counters_; }
  struct ClientView {
    uint64_t id;
    ReportedCounters counters;
    uint32_t requests_waiting;
    uint32_t unanswered;
    bool parked;
  };
  [[nodiscard]] std::vector<ClientView> clients();
  [[nodiscard]] size_t connection_count() const { return connections_.size(); }

 private:
  using ErrorCondition = boost::system::error_code;

  // accept.cpp
  void arm_accept();
  void on_acceptable();
  void accept_one(UniqueFd fd);
  void shed_connection();

  // control.cpp
  void arm_read(Connection& connection);
  void on_readable(uint64_t id);
  [[nodiscard]] bool read_one(Connection& connection);
  void handle(Connection& connection, ClientMessage message, UniqueFd sent_fd);
  void on_hello(Connection& connection, uint32_t request_id, const protocol::Hello& hello,
                UniqueFd sent_fd);
  void admit_engine(Connection& connection, uint32_t request_id, UniqueFd pidfd);
  // The pool that the client named, or the only one. False: it was told what there is instead.
  [[nodiscard]] bool choose_pool(Connection& connection, uint32_t request_id,
                                 const protocol::Hello& hello);
  void on_status(Connection& connection, uint32_t request_id);
  void send(Connection& connection, const Packet& packet, std::span<const int> fds = {});
  void refuse(Connection& connection, uint32_t request_id, ErrorCode code, const std::string& text);
  void reject(Connection& connection, uint32_t request_id, Rejection reason, ErrorCode code,
              const std::string& text);
  void arm_write(Connection& connection);
  void on_writable(uint64_t id);
  // Ends an engine for a fault that the shell found, or closes anybody else.
  void end(Connection& connection, core::EndCause cause, ErrorCode code, const std::string& text);
  void finish(Connection& connection);  // closes after what is queued
  void drop(Connection& connection);    // closes now

  // actions.cpp
  void feed(PoolIndex pool, const core::Event& event);
  void feed(const Connection& connection, const core::Event& event);
  void feed_all(const core::Event& event);
  void execute(const core::Actions& actions);
  void perform(const core::Admit& action);
  void perform(const core::Refuse& action);
  void perform(const core::ReplyModel& action);
  void perform(const core::ReplyPolicy& action);
  void perform(const core::SendExtent& action);
  void perform(const core::GrantPages& action);
  void perform(const core::Complete& action);
  void perform(const core::CreateExtent& action);
  void perform(const core::ReleaseExtent& action);
  void perform(const core::Disconnect& action);
  void perform(const core::ReloadResult& action);
  void create_one_extent();
  void publish_dirty();
  void mark_dirty(Connection& connection);
  [[nodiscard]] Connection* engine(ClientId id);

  // server.cpp
  void turn();
  [[nodiscard]] bool serve(Connection& connection);
  void heat(Connection& connection);
  void arm_bell(Connection& connection);
  void on_bell(uint64_t id);
  void on_process_exit(uint64_t key);
  void arm_tick();
  void on_tick();
  void check_deadlines(Connection& connection, uint64_t now);
  void reap();
  [[nodiscard]] bool may_log();

  ServerOptions options_;
  Listener listener_;
  std::vector<ServedPool> pools_;
  Host* host_;
  boost::asio::io_context io_;
  boost::asio::posix::stream_descriptor acceptor_;
  boost::asio::steady_timer tick_timer_;
  boost::asio::steady_timer accept_timer_;
  ProcessTable processes_;
  UniqueFd reserve_fd_;  // given up for a moment to accept and close when no descriptor is left

  std::unordered_map<uint64_t, std::unique_ptr<Connection>> connections_;
  std::vector<Connection*> hot_;
  std::vector<Connection*> dirty_;
  std::vector<uint64_t> throttled_;
  std::vector<uint64_t> closed_;
  uint64_t last_id_ = 0;

  core::Actions actions_;
  const core::Actions* current_ = nullptr;  // whose pages GrantPages refers to
  PoolIndex current_pool_;                  // whose actions they are
  struct FollowUp {
    PoolIndex pool;
    core::Event event;
  };
  std::deque<FollowUp> follow_ups_;  // of actions, fed when their list is done
  struct Creation {
    PoolIndex pool;
    core::CreateExtent extent;
  };
  std::deque<Creation> creations_;
  core::ReloadResult reload_result_;
  std::vector<uint32_t> returned_;

  ServerCounters counters_;
  uint64_t tick_due_ns_ = 0;
  uint32_t log_lines_left_ = 0;
  uint64_t log_lines_lost_ = 0;
  bool stopping_ = false;
  uint64_t stop_deadline_ns_ = 0;
};

[[nodiscard]] uint64_t monotonic_ns();

}  // namespace thinkv::ipc
