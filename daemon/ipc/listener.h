// listener.h: the control socket's place in the file system, and that only one daemon owns it.
//
// <socket>.lock is held by flock for the life of the process (the kernel releases it at SIGKILL),
// so a second daemon on the same path is refused before it touches anything. The lock file stays:
// removing it would let two processes lock two different files of that name.
#pragma once

#include <sys/types.h>

#include <string>

#include "thinkv/internal/unique_fd.h"
#include "thinkv/result.h"

namespace thinkv::ipc {

class Listener {
 public:
  // Locks, removes a stale socket of ours, binds and listens; makes the folder if its parent
  // exists. `mode`: of the socket file. Errors: kUnavailable (another daemon runs: *why has its
  // pid), kPermission (something else is at the path), kInvalidArgument (path too long),
  // kInternal with errno. *why is a sentence for a person.
  static Result<Listener> open(const std::string& path, mode_t mode, std::string* why);

  Listener(Listener&&) = default;
  Listener& operator=(Listener&&) = default;
  ~Listener();

  [[nodiscard]] int fd() const { return socket_.get(); }
  [[nodiscard]] const std::string& path() const { return path_; }
  // Nobody can connect any more; the lock is kept.
  void close();

 private:
  Listener() = default;
  std::string path_;
  UniqueFd lock_;
  UniqueFd socket_;
};

}  // namespace thinkv::ipc
