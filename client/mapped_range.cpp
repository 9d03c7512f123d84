#include "client/mapped_range.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

#include "client/error_text.h"
#include "client/fork_guard.h"

namespace thinkv::client {

MappedRange::MappedRange(MappedRange&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      fork_generation_(other.fork_generation_) {}

MappedRange& MappedRange::operator=(MappedRange&& other) noexcept {
  if (this != &other) {
    reset();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    fork_generation_ = other.fork_generation_;
  }
  return *this;
}

Result<MappedRange> MappedRange::map(int fd, uint64_t bytes, Access access, const char* name) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) {
    return describe_os(ErrorCode::kUnavailable, errno, "%s from thinkvd cannot be read", name);
  }
  if (bytes == 0 || static_cast<uint64_t>(info.st_size) != bytes) {
    return describe(ErrorCode::kUnavailable, "%s from thinkvd has %lld bytes, %llu were announced",
                    name, static_cast<long long>(info.st_size),
                    static_cast<unsigned long long>(bytes));
  }
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || (seals & F_SEAL_GROW) == 0) {
    return describe(ErrorCode::kUnavailable, "%s from thinkvd is not sealed against resizing",
                    name);
  }
  const int protection = access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* data = ::mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return describe_os(ErrorCode::kDeviceFailed, errno, "%s (%llu bytes) cannot be mapped", name,
                       static_cast<unsigned long long>(bytes));
  }
  MappedRange range;
  range.data_ = static_cast<std::byte*>(data);
  range.size_ = bytes;
  range.fork_generation_ = fork_generation();
  if (::madvise(data, bytes, MADV_DONTFORK) != 0) {
    return describe_os(ErrorCode::kDeviceFailed, errno, "%s cannot be kept from children", name);
  }
  return range;
}

void MappedRange::reset() {
  // In a forked child the range is not there, and its addresses may belong to something else.
  if (data_ != nullptr && fork_generation_ == fork_generation()) ::munmap(data_, size_);
  data_ = nullptr;
  size_ = 0;
}

}  // namespace thinkv::client
