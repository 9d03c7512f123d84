// control.cpp: Server, messages of the control socket.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cerrno>

#include "daemon/ipc/memfd_region.h"
#include "daemon/ipc/seq_packet.h"
#include "daemon/ipc/server.h"
#include "thinkv/version.h"

namespace thinkv::ipc {

using protocol::MessageType;
using State = Connection::State;

void Server::arm_read(Connection& connection) {
  connection.socket.async_wait(PacketSocket::wait_read,
                               [this, id = connection.id](const ErrorCondition& error) {
                                 if (!error) on_readable(id);
                               });
}

void Server::on_readable(uint64_t id) {
  constexpr int kMessagesPerTurn = 16;
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  Connection& connection = *found->second;
  for (int i = 0; i < kMessagesPerTurn; ++i) {
    if (connection.state == State::kClosing || connection.state == State::kClosed) return;
    if (!connection.bucket.take(monotonic_ns())) {
      ++counters_.throttled;
      throttled_.push_back(id);  // read again at the next tick
      return;
    }
    if (!read_one(connection)) break;
  }
  if (connection.state != State::kClosing && connection.state != State::kClosed) {
    arm_read(connection);
  }
}

// False: nothing more to read now.
bool Server::read_one(Connection& connection) {
  std::array<std::byte, limits::kControlMessageMax> buffer;
  Result<Received> received = receive_packet(connection.socket.native_handle(), buffer);
  if (!received) {
    const Error error = received.error();
    if (error.os_error == EAGAIN) return false;
    if (error.code == ErrorCode::kInvalidArgument) {
      end(connection, core::EndCause::kProtocol, error.code, error.what);
    } else {
      end(connection, core::EndCause::kKilled, ErrorCode::kOk, "");
    }
    return false;
  }
  if (received->size == 0) {  // closed; a clean client says Bye first
    end(connection, core::EndCause::kKilled, ErrorCode::kOk, "");
    return false;
  }
  ++counters_.messages;
  uint16_t peer_major = 0;
  const Result<ClientMessage> message = decode_client_message(
      std::span(buffer).first(received->size), received->fd_count, &peer_major);
  if (message) {
    handle(connection, *message, std::move(received->fds[0]));
  } else if (message.error().code == ErrorCode::kVersionMismatch) {
    reject(connection, 0, Rejection::kVersion, ErrorCode::kVersionMismatch,
           "libthinkv speaks protocol " + std::to_string(peer_major) + ", this thinkvd (" +
               kVersionText + ") speaks protocol " + std::to_string(kProtocolMajor) +
               ": upgrade the " + (peer_major < kProtocolMajor ? "library" : "daemon"));
  } else {
    end(connection, core::EndCause::kProtocol, message.error().code, message.error().what);
  }
  return true;
}

void Server::handle(Connection& connection, ClientMessage message, UniqueFd sent_fd) {
  const uint32_t request_id = message.request_id;
  if (std::holds_alternative<GetStatus>(message.body)) return on_status(connection, request_id);
  if (std::holds_alternative<Bye>(message.body)) {
    return end(connection, core::EndCause::kClean, ErrorCode::kOk, "");
  }
  if (const auto* hello = std::get_if<protocol::Hello>(&message.body)) {
    return on_hello(connection, request_id, *hello, std::move(sent_fd));
  }
  if (connection.state == State::kNew) {
    return reject(connection, request_id, Rejection::kProtocol, ErrorCode::kInvalidArgument,
                  "the first message must be Hello");
  }
  if (connection.state == State::kOperator) {
    return refuse(connection, request_id, ErrorCode::kPermission,
                  "operators only read the status: connect as an engine");
  }
  if (const auto* model = std::get_if<protocol::RegisterModel>(&message.body)) {
    core::ModelRegistered event{ClientId(connection.id), request_id, {}, model->model_name};
    event.geometry.layers = model->layers;
    event.geometry.q_heads = model->q_heads;
    event.geometry.kv_heads = model->kv_heads;
    event.geometry.head_dim = model->head_dim;
    event.geometry.value_type = static_cast<ValueType>(model->value_type);
    event.geometry.softmax_scale = model->softmax_scale;
    feed(connection, event);
  } else if (const auto* get = std::get_if<protocol::GetPolicy>(&message.body)) {
    feed(connection, core::PolicyAsked{ClientId(connection.id), request_id, get->policy_name});
  }
  publish_dirty();
}

void Server::on_hello(Connection& connection, uint32_t request_id, const protocol::Hello& hello,
                      UniqueFd sent_fd) {
  if (connection.state != State::kNew) {
    return end(connection, core::EndCause::kProtocol, ErrorCode::kInvalidArgument,
               "Hello was said before");
  }
  connection.name = hello.client_name;
  connection.hello_request_id = request_id;
  const uint32_t uid = connection.peer.uid;
  uint32_t of_user = processes_.count_of_user(uid);
  uint32_t engines = 0;
  for (const auto& [id, other] : connections_) {
    const bool known = other->state == State::kEngine || other->state == State::kOperator;
    if (known && other->peer.uid == uid) ++of_user;
    if (other->state == State::kEngine) ++engines;
  }
  if (of_user >= options_.clients_per_user_max) {
    return reject(connection, request_id, Rejection::kLimit, ErrorCode::kExhausted,
                  "user " + std::to_string(uid) + " has " + std::to_string(of_user) +
                      " clients, the most allowed: close some, or raise limits.clients_per_user");
  }
  if (hello.role == static_cast<uint32_t>(protocol::ClientRole::kOperator)) {
    connection.state = State::kOperator;
    protocol::Welcome welcome{};
    welcome.protocol_major = kProtocolMajor;
    welcome.protocol_minor = kProtocolMinor;
    welcome.boot_epoch = options_.boot_epoch;
    welcome.client_id = connection.id;
    copy_text(welcome.backend, pools_[0].backend);
    copy_text(welcome.daemon_version, kVersionText);
    return send(connection, encode(MessageType::kWelcome, request_id, welcome));
  }
  if (engines >= options_.clients_max) {
    return reject(connection, request_id, Rejection::kLimit, ErrorCode::kExhausted,
                  std::to_string(engines) +
                      " clients are connected, the most allowed: close some, or raise "
                      "limits.clients");
  }
  if (!choose_pool(connection, request_id, hello)) return;
  Result<UniqueFd> pidfd =
      verified_pidfd(connection.socket.native_handle(), connection.peer, std::move(sent_fd));
  if (!pidfd) {
    return reject(connection, request_id, Rejection::kPermission, pidfd.error().code,
                  pidfd.error().what);
  }
  admit_engine(connection, request_id, std::move(*pidfd));
}

bool Server::choose_pool(Connection& connection, uint32_t request_id,
                         const protocol::Hello& hello) {
  if (hello.pool[0] == '\0' && pools_.size() > 1) {
    send(connection, encode(MessageType::kPools, request_id, pools_message(pools_)));
    finish(connection);
    return false;
  }
  const std::optional<PoolIndex> found = find_pool(pools_, hello.pool);
  if (!found) {
    reject(connection, request_id, Rejection::kPool, ErrorCode::kNotFound,
           "no pool '" + std::string(hello.pool) + "'; there are: " + pool_names(pools_));
    return false;
  }
  connection.pool = *found;
  return true;
}

void Server::admit_engine(Connection& connection, uint32_t request_id, UniqueFd pidfd) {
  Result<std::unique_ptr<ClientLink>> link = ClientLink::create(options_.boot_epoch);
  if (!link) {
    return reject(connection, request_id, Rejection::kResources, link.error().code,
                  std::string("no memory or descriptors for another client: ") + link.error().what);
  }
  connection.link = std::move(*link);
  connection.process_key =
      processes_.connect(connection.peer.pid, connection.peer.uid, std::move(pidfd));
  connection.state = State::kEngine;  // the core's answers find it
  feed(connection,
       core::ClientConnected{ClientId(connection.id), core::ProcessKey(connection.process_key),
                             connection.peer.pid, connection.peer.uid, connection.peer.gid,
                             connection.peer.groups, connection.name});
  if (connection.state != State::kEngine) return;
  arm_bell(connection);
  heat(connection);
}

void Server::on_status(Connection& connection, uint32_t request_id) {
  const std::string json = host_->status_json();
  const Result<UniqueFd> text = make_text_memfd("thinkv-status", json);
  if (!text) {
    return refuse(connection, request_id, text.error().code, "no memory for the status");
  }
  protocol::StatusReply reply{};
  reply.json_bytes = json.size();
  const int fds[] = {text->get()};
  send(connection, encode(MessageType::kStatusReply, request_id, reply, 1), fds);
}

void Server::send(Connection& connection, const Packet& packet, std::span<const int> fds) {
  switch (connection.send(packet, fds)) {
    case SendResult::kSent:
      return;
    case SendResult::kQueued:
      return arm_write(connection);
    case SendResult::kOverflow:
      if (connection.state == State::kEngine) {
        connection.link->close(ErrorCode::kExhausted);
        // Not at once: the caller is in the middle of a list of actions about this client.
        follow_ups_.push_back(
            {connection.pool, core::ClientGone{ClientId(connection.id), core::EndCause::kSlow}});
      }
      return drop(connection);
    case SendResult::kGone:
      if (connection.state == State::kEngine) {
        follow_ups_.push_back(
            {connection.pool, core::ClientGone{ClientId(connection.id), core::EndCause::kKilled}});
      }
      return drop(connection);
  }
}

void Server::refuse(Connection& connection, uint32_t request_id, ErrorCode code,
                    const std::string& text) {
  send(connection, encode_refused(request_id, code, text));
}

void Server::reject(Connection& connection, uint32_t request_id, Rejection reason, ErrorCode code,
                    const std::string& text) {
  ++counters_.rejected[static_cast<size_t>(reason)];
  if (may_log()) {
    spdlog::warn("connection of pid {} (uid {}) refused: {}", connection.peer.pid,
                 connection.peer.uid, text);
  }
  refuse(connection, request_id, code, text);
  finish(connection);
}

void Server::arm_write(Connection& connection) {
  if (connection.write_armed) return;
  connection.write_armed = true;
  connection.socket.async_wait(PacketSocket::wait_write,
                               [this, id = connection.id](const ErrorCondition& error) {
                                 if (!error) on_writable(id);
                               });
}

void Server::on_writable(uint64_t id) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  Connection& connection = *found->second;
  connection.write_armed = false;
  if (connection.state == State::kClosed) return;
  switch (connection.flush()) {
    case SendResult::kQueued:
      return arm_write(connection);
    case SendResult::kSent:
      if (connection.state == State::kClosing) drop(connection);
      return;
    case SendResult::kOverflow:
    case SendResult::kGone:
      return end(connection, core::EndCause::kKilled, ErrorCode::kOk, "");
  }
}

void Server::end(Connection& connection, core::EndCause cause, ErrorCode code,
                 const std::string& text) {
  if (connection.state == State::kClosing || connection.state == State::kClosed) return;
  const bool engine = connection.state == State::kEngine;
  if (!engine && cause == core::EndCause::kProtocol) {
    ++counters_.rejected[static_cast<size_t>(Rejection::kProtocol)];
  }
  if (code != ErrorCode::kOk && may_log()) {
    spdlog::warn("client {} '{}' (pid {}, uid {}): {}", connection.id, connection.name,
                 connection.peer.pid, connection.peer.uid, text);
  }
  if (engine && code == ErrorCode::kOk && may_log()) {
    spdlog::info("client {} '{}' ended: {}", connection.id, connection.name,
                 core::end_cause_name(cause));
  }
  if (engine && code != ErrorCode::kOk) connection.link->close(code);
  if (code != ErrorCode::kOk) refuse(connection, 0, code, text);
  finish(connection);
  if (engine) {
    feed(connection, core::ClientGone{ClientId(connection.id), cause});
    publish_dirty();
  }
}

void Server::finish(Connection& connection) {
  if (connection.state == State::kClosed) return;
  if (!connection.backlog()) return drop(connection);
  connection.state = State::kClosing;
}

void Server::drop(Connection& connection) {
  if (connection.state == State::kClosed) return;
  connection.state = State::kClosed;
  connection.drain();
  closed_.push_back(connection.id);
}

}  // namespace thinkv::ipc
