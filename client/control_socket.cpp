#include "client/control_socket.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstdlib>

#include "client/error_text.h"

namespace thinkv::client {
namespace {

using protocol::MessageType;

constexpr const char* kSystemSocket = "/run/thinkvd/control.sock";

// What a daemon sends: the body's size and the descriptors of each type.
struct Expected {
  MessageType type;
  size_t body_bytes;
  uint32_t fds;
};
constexpr Expected kFromDaemon[] = {
    {MessageType::kWelcome, sizeof(protocol::Welcome), 3},
    {MessageType::kRefused, sizeof(protocol::Refused), 0},
    {MessageType::kModelRegistered, sizeof(protocol::ModelRegistered), 0},
    {MessageType::kPolicyReply, sizeof(protocol::PolicyReply), 0},
    {MessageType::kStatusReply, sizeof(protocol::StatusReply), 1},
    {MessageType::kExtent, sizeof(protocol::Extent), 1},
    {MessageType::kPools, sizeof(protocol::Pools), 0},
};

Error broken(const char* what) {
  return describe(ErrorCode::kUnavailable, "thinkvd sent a message this library cannot use: %s",
                  what);
}

const Expected* expected_of(uint16_t type) {
  for (const Expected& expected : kFromDaemon) {
    if (static_cast<uint16_t>(expected.type) == type) return &expected;
  }
  return nullptr;
}

Error connect_error(int os_error, const std::string& path) {
  if (os_error == EACCES || os_error == EPERM) {
    return describe_os(ErrorCode::kPermission, os_error,
                       "this user may not connect to thinkvd at %.120s", path.c_str());
  }
  return describe_os(ErrorCode::kUnavailable, os_error,
                     "no thinkvd at %.110s; is it running? Start thinkvd or set THINKV_SOCKET",
                     path.c_str());
}

}  // namespace

Status decode_control(std::span<const std::byte> packet, uint32_t fd_count,
                      ControlMessage& message) {
  protocol::ControlHeader header{};
  if (packet.size() < sizeof(header)) return broken("shorter than a header");
  std::memcpy(&header, packet.data(), sizeof(header));
  if (header.magic != protocol::kMagic) return broken("wrong magic number");
  if (header.size != packet.size()) return broken("the announced size is not the packet's");
  const Expected* expected = expected_of(header.type);
  if (expected == nullptr) return broken("a type that daemons do not send");
  if (packet.size() - sizeof(header) != expected->body_bytes) return broken("wrong body size");
  if (header.fds != fd_count || fd_count != expected->fds) {
    return broken("wrong number of descriptors");
  }
  message.header = header;
  std::memcpy(message.body.data(), packet.data() + sizeof(header), expected->body_bytes);
  return {};
}

std::string control_socket_path(const char* from_options) {
  if (from_options != nullptr && from_options[0] != '\0') return from_options;
  if (const char* set = std::getenv("THINKV_SOCKET"); set != nullptr && set[0] != '\0') return set;
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR"); runtime != nullptr) {
    std::string path = std::string(runtime) + "/thinkv/control.sock";
    if (::access(path.c_str(), F_OK) == 0) return path;
  }
  return kSystemSocket;
}

Result<ControlSocket> ControlSocket::connect(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return describe(ErrorCode::kInvalidArgument, "the socket path has %zu bytes, at most %zu fit",
                    path.size(), sizeof(address.sun_path) - 1);
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd.valid()) {
    return describe_os(ErrorCode::kUnavailable, errno, "cannot make a socket");
  }
  int result = 0;
  do {
    result = ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  } while (result != 0 && errno == EINTR);
  if (result != 0) return connect_error(errno, path);
  return ControlSocket(std::move(fd));
}

Status ControlSocket::send_bytes(MessageType type, uint32_t request_id,
                                 std::span<const std::byte> body, int fd) {
  protocol::ControlHeader header{
      .magic = protocol::kMagic,
      .type = static_cast<uint16_t>(type),
      .fds = static_cast<uint16_t>(fd >= 0 ? 1 : 0),
      .size = static_cast<uint32_t>(sizeof(protocol::ControlHeader) + body.size()),
      .request_id = request_id};
  // sendmsg reads only; its interface predates const.
  iovec parts[2] = {{&header, sizeof(header)}, {const_cast<std::byte*>(body.data()), body.size()}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = body.empty() ? 1 : 2;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd, sizeof(int));
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) {
    return describe_os(ErrorCode::kUnavailable, errno, "thinkvd closed the connection");
  }
  return {};
}

Result<bool> ControlSocket::receive(ControlMessage& message, int timeout_ms) {
  pollfd entry{.fd = fd_.get(), .events = POLLIN, .revents = 0};
  int ready = 0;
  do {
    ready = ::poll(&entry, 1, timeout_ms);
  } while (ready < 0 && errno == EINTR);
  if (ready < 0) return describe_os(ErrorCode::kUnavailable, errno, "cannot wait for thinkvd");
  if (ready == 0) return false;
  return receive_now(message);
}

Result<bool> ControlSocket::receive_now(ControlMessage& message) {
  std::array<std::byte, limits::kControlMessageMax> packet;
  iovec part{packet.data(), packet.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * limits::kFdsPerMessageMax)] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t got = ::recvmsg(fd_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) {
    if (errno == EAGAIN || errno == EINTR) return false;
    return describe_os(ErrorCode::kUnavailable, errno, "thinkvd closed the connection");
  }
  // Take the descriptors first: whatever is wrong with the packet, they must not leak.
  for (UniqueFd& fd : message.fds) fd.reset();
  uint32_t fd_count = 0;
  for (cmsghdr* c = CMSG_FIRSTHDR(&header); c != nullptr; c = CMSG_NXTHDR(&header, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t here = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < here && fd_count < message.fds.size(); ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      message.fds[fd_count++].reset(fd);
    }
  }
  if (got == 0) return describe(ErrorCode::kUnavailable, "thinkvd closed the connection");
  if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) return broken("too long");
  THINKV_TRY(decode_control(std::span(packet).first(static_cast<size_t>(got)), fd_count, message));
  return true;
}

bool ControlSocket::hung_up() const {
  pollfd entry{.fd = fd_.get(), .events = POLLIN | POLLRDHUP, .revents = 0};
  const int ready = ::poll(&entry, 1, 0);
  return ready > 0 && (entry.revents & (POLLHUP | POLLERR | POLLRDHUP | POLLNVAL)) != 0;
}

}  // namespace thinkv::client
