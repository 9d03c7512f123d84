#include "daemon/ipc/seq_packet.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "thinkv/internal/check.h"

namespace thinkv::ipc {
namespace {

constexpr size_t kControlBytes = CMSG_SPACE(sizeof(int) * limits::kFdsPerMessageMax);

// Takes ownership of every descriptor of the message, whatever else is wrong with it.
void take_descriptors(msghdr* message, Received* received) {
  for (cmsghdr* part = CMSG_FIRSTHDR(message); part != nullptr; part = CMSG_NXTHDR(message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof fd);
      UniqueFd owned(fd);
      if (received->fd_count < received->fds.size()) {
        received->fds[received->fd_count++] = std::move(owned);
      }
    }
  }
}

}  // namespace

Status send_packet(int socket, std::span<const std::byte> packet, std::span<const int> fds) {
  THINKV_CHECK(fds.size() <= limits::kFdsPerMessageMax);
  iovec data{const_cast<std::byte*>(packet.data()), packet.size()};
  alignas(cmsghdr) std::array<std::byte, kControlBytes> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(part), fds.data(), fds.size_bytes());
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) return make_error(ErrorCode::kUnavailable, "sendmsg", errno);
  return {};
}

Result<Received> receive_packet(int socket, std::span<std::byte> buffer) {
  iovec data{buffer.data(), buffer.size()};
  alignas(cmsghdr) std::array<std::byte, kControlBytes> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t got = 0;
  do {
    got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return make_error(ErrorCode::kUnavailable, "recvmsg", errno);
  Received received;
  take_descriptors(&message, &received);
  if ((message.msg_flags & MSG_CTRUNC) != 0) {
    return make_error(ErrorCode::kInvalidArgument, "too many descriptors in one message");
  }
  if ((message.msg_flags & MSG_TRUNC) != 0) {
    return make_error(ErrorCode::kInvalidArgument, "the message is longer than 4096 bytes");
  }
  received.size = static_cast<uint32_t>(got);
  return received;
}

}  // namespace thinkv::ipc
