// page_map.h: who holds each page of one extent.
//
// The only truth about pages: an owner a page (0: free), and a bitmap of the free ones with two
// levels of summaries, so that taking and giving back cost a few word operations whatever the
// extent's size and reclaiming a dead client's pages goes through the owners in order, four at a
// time. Lowest index first: what is in use stays dense.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace thinkv::core {

class PageMap {
 public:
  using Owner = uint16_t;  // client slot + 1
  static constexpr Owner kFree = 0;

  // Allocates for at most `capacity` pages; no later call allocates. Holds no page until reset().
  explicit PageMap(uint32_t capacity);

  // Makes it `page_count` free pages. Requires: nothing granted, page_count <= capacity.
  void reset(uint32_t page_count);

  [[nodiscard]] uint32_t page_count() const { return page_count_; }
  [[nodiscard]] uint32_t free_count() const { return free_count_; }
  [[nodiscard]] uint32_t granted_count() const { return page_count_ - free_count_; }
  // Requires: index < page_count().
  [[nodiscard]] Owner owner(uint32_t index) const { return owners_[index]; }

  // Gives up to out.size() free pages to `owner`; returns how many. Requires: owner != kFree.
  uint32_t take(Owner owner, std::span<uint32_t> out);
  // Requires: the page is granted.
  void give_back(uint32_t index);
  // Frees every page of `owner`; returns how many. Requires: owner != kFree.
  uint32_t reclaim(Owner owner);
  // Frees every page; for an extent with one owner, whose pages need not be told apart.
  void reclaim_all();

  // Null, or what is inconsistent. O(pages).
  [[nodiscard]] const char* check_invariants() const;

 private:
  void mark_all_free();
  void mark_free(uint32_t word, uint64_t bits);
  uint32_t first_free_word() const;

  std::vector<Owner> owners_;      // padded to whole bitmap words with kFree
  std::vector<uint64_t> free_;     // bit: page is free
  std::vector<uint64_t> summary_;  // bit: word of free_ is not zero
  std::vector<uint64_t> top_;      // bit: word of summary_ is not zero; at most 4 words
  uint32_t page_count_ = 0;
  uint32_t free_count_ = 0;
};

}  // namespace thinkv::core
