#include "tools/thinkvctl/status_client.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "thinkv/internal/protocol.h"
#include "thinkv/internal/unique_fd.h"

namespace thinkv::ctl {
namespace {

constexpr int kTimeoutMs = 5000;
constexpr uint64_t kStatusBytesMax = uint64_t{64} << 20;

Error fail(ErrorCode code, std::string* why, const std::string& text, int os_error = 0) {
  *why = text;
  return make_error(code, "status", os_error);
}

Result<UniqueFd> connect_to(const std::string& path, std::string* why) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail(ErrorCode::kInvalidArgument, why, "the socket path is too long: " + path);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd.valid()) {
    return fail(ErrorCode::kInternal, why, std::string("socket: ") + std::strerror(errno), errno);
  }
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    return fd;
  }
  const int error = errno;
  if (error == EACCES || error == EPERM) {
    return fail(ErrorCode::kPermission, why,
                "you may not connect to " + path + " (see socket.access)", error);
  }
  return fail(ErrorCode::kUnavailable, why,
              "no thinkvd answers on " + path + " (" + std::strerror(error) +
                  "): start it, or name its socket with --socket or THINKV_SOCKET",
              error);
}

struct Reply {
  std::array<std::byte, limits::kControlMessageMax> bytes{};
  size_t size = 0;
  UniqueFd fd;
};

Status receive(int socket, Reply* reply, std::string* why) {
  pollfd ready{socket, POLLIN, 0};
  if (::poll(&ready, 1, kTimeoutMs) != 1) {
    return fail(ErrorCode::kUnavailable, why, "thinkvd does not answer within 5 s");
  }
  iovec data{reply->bytes.data(), reply->bytes.size()};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  if (got <= 0) return fail(ErrorCode::kUnavailable, why, "thinkvd closed the connection");
  reply->size = static_cast<size_t>(got);
  const cmsghdr* part = CMSG_FIRSTHDR(&message);
  if (part != nullptr && part->cmsg_type == SCM_RIGHTS && part->cmsg_len == CMSG_LEN(sizeof(int))) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(part), sizeof fd);
    reply->fd.reset(fd);
  }
  return {};
}

template <class Body>
bool read_body(const Reply& reply, Body* body) {
  if (reply.size != sizeof(protocol::ControlHeader) + sizeof(Body)) return false;
  std::memcpy(body, reply.bytes.data() + sizeof(protocol::ControlHeader), sizeof(Body));
  return true;
}

Result<std::string> read_text(const Reply& reply, std::string* why) {
  protocol::StatusReply status{};
  struct stat info {};
  const bool sane = read_body(reply, &status) && reply.fd.valid() &&
                    ::fstat(reply.fd.get(), &info) == 0 && status.json_bytes <= kStatusBytesMax &&
                    static_cast<uint64_t>(info.st_size) >= status.json_bytes;
  if (!sane) return fail(ErrorCode::kVersionMismatch, why, "thinkvd sent an unknown reply");
  std::string text(status.json_bytes, '\0');
  size_t at = 0;
  while (at < text.size()) {
    const ssize_t got =
        ::pread(reply.fd.get(), text.data() + at, text.size() - at, static_cast<off_t>(at));
    if (got <= 0) return fail(ErrorCode::kInternal, why, "the status cannot be read", errno);
    at += static_cast<size_t>(got);
  }
  return text;
}

}  // namespace

std::string default_socket() {
  const char* given = std::getenv("THINKV_SOCKET");
  if (given != nullptr && given[0] != '\0') return given;
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  if (runtime != nullptr && runtime[0] == '/') {
    const std::string path = std::string(runtime) + "/thinkv/control.sock";
    if (::access(path.c_str(), F_OK) == 0) return path;
  }
  return "/run/thinkvd/control.sock";
}

Result<std::string> fetch_status(const std::string& path, std::string* why) {
  THINKV_ASSIGN_OR_RETURN(const UniqueFd socket, connect_to(path, why));
  const protocol::ControlHeader ask{protocol::kMagic,
                                    static_cast<uint16_t>(protocol::MessageType::kGetStatus), 0,
                                    sizeof(protocol::ControlHeader), 1};
  if (::send(socket.get(), &ask, sizeof ask, MSG_NOSIGNAL) != sizeof ask) {
    return fail(ErrorCode::kUnavailable, why, "thinkvd closed the connection", errno);
  }
  Reply reply;
  THINKV_TRY(receive(socket.get(), &reply, why));
  protocol::ControlHeader header{};
  if (reply.size >= sizeof header) std::memcpy(&header, reply.bytes.data(), sizeof header);
  if (header.magic == protocol::kMagic &&
      header.type == static_cast<uint16_t>(protocol::MessageType::kRefused)) {
    protocol::Refused refused{};
    if (read_body(reply, &refused)) {
      refused.text[sizeof refused.text - 1] = '\0';
      return fail(static_cast<ErrorCode>(refused.code), why,
                  std::string("thinkvd refuses: ") + refused.text);
    }
  }
  if (header.magic != protocol::kMagic ||
      header.type != static_cast<uint16_t>(protocol::MessageType::kStatusReply)) {
    return fail(ErrorCode::kVersionMismatch, why, "what answers is not this version of thinkvd");
  }
  return read_text(reply, why);
}

}  // namespace thinkv::ctl
