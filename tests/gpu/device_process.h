// device_process.h: other processes of one GPU test.
//
// CUDA does not survive a fork, so every process is a fresh exec of the same program. Commands and
// descriptors travel over a SEQPACKET pair.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "thinkv/internal/unique_fd.h"

namespace thinkv::gpu_test {

struct Packet {
  char what = 0;  // a command, or its echo in the answer
  uint32_t extent = 0;
  int32_t error = 0;  // ErrorCode
  uint64_t nanoseconds = 0;
  char text[200] = {};  // of the error
};

// False: the peer is gone.
inline bool send_packet(int socket, const Packet& packet, int fd = -1) {
  Packet copy = packet;
  iovec part{&copy, sizeof(copy)};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
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
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof(copy));
}

inline bool receive_packet(int socket, Packet* packet, UniqueFd* fd) {
  iovec part{packet, sizeof(*packet)};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  if (::recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(sizeof(*packet))) {
    return false;
  }
  const cmsghdr* rights = CMSG_FIRSTHDR(&message);
  if (rights != nullptr && rights->cmsg_type == SCM_RIGHTS) {
    int received = -1;
    std::memcpy(&received, CMSG_DATA(rights), sizeof(int));
    *fd = UniqueFd(received);
  }
  return true;
}

// A running copy of this program; killed at the end of its scope.
class Process {
 public:
  // `fd` is inherited under a number that becomes the last argument.
  Process(std::vector<std::string> arguments, int fd) {
    const UniqueFd inherited(::dup(fd));  // without close-on-exec
    arguments.push_back(std::to_string(inherited.get()));
    std::vector<char*> argv;
    char self[] = "/proc/self/exe";
    argv.push_back(self);
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::execv(self, argv.data());
      ::_exit(127);
    }
  }
  ~Process() {
    if (pid_ > 0) kill();
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  // SIGKILL, and wait for the end.
  void kill() {
    ::kill(pid_, SIGKILL);
    static_cast<void>(wait());
  }
  // The exit status, or minus the signal.
  [[nodiscard]] int wait() {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  pid_t pid_ = -1;
};

}  // namespace thinkv::gpu_test
