#include "daemon/core/extent_pool.h"

#include <algorithm>

#include "thinkv/internal/check.h"

namespace thinkv::core {
namespace {

PageMap::Owner owner_of(ClientSlot client) {
  return static_cast<PageMap::Owner>(client.value() + 1);
}

}  // namespace

ExtentPool::ExtentPool(uint32_t extents, uint64_t extent_bytes)
    : extent_bytes_(extent_bytes), held_(size_t{extents} * limits::kClientsMax, 0) {
  THINKV_CHECK(extents >= 1 && extents <= limits::kExtentsMax);
  THINKV_CHECK(extent_bytes >= limits::kExtentBytesMin && extent_bytes <= limits::kExtentBytesMax);
  extents_.reserve(extents);
  for (uint32_t i = 0; i < extents; ++i) extents_.emplace_back(pages_per_extent(0));
  states_[static_cast<size_t>(ExtentState::kUnassigned)] = extents;
  for (auto& tenant : accounts_) {
    for (Account& shelf : tenant) shelf.heads.fill(kNoSlot);
  }
  scratch_.resize(limits::kGrantRing);
}

ExtentPool::Account& ExtentPool::account(Shelf shelf) {
  THINKV_CHECK(shelf.tenant.value() < limits::kTenantsMax && shelf.page_class < kPageClassCount);
  return accounts_[shelf.tenant.value()][shelf.page_class];
}
const ExtentPool::Account& ExtentPool::account(Shelf shelf) const {
  return const_cast<ExtentPool*>(this)->account(shelf);
}
ExtentPool::Extent& ExtentPool::at(ExtentId extent) {
  THINKV_CHECK(extent.value() < extents_.size());
  return extents_[extent.value()];
}
const ExtentPool::Extent& ExtentPool::at(ExtentId extent) const {
  return const_cast<ExtentPool*>(this)->at(extent);
}
uint32_t& ExtentPool::held(uint32_t extent, ClientSlot client) {
  return held_[size_t{extent} * limits::kClientsMax + client.value()];
}

uint32_t ExtentPool::tenant_extents(TenantId tenant) const {
  uint32_t sum = 0;
  for (const Account& shelf : accounts_[tenant.value()]) sum += shelf.creating + shelf.assigned;
  return sum;
}

bool ExtentPool::mapped(ProcessSlot process) const {
  return std::any_of(extents_.begin(), extents_.end(),
                     [&](const Extent& e) { return e.mappers.test(process.value()); });
}

void ExtentPool::set_state(Extent& extent, ExtentState state) {
  --states_[static_cast<size_t>(extent.state)];
  extent.state = state;
  ++states_[static_cast<size_t>(state)];
}

ExtentId ExtentPool::assign(Shelf shelf) {
  const auto found = std::find_if(extents_.begin(), extents_.end(), [](const Extent& e) {
    return e.state == ExtentState::kUnassigned;
  });
  THINKV_CHECK(found != extents_.end());
  found->shelf = shelf;
  set_state(*found, ExtentState::kCreating);
  ++found->generation;
  ++account(shelf).creating;
  return ExtentId(static_cast<uint32_t>(found - extents_.begin()));
}

Shelf ExtentPool::ready(ExtentId id) {
  Extent& extent = at(id);
  THINKV_CHECK(extent.state == ExtentState::kCreating);
  THINKV_CHECK(extent.mappers.none() && extent.sent.none());
  Account& shelf = account(extent.shelf);
  set_state(extent, ExtentState::kAssigned);
  extent.pages.reset(pages_per_extent(extent.shelf.page_class));
  --shelf.creating;
  ++shelf.assigned;
  shelf.free += extent.pages.free_count();
  link(id.value());
  return extent.shelf;
}

Shelf ExtentPool::failed(ExtentId id, bool retire) {
  Extent& extent = at(id);
  THINKV_CHECK(extent.state == ExtentState::kCreating);
  set_state(extent, retire ? ExtentState::kRetired : ExtentState::kUnassigned);
  --account(extent.shelf).creating;
  return extent.shelf;
}

uint32_t ExtentPool::bucket_of(const PageMap& pages) {
  if (pages.granted_count() == 0) return 0;
  if (pages.free_count() == 0) return kNoBucket;
  const uint64_t sevenths = uint64_t{pages.granted_count()} * (kBuckets - 1) / pages.page_count();
  return 1 + std::min(static_cast<uint32_t>(sevenths), kBuckets - 2);
}

void ExtentPool::link(uint32_t index) {
  Extent& extent = extents_[index];
  extent.bucket = bucket_of(extent.pages);
  if (extent.bucket == kNoBucket) return;
  uint32_t& head = account(extent.shelf).heads[extent.bucket];
  extent.prev = kNoSlot;
  extent.next = head;
  if (head != kNoSlot) extents_[head].prev = index;
  head = index;
}

void ExtentPool::unlink(uint32_t index) {
  Extent& extent = extents_[index];
  if (extent.bucket == kNoBucket) return;
  if (extent.prev != kNoSlot) {
    extents_[extent.prev].next = extent.next;
  } else {
    account(extent.shelf).heads[extent.bucket] = extent.next;
  }
  if (extent.next != kNoSlot) extents_[extent.next].prev = extent.prev;
  extent.bucket = kNoBucket;
}

void ExtentPool::relink(uint32_t index) {
  if (extents_[index].bucket == bucket_of(extents_[index].pages)) return;
  unlink(index);
  link(index);
}

uint32_t ExtentPool::fullest(const Account& shelf) const {
  for (uint32_t b = kBuckets; b-- > 0;) {
    if (shelf.heads[b] != kNoSlot) return shelf.heads[b];
  }
  return kNoSlot;
}

uint32_t ExtentPool::take(Shelf shelf, Holder holder, uint32_t count, std::vector<uint32_t>* pages,
                          std::vector<ExtentId>* first_time) {
  THINKV_CHECK(count <= scratch_.size());
  Account& book = account(shelf);
  uint32_t taken = 0;
  while (taken < count) {
    const uint32_t index = fullest(book);
    if (index == kNoSlot) break;
    Extent& extent = extents_[index];
    THINKV_CHECK(extent.state == ExtentState::kAssigned);
    const uint32_t got =
        extent.pages.take(owner_of(holder.client), std::span(scratch_).first(count - taken));
    THINKV_CHECK(got > 0);
    for (uint32_t i = 0; i < got; ++i) {
      pages->push_back(PageId(ExtentId(index), scratch_[i]).raw());
    }
    taken += got;
    held(index, holder.client) += got;
    book.free -= got;
    book.granted += got;
    relink(index);
    extent.mappers.set(holder.process.value());
    if (!extent.sent.test(holder.client.value())) {
      extent.sent.set(holder.client.value());
      first_time->push_back(ExtentId(index));
    }
  }
  return taken;
}

bool ExtentPool::give_back(ClientSlot client, uint32_t page_class, uint32_t raw_page) {
  const PageId page(raw_page);
  const uint32_t index = page.extent().value();
  if (index >= extents_.size()) return false;
  Extent& extent = extents_[index];
  if (extent.state != ExtentState::kAssigned || extent.shelf.page_class != page_class) return false;
  if (page.index() >= extent.pages.page_count()) return false;
  if (extent.pages.owner(page.index()) != owner_of(client)) return false;
  extent.pages.give_back(page.index());
  --held(index, client);
  Account& book = account(extent.shelf);
  ++book.free;
  --book.granted;
  relink(index);
  return true;
}

std::array<uint64_t, kPageClassCount> ExtentPool::reclaim(ClientSlot client) {
  std::array<uint64_t, kPageClassCount> freed{};
  for (uint32_t index = 0; index < extents_.size(); ++index) {
    Extent& extent = extents_[index];
    extent.sent.reset(client.value());
    const uint32_t expected = held(index, client);
    if (expected == 0) continue;
    uint32_t got = expected;
    if (expected == extent.pages.granted_count()) {
      extent.pages.reclaim_all();
    } else {
      got = extent.pages.reclaim(owner_of(client));
      THINKV_CHECK(got == expected);
    }
    held(index, client) = 0;
    Account& book = account(extent.shelf);
    book.free += got;
    book.granted -= got;
    freed[extent.shelf.page_class] += got;
    relink(index);
  }
  return freed;
}

void ExtentPool::forget_process(ProcessSlot process) {
  for (Extent& extent : extents_) extent.mappers.reset(process.value());
}

void ExtentPool::release_unused(std::vector<ExtentId>* released) {
  for (uint32_t index = 0; index < extents_.size(); ++index) {
    Extent& extent = extents_[index];
    if (extent.state != ExtentState::kAssigned || extent.mappers.any()) continue;
    if (extent.pages.granted_count() != 0) continue;
    Account& book = account(extent.shelf);
    if (book.creating > 0) continue;
    THINKV_CHECK(extent.sent.none());
    unlink(index);
    book.free -= extent.pages.free_count();
    --book.assigned;
    extent.pages.reset(0);
    set_state(extent, ExtentState::kUnassigned);
    released->push_back(ExtentId(index));
  }
}

}  // namespace thinkv::core
