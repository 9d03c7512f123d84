#include "daemon/ipc/server.h"

#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <exception>

#include "thinkv/internal/check.h"

namespace thinkv::ipc {
namespace {

using State = Connection::State;

// A request that follows the last one within this time is served without a wake-up (which costs
// 5 to 20 us); longer would only burn the processor that the engine wants.
constexpr uint64_t kHotNs = 50'000;
constexpr uint32_t kTurnsPerPoll = 64;  // ring turns between two looks at sockets, while hot
constexpr auto kTick = std::chrono::milliseconds(200);
constexpr uint64_t kTickNs = 200'000'000u;
constexpr uint32_t kLogLinesPerTick = 10;
constexpr uint64_t kHelloNs = 5'000'000'000u;  // from connect to Hello
constexpr uint64_t kStopNs = 1'000'000'000u;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

uint64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}

const char* rejection_name(Rejection reason) {
  switch (reason) {
    case Rejection::kVersion:
      return "version";
    case Rejection::kLimit:
      return "limit";
    case Rejection::kProtocol:
      return "protocol";
    case Rejection::kPermission:
      return "permission";
    case Rejection::kResources:
      return "resources";
    case Rejection::kTimeout:
      return "timeout";
    case Rejection::kPool:
      return "pool";
  }
  return "other";
}

Server::Server(const ServerOptions& options, Listener listener, std::vector<ServedPool> pools,
               Host* host)
    : options_(options),
      listener_(std::move(listener)),
      pools_(std::move(pools)),
      host_(host),
      io_(1),
      acceptor_(io_, ::fcntl(listener_.fd(), F_DUPFD_CLOEXEC, 0)),
      tick_timer_(io_),
      accept_timer_(io_),
      processes_(io_, [this](uint64_t key) { on_process_exit(key); }),
      reserve_fd_(::open("/dev/null", O_RDONLY | O_CLOEXEC)),
      returned_(limits::kReturnsPerTurn),
      log_lines_left_(kLogLinesPerTick) {}

Server::~Server() = default;

Status Server::run() {
  try {
    arm_accept();
    arm_tick();
    uint32_t turns = 0;
    for (;;) {
      const bool idle = hot_.empty() && creations_.empty();
      if (idle) {
        io_.run_one();
      } else if (turns++ % kTurnsPerPoll == 0) {
        io_.poll();
      }
      turn();
      if (stopping_ && (connections_.empty() || monotonic_ns() >= stop_deadline_ns_)) return {};
    }
  } catch (const std::exception& error) {
    spdlog::critical("event loop: {}", error.what());
    return make_error(ErrorCode::kInternal, "event loop");
  }
}

void Server::turn() {
  const uint64_t now = monotonic_ns();
  bool worked = !creations_.empty();
  create_one_extent();
  for (size_t i = 0; i < hot_.size();) {
    Connection& connection = *hot_[i];
    bool keep = connection.state == State::kEngine;
    if (keep && serve(connection)) {
      connection.last_work_ns = now;
      worked = true;
    } else if (keep && now - connection.last_work_ns > kHotNs) {
      keep = !connection.link->try_park();
      if (!keep) ++counters_.parks;
    }
    if (keep) {
      ++i;
    } else {
      connection.hot = false;
      hot_[i] = hot_.back();
      hot_.pop_back();
    }
  }
  reap();
  if (!worked && !hot_.empty()) pause_briefly();
}

// One turn of a client's rings, within its budget. True: there was something.
bool Server::serve(Connection& connection) {
  ClientLink& link = *connection.link;
  const ClientId id(connection.id);
  // Before the grant heads: a request may count on grants that were consumed before it was made.
  const uint32_t ready = std::min(link.requests_ready(), limits::kRequestsPerTurn);
  bool worked = ready > 0;
  for (uint32_t c = 0; c < kPageClassCount && connection.state == State::kEngine; ++c) {
    const uint64_t consumed = link.take_consumed(c);
    if (consumed > 0) feed(connection, core::GrantsConsumed{id, c, consumed});
    if (connection.state != State::kEngine) break;
    const uint32_t returned = link.take_returns(c, returned_);
    if (returned > 0) {
      feed(connection, core::PagesReturned{id, c, std::span(returned_).first(returned)});
    }
    worked = worked || consumed > 0 || returned > 0;
  }
  for (uint32_t i = 0; i < ready && connection.state == State::kEngine; ++i) {
    feed(connection, core::RequestArrived{id, link.take_request()});
  }
  if (connection.state != State::kEngine) {
    publish_dirty();
    return true;
  }
  if (link.broken()) {
    end(connection, core::EndCause::kProtocol, ErrorCode::kInvalidArgument,
        "an index of a ring is where it cannot be");
    return true;
  }
  if (link.stalled()) {
    ++counters_.completions_full;
    if (connection.stalled_since_ns == 0) connection.stalled_since_ns = monotonic_ns();
  } else {
    connection.stalled_since_ns = 0;
  }
  if (worked) mark_dirty(connection);
  publish_dirty();
  return worked;
}

void Server::heat(Connection& connection) {
  connection.last_work_ns = monotonic_ns();
  if (connection.hot) return;
  connection.hot = true;
  connection.link->unpark();
  hot_.push_back(&connection);
}

void Server::arm_bell(Connection& connection) {
  if (connection.bell == nullptr) {
    const int copy = ::fcntl(connection.link->bell_fd(), F_DUPFD_CLOEXEC, 0);
    if (copy < 0) {
      return end(connection, core::EndCause::kSlow, ErrorCode::kExhausted,
                 "no descriptor left for the bell");
    }
    connection.bell = std::make_unique<boost::asio::posix::stream_descriptor>(io_, copy);
  }
  connection.bell->async_wait(boost::asio::posix::stream_descriptor::wait_read,
                              [this, id = connection.id](const ErrorCondition& error) {
                                if (!error) on_bell(id);
                              });
}

void Server::on_bell(uint64_t id) {
  Connection* connection = engine(ClientId(id));
  if (connection == nullptr) return;
  ++counters_.bells;
  connection->link->silence_bell();
  arm_bell(*connection);
  if (connection->state == State::kEngine) heat(*connection);
}

void Server::on_process_exit(uint64_t key) {
  feed_all(core::ProcessExited{core::ProcessKey(key)});
  for (auto& [id, connection] : connections_) {
    if (connection->process_key != key || connection->state == State::kClosed) continue;
    connection->process_key = 0;
    if (may_log()) {
      spdlog::info("client {} '{}' ended: its process exited", connection->id, connection->name);
    }
    drop(*connection);
  }
  publish_dirty();
}

void Server::arm_tick() {
  tick_due_ns_ = monotonic_ns() + kTickNs;
  tick_timer_.expires_after(kTick);
  tick_timer_.async_wait([this](const ErrorCondition& error) {
    if (!error) on_tick();
  });
}

void Server::on_tick() {
  const uint64_t now = monotonic_ns();
  counters_.loop_lag_ns = now > tick_due_ns_ ? now - tick_due_ns_ : 0;
  counters_.loop_lag_max_ns = std::max(counters_.loop_lag_max_ns, counters_.loop_lag_ns);
  if (log_lines_lost_ > 0) {
    spdlog::warn("{} log lines about clients were left out", log_lines_lost_);
    log_lines_lost_ = 0;
  }
  log_lines_left_ = kLogLinesPerTick;
  for (const uint64_t id : std::exchange(throttled_, {})) {
    const auto found = connections_.find(id);
    if (found != connections_.end() && found->second->state < State::kClosing) {
      arm_read(*found->second);
    }
  }
  for (auto& [id, connection] : connections_) check_deadlines(*connection, now);
  host_->tick();
  arm_tick();
}

void Server::check_deadlines(Connection& connection, uint64_t now) {
  if (connection.state == State::kNew && now - connection.accepted_ns > kHelloNs) {
    return reject(connection, 0, Rejection::kTimeout, ErrorCode::kInvalidArgument,
                  "no Hello within 5 s");
  }
  if (connection.state == State::kClosing && now - connection.accepted_ns > kHelloNs &&
      connection.flush() != SendResult::kSent) {
    return drop(connection);
  }
  if (connection.state != State::kEngine) return;
  // Also serves clients that moved a ring without ringing, and those whose completions were full.
  (void)serve(connection);
  if (connection.state != State::kEngine || connection.stalled_since_ns == 0) return;
  if (now > connection.stalled_since_ns &&
      now - connection.stalled_since_ns > options_.slow_client_ns) {
    end(connection, core::EndCause::kSlow, ErrorCode::kExhausted,
        "completions were not read for too long (limits.slow_client)");
  }
}

void Server::reap() {
  if (closed_.empty()) return;
  for (const uint64_t id : std::exchange(closed_, {})) {
    const auto found = connections_.find(id);
    if (found == connections_.end()) continue;
    Connection* connection = found->second.get();
    std::erase(hot_, connection);
    std::erase(dirty_, connection);
    const uint64_t key = connection->process_key;
    connections_.erase(found);
    // Nothing of this process can be mapped: the core need not wait for its end.
    if (key != 0 && processes_.disconnect(key))
      feed_all(core::ProcessExited{core::ProcessKey(key)});
  }
  publish_dirty();
}

bool Server::may_log() {
  if (log_lines_left_ == 0) {
    ++log_lines_lost_;
    return false;
  }
  --log_lines_left_;
  return true;
}

void Server::shutdown() {
  if (stopping_) return;
  stopping_ = true;
  stop_deadline_ns_ = monotonic_ns() + kStopNs;
  ErrorCondition ignored;
  acceptor_.close(ignored);
  accept_timer_.cancel();
  listener_.close();
  feed_all(core::Shutdown{});
  for (auto& [id, connection] : connections_) {
    if (connection->state == State::kNew || connection->state == State::kOperator) {
      finish(*connection);
    } else if (connection->state == State::kEngine) {
      end(*connection, core::EndCause::kShutdown, ErrorCode::kUnavailable, "thinkvd stops");
    }
  }
}

core::ReloadResult Server::reload(std::span<const core::Config> configs) {
  THINKV_CHECK(configs.size() == pools_.size());
  for (size_t i = 0; i < pools_.size() && pools_.size() > 1; ++i) {
    std::string why;
    const Status possible = pools_[i].service->check_reload(configs[i], &why);
    if (!possible) return {possible.error().code, "pool '" + pools_[i].name + "': " + why};
  }
  reload_result_ = {};
  for (uint32_t i = 0; i < pools_.size(); ++i) {
    feed(PoolIndex(i), core::ConfigReloaded{&configs[i]});
    if (reload_result_.code != ErrorCode::kOk) break;  // with several, it was possible a moment ago
  }
  publish_dirty();
  return reload_result_;
}

void Server::set_limits(const ServerOptions& options) {
  options_.clients_max = options.clients_max;
  options_.clients_per_user_max = options.clients_per_user_max;
  options_.messages_per_second = options.messages_per_second;
  options_.slow_client_ns = options.slow_client_ns;
}

std::vector<Server::ClientView> Server::clients() {
  std::vector<ClientView> views;
  for (auto& [id, connection] : connections_) {
    if (connection->state != State::kEngine) continue;
    ClientLink& link = *connection->link;
    views.push_back(
        {id, link.counters(), link.requests_waiting(), link.unanswered(), link.parked()});
  }
  std::sort(views.begin(), views.end(),
            [](const ClientView& a, const ClientView& b) { return a.id < b.id; });
  return views;
}

}  // namespace thinkv::ipc
