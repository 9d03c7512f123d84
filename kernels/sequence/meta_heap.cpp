#include "kernels/sequence/meta_heap.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

bool granule_used(const MetaPageHeader& page, uint32_t granule) {
  return ((page.used[granule / 64] >> (granule % 64)) & 1u) != 0;
}

void mark(MetaPageHeader& page, uint32_t first, uint32_t count, bool used) {
  for (uint32_t g = first; g < first + count; ++g) {
    THINKV_CHECK(granule_used(page, g) != used);
    page.used[g / 64] ^= uint64_t{1} << (g % 64);
  }
  page.used_granules = used ? page.used_granules + count : page.used_granules - count;
}

// The first run of `count` free granules, or 0.
uint32_t find_run(const MetaPageHeader& page, uint32_t granules, uint32_t count) {
  uint32_t run = 0;
  for (uint32_t g = 1; g < granules; ++g) {
    run = granule_used(page, g) ? 0 : run + 1;
    if (run == count) return g - count + 1;
  }
  return 0;
}

}  // namespace

void MetaNeed::add_blocks(uint32_t granules, uint32_t count) {
  if (count == 0) return;
  if (granules > usable_ / 2) {
    whole_pages_ += count;  // no two of them share a page
    return;
  }
  small_granules_ += granules * count;
  largest_small_ = std::max(largest_small_, granules);
}

uint32_t MetaNeed::pages() const {
  if (small_granules_ == 0) return whole_pages_;
  // A page is opened only when the block fits in no other: all pages but the newest hold more than
  // usable - largest granules.
  const uint32_t full = usable_ - largest_small_ + 1;
  return whole_pages_ + (small_granules_ + full - 1) / full;
}

uint32_t MetaHeap::block_granules_max() const {
  return std::bit_floor(granules_ - 1);
}

void MetaHeap::append_page() {
  const PageId page = pages_->take();
  std::byte* bytes = pages_->address(page);
  std::memset(bytes, 0, kGranuleBytes);
  auto* fresh = reinterpret_cast<MetaPageHeader*>(bytes);
  fresh->magic = kMetaPageMagic;
  fresh->next = PageId::kNoneRaw;
  fresh->used_granules = 1;
  fresh->used[0] = 1;
  if (!page_ids_.empty()) header(page_ids_.size() - 1)->next = page.raw();
  page_ids_.push_back(page.raw());
  header(0)->total_pages += 1;
}

void MetaHeap::remove_page(size_t i) {
  THINKV_CHECK(i > 0);
  header(i - 1)->next = header(i)->next;
  pages_->give_back(PageId(page_ids_[i]));
  page_ids_.erase(page_ids_.begin() + static_cast<std::ptrdiff_t>(i));
  header(0)->total_pages -= 1;
  hint_ = 0;
}

void MetaHeap::create() {
  THINKV_CHECK(page_ids_.empty());
  append_page();
}

bool MetaHeap::adopt(PageId root) {
  page_ids_.clear();
  for (uint32_t raw = root.raw(); raw != PageId::kNoneRaw;) {
    const auto* page = reinterpret_cast<const MetaPageHeader*>(pages_->address(raw));
    if (page->magic != kMetaPageMagic || page->used_granules > granules_) return false;
    page_ids_.push_back(raw);
    raw = page->next;
  }
  return true;
}

void MetaHeap::destroy() {
  for (size_t i = page_ids_.size(); i-- > 0;) pages_->give_back(PageId(page_ids_[i]));
  page_ids_.clear();
}

BlockRef MetaHeap::allocate_in(size_t i, uint32_t granules) {
  MetaPageHeader* page = header(i);
  if (granules_ - page->used_granules < granules) return {PageId::kNoneRaw, 0};
  const uint32_t first = find_run(*page, granules_, granules);
  if (first == 0) return {PageId::kNoneRaw, 0};
  mark(*page, first, granules, true);
  hint_ = i;
  const BlockRef block{page_ids_[i], first};
  std::memset(address(block), 0, size_t{granules} * kGranuleBytes);
  return block;
}

BlockRef MetaHeap::allocate(uint32_t granules) {
  THINKV_CHECK(granules >= 1 && granules <= block_granules_max());
  const size_t count = page_ids_.size();
  for (size_t n = 0; n < count; ++n) {
    const BlockRef block = allocate_in((hint_ + n) % count, granules);
    if (block.page != PageId::kNoneRaw) return block;
  }
  append_page();
  const BlockRef block = allocate_in(page_ids_.size() - 1, granules);
  THINKV_CHECK(block.page != PageId::kNoneRaw);
  return block;
}

void MetaHeap::free(BlockRef block, uint32_t granules) {
  auto* page = reinterpret_cast<MetaPageHeader*>(pages_->address(block.page));
  mark(*page, block.granule, granules, false);
  if (page->used_granules > 1 || block.page == page_ids_.front()) return;
  const auto found = std::find(page_ids_.begin(), page_ids_.end(), block.page);
  THINKV_CHECK(found != page_ids_.end());
  remove_page(static_cast<size_t>(found - page_ids_.begin()));
}

PageId MetaHeap::take_table() {
  const PageId page = pages_->take();
  std::memset(pages_->address(page), 0, page_bytes_);
  header(0)->total_pages += 1;
  return page;
}

void MetaHeap::give_table(PageId page) {
  pages_->give_back(page);
  header(0)->total_pages -= 1;
}

}  // namespace thinkv::kernels
