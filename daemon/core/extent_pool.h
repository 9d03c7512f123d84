// extent_pool.h: the extents, which tenant and class each is assigned to, and their pages.
//
//   unassigned -> creating -> assigned -> unassigned      (with other memory behind it each time)
//                    |  \-> retired
//                    \-> unassigned                        (no memory to be had now)
// An assigned extent goes back only when all its pages are free and every process that received its
// descriptor has exited: a descriptor cannot be revoked (reliability.md finding 3).
// Knows nothing of quotas: the caller charges before it takes.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <vector>

#include "daemon/core/page_map.h"
#include "daemon/core/slots.h"

namespace thinkv::core {

enum class ExtentState : uint8_t { kUnassigned, kCreating, kAssigned, kRetired };

class ExtentPool {
 public:
  struct Holder {
    ClientSlot client;
    ProcessSlot process;
  };

  // Requires: extents in 1..limits::kExtentsMax, extent_bytes in its limits.
  ExtentPool(uint32_t extents, uint64_t extent_bytes);

  [[nodiscard]] uint32_t extent_count() const { return static_cast<uint32_t>(extents_.size()); }
  [[nodiscard]] uint64_t extent_bytes() const { return extent_bytes_; }
  [[nodiscard]] uint32_t pages_per_extent(uint32_t page_class) const {
    return static_cast<uint32_t>(extent_bytes_ / class_page_bytes(page_class));
  }
  [[nodiscard]] uint32_t in_state(ExtentState state) const {
    return states_[static_cast<size_t>(state)];
  }
  // Creating or assigned.
  [[nodiscard]] uint32_t tenant_extents(TenantId tenant) const;
  [[nodiscard]] uint64_t free_pages(Shelf shelf) const { return account(shelf).free; }
  [[nodiscard]] uint64_t granted_pages(Shelf shelf) const { return account(shelf).granted; }
  [[nodiscard]] uint32_t creating(Shelf shelf) const { return account(shelf).creating; }
  [[nodiscard]] uint32_t generation(ExtentId extent) const { return at(extent).generation; }
  [[nodiscard]] bool mapped(ProcessSlot process) const;

  // Picks an unassigned extent. Its memory is not there before ready(). Requires: there is one.
  ExtentId assign(Shelf shelf);
  // Requires: creating. Returns where it belongs.
  Shelf ready(ExtentId extent);
  Shelf failed(ExtentId extent, bool retire);

  // Gives min(count, free pages of the shelf) pages, from the fullest extents first so that others
  // become empty. Appends raw page ids, and to *first_time the extents that this client did not
  // know.
  uint32_t take(Shelf shelf, Holder holder, uint32_t count, std::vector<uint32_t>* pages,
                std::vector<ExtentId>* first_time);

  // A page id from a client. False: no such page, of another class, or not this client's.
  [[nodiscard]] bool give_back(ClientSlot client, uint32_t page_class, uint32_t raw_page);

  // Frees all that the client holds; returns pages by class. Its process still counts as a mapper.
  std::array<uint64_t, kPageClassCount> reclaim(ClientSlot client);
  // No mapping of this process exists any more.
  void forget_process(ProcessSlot process);

  // Takes the empty extents that nobody maps away from their tenants and appends them, except where
  // another extent of the shelf is being made: somebody waits for both. O(extents).
  void release_unused(std::vector<ExtentId>* released);

  // Null, or what is inconsistent. O(extents), with `pages` O(pages).
  [[nodiscard]] const char* check_invariants(bool pages) const;

 private:
  // Extents of a shelf are in lists by fullness: [0] is empty, the full ones are in none.
  static constexpr uint32_t kBuckets = 8;
  static constexpr uint32_t kNoBucket = kBuckets;

  struct Extent {
    explicit Extent(uint32_t capacity) : pages(capacity) {}
    ExtentState state = ExtentState::kUnassigned;
    Shelf shelf;
    uint32_t generation = 0;
    uint32_t bucket = kNoBucket;
    uint32_t prev = kNoSlot;
    uint32_t next = kNoSlot;
    std::bitset<limits::kClientsMax> sent;  // connections that know the extent
    std::bitset<kProcessesMax> mappers;     // processes that may map it
    PageMap pages;
  };
  struct Account {
    uint64_t free = 0;
    uint64_t granted = 0;
    uint32_t creating = 0;
    uint32_t assigned = 0;
    std::array<uint32_t, kBuckets> heads{};
  };

  [[nodiscard]] Account& account(Shelf shelf);
  [[nodiscard]] const Account& account(Shelf shelf) const;
  [[nodiscard]] Extent& at(ExtentId extent);
  [[nodiscard]] const Extent& at(ExtentId extent) const;
  [[nodiscard]] uint32_t& held(uint32_t extent, ClientSlot client);
  void set_state(Extent& extent, ExtentState state);
  void link(uint32_t index);  // into the list of its fullness
  void unlink(uint32_t index);
  void relink(uint32_t index);  // after its fullness changed
  [[nodiscard]] static uint32_t bucket_of(const PageMap& pages);
  [[nodiscard]] uint32_t fullest(const Account& account) const;
  [[nodiscard]] const char* check_lists() const;
  [[nodiscard]] const char* check_owners(uint32_t index) const;

  const uint64_t extent_bytes_;
  std::vector<Extent> extents_;
  std::vector<uint32_t> held_;  // [extent][client slot] pages
  std::array<std::array<Account, kPageClassCount>, limits::kTenantsMax> accounts_;
  std::array<uint32_t, 4> states_{};  // extents by state
  std::vector<uint32_t> scratch_;     // page indices of one take
};

}  // namespace thinkv::core
