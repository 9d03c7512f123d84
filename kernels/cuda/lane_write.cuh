// lane_write.cuh: places for new tokens in a lane, and the sweep of pages that drops emptied.
//
// Functions of one warp: all its threads call them with the same arguments.
#pragma once

#include "kernels/cuda/lane.cuh"

namespace thinkv::cuda {

// Where one token goes. page: null where the lease was empty, and the token is lost.
struct SlotPlace {
  unsigned char* page;
  uint32_t slot;
};

// Arrays in shared or global memory that the whole warp sees.
struct PlaceRequest {
  Format format;
  const uint32_t* positions;  // [count]
  const void* scores;         // [count] as wide as the lane's, or null: zero
  uint32_t count;
  SlotPlace* places;  // [count] out
};

namespace lane_detail {

inline constexpr uint64_t kNoKey = ~uint64_t{0};

// Descriptors with room, oldest first: first_position << 32 | index.
struct OldestPages {
  uint64_t evicted;
  uint64_t unwritten;
};

[[nodiscard]] __device__ __forceinline__ uint64_t warp_min(uint64_t key) {
  for (uint32_t x = 16; x > 0; x /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, key, x);
    key = other < key ? other : key;
  }
  return key;
}

[[nodiscard]] __device__ __forceinline__ OldestPages find_room(const LaneView& lane, Format format,
                                                               uint64_t full) {
  OldestPages best{kNoKey, kNoKey};
  const uint32_t pages = lane.lane->pages;
#pragma unroll 4
  for (uint32_t i = threadIdx.x % 32; i < pages; i += 32) {
    const DeviceDescriptor* d = descriptor_at(lane, i);
    if (d == nullptr || d->format != static_cast<uint8_t>(format)) continue;
    const uint64_t written = low_slots(d->filled) & full;
    const uint64_t key = uint64_t{d->first_position} << 32 | i;
    if ((written & ~d->live) != 0 && key < best.evicted) best.evicted = key;
    if (written != full && key < best.unwritten) best.unwritten = key;
  }
  return {warp_min(best.evicted), warp_min(best.unwritten)};
}

// Tokens from `from` on into the lowest of `slots`. Result: how many.
[[nodiscard]] __device__ __forceinline__ uint32_t fill_page(const LaneView& lane, uint32_t index,
                                                            uint64_t slots,
                                                            const PlaceRequest& request,
                                                            uint32_t from) {
  DeviceDescriptor* d = descriptor_at(lane, index);
  if (d == nullptr) return 0;
  unsigned char* page = page_at(*lane.batch, d->page);
  if (page == nullptr) return 0;
  uint64_t written = 0;
  uint32_t count = 0, first = d->first_position, last = d->last_position, filled = d->filled;
  bool empty = d->live == 0;
  for (; slots != 0 && from + count < request.count; slots &= slots - 1, ++count) {
    const auto slot = static_cast<uint32_t>(__ffsll(static_cast<int64_t>(slots)) - 1);
    const uint32_t position = request.positions[from + count];
    first = empty || position < first ? position : first;
    last = empty || position > last ? position : last;
    empty = false;
    filled = slot + 1 > filled ? slot + 1 : filled;
    written |= uint64_t{1} << slot;
    if (threadIdx.x % 32 != count % 32) continue;
    request.places[from + count] = {page, slot};
    if (!lane.scored()) continue;
    const uint32_t score =
        request.scores != nullptr ? read_score(lane, request.scores, from + count) : 0;
    write_score(lane, score_row(lane, d, index), slot, score);
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    d->live |= written;
    d->filled = static_cast<uint8_t>(filled);
    d->first_position = first;
    d->last_position = last;
    lane.lane->free_slots[d->format] -= count;
    lane.lane->live += count;
  }
  __syncwarp();
  return count;
}

// A table page for one more descriptor, where there is none. Thread 0 of the warp. Result: success.
[[nodiscard]] __device__ __forceinline__ bool grow_table(const LaneView& lane) {
  DeviceLane& header = *lane.lane;
  if (header.pages < header.table_pages * lane.per_table) return true;
  if (header.table_pages >= kTablePagesMax) {
    raise_fault(lane.batch->lease, kLeaseEmpty);
    return false;
  }
  const uint32_t raw = take_page(lane.batch->lease);
  if (raw == PageId::kNoneRaw) return false;
  header.table[header.table_pages] = raw;
  header.table_pages += 1;
  atomicAdd(&lane.sequence->metadata_pages, 1u);
  return true;
}

// The page of the lane's next descriptor: one that was put aside, else the lease's. Thread 0 of the
// warp. Result: kNoneRaw where there is none.
[[nodiscard]] __device__ __forceinline__ uint32_t next_page(const LaneView& lane) {
  DeviceLane& header = *lane.lane;
  if (header.pending == 0)
    return grow_table(lane) ? take_page(lane.batch->lease) : PageId::kNoneRaw;
  header.pending = static_cast<uint16_t>(header.pending - 1);
  auto* table = page_at(*lane.batch, header.table[header.pages / lane.per_table]);
  if (table == nullptr) return PageId::kNoneRaw;
  return reinterpret_cast<DeviceDescriptor*>(table)[header.pages % lane.per_table].page;
}

// The same where the page is another lane's.
[[nodiscard]] __device__ __forceinline__ uint32_t room_for_shared(const LaneView& lane,
                                                                  uint32_t shared) {
  if (lane.lane->pending == 0) return grow_table(lane) ? shared : PageId::kNoneRaw;
  raise_fault(lane.batch->lease, kBadMetadata);  // ids that were put aside lie where it would go
  return PageId::kNoneRaw;
}

// One more page of `format`, empty; `shared`: the one that the second layer of a pair owns. Result:
// success.
[[nodiscard]] __device__ __forceinline__ bool push_page(const LaneView& lane, Format format,
                                                        uint32_t slots,
                                                        uint32_t shared = PageId::kNoneRaw) {
  bool pushed = false;
  __syncwarp();  // all threads have read the counts that one of them changes
  if (threadIdx.x % 32 == 0) {
    const bool own = shared == PageId::kNoneRaw;
    const uint32_t raw = own ? next_page(lane) : room_for_shared(lane, shared);
    auto* table = raw == PageId::kNoneRaw
                      ? nullptr
                      : page_at(*lane.batch, lane.lane->table[lane.lane->pages / lane.per_table]);
    if (table != nullptr) {
      auto* d = reinterpret_cast<DeviceDescriptor*>(table) + lane.lane->pages % lane.per_table;
      *d = {.live = 0,
            .page = raw,
            .format = static_cast<uint8_t>(format),
            .filled = 0,
            .reserved0 = 0,
            .first_position = 0,
            .last_position = 0,
            .marks = 0};
      lane.lane->pages += 1;
      count_free(lane, static_cast<uint32_t>(format), slots, 0);
      if (own) atomicAdd(&lane.sequence->data_pages, 1u);
      pushed = true;
    }
  }
  return __any_sync(kAllLanes, pushed) != 0;
}

}  // namespace lane_detail

// Slots of `format` for `count` tokens: evicted ones of the oldest pages first, then never written
// ones, then new pages; they are live afterwards and only their codes and positions are missing.
// Result: how many went into evicted slots.
__device__ __forceinline__ uint32_t place_tokens(const LaneView& lane,
                                                 const PlaceRequest& request) {
  const auto format = static_cast<uint32_t>(request.format);
  const uint32_t slots = slot_shape(lane.head_dim, format).slots;
  const uint64_t full = low_slots(slots);
  uint32_t done = 0, reused = 0;
  bool evicted_left = true;
  while (done < request.count && lane.lane->free_slots[format] > 0) {
    const lane_detail::OldestPages oldest = lane_detail::find_room(lane, request.format, full);
    evicted_left = evicted_left && oldest.evicted != lane_detail::kNoKey;
    const uint64_t key = evicted_left ? oldest.evicted : oldest.unwritten;
    if (key == lane_detail::kNoKey) break;
    const auto index = static_cast<uint32_t>(key);
    const DeviceDescriptor* d = descriptor_at(lane, index);
    if (d == nullptr) break;
    const uint64_t written = low_slots(d->filled) & full;
    const uint32_t placed = lane_detail::fill_page(
        lane, index, evicted_left ? written & ~d->live : full & ~written, request, done);
    if (placed == 0) break;
    done += placed;
    if (evicted_left) reused += placed;
  }
  while (done < request.count && lane_detail::push_page(lane, request.format, slots)) {
    const uint32_t placed = lane_detail::fill_page(lane, lane.lane->pages - 1, full, request, done);
    if (placed == 0) break;
    done += placed;
  }
  for (uint32_t i = done + threadIdx.x % 32; i < request.count; i += 32) {
    request.places[i] = {nullptr, 0};
  }
  __syncwarp();
  return reused;
}

namespace lane_detail {

// What a sweep takes out of the table. `pages`: those that the lane owned.
struct Removed {
  uint32_t descriptors;
  uint32_t pages;
};

// The ids that are put aside begin at `first`, one lower than before: with `raw`, or where there is
// none, with the last of the `count` that there are. One thread.
__device__ __forceinline__ void begin_aside(const LaneView& lane, uint32_t first, uint32_t count,
                                            uint32_t raw) {
  DeviceDescriptor* begin = descriptor_at(lane, first);
  if (begin == nullptr) return;
  if (raw == PageId::kNoneRaw && count > 0) {
    const DeviceDescriptor* end = descriptor_at(lane, first + count);
    if (end != nullptr) raw = end->page;
  }
  begin->page = raw;
}

// Takes descriptor `index` out of the table: the last one moves into its place.
__device__ __forceinline__ void move_last(const LaneView& lane, uint32_t index, uint32_t last) {
  DeviceDescriptor* d = descriptor_at(lane, index);
  DeviceDescriptor* moved = descriptor_at(lane, last);
  if (index == last || d == nullptr || moved == nullptr) return;
  const uint32_t thread = threadIdx.x % 32;
  if (lane.scored()) {
    const auto* from = reinterpret_cast<const uint32_t*>(score_row(lane, moved, last));
    auto* to = reinterpret_cast<uint32_t*>(score_row(lane, d, index));
    for (uint32_t i = thread; i < kSlotsPerPageMax * lane.score_bytes / 4; i += 32) to[i] = from[i];
  }
  if (thread < 2)
    reinterpret_cast<uint4*>(d)[thread] = reinterpret_cast<const uint4*>(moved)[thread];
  __syncwarp();
}

// Takes descriptor `index` out. Its page, where the lane owns it, goes to the lease, or with
// `aside` to the ids behind the table, of which there are removed.pages more than before.
__device__ __forceinline__ void remove_descriptor(const LaneView& lane, uint32_t index, bool aside,
                                                  Removed& removed) {
  const DeviceDescriptor* d = descriptor_at(lane, index);
  if (d == nullptr) return;
  const uint32_t thread = threadIdx.x % 32, raw = d->page, format = d->format;
  const bool own = owns_page(d);
  const uint32_t last = lane.lane->pages - removed.descriptors - 1;
  __syncwarp();  // all have read what is about to be written
  if (thread == 0) {
    count_free(lane, format, 0, slot_shape(lane.head_dim, format).slots);
    if (!aside && own) give_page(lane.batch->lease, raw);
  }
  move_last(lane, index, last);
  if (aside && thread == 0) {
    begin_aside(lane, last, lane.lane->pending + removed.pages, own ? raw : PageId::kNoneRaw);
  }
  __syncwarp();
  removed.descriptors += 1;
  removed.pages += own ? 1 : 0;
}

// Table pages that nothing needs any more, but the first. One thread.
__device__ __forceinline__ void give_tables(const LaneView& lane) {
  DeviceLane& header = *lane.lane;
  const uint32_t wanted = (header.pages + lane.per_table - 1) / lane.per_table;
  const uint32_t tables = wanted > 0 ? wanted : 1;
  const uint32_t had = header.table_pages;
  for (; header.table_pages > tables; header.table_pages -= 1) {
    give_page(lane.batch->lease, header.table[header.table_pages - 1]);
  }
  atomicSub(&lane.sequence->metadata_pages, had - header.table_pages);
}

}  // namespace lane_detail

namespace lane_detail {

__device__ __forceinline__ Removed remove_empty(const LaneView& lane, bool aside) {
  const uint32_t before = lane.lane->pages;
  Removed removed{0, 0};
  for (uint32_t end = (before + 31) / 32; end > 0; --end) {
    const uint32_t base = (end - 1) * 32, mine = base + threadIdx.x % 32;
    bool empty = false;
    if (mine < before) {
      const DeviceDescriptor* d = descriptor_at(lane, mine);
      empty = d != nullptr && d->live == 0;
    }
    uint32_t found = __ballot_sync(kAllLanes, empty);
    while (found != 0) {
      const auto bit = static_cast<uint32_t>(31 - __clz(static_cast<int32_t>(found)));
      found &= ~(1u << bit);
      remove_descriptor(lane, base + bit, aside, removed);
    }
  }
  __syncwarp();
  if (removed.descriptors != 0 && threadIdx.x % 32 == 0) {
    lane.lane->pages = before - removed.descriptors;
    atomicSub(&lane.sequence->data_pages, removed.pages);
  }
  __syncwarp();
  return removed;
}

}  // namespace lane_detail

// Gives back the pages that drop_slots() emptied, and tables that nothing needs any more. Indices
// of descriptors change. The lane's drops are visible to the warp. Requires: nothing is put aside.
__device__ __forceinline__ void sweep_lane(const LaneView& lane) {
  if (lane_detail::remove_empty(lane, false).descriptors == 0) return;
  if (threadIdx.x % 32 == 0) lane_detail::give_tables(lane);
  __syncwarp();
}

// The same for kernels that take pages: the lane's next new pages are these, and give_aside() gives
// what is left.
__device__ __forceinline__ void put_pages_aside(const LaneView& lane) {
  const uint32_t pages = lane_detail::remove_empty(lane, true).pages;
  if (pages != 0 && threadIdx.x % 32 == 0) {
    lane.lane->pending = static_cast<uint16_t>(lane.lane->pending + pages);
  }
  __syncwarp();
}

// One thread. Requires: no other kernel takes pages meanwhile.
__device__ __forceinline__ void give_aside(const LaneView& lane) {
  DeviceLane& header = *lane.lane;
  const uint32_t first = header.pages, end = first + header.pending;
  for (uint32_t i = first; i < end; ++i) {
    const DeviceDescriptor* d = descriptor_at(lane, i);
    if (d != nullptr) give_page(lane.batch->lease, d->page);
  }
  header.pending = 0;
  lane_detail::give_tables(lane);
}

}  // namespace thinkv::cuda
