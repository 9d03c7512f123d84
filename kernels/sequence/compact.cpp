// compact.cpp: the tokens of a lane's emptiest pages move into the free slots of its fullest ones.
#include <algorithm>
#include <bit>
#include <vector>

#include "kernels/sequence/lane.h"
#include "kernels/slot_copy.h"

namespace thinkv::kernels {
namespace {

// Pages of one format, the fullest first; of equal ones the older first.
std::vector<uint32_t> pages_of(const SharedVector<PageDescriptor>& pages, uint8_t format) {
  std::vector<uint32_t> found;
  pages.for_each([&](uint32_t index, const PageDescriptor& page) {
    if (page.format == format) found.push_back(index);
  });
  std::sort(found.begin(), found.end(), [&](uint32_t a, uint32_t b) {
    const int x = std::popcount(pages[a].live), y = std::popcount(pages[b].live);
    if (x != y) return x > y;
    if (pages[a].first_position != pages[b].first_position) {
      return pages[a].first_position < pages[b].first_position;
    }
    return a < b;
  });
  return found;
}

}  // namespace

uint64_t Lane::compact() {
  uint64_t moved = 0;
  for (uint32_t f = 1; f < kFormatCount; ++f) {
    const std::vector<uint32_t> order = pages_of(pages_, static_cast<uint8_t>(f));
    uint32_t live = 0;
    for (const uint32_t index : order) {
      live += static_cast<uint32_t>(std::popcount(pages_[index].live));
    }
    const PageLayout& shape = page_layout(static_cast<Format>(f), store_->head_dim);
    const uint32_t needed = (live + shape.slots - 1) / shape.slots;
    for (uint32_t from = needed, to = 0; from < order.size(); ++from) {
      moved += move_tokens(pages_[order[from]], order, to) * uint64_t{shape.slot_payload_bytes()};
    }
  }
  sweep();
  return moved;
}

// Moves the tokens of `from` into the pages order[to..], which have room for them all.
uint32_t Lane::move_tokens(PageDescriptor& from, std::span<const uint32_t> order, uint32_t& to) {
  const PageLayout& shape = layout(from);
  uint32_t count = 0;
  for (uint64_t left = from.live; left != 0; left &= left - 1, ++count) {
    while (pages_[order[to]].live == shape.full_mask()) ++to;
    PageDescriptor& target = pages_[order[to]];
    const auto source = static_cast<uint32_t>(std::countr_zero(left));
    const auto slot = static_cast<uint32_t>(std::countr_one(target.live));
    const uint32_t where = position(from, source);
    copy_slot(shape, store_->pages->address(from.page), source, store_->pages->address(target.page),
              slot);
    if (store_->scored) {
      const uint32_t width = store_->score_bytes();
      std::memcpy(score_row(target) + size_t{slot} * width, score_of(from, source), width);
    }
    target.live |= uint64_t{1} << slot;
    target.filled = std::max(target.filled, static_cast<uint8_t>(slot + 1));
    target.first_position = std::min(target.first_position, where);
    target.last_position = std::max(target.last_position, where);
  }
  from.live = 0;
  return count;
}

}  // namespace thinkv::kernels
