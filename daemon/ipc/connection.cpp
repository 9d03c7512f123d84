#include "daemon/ipc/connection.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "daemon/ipc/seq_packet.h"

namespace thinkv::ipc {
namespace {

bool try_later(const Error& error) {
  // ETOOMANYREFS: too many descriptors in flight to this user; they go down as it reads.
  return error.os_error == EAGAIN || error.os_error == ENOBUFS || error.os_error == ENOMEM ||
         error.os_error == ETOOMANYREFS;
}

}  // namespace

TokenBucket::TokenBucket(uint32_t per_second, uint64_t now_ns)
    : cost_ns_(1'000'000'000u / per_second),
      burst_ns_(std::max<uint64_t>(100'000'000u, cost_ns_)),
      credit_ns_(burst_ns_),
      last_ns_(now_ns) {}

bool TokenBucket::take(uint64_t now_ns) {
  credit_ns_ = std::min(burst_ns_, credit_ns_ + (now_ns - last_ns_));
  last_ns_ = now_ns;
  if (credit_ns_ < cost_ns_) return false;
  credit_ns_ -= cost_ns_;
  return true;
}

Connection::Connection(uint64_t connection_id, PacketSocket accepted, Peer who, TokenBucket tokens,
                       uint64_t now_ns)
    : id(connection_id),
      socket(std::move(accepted)),
      peer(std::move(who)),
      bucket(tokens),
      accepted_ns(now_ns) {}

SendResult Connection::send(const Packet& packet, std::span<const int> fds) {
  if (state == State::kClosed) return SendResult::kGone;
  if (!queue_.empty()) return enqueue(packet, fds);
  const Status sent = send_packet(socket.native_handle(), packet.view(), fds);
  if (sent) return SendResult::kSent;
  return try_later(sent.error()) ? enqueue(packet, fds) : SendResult::kGone;
}

SendResult Connection::enqueue(const Packet& packet, std::span<const int> fds) {
  if (queue_bytes_ + packet.size > limits::kControlBacklogBytesMax) return SendResult::kOverflow;
  const std::span<const std::byte> bytes = packet.view();
  Waiting waiting{{bytes.begin(), bytes.end()}, {}};
  for (const int fd : fds) {
    UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!copy.valid()) return SendResult::kOverflow;
    waiting.fds.push_back(std::move(copy));
  }
  queue_bytes_ += packet.size;
  queue_.push_back(std::move(waiting));
  return SendResult::kQueued;
}

SendResult Connection::flush() {
  while (!queue_.empty()) {
    const Waiting& next = queue_.front();
    std::array<int, limits::kFdsPerMessageMax> fds{};
    std::transform(next.fds.begin(), next.fds.end(), fds.begin(),
                   [](const UniqueFd& fd) { return fd.get(); });
    const Status sent =
        send_packet(socket.native_handle(), next.bytes, std::span(fds).first(next.fds.size()));
    if (!sent) return try_later(sent.error()) ? SendResult::kQueued : SendResult::kGone;
    queue_bytes_ -= next.bytes.size();
    queue_.pop_front();
  }
  return SendResult::kSent;
}

void Connection::drain() {
  constexpr int kPacketsMax = 64;
  std::array<std::byte, limits::kControlMessageMax> buffer;
  for (int i = 0; i < kPacketsMax; ++i) {
    // Without control space the kernel closes descriptors that nobody asked for.
    if (::recv(socket.native_handle(), buffer.data(), buffer.size(), MSG_DONTWAIT) <= 0) return;
  }
}

}  // namespace thinkv::ipc
