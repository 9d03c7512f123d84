// actions.cpp: Server, what the core wants done.
#include <spdlog/spdlog.h>

#include <cerrno>
#include <cstring>

#include "daemon/ipc/server.h"
#include "thinkv/internal/shm_layout.h"
#include "thinkv/version.h"

namespace thinkv::ipc {

using protocol::MessageType;
using State = Connection::State;

// Actions can call for events (ExtentReady, ClientGone): these wait until the list is done.
void Server::feed(PoolIndex pool, const core::Event& event) {
  const auto step = [this](PoolIndex of, const core::Event& one) {
    current_pool_ = of;
    pools_[of.value()].service->step(one, monotonic_ns(), &actions_);
    execute(actions_);
  };
  step(pool, event);
  while (!follow_ups_.empty()) {
    const FollowUp next = std::move(follow_ups_.front());
    follow_ups_.pop_front();
    step(next.pool, next.event);
  }
}

void Server::feed(const Connection& connection, const core::Event& event) {
  feed(connection.pool, event);
}

// What is about the whole daemon, or about a process, which may be a client of several pools.
void Server::feed_all(const core::Event& event) {
  for (uint32_t i = 0; i < pools_.size(); ++i) feed(PoolIndex(i), event);
}

void Server::execute(const core::Actions& actions) {
  current_ = &actions;
  for (const core::Action& action : actions.list) {
    std::visit([this](const auto& one) { perform(one); }, action);
  }
  current_ = nullptr;
}

Connection* Server::engine(ClientId id) {
  const auto found = connections_.find(id.value());
  if (found == connections_.end() || found->second->state != State::kEngine) return nullptr;
  return found->second.get();
}

void Server::perform(const core::Admit& action) {
  Connection* connection = engine(action.client);
  if (connection == nullptr) return;
  protocol::Welcome welcome{};
  welcome.protocol_major = kProtocolMajor;
  welcome.protocol_minor = kProtocolMinor;
  welcome.boot_epoch = options_.boot_epoch;
  welcome.client_id = connection->id;
  welcome.daemon_region_bytes = sizeof(shm::DaemonRegion);
  welcome.client_region_bytes = sizeof(shm::ClientRegion);
  copy_text(welcome.tenant, action.tenant_name);
  const ServedPool& pool = pools_[current_pool_.value()];
  copy_text(welcome.backend, pool.backend);
  copy_text(welcome.daemon_version, kVersionText);
  std::memcpy(welcome.device_uuid, pool.device.bytes.data(), sizeof(welcome.device_uuid));
  welcome.extent_bytes = pool.extent_bytes;
  copy_text(welcome.pool, pool.name);
  const ClientLink& link = *connection->link;
  const int fds[] = {link.daemon_region_fd(), link.client_region_fd(), link.bell_fd()};
  send(*connection, encode(MessageType::kWelcome, connection->hello_request_id, welcome, 3), fds);
  spdlog::info("client {} '{}' connected (pid {}, uid {}, tenant {}, pool {})", connection->id,
               connection->name, connection->peer.pid, connection->peer.uid, action.tenant_name,
               pool.name);
}

void Server::perform(const core::Refuse& action) {
  Connection* connection = engine(action.client);
  if (connection == nullptr) return;
  const bool hello = action.fatal && action.request_id == 0;
  const uint32_t request_id = hello ? connection->hello_request_id : action.request_id;
  if (action.fatal) {
    reject(*connection, request_id, Rejection::kPermission, action.code, action.text);
  } else {
    refuse(*connection, request_id, action.code, action.text);
  }
}

void Server::perform(const core::ReplyModel& action) {
  if (Connection* connection = engine(action.client)) {
    send(*connection, encode(MessageType::kModelRegistered, action.request_id, action.reply));
  }
}

void Server::perform(const core::ReplyPolicy& action) {
  if (Connection* connection = engine(action.client)) {
    send(*connection, encode(MessageType::kPolicyReply, action.request_id, action.reply));
  }
}

void Server::perform(const core::SendExtent& action) {
  Connection* connection = engine(action.client);
  if (connection == nullptr) return;
  const Result<int> fd = host_->export_fd(current_pool_, ExtentId(action.message.extent_id));
  if (!fd) {
    spdlog::error("extent {} has no descriptor: {}", action.message.extent_id, fd.error().what);
    follow_ups_.push_back({current_pool_, core::ClientGone{action.client, core::EndCause::kSlow}});
    return drop(*connection);
  }
  processes_.mark_mapper(connection->process_key);
  const int fds[] = {*fd};
  send(*connection, encode(MessageType::kExtent, 0, action.message, 1), fds);
}

void Server::perform(const core::GrantPages& action) {
  Connection* connection = engine(action.client);
  if (connection == nullptr) return;
  if (!connection->link->push_grants(action.page_class, current_->pages_of(action))) {
    // The core counts what fits: the client moved its head backwards.
    follow_ups_.push_back(
        {current_pool_, core::ClientGone{action.client, core::EndCause::kProtocol}});
    connection->link->close(ErrorCode::kInvalidArgument);
    return drop(*connection);
  }
  mark_dirty(*connection);
}

void Server::perform(const core::Complete& action) {
  Connection* connection = engine(action.client);
  if (connection == nullptr) return;
  if (!connection->link->push_completion(action.completion)) {
    follow_ups_.push_back(
        {current_pool_, core::ClientGone{action.client, core::EndCause::kProtocol}});
    connection->link->close(ErrorCode::kInvalidArgument);
    return drop(*connection);
  }
  mark_dirty(*connection);
}

// Committing 64 MiB takes some 10 ms: one extent a turn, so that rings are served in between.
void Server::perform(const core::CreateExtent& action) {
  creations_.push_back({current_pool_, action});
}

void Server::create_one_extent() {
  if (creations_.empty()) return;
  const auto [pool, next] = creations_.front();
  creations_.pop_front();
  const Status made = host_->create_extent(pool, next.extent, next.bytes);
  if (made) {
    feed(pool, core::ExtentReady{next.extent});
  } else {
    const Error error = made.error();
    if (may_log()) {
      spdlog::error("extent {} of {} bytes of pool {} cannot be made: {} (error {})",
                    next.extent.value(), next.bytes, pools_[pool.value()].name, error.what,
                    error.os_error);
    }
    feed(pool,
         core::ExtentFailed{next.extent, error.os_error, error.code == ErrorCode::kDeviceFailed});
  }
  publish_dirty();
}

void Server::perform(const core::ReleaseExtent& action) {
  host_->release_extent(current_pool_, action.extent);
}

void Server::perform(const core::Disconnect& action) {
  Connection* connection = engine(action.client);
  if (connection == nullptr) return;
  if (action.cause != core::EndCause::kShutdown && may_log()) {
    spdlog::warn("client {} '{}' (pid {}, uid {}) disconnected: {}", connection->id,
                 connection->name, connection->peer.pid, connection->peer.uid, action.text);
  }
  connection->link->close(action.code);
  refuse(*connection, 0, action.code, action.text);
  finish(*connection);
}

void Server::perform(const core::ReloadResult& action) {
  reload_result_ = action;
}

void Server::mark_dirty(Connection& connection) {
  if (connection.dirty) return;
  connection.dirty = true;
  dirty_.push_back(&connection);
}

void Server::publish_dirty() {
  for (Connection* connection : dirty_) {
    connection->dirty = false;
    if (connection->state == State::kEngine) connection->link->publish();
  }
  dirty_.clear();
}

}  // namespace thinkv::ipc
