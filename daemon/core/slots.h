// slots.h: indices of the core's tables. Never leave the core: the world knows ids.
#pragma once

#include <cstdint>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/units.h"

namespace thinkv::core {

using ClientSlot = Strong<struct ClientSlotTag, uint32_t>;    // < limits::kClientsMax
using ProcessSlot = Strong<struct ProcessSlotTag, uint32_t>;  // < kProcessesMax

// Processes with a connected client, and as many that disconnected but may still map extents.
inline constexpr uint32_t kProcessesMax = 2 * limits::kClientsMax;

inline constexpr uint32_t kNoSlot = 0xFFFF'FFFFu;

// A tenant's pages of one class: what free lists and accounts are kept for.
struct Shelf {
  TenantId tenant;
  uint32_t page_class = 0;
};

[[nodiscard]] constexpr uint32_t class_page_bytes(uint32_t page_class) {
  return page_bytes(kHeadDims[page_class]);
}
static_assert(page_class(kHeadDims[0]) == 0 && page_class(kHeadDims[1]) == 1 &&
              page_class(kHeadDims[2]) == 2);

}  // namespace thinkv::core
