// lane.h: the pages and slots of one lane (one kv head of one layer of one sequence).
//
// Slots that are not live are all writable; no write moves a token. A write in format F
// takes, in this order: evicted slots of F pages, oldest page first; slots of F pages that were
// never written; new pages. A page whose last live slot is dropped goes back at the next sweep().
// Slots of a block page (block_format.h) are never written again alone.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/kernels.h"
#include "kernels/sequence/sequence_format.h"
#include "kernels/sequence/shared_vector.h"

namespace thinkv::kernels {

inline constexpr Error kLaneFull =
    make_error(ErrorCode::kUnsupported, "a lane cannot hold more pages: evict or use fewer bits");

// What all lanes of a sequence share. Borrowed: everything outlives the Lane.
struct LaneStore {
  Pages* pages;
  MetaHeap* heap;
  const KernelSet* kernels;
  uint64_t* data_pages;  // SequenceHeader::data_pages
  uint32_t head_dim;
  Format wide;  // the model's 16-bit format
  bool scored;  // pages carry scores
  bool sums;    // fp32 sums instead of fp16 scores
  [[nodiscard]] uint32_t score_bytes() const { return sums ? sizeof(float) : sizeof(uint16_t); }
};

// Tokens to be written, K and V already rotated where the policy rotates.
struct TokenRows {
  const float* k;             // [count, head_dim]
  const float* v;             // [count, head_dim]
  const uint32_t* positions;  // [count]
  const void* scores;         // [count] fp16 or fp32 as the store has them, or null: zero
  uint32_t count;
};

// A live token and where it is.
struct SlotRow {
  uint32_t position;
  uint32_t page;  // index of the descriptor
  uint32_t slot;
};

class Lane {
 public:
  Lane(const LaneStore& store, LaneHeader& header)
      : store_(&store), header_(&header), pages_(header.pages, *store.heap) {}

  [[nodiscard]] LaneHeader& header() const { return *header_; }
  [[nodiscard]] const SharedVector<PageDescriptor>& pages() const { return pages_; }

  // New pages that writing `tokens` in `format` takes. Requires: whole blocks of a block format.
  [[nodiscard]] uint32_t new_pages(Format format, uint32_t tokens) const;
  // Metadata for `count` more pages of `format`. Result: false beyond the size of a lane table.
  [[nodiscard]] bool add_need(Format format, uint32_t count, MetaNeed& need) const;
  // Requires: add_need() said true and its pages are promised.
  void grow_for(uint32_t pages) { pages_.grow_for(pages); }

  // Result: how many rows went into evicted slots. Requires: not a block format, pages promised,
  // table grown.
  uint32_t write(Format format, const TokenRows& rows);
  // Makes a buffer page with slots 0..count-1 written a page of the table. Requires: table grown.
  void adopt_page(uint32_t page, uint32_t count, const void* scores);
  // Makes a page that was written in a block format, tokens ascending by position, one of the
  // table. `scores` as in TokenRows. Requires: table grown.
  void adopt_block(Format format, uint32_t page, const void* scores);

  // The slots stop to count and become writable. Requires: all of them live.
  void drop(uint32_t page_index, uint64_t slots);
  // Gives back the pages that drop() emptied. Indices of descriptors change.
  void sweep();
  // Moves tokens, bit for bit, until every format has as few pages as its tokens need, and gives
  // back the others. Takes no page. Result: bytes moved (codes and scales). Indices of descriptors
  // and slots of tokens change. (compact.cpp)
  uint64_t compact();
  // Gives back everything, the buffer included.
  void destroy();

  // Live slots with first <= position < end, ascending by position. The buffer is not in the
  // table. Result: how many. Requires: rows.size() is enough.
  [[nodiscard]] uint32_t gather(uint32_t first, uint32_t end, std::span<SlotRow> rows) const;

  // Rows k, v [rows, head_dim] of live slots, or null for one that is not wanted; neighbours on one
  // page in one call of the kernel.
  void decode(std::span<const SlotRow> rows, float* k, float* v) const;

  [[nodiscard]] uint32_t position(const PageDescriptor& page, uint32_t slot) const;
  // fp16 [slots]. Requires: the store is scored, without sums.
  [[nodiscard]] uint16_t* scores(const PageDescriptor& page) const;
  // fp32 [slots]. Requires: the store is scored, with sums.
  [[nodiscard]] float* sums(const PageDescriptor& page) const;
  // The score or sum of one slot. Requires: the store is scored.
  [[nodiscard]] const std::byte* score_of(const PageDescriptor& page, uint32_t slot) const {
    return score_row(page) + size_t{slot} * store_->score_bytes();
  }
  // Of the tokens in the buffer, as wide as those of the pages. Requires: the store is scored.
  [[nodiscard]] std::byte* buffer_scores() const;
  [[nodiscard]] RankLane& rank() const;
  [[nodiscard]] uint32_t slots_of(Format format) const {
    return page_layout(format, store_->head_dim).slots;
  }
  [[nodiscard]] const PageLayout& layout(const PageDescriptor& page) const {
    return page_layout(static_cast<Format>(page.format), store_->head_dim);
  }

 private:
  enum class SlotKind { kEvicted, kUnwritten };
  // Of a page in that format; those of a block are never free alone.
  void count_free(uint8_t format, uint32_t more, uint32_t fewer);
  [[nodiscard]] std::byte* score_row(const PageDescriptor& page) const;
  [[nodiscard]] uint64_t candidates(const PageDescriptor& page, SlotKind kind) const;
  [[nodiscard]] PageDescriptor* oldest_with(Format format, SlotKind kind) const;
  [[nodiscard]] uint32_t fill(Format format, SlotKind kind, const TokenRows& rows, uint32_t from);
  [[nodiscard]] PageDescriptor& push_page(Format format, uint32_t page);
  // Writes rows from `from` on into the lowest of `slots`. Result: the next row.
  uint32_t write_slots(PageDescriptor& page, uint64_t slots, const TokenRows& rows, uint32_t from);
  // Result: tokens moved.
  uint32_t move_tokens(PageDescriptor& from, std::span<const uint32_t> order, uint32_t& to);

  const LaneStore* store_;
  LaneHeader* header_;
  SharedVector<PageDescriptor> pages_;
};

[[nodiscard]] constexpr uint64_t low_slots(uint32_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

}  // namespace thinkv::kernels
