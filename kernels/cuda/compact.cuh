// compact.cuh: the tokens of a lane's emptiest pages move into the free slots of its fullest ones,
// bit for bit, as Lane::compact() of the host does it (record 0024), by one block a lane.
//
// A lane can have more pages than shared memory has words, so its pages are taken in order from
// batches of keys: a key orders the pages of a format as the host sorts them. Two streams of keys
// run side by side: pages that are filled and, above them, pages that are emptied. What a move does
// to a page never brings its key back into a stream: a filled page's gets smaller, an emptied one
// has none.
#pragma once

#include <cstdint>

#include "kernels/cuda/codec_place.cuh"
#include "kernels/cuda/lane_write.cuh"

namespace thinkv::cuda {

inline constexpr uint32_t kCompactBatch = 256;

// Of one block.
struct CompactShared {
  uint64_t found[kCompactBatch];
  uint64_t targets[kCompactBatch];
  uint64_t sources[kCompactBatch];
  uint8_t from_slot[kSlotsPerPageMax];
  uint8_t to_slot[kSlotsPerPageMax];
  uint32_t count;
  uint32_t live;
};

namespace compact_detail {

using lane_detail::kNoKey;

// Fewer free slots first, then the older, then the lower index; never 0.
inline constexpr uint32_t kIndexBits = 15;
inline constexpr uint32_t kKeyBits = kIndexBits + 32 + 7;
static_assert(kTablePagesMax * descriptors_per_page(256, 0) <= 1u << kIndexBits);
static_assert(kTablePagesMax * descriptors_per_page(64, 0) <= 1u << kIndexBits);

// The pages of one format in one lane.
struct FormatPages {
  const LaneView* lane;
  CompactShared* shared;
  Format format;
  SlotShape shape;
  uint64_t full;
  uint32_t score_bytes;  // of a slot; 0: the lane has no scores

  // kNoKey for a page of another format, or without a token.
  [[nodiscard]] __device__ uint64_t key(uint32_t index) const {
    const DeviceDescriptor* d = descriptor_at(*lane, index);
    if (d == nullptr || d->format != static_cast<uint8_t>(format)) return kNoKey;
    const auto live = static_cast<uint32_t>(__popcll(d->live & full));
    if (live == 0) return kNoKey;
    return uint64_t{65 - live} << (kIndexBits + 32) | uint64_t{d->first_position} << kIndexBits |
           index;
  }
};
[[nodiscard]] __device__ __forceinline__ uint32_t index_of(uint64_t key) {
  return static_cast<uint32_t>(key) & ((1u << kIndexBits) - 1);
}

struct PageCount {
  uint32_t pages;
  uint32_t live;
};
// Pages with above < key <= end. Whole block.
[[nodiscard]] __device__ inline PageCount count_pages(const FormatPages& pages, uint64_t above,
                                                      uint64_t end) {
  CompactShared& shared = *pages.shared;
  __syncthreads();  // what was written before, and the counts of the last call, are read
  if (threadIdx.x == 0) shared.count = shared.live = 0;
  __syncthreads();
  uint32_t count = 0, live = 0;
  for (uint32_t i = threadIdx.x; i < pages.lane->lane->pages; i += blockDim.x) {
    const uint64_t key = pages.key(i);
    if (key == kNoKey || key <= above || key > end) continue;
    count += 1;
    live += 65 - static_cast<uint32_t>(key >> (kIndexBits + 32));
  }
  if (count != 0) {
    atomicAdd(&shared.count, count);
    atomicAdd(&shared.live, live);
  }
  __syncthreads();
  return {shared.count, shared.live};
}

// The key that `rank` - 1 keys above `above` come before. Requires: there are `rank`. Whole block.
[[nodiscard]] __device__ inline uint64_t select_key(const FormatPages& pages, uint64_t above,
                                                    uint32_t rank) {
  uint64_t key = 0;
  for (uint32_t bit = kKeyBits; bit-- > 0;) {
    const uint64_t with = key | uint64_t{1} << bit;
    if (count_pages(pages, above, with - 1).pages < rank) key = with;
  }
  return key;
}

// Keys in ascending order. A view of what all threads of the block have alike.
struct KeyStream {
  uint64_t* batch;  // [kCompactBatch] shared
  uint64_t above;   // keys up to it have been in a batch
  uint64_t end;     // the last key
  uint32_t next = 0;
  uint32_t count = 0;
};

__device__ inline void load_batch(const FormatPages& pages, KeyStream& stream) {
  CompactShared& shared = *pages.shared;
  uint64_t last = stream.end;
  const uint32_t left = count_pages(pages, stream.above, last).pages;
  if (left > kCompactBatch) last = select_key(pages, stream.above, kCompactBatch);
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < pages.lane->lane->pages; i += blockDim.x) {
    const uint64_t key = pages.key(i);
    if (key == kNoKey || key <= stream.above || key > last) continue;
    const uint32_t at = atomicAdd(&shared.count, 1u);
    if (at < kCompactBatch) shared.found[at] = key;
  }
  __syncthreads();
  stream.count = min(shared.count, kCompactBatch);
  stream.next = 0;
  stream.above = last;
  for (uint32_t i = threadIdx.x; i < stream.count; i += blockDim.x) {
    uint32_t rank = 0;
    for (uint32_t j = 0; j < stream.count; ++j) rank += shared.found[j] < shared.found[i] ? 1u : 0u;
    stream.batch[rank] = shared.found[i];
  }
  __syncthreads();
}

// The next key, or kNoKey. Whole block.
[[nodiscard]] __device__ inline uint64_t take_key(const FormatPages& pages, KeyStream& stream) {
  if (stream.next == stream.count && stream.above < stream.end) load_batch(pages, stream);
  return stream.next < stream.count ? stream.batch[stream.next++] : kNoKey;
}

// ---- moves ----

[[nodiscard]] __device__ __forceinline__ uint64_t without_lowest(uint64_t slots, uint32_t count) {
  for (; count > 0; --count) slots &= slots - 1;
  return slots;
}
[[nodiscard]] __device__ __forceinline__ uint8_t nth_slot(uint64_t slots, uint32_t n) {
  const uint64_t left = without_lowest(slots, n);
  return static_cast<uint8_t>(__ffsll(static_cast<int64_t>(left)) - 1);
}

// A page that loses or gets tokens; the same in all threads.
struct MovedPage {
  uint32_t index;
  DeviceDescriptor* descriptor;
  unsigned char* bytes;  // null: none, or bad metadata
  uint64_t slots;        // still to be moved, or still free
};
[[nodiscard]] __device__ inline MovedPage moved_page(const FormatPages& pages, uint32_t index,
                                                     bool source) {
  DeviceDescriptor* d = descriptor_at(*pages.lane, index);
  if (d == nullptr) return {};
  const uint64_t slots = (source ? d->live : ~d->live) & pages.full;
  return {index, d, page_at(*pages.lane->batch, d->page), slots};
}

// Codes of less than 16 bits: a byte holds those of one slot (page_format.h), so slots are copied
// by bytes. Which dim is the lowest of byte `i` of a slot.
[[nodiscard]] __device__ __forceinline__ uint32_t dim_of_byte(const CodeSection& section,
                                                              uint32_t i) {
  if (section.bits == 16) return i;  // of half i
  const uint32_t run = section.is_k ? 16 : 8;
  return i / run * run * (8 / section.bits) + i % run;
}

__device__ inline void copy_codes(const FormatPages& pages, const CodeSection& section,
                                  const MovedPage& from, const MovedPage& to, uint32_t count) {
  const CompactShared& shared = *pages.shared;
  const bool halves = section.bits == 16;
  const uint32_t each = halves ? section.head_dim : section.head_dim * section.bits / 8;
  for (uint32_t i = threadIdx.x; i < count * each; i += blockDim.x) {
    const uint32_t token = i / each, dim = dim_of_byte(section, i % each);
    const unsigned char* source = from.bytes + section.site(shared.from_slot[token], dim).byte;
    unsigned char* target = to.bytes + section.site(shared.to_slot[token], dim).byte;
    target[0] = source[0];
    if (halves) target[1] = source[1];
  }
}

// Rows of `each` bytes a slot.
__device__ inline void copy_rows(const CompactShared& shared, const unsigned char* from,
                                 unsigned char* to, uint32_t each, uint32_t count) {
  for (uint32_t i = threadIdx.x; i < count * each; i += blockDim.x) {
    const uint32_t token = i / each, byte = i % each;
    to[shared.to_slot[token] * each + byte] = from[shared.from_slot[token] * each + byte];
  }
}

// The scores of a page, in rows behind the descriptors of its table.
[[nodiscard]] __device__ inline unsigned char* score_row(const FormatPages& pages,
                                                         const MovedPage& page) {
  const uint32_t per_table = pages.lane->per_table, place = page.index % per_table;
  return reinterpret_cast<unsigned char*>(page.descriptor - place + per_table) +
         place * kSlotsPerPageMax * pages.score_bytes;
}

__device__ inline void copy_slots(const FormatPages& pages, const MovedPage& from,
                                  const MovedPage& to, uint32_t count) {
  const uint32_t dim = pages.lane->head_dim;
  const VectorCoding k = coding_of<true>(pages.format), v = coding_of<false>(pages.format);
  const SlotShape& shape = pages.shape;
  using page_format_detail::section;
  copy_codes(pages, section(k.bits, shape.slots, dim, 0, true), from, to, count);
  copy_codes(pages, section(v.bits, shape.slots, dim, shape.v_offset, false), from, to, count);
  const uint32_t offsets[3] = {shape.k_scale_offset, shape.v_scale_offset, shape.position_offset};
  const uint32_t bytes[3] = {k.scale_bytes(dim), v.scale_bytes(dim), kPositionBytes};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    copy_rows(*pages.shared, from.bytes + offsets[i], to.bytes + offsets[i], bytes[i], count);
  }
  if (pages.score_bytes == 0) return;
  copy_rows(*pages.shared, score_row(pages, from), score_row(pages, to), pages.score_bytes, count);
}

// What the two descriptors say after the move of the lowest `count` slots. One warp.
__device__ inline void describe_move(const FormatPages& pages, const MovedPage& from,
                                     const MovedPage& to, uint32_t count) {
  const CompactShared& shared = *pages.shared;
  uint64_t least = kNoKey, most = kNoKey;  // positions, and their complements
  for (uint32_t i = threadIdx.x % 32; i < count; i += 32) {
    const uint32_t where =
        position_of(from.bytes, pages.shape.position_offset, shared.from_slot[i]);
    least = min(least, uint64_t{where});
    most = min(most, uint64_t{~where});
  }
  const auto first = static_cast<uint32_t>(lane_detail::warp_min(least));
  const uint32_t last = ~static_cast<uint32_t>(lane_detail::warp_min(most));
  if (threadIdx.x % 32 != 0) return;
  DeviceDescriptor& target = *to.descriptor;
  const uint32_t filled = shared.to_slot[count - 1] + 1u;
  from.descriptor->live = without_lowest(from.slots, count);
  target.live |= to.slots & ~without_lowest(to.slots, count);
  target.filled = static_cast<uint8_t>(max(uint32_t{target.filled}, filled));
  target.first_position = min(target.first_position, first);
  target.last_position = max(target.last_position, last);
}

// As many tokens of `from` as `to` has room for. Result: how many. Whole block.
__device__ inline uint32_t move_tokens(const FormatPages& pages, MovedPage& from, MovedPage& to) {
  CompactShared& shared = *pages.shared;
  const auto count = static_cast<uint32_t>(min(__popcll(from.slots), __popcll(to.slots)));
  __syncthreads();  // the slots of the last move are no longer read
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    shared.from_slot[i] = nth_slot(from.slots, i);
    shared.to_slot[i] = nth_slot(to.slots, i);
  }
  __syncthreads();
  if (threadIdx.x < 32) describe_move(pages, from, to, count);
  copy_slots(pages, from, to, count);
  from.slots = without_lowest(from.slots, count);
  to.slots = without_lowest(to.slots, count);
  return count;
}

// Moves the tokens of all pages of a format that its tokens do not need. Result: how many.
__device__ inline uint32_t compact_format(const FormatPages& pages) {
  const PageCount all = count_pages(pages, 0, kNoKey - 1);
  const uint32_t needed = (all.live + pages.shape.slots - 1) / pages.shape.slots;
  if (needed == all.pages) return 0;
  const uint64_t last_target = select_key(pages, 0, needed);
  KeyStream targets{pages.shared->targets, 0, last_target};
  KeyStream sources{pages.shared->sources, last_target, kNoKey - 1};
  uint32_t moved = 0;
  MovedPage to{};
  for (uint64_t key = take_key(pages, sources); key != kNoKey; key = take_key(pages, sources)) {
    MovedPage from = moved_page(pages, index_of(key), true);
    while (from.slots != 0) {
      while (to.slots == 0) {
        const uint64_t next = take_key(pages, targets);
        to = next == kNoKey ? MovedPage{} : moved_page(pages, index_of(next), false);
        if (next == kNoKey) break;
      }
      if (from.bytes == nullptr || to.bytes == nullptr) {  // bad metadata: the tokens stay
        if (threadIdx.x == 0) raise_fault(pages.lane->batch->lease, kBadMetadata);
        return moved;
      }
      moved += move_tokens(pages, from, to);
    }
  }
  return moved;
}

}  // namespace compact_detail

// Moves tokens until every format has as few pages as its tokens need, and leaves the others
// empty for the sweep. score_bytes: of a slot's score in the table's rows, 2 or 4; 0 where the lane
// is not scored. Result: bytes moved (codes and scales), in every thread. Whole block; no other
// works on the lane.
[[nodiscard]] __device__ inline uint64_t move_to_fullest(const LaneView& lane, uint32_t score_bytes,
                                                         CompactShared& shared) {
  uint64_t bytes = 0;
  for (uint32_t f = 1; f < kFormatCount; ++f) {
    const auto format = static_cast<Format>(f);
    const SlotShape shape = slot_shape(lane.head_dim, f);
    const VectorCoding k = coding_of<true>(format), v = coding_of<false>(format);
    const uint32_t each = lane.head_dim * (k.bits + v.bits) / 8 + k.scale_bytes(lane.head_dim) +
                          v.scale_bytes(lane.head_dim);
    const compact_detail::FormatPages pages{
        &lane, &shared, format, shape, low_slots(shape.slots), score_bytes};
    bytes += uint64_t{compact_detail::compact_format(pages)} * each;
  }
  __syncthreads();
  return bytes;
}

// The same, and the emptied pages go to the lease. Indices of descriptors and slots of tokens
// change.
[[nodiscard]] __device__ inline uint64_t compact_lane(const LaneView& lane, uint32_t score_bytes,
                                                      CompactShared& shared) {
  const uint64_t bytes = move_to_fullest(lane, score_bytes, shared);
  if (threadIdx.x < 32) sweep_lane(lane);
  __syncthreads();
  return bytes;
}

}  // namespace thinkv::cuda
