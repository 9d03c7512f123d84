#include "client/extent_map.h"

#include <utility>

#include "client/error_text.h"

namespace thinkv::client {
namespace {

Status check(const protocol::Extent& extent) {
  const bool id_ok = extent.extent_id < limits::kExtentsMax;
  const bool class_ok = extent.page_class < kPageClassCount;
  const bool bytes_ok = extent.extent_bytes >= limits::kExtentBytesMin &&
                        extent.extent_bytes <= limits::kExtentBytesMax;
  if (!id_ok || !class_ok || !bytes_ok) {
    return describe(ErrorCode::kUnavailable, "thinkvd sent extent %u of class %u with %llu bytes",
                    extent.extent_id, extent.page_class,
                    static_cast<unsigned long long>(extent.extent_bytes));
  }
  if (extent.page_bytes != page_bytes(kHeadDims[extent.page_class]) || extent.page_count == 0 ||
      extent.page_count > extent.extent_bytes / extent.page_bytes) {
    return describe(ErrorCode::kUnavailable,
                    "thinkvd sent extent %u with %u pages of %u bytes in %llu bytes",
                    extent.extent_id, extent.page_count, extent.page_bytes,
                    static_cast<unsigned long long>(extent.extent_bytes));
  }
  return {};
}

}  // namespace

Status ExtentMap::add(const protocol::Extent& extent, int fd) {
  THINKV_TRY(check(extent));
  Entry& entry = entries_[extent.extent_id];
  const bool known = entry.base.load(std::memory_order_relaxed) != nullptr;
  if (known && entry.generation == extent.generation) {
    return describe(ErrorCode::kUnavailable, "thinkvd sent extent %u twice", extent.extent_id);
  }
  if (extent_bytes_ != 0 && extent.extent_bytes != extent_bytes_) {
    return describe(ErrorCode::kUnavailable,
                    "thinkvd sent extent %u with %llu bytes, %llu were announced", extent.extent_id,
                    static_cast<unsigned long long>(extent.extent_bytes),
                    static_cast<unsigned long long>(extent_bytes_));
  }
  THINKV_ASSIGN_OR_RETURN(std::byte* const base, map(extent, fd, &entry));
  entry.page_bytes = extent.page_bytes;
  entry.page_count = extent.page_count;
  entry.page_class = extent.page_class;
  entry.generation = extent.generation;
  entry.base.store(base, std::memory_order_release);
  return {};
}

Result<std::byte*> ExtentMap::map(const protocol::Extent& extent, int fd, Entry* entry) {
  if (window_ != nullptr) {
    const ExtentId id(extent.extent_id);
    entry->base.store(nullptr, std::memory_order_release);
    THINKV_TRY(window_->map(id, fd, Access::kReadWrite));
    return reinterpret_cast<std::byte*>(window_->address(id));
  }
  THINKV_ASSIGN_OR_RETURN(MappedRange range, MappedRange::map(fd, extent.extent_bytes,
                                                              Access::kReadWrite, "an extent"));
  entry->range = std::move(range);
  return entry->range.data();
}

bool ExtentMap::mapped(ExtentId id) const {
  return id.value() < limits::kExtentsMax &&
         entries_[id.value()].base.load(std::memory_order_acquire) != nullptr;
}

bool ExtentMap::holds(PageId page, uint32_t page_class) const {
  if (!page.valid() || !mapped(page.extent())) return false;
  const Entry& entry = entries_[page.extent().value()];
  return entry.page_class == page_class && page.index() < entry.page_count;
}

}  // namespace thinkv::client
