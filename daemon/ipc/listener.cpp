#include "daemon/ipc/listener.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "thinkv/internal/limits.h"

namespace thinkv::ipc {
namespace {

constexpr int kBacklog = 128;

Error fail(ErrorCode code, std::string* why, const std::string& text, int os_error = 0) {
  *why = text;
  if (os_error != 0) why->append(": ").append(std::strerror(os_error));
  return make_error(code, "control socket", os_error);
}

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

UniqueFd make_socket() {
  return UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

std::string owner_of(int lock) {
  char text[32] = {};
  const ssize_t got = ::pread(lock, text, sizeof text - 1, 0);
  std::string owner(text, got > 0 ? static_cast<size_t>(got) : 0);
  while (!owner.empty() && (owner.back() < '0' || owner.back() > '9')) owner.pop_back();
  return owner.empty() ? "unknown" : owner;
}

Result<UniqueFd> take_lock(const std::string& path, std::string* why) {
  const std::string file = path + ".lock";
  UniqueFd lock(::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock.valid()) return fail(ErrorCode::kPermission, why, "cannot open " + file, errno);
  if (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    return fail(ErrorCode::kUnavailable, why,
                "another thinkvd (pid " + owner_of(lock.get()) + ") owns " + path +
                    ": stop it, or choose another --socket");
  }
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::ftruncate(lock.get(), 0) != 0 ||
      ::pwrite(lock.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return fail(ErrorCode::kInternal, why, "cannot write " + file, errno);
  }
  return lock;
}

// Under the lock no thinkvd listens here. What else lies at the path is removed only if it is a
// socket of our own user that nobody answers on.
Status remove_stale(const std::string& path, std::string* why) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return {};
    return fail(ErrorCode::kPermission, why, "cannot look at " + path, errno);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return fail(ErrorCode::kPermission, why, path + " exists and is not a socket: remove it first");
  }
  if (info.st_uid != ::geteuid()) {
    return fail(ErrorCode::kPermission, why, path + " is a socket of another user");
  }
  const UniqueFd probe = make_socket();
  const sockaddr_un address = address_of(path);
  if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ||
      errno != ECONNREFUSED) {
    return fail(ErrorCode::kUnavailable, why, "another program listens on " + path);
  }
  if (::unlink(path.c_str()) != 0) {
    return fail(ErrorCode::kPermission, why, "cannot remove the stale socket " + path, errno);
  }
  return {};
}

Status make_folder(const std::string& path, std::string* why) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos || slash == 0) return {};
  const std::string folder = path.substr(0, slash);
  if (::mkdir(folder.c_str(), 0755) == 0 || errno == EEXIST) return {};
  return fail(ErrorCode::kPermission, why, "cannot make the folder " + folder, errno);
}

}  // namespace

Result<Listener> Listener::open(const std::string& path, mode_t mode, std::string* why) {
  if (path.empty() || path.size() > limits::kSocketPathMax) {
    return fail(
        ErrorCode::kInvalidArgument, why,
        "the socket path must have 1 to " + std::to_string(limits::kSocketPathMax) + " bytes");
  }
  THINKV_TRY(make_folder(path, why));
  Listener listener;
  THINKV_ASSIGN_OR_RETURN(listener.lock_, take_lock(path, why));
  THINKV_TRY(remove_stale(path, why));
  listener.socket_ = make_socket();
  // Bound under another name, with no rights for others, and renamed once it listens: a client that
  // sees the path is never refused, and between bind and chmod nobody slips in.
  const std::string pending = path + "~";
  THINKV_TRY(remove_stale(pending, why));
  const sockaddr_un address = address_of(pending);
  const mode_t before = ::umask(0177);
  const int bound =
      ::bind(listener.socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int bind_error = errno;
  ::umask(before);
  if (bound != 0) return fail(ErrorCode::kPermission, why, "cannot bind " + pending, bind_error);
  listener.path_ = pending;  // from here the destructor removes the file
  if (::listen(listener.socket_.get(), kBacklog) != 0 || ::chmod(pending.c_str(), mode) != 0 ||
      ::rename(pending.c_str(), path.c_str()) != 0) {
    return fail(ErrorCode::kInternal, why, "cannot listen on " + path, errno);
  }
  listener.path_ = path;
  return listener;
}

void Listener::close() {
  if (!socket_.valid()) return;
  if (!path_.empty()) ::unlink(path_.c_str());
  socket_.reset();
}

Listener::~Listener() {
  close();
}

}  // namespace thinkv::ipc
