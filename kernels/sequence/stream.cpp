#include "kernels/sequence/stream.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/stream/coded_block.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

uint64_t units_of(uint64_t bytes) {
  return (bytes + kStreamUnitBytes - 1) / kStreamUnitBytes;
}
uint64_t begin_of(const StreamBlock& block) {
  return uint64_t{block.unit} * kStreamUnitBytes;
}

}  // namespace

void Stream::initialise(StreamLane& lane) {
  SharedVector<uint32_t>::initialise(lane.pages);
  SharedVector<StreamBlock>::initialise(lane.blocks);
  lane.end_unit = lane.end_position = 0;
}

uint64_t Stream::end_of(std::span<const uint32_t> block_bytes) const {
  uint64_t units = lane_->end_unit;
  for (const uint32_t bytes : block_bytes) units += units_of(bytes);
  return units * kStreamUnitBytes;
}

uint32_t Stream::pages_for(uint64_t bytes) const {
  const uint32_t page = store_->heap->page_bytes();
  return static_cast<uint32_t>((bytes + page - 1) / page);
}

bool Stream::has_open_page() const {
  const uint64_t end = uint64_t{lane_->end_unit} * kStreamUnitBytes;
  const uint32_t page = store_->heap->page_bytes();
  return end % page != 0 && pages_[static_cast<uint32_t>(end / page)] != PageId::kNoneRaw;
}

bool Stream::add_need(std::span<const uint32_t> block_bytes, uint32_t& data_pages,
                      MetaNeed& need) const {
  if (block_bytes.empty()) return true;
  const uint64_t end = end_of(block_bytes);
  const uint64_t count = uint64_t{blocks_.size()} + block_bytes.size();
  if (end / kStreamUnitBytes > std::numeric_limits<uint32_t>::max() ||
      end > uint64_t{pages_.size_max()} * store_->heap->page_bytes() ||
      count > blocks_.size_max()) {
    return false;
  }
  blocks_.add_need(static_cast<uint32_t>(block_bytes.size()), need);
  pages_.add_need(pages_for(end) - pages_.size(), need);
  data_pages += pages_for(end) - pages_for(uint64_t{lane_->end_unit} * kStreamUnitBytes);
  // The end lies within a page that went back with its blocks: it is taken again.
  const bool within =
      uint64_t{lane_->end_unit} * kStreamUnitBytes % store_->heap->page_bytes() != 0;
  if (within && !has_open_page()) data_pages += 1;
  return true;
}

void Stream::grow_for(std::span<const uint32_t> block_bytes) {
  blocks_.grow_for(static_cast<uint32_t>(block_bytes.size()));
  pages_.grow_for(pages_for(end_of(block_bytes)) - pages_.size());
}

void Stream::append(bool raw, std::span<const std::byte> bytes) {
  const uint32_t page_bytes = store_->heap->page_bytes();
  uint64_t at = uint64_t{lane_->end_unit} * kStreamUnitBytes;
  blocks_.push({.unit = lane_->end_unit,
                .bytes = static_cast<uint32_t>(bytes.size()),
                .first_position = lane_->end_position,
                .raw = raw ? 1u : 0u});
  lane_->end_unit += static_cast<uint32_t>(units_of(bytes.size()));
  lane_->end_position += kBlockTokens;
  while (!bytes.empty()) {
    const auto index = static_cast<uint32_t>(at / page_bytes);
    if (index == pages_.size()) pages_.push(PageId::kNoneRaw);
    if (pages_[index] == PageId::kNoneRaw) {
      pages_[index] = store_->pages->take().raw();
      *store_->data_pages += 1;
    }
    const size_t offset = at % page_bytes;
    const size_t count = std::min<size_t>(bytes.size(), page_bytes - offset);
    std::memcpy(store_->pages->address(pages_[index]) + offset, bytes.data(), count);
    bytes = bytes.subspan(count);
    at += count;
  }
  // The next block begins in a page that is listed, or at the border behind the last one.
  THINKV_CHECK(pages_for(uint64_t{lane_->end_unit} * kStreamUnitBytes) == pages_.size());
}

bool Stream::read(uint32_t index, std::vector<std::byte>& out) const {
  const StreamBlock block = blocks_[index];
  const uint32_t page_bytes = store_->heap->page_bytes();
  const uint64_t begin = begin_of(block);
  if (block.bytes == 0 || block.bytes > raw_block_bytes(store_->head_dim) ||
      begin + block.bytes > uint64_t{pages_.size()} * page_bytes) {
    return false;
  }
  out.resize(block.bytes);
  for (size_t done = 0; done < block.bytes;) {
    const uint64_t at = begin + done;
    const uint32_t raw = pages_[static_cast<uint32_t>(at / page_bytes)];
    if (raw == PageId::kNoneRaw) return false;
    const size_t offset = at % page_bytes;
    const size_t count = std::min<size_t>(block.bytes - done, page_bytes - offset);
    std::memcpy(out.data() + done, store_->pages->address(raw) + offset, count);
    done += count;
  }
  return true;
}

void Stream::remove(uint32_t index) {
  blocks_.remove_ordered(index);
  free_unused_pages();
}

void Stream::free_unused_pages() {
  const uint32_t page_bytes = store_->heap->page_bytes();
  uint32_t next = 0;  // the first page that no earlier block lies in
  const auto free_until = [&](uint32_t end) {
    for (; next < end; ++next) {
      uint32_t& raw = pages_[next];
      if (raw == PageId::kNoneRaw) continue;
      store_->pages->give_back(PageId(raw));
      *store_->data_pages -= 1;
      raw = PageId::kNoneRaw;
    }
  };
  blocks_.for_each([&](uint32_t, const StreamBlock& block) {
    const uint64_t begin = begin_of(block);
    free_until(static_cast<uint32_t>(begin / page_bytes));
    next = std::max(next, static_cast<uint32_t>((begin + block.bytes - 1) / page_bytes) + 1);
  });
  free_until(pages_.size());
}

void Stream::destroy() {
  pages_.for_each([&](uint32_t, uint32_t raw) {
    if (raw == PageId::kNoneRaw) return;
    store_->pages->give_back(PageId(raw));
    *store_->data_pages -= 1;
  });
  pages_.destroy();
  blocks_.destroy();
  lane_->end_unit = lane_->end_position = 0;
}

bool Stream::fits_together() const {
  const uint32_t page_bytes = store_->heap->page_bytes();
  bool ok = pages_for(uint64_t{lane_->end_unit} * kStreamUnitBytes) == pages_.size() &&
            lane_->end_position % kBlockTokens == 0;
  uint64_t end = 0;
  uint64_t position = 0;
  blocks_.for_each([&](uint32_t, const StreamBlock& block) {
    ok = ok && begin_of(block) >= end && block.bytes > 0 && block.raw <= 1 &&
         block.first_position % kBlockTokens == 0 && block.first_position >= position;
    end = begin_of(block) + block.bytes;
    position = uint64_t{block.first_position} + kBlockTokens;
    ok = ok && end <= uint64_t{lane_->end_unit} * kStreamUnitBytes &&
         position <= lane_->end_position;
    if (!ok) return;
    for (uint64_t page = begin_of(block) / page_bytes; page * page_bytes < end; ++page) {
      ok = ok && pages_[static_cast<uint32_t>(page)] != PageId::kNoneRaw;
    }
  });
  return ok;
}

}  // namespace thinkv::kernels
