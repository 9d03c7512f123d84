#include "kernels/sequence/lane.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "kernels/sequence/stream.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

uint32_t score_granules(const LaneStore& store, const PageLayout& layout) {
  const uint32_t bytes = layout.slots * store.score_bytes();
  return (bytes + kGranuleBytes - 1) / kGranuleBytes;
}

}  // namespace

uint32_t Lane::new_pages(Format format, uint32_t tokens) const {
  const uint32_t slots = page_layout(format, store_->head_dim).slots;
  if (is_block(format)) return tokens / slots;
  const uint32_t free = header_->free_slots[static_cast<size_t>(format)];
  return tokens <= free ? 0 : (tokens - free + slots - 1) / slots;
}

bool Lane::add_need(Format format, uint32_t count, MetaNeed& need) const {
  if (uint64_t{pages_.size()} + count > pages_.size_max()) return false;
  pages_.add_need(count, need);
  if (store_->scored) {
    need.add_blocks(score_granules(*store_, page_layout(format, store_->head_dim)), count);
  }
  return true;
}

uint32_t Lane::position(const PageDescriptor& page, uint32_t slot) const {
  uint32_t position = 0;
  const std::byte* bytes = store_->pages->address(page.page);
  std::memcpy(&position, bytes + layout(page).position_offset + slot * kPositionBytes,
              sizeof position);
  return position;
}

void Lane::count_free(uint8_t format, uint32_t more, uint32_t fewer) {
  if (is_block(static_cast<Format>(format))) return;
  header_->free_slots[format] += more - fewer;
}

std::byte* Lane::score_row(const PageDescriptor& page) const {
  THINKV_CHECK(page.score_page != PageId::kNoneRaw);
  return store_->heap->address({page.score_page, page.score_granule});
}

uint16_t* Lane::scores(const PageDescriptor& page) const {
  THINKV_CHECK(!store_->sums);
  return reinterpret_cast<uint16_t*>(score_row(page));
}

float* Lane::sums(const PageDescriptor& page) const {
  THINKV_CHECK(store_->sums);
  return reinterpret_cast<float*>(score_row(page));
}

RankLane& Lane::rank() const {
  THINKV_CHECK(header_->rank.page != PageId::kNoneRaw);
  return *reinterpret_cast<RankLane*>(store_->heap->address(header_->rank));
}

std::byte* Lane::buffer_scores() const {
  THINKV_CHECK(store_->scored);
  return store_->sums ? reinterpret_cast<std::byte*>(rank().buffer_sum)
                      : reinterpret_cast<std::byte*>(header_->buffer_score);
}

uint64_t Lane::candidates(const PageDescriptor& page, SlotKind kind) const {
  if (kind == SlotKind::kEvicted) return low_slots(page.filled) & ~page.live;
  return layout(page).full_mask() & ~low_slots(page.filled);
}

PageDescriptor* Lane::oldest_with(Format format, SlotKind kind) const {
  PageDescriptor* oldest = nullptr;
  pages_.for_each([&](uint32_t, PageDescriptor& page) {
    if (page.format != static_cast<uint8_t>(format) || candidates(page, kind) == 0) return;
    if (oldest == nullptr || page.first_position < oldest->first_position) oldest = &page;
  });
  return oldest;
}

uint32_t Lane::fill(Format format, SlotKind kind, const TokenRows& rows, uint32_t from) {
  while (from < rows.count && header_->free_slots[static_cast<size_t>(format)] > 0) {
    PageDescriptor* page = oldest_with(format, kind);
    if (page == nullptr) break;
    from = write_slots(*page, candidates(*page, kind), rows, from);
  }
  return from;
}

PageDescriptor& Lane::push_page(Format format, uint32_t page) {
  const PageLayout& shape = page_layout(format, store_->head_dim);
  BlockRef score{PageId::kNoneRaw, 0};
  if (store_->scored) score = store_->heap->allocate(score_granules(*store_, shape));
  count_free(static_cast<uint8_t>(format), shape.slots, 0);
  return pages_.push({.live = 0,
                      .page = page,
                      .score_page = score.page,
                      .format = static_cast<uint8_t>(format),
                      .score_granule = static_cast<uint8_t>(score.granule),
                      .filled = 0,
                      .reserved0 = 0,
                      .first_position = 0,
                      .last_position = 0,
                      .reserved1 = 0});
}

uint32_t Lane::write_slots(PageDescriptor& page, uint64_t slots, const TokenRows& rows,
                           uint32_t from) {
  std::array<uint8_t, kSlotsPerPageMax> chosen;
  uint32_t count = 0;
  uint64_t written = 0;
  for (; slots != 0 && from + count < rows.count; slots &= slots - 1) {
    const auto slot = static_cast<uint8_t>(std::countr_zero(slots));
    chosen[count++] = slot;
    written |= uint64_t{1} << slot;
    page.filled = std::max(page.filled, static_cast<uint8_t>(slot + 1));
  }
  const size_t row = size_t{from} * store_->head_dim;
  store_->kernels->encode({.page = store_->pages->address(page.page),
                           .format = static_cast<Format>(page.format),
                           .head_dim = store_->head_dim,
                           .slots = {chosen.data(), count},
                           .k = rows.k + row,
                           .v = rows.v + row,
                           .positions = rows.positions + from});
  const uint32_t width = store_->score_bytes();
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t where = rows.positions[from + i];
    const bool first = page.live == 0 && i == 0;
    page.first_position = first ? where : std::min(page.first_position, where);
    page.last_position = first ? where : std::max(page.last_position, where);
    if (!store_->scored) continue;
    std::byte* score = score_row(page) + size_t{chosen[i]} * width;
    std::memset(score, 0, width);
    if (rows.scores == nullptr) continue;
    std::memcpy(score, static_cast<const std::byte*>(rows.scores) + size_t{from + i} * width,
                width);
  }
  THINKV_CHECK((page.live & written) == 0);
  page.live |= written;
  header_->live += count;
  header_->free_slots[page.format] -= count;
  return from + count;
}

uint32_t Lane::write(Format format, const TokenRows& rows) {
  THINKV_CHECK(!is_block(format));
  const uint32_t reused = fill(format, SlotKind::kEvicted, rows, 0);
  uint32_t done = fill(format, SlotKind::kUnwritten, rows, reused);
  while (done < rows.count) {
    PageDescriptor& page = push_page(format, store_->pages->take().raw());
    *store_->data_pages += 1;
    done = write_slots(page, candidates(page, SlotKind::kUnwritten), rows, done);
  }
  return reused;
}

void Lane::adopt_page(uint32_t raw, uint32_t count, const void* page_scores) {
  PageDescriptor& page = push_page(store_->wide, raw);
  page.live = low_slots(count);
  page.filled = static_cast<uint8_t>(count);
  page.first_position = position(page, 0);
  page.last_position = position(page, count - 1);
  if (store_->scored) {
    std::memcpy(score_row(page), page_scores, size_t{count} * store_->score_bytes());
  }
  header_->live += count;
  header_->free_slots[page.format] -= count;
}

void Lane::adopt_block(Format format, uint32_t raw, const void* scores) {
  PageDescriptor& page = push_page(format, raw);
  const uint32_t slots = layout(page).slots;
  page.live = layout(page).full_mask();
  page.filled = static_cast<uint8_t>(slots);
  page.first_position = position(page, 0);
  page.last_position = position(page, slots - 1);
  if (store_->scored) {
    std::memcpy(score_row(page), scores, size_t{slots} * store_->score_bytes());
  }
  header_->live += slots;
}

void Lane::drop(uint32_t page_index, uint64_t slots) {
  PageDescriptor& page = pages_[page_index];
  THINKV_CHECK((page.live & slots) == slots);
  const auto count = static_cast<uint32_t>(std::popcount(slots));
  page.live &= ~slots;
  header_->live -= count;
  count_free(page.format, count, 0);
}

void Lane::sweep() {
  for (uint32_t i = pages_.size(); i-- > 0;) {
    const PageDescriptor page = pages_[i];
    if (page.live != 0) continue;
    count_free(page.format, 0, layout(page).slots);
    if (store_->scored) {
      store_->heap->free({page.score_page, page.score_granule},
                         score_granules(*store_, layout(page)));
    }
    if (!is_pair(static_cast<Format>(page.format))) {  // else the second layer's lane owns it
      store_->pages->give_back(PageId(page.page));
      *store_->data_pages -= 1;
    }
    pages_.remove_unordered(i);
  }
}

void Lane::destroy() {
  pages_.for_each([&](uint32_t, PageDescriptor& page) { page.live = 0; });
  sweep();
  for (uint32_t& page : header_->buffer_page) {
    if (page == PageId::kNoneRaw) continue;
    store_->pages->give_back(PageId(page));
    *store_->data_pages -= 1;
    page = PageId::kNoneRaw;
  }
  header_->live = header_->live_prompt = 0;
  header_->buffer_count = 0;
  if (header_->rank.page != PageId::kNoneRaw) {
    store_->heap->free(header_->rank, kRankLaneGranules);
    header_->rank.page = PageId::kNoneRaw;
  }
  if (StreamLane* stream = stream_header(*store_, *header_); stream != nullptr) {
    Stream(*store_, *stream).destroy();
    store_->heap->free(header_->stream, kStreamLaneGranules);
    header_->stream.page = PageId::kNoneRaw;
  }
  pages_.destroy();
}

uint32_t Lane::gather(uint32_t first, uint32_t end, std::span<SlotRow> rows) const {
  uint32_t count = 0;
  pages_.for_each([&](uint32_t index, const PageDescriptor& page) {
    if (page.last_position < first || page.first_position >= end) return;
    const std::byte* const positions =
        store_->pages->address(page.page) + layout(page).position_offset;
    for (uint64_t left = page.live; left != 0; left &= left - 1) {
      const auto slot = static_cast<uint32_t>(std::countr_zero(left));
      uint32_t where = 0;
      std::memcpy(&where, positions + slot * kPositionBytes, sizeof where);
      if (where < first || where >= end) continue;
      THINKV_CHECK(count < rows.size());
      rows[count++] = {.position = where, .page = index, .slot = slot};
    }
  });
  // By position, so that what is chosen does not depend on where tokens happen to lie.
  std::sort(rows.begin(), rows.begin() + count,
            [](const SlotRow& a, const SlotRow& b) { return a.position < b.position; });
  return count;
}

void Lane::decode(std::span<const SlotRow> rows, float* k, float* v) const {
  std::array<uint8_t, kSlotsPerPageMax> slots;
  for (size_t first = 0; first < rows.size();) {
    const PageDescriptor& page = pages_[rows[first].page];
    uint32_t count = 0;
    for (size_t i = first; i < rows.size() && rows[i].page == rows[first].page; ++i, ++count) {
      THINKV_CHECK(count < kSlotsPerPageMax);
      slots[count] = static_cast<uint8_t>(rows[i].slot);
    }
    const size_t row = first * store_->head_dim;
    store_->kernels->decode({.page = store_->pages->address(page.page),
                             .format = static_cast<Format>(page.format),
                             .head_dim = store_->head_dim,
                             .slots = {slots.data(), count},
                             .k = k == nullptr ? nullptr : k + row,
                             .v = v == nullptr ? nullptr : v + row});
    first += count;
  }
}

}  // namespace thinkv::kernels
