// memfd_region.h: sealed shared memory that one side writes and the other only reads.
//
// The daemon creates, sizes, fills and seals every region; it never maps memory that a client
// made, because a client could truncate that under the reader (SIGBUS).
#pragma once

#include <boost/interprocess/mapped_region.hpp>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "thinkv/internal/unique_fd.h"
#include "thinkv/result.h"

namespace thinkv::ipc {

enum class RegionWriter : uint8_t {
  kDaemon,  // mapped read-write here; sealed so that nobody can map it writable again
  kClient,  // mapped read-only here
};

class MemfdRegion {
 public:
  // `bytes` are committed now, so a later touch cannot fail for want of memory, and read as zeros.
  // `fill` (may be null) writes the header before the region is sealed and mapped; it gets the
  // writable bytes. Errors: kExhausted with errno.
  static Result<MemfdRegion> create(const char* name, size_t bytes, RegionWriter writer,
                                    void (*fill)(void* bytes) = nullptr);

  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] void* data() const { return mapping_.get_address(); }
  [[nodiscard]] size_t size() const { return mapping_.get_size(); }

 private:
  UniqueFd fd_;
  boost::interprocess::mapped_region mapping_;
};

// A read-only memfd with `text` in it, sealed against everything: for the status.
// Errors: kExhausted with errno.
[[nodiscard]] Result<UniqueFd> make_text_memfd(const char* name, std::string_view text);

}  // namespace thinkv::ipc
