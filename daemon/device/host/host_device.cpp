#include "daemon/device/host/host_device.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U  // Linux 6.3; older headers lack it
#endif

namespace thinkv::device {
namespace {

// Whether a later try can succeed once somebody frees memory or descriptors.
ErrorCode code_for(int error) {
  switch (error) {
    case ENOMEM:
    case ENOSPC:
    case EMFILE:
    case ENFILE:
      return ErrorCode::kExhausted;
    default:
      return ErrorCode::kDeviceFailed;
  }
}

Error os_failure(const char* what) {
  return make_error(code_for(errno), what, errno);
}

Result<UniqueFd> open_memory(ExtentId extent) {
  char name[32];
  std::snprintf(name, sizeof(name), "thinkv-extent-%u", extent.value());
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  int fd = ::memfd_create(name, kFlags | MFD_NOEXEC_SEAL);
  // Kernels before 6.3 refuse the flag they do not know.
  if (fd < 0 && errno == EINVAL) fd = ::memfd_create(name, kFlags);
  if (fd < 0) return os_failure("memfd_create of an extent");
  return UniqueFd(fd);
}

// The number of kB behind `key` in the text of /proc/meminfo, in bytes. 0: not there.
uint64_t meminfo_bytes(const char* text, const char* key) {
  const char* line = std::strstr(text, key);
  return line == nullptr ? 0 : std::strtoull(line + std::strlen(key), nullptr, 10) * 1024;
}

// memfds know no limit but the machine's memory: an fallocate beyond it does not fail, it makes the
// kernel kill processes, whichever it likes. So what is not there must not be asked for.
Status check_available(const Device& device, uint64_t bytes) {
  THINKV_ASSIGN_OR_RETURN(const Capacity capacity, device.capacity());
  // A sixteenth stays for everybody else: the rest of the system needs memory at this moment too.
  if (bytes > capacity.available_bytes ||
      capacity.available_bytes - bytes < capacity.total_bytes / 16) {
    return make_error(ErrorCode::kExhausted, "the machine has not enough free memory", ENOMEM);
  }
  return {};
}

Status commit(int fd, uint64_t bytes) {
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return os_failure("size of an extent");
  // Pages now: without this, want of memory would be a SIGBUS in whoever writes first.
  int result = 0;
  do {
    result = ::fallocate(fd, 0, 0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result != 0) return os_failure("memory of an extent");
  if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return os_failure("seals of an extent");
  }
  return {};
}

}  // namespace

Status HostDevice::create_extent(ExtentId extent, uint64_t bytes) {
  if (bytes == 0 || bytes > static_cast<uint64_t>(std::numeric_limits<off_t>::max())) {
    return make_error(ErrorCode::kInvalidArgument, "size of an extent");
  }
  if (extents_.contains(extent)) {
    return make_error(ErrorCode::kInvalidArgument, "the extent exists already");
  }
  THINKV_TRY(check_available(*this, bytes));
  THINKV_ASSIGN_OR_RETURN(UniqueFd fd, open_memory(extent));
  THINKV_TRY(commit(fd.get(), bytes));
  extents_.emplace(extent, std::move(fd));
  return {};
}

void HostDevice::release_extent(ExtentId extent) {
  extents_.erase(extent);
}

Result<int> HostDevice::export_fd(ExtentId extent) const {
  const auto found = extents_.find(extent);
  if (found == extents_.end()) return make_error(ErrorCode::kNotFound, "no such extent");
  return found->second.get();
}

Result<Capacity> HostDevice::capacity() const {
  const UniqueFd file(::open("/proc/meminfo", O_RDONLY | O_CLOEXEC));
  if (!file.valid()) return make_error(code_for(errno), "open /proc/meminfo", errno);
  std::array<char, 4096> text{};  // both keys are in the first lines
  const ssize_t size = ::read(file.get(), text.data(), text.size() - 1);
  if (size <= 0) return make_error(ErrorCode::kUnavailable, "read /proc/meminfo", errno);
  const Capacity capacity{.total_bytes = meminfo_bytes(text.data(), "MemTotal:"),
                          .available_bytes = meminfo_bytes(text.data(), "MemAvailable:")};
  if (capacity.total_bytes == 0 || capacity.available_bytes == 0) {
    return make_error(ErrorCode::kUnavailable, "/proc/meminfo without MemTotal or MemAvailable");
  }
  return capacity;
}

}  // namespace thinkv::device
