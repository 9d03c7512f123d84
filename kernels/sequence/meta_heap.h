// meta_heap.h: blocks of 64-byte granules inside meta pages, and how many pages they can need.
//
// The heap lives in its pages (MetaPageHeader); an object of this class is a view with the page
// ids cached. A page whose last block is freed goes back, except the root page.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sequence/pages.h"
#include "kernels/sequence/sequence_format.h"

namespace thinkv::kernels {

// An upper bound of the pages that a set of allocations takes, whatever holes the heap has: blocks
// are put into fresh pages only, so nothing has to be simulated. At most the pages of all holes
// too many; the surplus of a promise is let go at the end of the step.
class MetaNeed {
 public:
  explicit MetaNeed(uint32_t granules_per_page) : usable_(granules_per_page - 1) {}
  void add_pages(uint32_t pages) { whole_pages_ += pages; }
  void add_blocks(uint32_t granules, uint32_t count = 1);
  [[nodiscard]] uint32_t pages() const;

 private:
  uint32_t usable_;
  uint32_t whole_pages_ = 0;
  uint32_t small_granules_ = 0;
  uint32_t largest_small_ = 0;
};

class MetaHeap {
 public:
  MetaHeap(Pages& pages, uint32_t page_bytes)
      : pages_(&pages), granules_(page_bytes / kGranuleBytes), page_bytes_(page_bytes) {}

  // A new heap whose root page is taken now. Requires: one promised page.
  void create();
  // The heap that starts at `root`. Requires: the root page is a valid meta page. Result: false
  // where a linked page is not a meta page.
  [[nodiscard]] bool adopt(PageId root);
  // Gives back every meta page, the root page last. Table pages must be gone before.
  void destroy();

  // Zeroed bytes. Requires: 1 <= granules <= block_granules_max(), pages promised (MetaNeed).
  [[nodiscard]] BlockRef allocate(uint32_t granules);
  void free(BlockRef block, uint32_t granules);
  // A whole page that is counted as metadata, zeroed. Requires: one promised page.
  [[nodiscard]] PageId take_table();
  void give_table(PageId page);

  [[nodiscard]] std::byte* address(BlockRef block) const {
    return pages_->address(block.page) + size_t{block.granule} * kGranuleBytes;
  }
  [[nodiscard]] std::byte* table(uint32_t raw) const { return pages_->address(raw); }
  [[nodiscard]] PageId root() const { return PageId(page_ids_.front()); }
  [[nodiscard]] uint32_t pages() const { return header(0)->total_pages; }
  [[nodiscard]] uint32_t page_bytes() const { return page_bytes_; }
  [[nodiscard]] uint32_t granules_per_page() const { return granules_; }
  [[nodiscard]] uint32_t block_granules_max() const;  // the largest power of two that fits

 private:
  [[nodiscard]] MetaPageHeader* header(size_t i) const {
    return reinterpret_cast<MetaPageHeader*>(pages_->address(page_ids_[i]));
  }
  [[nodiscard]] BlockRef allocate_in(size_t i, uint32_t granules);
  void append_page();
  void remove_page(size_t i);

  Pages* pages_;
  uint32_t granules_;
  uint32_t page_bytes_;
  size_t hint_ = 0;                 // page of the last success
  std::vector<uint32_t> page_ids_;  // in link order, the root first
};

}  // namespace thinkv::kernels
