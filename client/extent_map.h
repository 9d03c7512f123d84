// extent_map.h: where the extents of the pool lie in this process.
//
// The daemon sends the descriptor of an extent before it grants the first page of it; the extent
// is mapped then, once. Extents are mapped read-write: the client is their user. On the host
// backend they are memory of this process; on the cuda backend they lie in a DeviceWindow, and
// their addresses are good for kernels and device copies only. Threads: add() under the session's
// mutex; address() and the checks from any thread, for pages that were taken after their extent was
// added (the mutex of the lease orders the two).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include "client/device_window.h"
#include "client/mapped_range.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/protocol.h"
#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::client {

class ExtentMap {
 public:
  // What the daemon announced: every extent has `extent_bytes`, and lies on the GPU if `window` is
  // not null. The window outlives the map. Requires: before the first add.
  void expect(uint64_t extent_bytes, DeviceWindow* window) {
    extent_bytes_ = extent_bytes;
    window_ = window;
  }
  // Checks the message against the descriptor and maps it. A known id with another generation
  // replaces the mapping: by then every page of the old one was returned.
  // Errors: kUnavailable (the daemon contradicts itself), kDeviceFailed, kExhausted (the map).
  [[nodiscard]] Status add(const protocol::Extent& extent, int fd);

  [[nodiscard]] bool mapped(ExtentId id) const;
  // Whether `page` lies in a mapped extent of this class.
  [[nodiscard]] bool holds(PageId page, uint32_t page_class) const;
  // Not for the host to read on the cuda backend. Requires: holds(page, its class).
  [[nodiscard]] std::byte* address(PageId page) const {
    const Entry& entry = entries_[page.extent().value()];
    return entry.base.load(std::memory_order_relaxed) + uint64_t{page.index()} * entry.page_bytes;
  }

 private:
  struct Entry {
    std::atomic<std::byte*> base{nullptr};
    uint32_t page_bytes = 0;
    uint32_t page_count = 0;
    uint32_t page_class = 0;
    uint32_t generation = 0;
    MappedRange range;  // host backend
  };
  // Maps the memory and gives its address; on the cuda backend the old memory is gone even if the
  // new cannot be mapped.
  [[nodiscard]] Result<std::byte*> map(const protocol::Extent& extent, int fd, Entry* entry);

  uint64_t extent_bytes_ = 0;  // 0: nothing was announced
  DeviceWindow* window_ = nullptr;
  std::unique_ptr<std::array<Entry, limits::kExtentsMax>> storage_ =
      std::make_unique<std::array<Entry, limits::kExtentsMax>>();
  std::array<Entry, limits::kExtentsMax>& entries_ = *storage_;
};

}  // namespace thinkv::client
