// accept.cpp: Server, new connections.
#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "daemon/ipc/server.h"

namespace thinkv::ipc {
namespace {

// Beside the clients: operators, and connections that have not said Hello yet.
constexpr size_t kOtherConnectionsMax = 64;
constexpr auto kBackOff = std::chrono::milliseconds(100);

}  // namespace

void Server::arm_accept() {
  acceptor_.async_wait(boost::asio::posix::stream_descriptor::wait_read,
                       [this](const ErrorCondition& error) {
                         if (!error && !stopping_) on_acceptable();
                       });
}

void Server::on_acceptable() {
  constexpr int kAcceptsPerTurn = 16;
  for (int i = 0; i < kAcceptsPerTurn; ++i) {
    UniqueFd fd(
        ::accept4(acceptor_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd.valid()) {
      accept_one(std::move(fd));
      continue;
    }
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno == EAGAIN) break;
    ++counters_.accept_failures;
    shed_connection();
    // The socket stays readable: waiting on it again at once would spin.
    accept_timer_.expires_after(kBackOff);
    accept_timer_.async_wait([this](const ErrorCondition& error) {
      if (!error) arm_accept();
    });
    return;
  }
  arm_accept();
}

void Server::shed_connection() {
  if (may_log()) {
    spdlog::error("cannot accept a connection: {} (raise LimitNOFILE?)", std::strerror(errno));
  }
  reserve_fd_.reset();
  // Accepted and closed: the client sees the end of the connection and not a hang.
  const UniqueFd unlucky(
      ::accept4(acceptor_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  reserve_fd_.reset(::open("/dev/null", O_RDONLY | O_CLOEXEC));
}

void Server::accept_one(UniqueFd fd) {
  ++counters_.accepted;
  Result<Peer> peer = peer_of(fd.get());
  if (!peer) {
    ++counters_.rejected[static_cast<size_t>(Rejection::kPermission)];
    return;
  }
  const uint64_t now = monotonic_ns();
  PacketSocket socket(io_);
  ErrorCondition error;
  const int raw = fd.release();
  socket.assign(boost::asio::generic::seq_packet_protocol(AF_UNIX, 0), raw, error);
  if (error) {
    UniqueFd closer(raw);
    return;
  }
  const uint64_t id = ++last_id_;
  auto connection = std::make_unique<Connection>(
      id, std::move(socket), std::move(*peer), TokenBucket(options_.messages_per_second, now), now);
  Connection& added = *connection;
  connections_[id] = std::move(connection);
  if (connections_.size() > options_.clients_max + kOtherConnectionsMax) {
    reject(added, 0, Rejection::kLimit, ErrorCode::kExhausted,
           "too many connections: close some, or raise limits.clients");
    return;
  }
  arm_read(added);
}

}  // namespace thinkv::ipc
