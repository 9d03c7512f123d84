// The pool's own proof that its books agree with its pages.
#include "daemon/core/extent_pool.h"

namespace thinkv::core {

const char* ExtentPool::check_lists() const {
  for (const auto& tenant : accounts_) {
    for (const Account& shelf : tenant) {
      uint64_t free = 0;
      for (uint32_t b = 0; b < kBuckets; ++b) {
        uint32_t before = kNoSlot;
        for (uint32_t i = shelf.heads[b]; i != kNoSlot; i = extents_[i].next) {
          const Extent& extent = extents_[i];
          if (extent.prev != before || extent.bucket != b) return "links of a fullness list";
          if (bucket_of(extent.pages) != b) return "extent in the wrong fullness list";
          if (&account(extent.shelf) != &shelf) return "extent in another tenant's list";
          free += extent.pages.free_count();
          before = i;
        }
      }
      if (free != shelf.free) return "free pages of a tenant's class";
    }
  }
  return nullptr;
}

// The pages of each owner are as many as are booked for that client.
const char* ExtentPool::check_owners(uint32_t index) const {
  std::array<uint32_t, limits::kClientsMax + 1> counts{};
  const PageMap& map = extents_[index].pages;
  for (uint32_t i = 0; i < map.page_count(); ++i) {
    if (map.owner(i) > limits::kClientsMax) return "page of no client";
    ++counts[map.owner(i)];
  }
  for (uint32_t c = 0; c < limits::kClientsMax; ++c) {
    if (counts[c + 1] != held_[size_t{index} * limits::kClientsMax + c]) {
      return "pages of a client in an extent";
    }
  }
  return nullptr;
}

const char* ExtentPool::check_invariants(bool pages) const {
  std::array<std::array<Account, kPageClassCount>, limits::kTenantsMax> sums{};
  std::array<uint32_t, 4> states{};
  for (uint32_t index = 0; index < extents_.size(); ++index) {
    const Extent& extent = extents_[index];
    ++states[static_cast<size_t>(extent.state)];
    if (pages) {
      if (const char* broken = extent.pages.check_invariants()) return broken;
      if (const char* broken = check_owners(index)) return broken;
    }
    uint64_t by_client = 0;
    for (uint32_t c = 0; c < limits::kClientsMax; ++c) {
      const uint32_t count = held_[size_t{index} * limits::kClientsMax + c];
      by_client += count;
      // A page may only be held by a connection that got the extent's descriptor.
      if (count > 0 && !extent.sent.test(c)) return "pages of an extent that was never sent";
    }
    if (by_client != extent.pages.granted_count()) return "granted pages of an extent";
    if (extent.state == ExtentState::kUnassigned || extent.state == ExtentState::kRetired) {
      if (by_client != 0 || extent.mappers.any()) return "unassigned extent in use";
      continue;
    }
    Account& sum = sums[extent.shelf.tenant.value()][extent.shelf.page_class];
    sum.granted += extent.pages.granted_count();
    (extent.state == ExtentState::kCreating ? sum.creating : sum.assigned) += 1;
  }
  if (states != states_) return "extents by state";
  for (uint32_t t = 0; t < limits::kTenantsMax; ++t) {
    for (uint32_t c = 0; c < kPageClassCount; ++c) {
      const Account& book = accounts_[t][c];
      if (book.granted != sums[t][c].granted) return "granted pages of a tenant's class";
      if (book.creating != sums[t][c].creating) return "extents in creation";
      if (book.assigned != sums[t][c].assigned) return "assigned extents";
    }
  }
  return check_lists();
}

}  // namespace thinkv::core
