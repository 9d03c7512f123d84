// mapped_range.h: a shared mapping of a memfd, not inherited by forked children.
//
// Move-only; unmaps on destruction, in the process that mapped it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "thinkv/result.h"

namespace thinkv::client {

enum class Access { kRead, kReadWrite };

class MappedRange {
 public:
  MappedRange() = default;
  MappedRange(MappedRange&& other) noexcept;
  MappedRange& operator=(MappedRange&& other) noexcept;
  ~MappedRange() { reset(); }

  // Maps the first `bytes` of a memfd that must be exactly that long and sealed against changes
  // of its size, so that no access can fault later. `name` is for the error text.
  // Errors: kUnavailable (not as announced: the peer is broken), kDeviceFailed (the map failed).
  [[nodiscard]] static Result<MappedRange> map(int fd, uint64_t bytes, Access access,
                                               const char* name);

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] uint64_t size() const { return size_; }
  void reset();

 private:
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
  uint64_t fork_generation_ = 0;
};

}  // namespace thinkv::client
