#include "daemon/ipc/peer.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <string_view>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77  // Linux 6.5
#endif

namespace thinkv::ipc {
namespace {

// "Pid:" of a pidfd's fdinfo; 0 if this is not a pidfd, -1 if its process was reaped.
int64_t pid_of_pidfd(int pidfd) {
  std::array<char, 64> path{};
  std::snprintf(path.data(), path.size(), "/proc/self/fdinfo/%d", pidfd);
  const UniqueFd file(::open(path.data(), O_RDONLY | O_CLOEXEC));
  if (!file.valid()) return 0;
  std::array<char, 1024> text{};
  const ssize_t got = ::read(file.get(), text.data(), text.size());
  if (got <= 0) return 0;
  const std::string_view info(text.data(), static_cast<size_t>(got));
  const size_t at = info.find("\nPid:\t");
  if (at == std::string_view::npos) return 0;
  const char* digits = info.data() + at + 6;
  int64_t pid = 0;
  const auto [end, error] = std::from_chars(digits, info.data() + info.size(), pid);
  return error == std::errc{} && end != digits ? pid : 0;
}

}  // namespace

Result<Peer> peer_of(int socket) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0 ||
      credentials.pid <= 0) {
    return make_error(ErrorCode::kPermission, "the peer's credentials are not known", errno);
  }
  Peer peer;
  peer.pid = static_cast<uint32_t>(credentials.pid);
  peer.uid = credentials.uid;
  peer.gid = credentials.gid;
  peer.groups.resize(64);
  for (;;) {
    socklen_t bytes = static_cast<socklen_t>(peer.groups.size() * sizeof(uint32_t));
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, peer.groups.data(), &bytes) == 0) {
      peer.groups.resize(bytes / sizeof(uint32_t));
      return peer;
    }
    if (errno != ERANGE || bytes / sizeof(uint32_t) <= peer.groups.size()) break;
    peer.groups.resize(bytes / sizeof(uint32_t));
  }
  peer.groups.clear();
  return peer;
}

Result<UniqueFd> verified_pidfd(int socket, const Peer& peer, UniqueFd sent) {
  if (sent.valid()) {
    const int64_t pid = pid_of_pidfd(sent.get());
    if (pid == -1) return make_error(ErrorCode::kUnavailable, "the process has ended");
    if (pid != static_cast<int64_t>(peer.pid)) {
      return make_error(ErrorCode::kPermission, "the pidfd is not that of the connected process");
    }
  }
  int kernel_fd = -1;
  socklen_t size = sizeof kernel_fd;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &kernel_fd, &size) == 0 && kernel_fd >= 0) {
    sent.reset(kernel_fd);
  } else if (!sent.valid()) {
    // The pid could have been reused since the connect; only older kernels come here.
    sent.reset(static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(peer.pid), 0)));
  }
  if (!sent.valid() || process_ended(sent.get())) {
    return make_error(ErrorCode::kUnavailable, "the process has ended", errno);
  }
  return sent;
}

bool process_ended(int pidfd) {
  pollfd entry{pidfd, POLLIN, 0};
  return ::poll(&entry, 1, 0) == 1;
}

}  // namespace thinkv::ipc
