#include "daemon/ipc/memfd_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <boost/interprocess/exceptions.hpp>
#include <cerrno>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U  // Linux 6.3
#endif

namespace thinkv::ipc {
namespace {

namespace bip = boost::interprocess;

// What mapped_region asks of a thing that can be mapped.
class MemfdHandle {
 public:
  MemfdHandle(int fd, bip::mode_t mode) : fd_(fd), mode_(mode) {}
  [[nodiscard]] bip::mapping_handle_t get_mapping_handle() const { return {fd_, false}; }
  [[nodiscard]] bip::mode_t get_mode() const { return mode_; }

 private:
  int fd_;
  bip::mode_t mode_;
};

Error exhausted(const char* what) {
  return make_error(ErrorCode::kExhausted, what, errno);
}

Result<UniqueFd> create_memfd(const char* name) {
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  UniqueFd fd(::memfd_create(name, kFlags | MFD_NOEXEC_SEAL));
  if (!fd.valid() && errno == EINVAL) fd.reset(::memfd_create(name, kFlags));
  if (!fd.valid()) return exhausted("memfd_create");
  return fd;
}

Result<bip::mapped_region> map(int fd, bip::mode_t mode, size_t bytes) {
  try {
    return bip::mapped_region(MemfdHandle(fd, mode), mode, 0, bytes);
  } catch (const bip::interprocess_exception& error) {
    return make_error(ErrorCode::kExhausted, "mmap", error.get_native_error());
  }
}

}  // namespace

Result<MemfdRegion> MemfdRegion::create(const char* name, size_t bytes, RegionWriter writer,
                                        void (*fill)(void* bytes)) {
  MemfdRegion region;
  THINKV_ASSIGN_OR_RETURN(region.fd_, create_memfd(name));
  const int fd = region.fd_.get();
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return exhausted("ftruncate");
  if (::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) != 0) return exhausted("fallocate");
  {
    THINKV_ASSIGN_OR_RETURN(bip::mapped_region writable, map(fd, bip::read_write, bytes));
    if (fill != nullptr) fill(writable.get_address());
    if (writer == RegionWriter::kDaemon) {
      region.mapping_ = std::move(writable);
    } else {
      THINKV_ASSIGN_OR_RETURN(region.mapping_, map(fd, bip::read_only, bytes));
    }
  }
  // F_SEAL_SEAL: otherwise a client could add seals that keep us from mapping it again.
  int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  if (writer == RegionWriter::kDaemon) seals |= F_SEAL_FUTURE_WRITE;
  if (::fcntl(fd, F_ADD_SEALS, seals) != 0) return exhausted("F_ADD_SEALS");
  return region;
}

Result<UniqueFd> make_text_memfd(const char* name, std::string_view text) {
  THINKV_ASSIGN_OR_RETURN(UniqueFd fd, create_memfd(name));
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = ::pwrite(fd.get(), text.data() + written, text.size() - written,
                                   static_cast<off_t>(written));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return exhausted("pwrite");
    written += static_cast<size_t>(count);
  }
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) !=
      0) {
    return exhausted("F_ADD_SEALS");
  }
  return fd;
}

}  // namespace thinkv::ipc
