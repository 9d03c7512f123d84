// lane.cuh: sequences and lanes as kernels see them: bounds-checked ways from a root page to a
// slot, places for new tokens, drops, sweeps, and the lease.
//
// Ids, counts and indices that come out of metadata are checked before they are followed; a bad one
// raises kBadMetadata and the answer is null: the caller skips that lane. The functions for a warp
// are called by all 32 threads of it with the same arguments. Nothing here locks: one warp works on
// one lane at a time, and no kernel both takes from and gives to the lease.
// Slots are chosen in the order of the host's Lane::write, so both put a token in the same place.
//
// What launch_refresh() finds: tokens, counters.steps and counters.segments count the step that
// ends; the buffers of closing sequences are flushed (buffer_count 0); full buffers of others are
// flushed after it, as on the host, where the next token does it. BatchView::pages is free to use.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_format.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/sequence.h"
#include "thinkv/internal/units.h"

namespace thinkv::cuda {

inline constexpr uint32_t kAllLanes = 0xFFFF'FFFFu;  // of a warp

#if defined(THINKV_CUDA_EMULATED)
using AtomicWord64 = uint64_t;
#else
using AtomicWord64 = unsigned long long;  // CUDA's atomics know 64 bits by this name alone
#endif
__device__ __forceinline__ void add_64(uint64_t* where, uint64_t value) {
  atomicAdd(reinterpret_cast<AtomicWord64*>(where), static_cast<AtomicWord64>(value));
}

__device__ __forceinline__ void min_64(uint64_t* where, uint64_t value) {
  atomicMin(reinterpret_cast<AtomicWord64*>(where), static_cast<AtomicWord64>(value));
}

[[nodiscard]] __device__ __forceinline__ uint64_t low_slots(uint32_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// ---- layouts, by numbers that are known only when the kernel runs ----

// What PageLayout says, as far as kernels need it at run time.
struct SlotShape {
  uint32_t slots;
  uint32_t v_offset;
  uint32_t k_scale_offset;
  uint32_t v_scale_offset;
  uint32_t position_offset;
};
struct SlotShapes {
  SlotShape of[kPageClassCount][kAllFormatCount];
};
[[nodiscard]] constexpr SlotShapes make_slot_shapes() {
  SlotShapes all{};
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    for (uint32_t f = 1; f < kAllFormatCount; ++f) {
      const PageLayout l = make_page_layout(static_cast<Format>(f), kHeadDims[c]);
      all.of[c][f] = {.slots = l.slots,
                      .v_offset = l.v.offset,
                      .k_scale_offset = l.k_scale_offset,
                      .v_scale_offset = l.v_scale_offset,
                      .position_offset = l.position_offset};
    }
  }
  return all;
}
// Of a block format: slots and positions mean the same. Requires: page_format_valid(format).
[[nodiscard]] __device__ __forceinline__ SlotShape slot_shape(uint32_t head_dim, uint32_t format) {
  static constexpr SlotShapes kShapes = make_slot_shapes();
  return kShapes.of[page_class(head_dim)][format];
}

// ---- the lease ----

__device__ __forceinline__ void raise_fault(Lease* lease, uint32_t fault) {
  atomicOr(&lease->faults, fault);
}
// A page, or PageId::kNoneRaw with kLeaseEmpty raised.
[[nodiscard]] __device__ __forceinline__ uint32_t take_page(Lease* lease) {
  const auto before = static_cast<int32_t>(atomicSub(&lease->count, 1u));
  if (before <= 0) {
    atomicAdd(&lease->count, 1u);
    raise_fault(lease, kLeaseEmpty);
    return PageId::kNoneRaw;
  }
  add_64(&lease->used_total, 1);
  return lease->pages[before - 1];
}
__device__ __forceinline__ void give_page(Lease* lease, uint32_t raw) {
  const uint32_t index = atomicAdd(&lease->count, 1u);
  if (index >= lease->capacity) {
    atomicSub(&lease->count, 1u);
    raise_fault(lease, kLeaseFull);
    return;
  }
  lease->pages[index] = raw;
  add_64(&lease->used_total, ~uint64_t{0});  // less one
}

// ---- pages and sequences ----

// The first byte of a page, or null with kBadMetadata raised.
[[nodiscard]] __device__ __forceinline__ unsigned char* page_at(const BatchView& view,
                                                                uint32_t raw) {
  const uint32_t bytes = page_bytes(view.geometry.head_dim);
  const uint64_t offset = uint64_t{raw & PageId::kIndexMask} * bytes;
  const uint32_t extent = raw >> PageId::kIndexBits;
  if (raw == PageId::kNoneRaw || offset + bytes > view.pool.extent_bytes ||
      (view.pool.extents != 0 && extent >= view.pool.extents)) {
    raise_fault(view.lease, kBadMetadata);
    return nullptr;
  }
  return reinterpret_cast<unsigned char*>(view.pool.base + extent * view.pool.extent_bytes +
                                          offset);
}

// True where the header is that of a sequence of the batch's model. All fields are read at once: a
// chain of conditions would be a chain of reads, each as long as the one before it.
[[nodiscard]] __device__ __forceinline__ bool header_good(const BatchView& view,
                                                          const DeviceSequence* s) {
  const ModelGeometry& g = view.geometry;
  const uint32_t segments_max = kSegmentPagesMax * segments_per_page(g.head_dim);
  const uint32_t wrong =
      (s->magic ^ kDeviceSequenceMagic) | (s->version ^ kDeviceLayoutVersion) |
      (s->layers ^ g.layers) | (s->kv_heads ^ g.kv_heads) | (s->head_dim ^ g.head_dim) |
      (s->value_type ^ static_cast<uint32_t>(g.value_type)) | (s->score_bytes & ~6u);
  const uint32_t segments = s->segments, pages = s->segment_pages;
  return (wrong == 0) & (segments - 1 < segments_max) & (pages <= kSegmentPagesMax);
}

// The sequence of a root page: null, without a fault, for PageId::kNoneRaw; null with kBadMetadata
// where the page is not the root of a sequence of the batch's model.
[[nodiscard]] __device__ __forceinline__ DeviceSequence* sequence_at(const BatchView& view,
                                                                     uint32_t root) {
  if (root == PageId::kNoneRaw) return nullptr;
  auto* sequence = reinterpret_cast<DeviceSequence*>(page_at(view, root));
  if (sequence == nullptr || header_good(view, sequence)) return sequence;
  raise_fault(view.lease, kBadMetadata);
  return nullptr;
}

// Page ids of the pages of DeviceLane, behind the DeviceSequence of the root page.
[[nodiscard]] __device__ __forceinline__ uint32_t* lane_page_ids(DeviceSequence* sequence) {
  return reinterpret_cast<uint32_t*>(sequence + 1);
}

// Segment `index`, or null with kBadMetadata raised.
[[nodiscard]] __device__ __forceinline__ policy::Segment* segment_at(const BatchView& view,
                                                                     DeviceSequence* sequence,
                                                                     uint32_t index) {
  const uint32_t per_page = segments_per_page(view.geometry.head_dim);
  if (index >= per_page * kSegmentPagesMax) {
    raise_fault(view.lease, kBadMetadata);
    return nullptr;
  }
  auto* page = page_at(view, sequence->segment_page[index / per_page]);
  return page == nullptr ? nullptr : reinterpret_cast<policy::Segment*>(page) + index % per_page;
}
[[nodiscard]] __device__ __forceinline__ policy::Segment* open_segment(const BatchView& view,
                                                                       DeviceSequence* sequence) {
  return segment_at(view, sequence, sequence->segments - 1);
}

[[nodiscard]] __device__ __forceinline__ Format wide_format(const BatchView& view) {
  return view.geometry.value_type == ValueType::kBf16 ? Format::kBf16 : Format::kF16;
}
// A policy's kF16 and kBf16, and the values of its kThink, are the model's 16-bit type.
[[nodiscard]] __device__ __forceinline__ Format resolve_format(const BatchView& view,
                                                               Format format) {
  if (is_16bit(format)) return wide_format(view);
  if (!is_think(format)) return format;
  return wide_format(view) == Format::kBf16 ? Format::kThinkBf16 : Format::kThink;
}

// ---- a lane ----

struct LaneView {
  const BatchView* batch;
  DeviceSequence* sequence;
  DeviceLane* lane;  // null: none, or bad metadata
  uint32_t head_dim;
  uint32_t per_table;    // descriptors in a table page
  uint32_t score_bytes;  // of a slot's number in table pages; 0: none
  [[nodiscard]] __device__ __forceinline__ bool scored() const { return score_bytes != 0; }
};

// True where the counts of a lane are within their bounds; read at once, as in header_good().
[[nodiscard]] __device__ __forceinline__ bool lane_good(const DeviceLane* lane,
                                                        uint32_t per_table) {
  const uint32_t tables = lane->table_pages, buffered = lane->buffer_count;
  const uint32_t pages = lane->pages, pending = lane->pending;
  return (tables <= kTablePagesMax) & (buffered <= 2 * kBufferPageSlots) &
         (pages <= tables * per_table) & (pages + pending <= tables * per_table);
}

// Lane `index` = layer * kv_heads + kv head. Requires: sequence from sequence_at(), index < lanes.
[[nodiscard]] __device__ __forceinline__ LaneView lane_view(const BatchView& view,
                                                            DeviceSequence* sequence,
                                                            uint32_t index) {
  const uint32_t dim = view.geometry.head_dim;
  const uint32_t width = sequence->score_bytes;
  LaneView lane{&view, sequence, nullptr, dim, descriptors_per_page(dim, width), width};
  auto* page = page_at(view, lane_page_ids(sequence)[index / lanes_per_page(dim)]);
  if (page == nullptr) return lane;
  auto* found = reinterpret_cast<DeviceLane*>(page) + index % lanes_per_page(dim);
  if (lane_good(found, lane.per_table)) {
    lane.lane = found;
  } else {
    raise_fault(view.lease, kBadMetadata);
  }
  return lane;
}

// sequence_at() and lane_view() in two rounds of reads instead of three: the id of the lane's page
// is read beside the header, and followed, within the window, before the header has been judged.
// Lane null: no sequence (no fault), or bad metadata. Requires: index < lanes.
[[nodiscard]] __device__ __forceinline__ LaneView lane_of_root(const BatchView& view, uint32_t root,
                                                               uint32_t index) {
  const uint32_t dim = view.geometry.head_dim;
  LaneView lane{&view, nullptr, nullptr, dim, 1, 0};
  if (root == PageId::kNoneRaw) return lane;
  auto* sequence = reinterpret_cast<DeviceSequence*>(page_at(view, root));
  if (sequence == nullptr) return lane;
  const uint32_t id = lane_page_ids(sequence)[index / lanes_per_page(dim)];
  const bool good = header_good(view, sequence);
  const uint32_t width = sequence->score_bytes;
  auto* page = page_at(view, id);
  if (page == nullptr) return lane;
  auto* found = reinterpret_cast<DeviceLane*>(page) + index % lanes_per_page(dim);
  lane.score_bytes = width;
  lane.per_table = descriptors_per_page(dim, width);
  const bool counts = lane_good(found, lane.per_table);
  if (!(good & counts)) {
    raise_fault(view.lease, kBadMetadata);
    return lane;
  }
  lane.sequence = sequence;
  lane.lane = found;
  return lane;
}

// Descriptor `index`, or null with kBadMetadata raised. Requires: index < lane.pages.
[[nodiscard]] __device__ __forceinline__ DeviceDescriptor* descriptor_at(const LaneView& lane,
                                                                         uint32_t index) {
  auto* table = page_at(*lane.batch, lane.lane->table[index / lane.per_table]);
  if (table == nullptr) return nullptr;
  auto* found = reinterpret_cast<DeviceDescriptor*>(table) + index % lane.per_table;
  if (page_format_valid(found->format)) return found;
  raise_fault(lane.batch->lease, kBadMetadata);
  return nullptr;
}
// The numbers of a descriptor's slots. Requires: the lane is scored; `descriptor` came from
// descriptor_at(lane, index).
[[nodiscard]] __device__ __forceinline__ unsigned char* score_row(const LaneView& lane,
                                                                  DeviceDescriptor* descriptor,
                                                                  uint32_t index) {
  const uint32_t place = index % lane.per_table;
  auto* rows = reinterpret_cast<unsigned char*>(descriptor - place + lane.per_table);
  return rows + place * kSlotsPerPageMax * lane.score_bytes;
}
// As fp16. Requires: score_bytes is 2.
[[nodiscard]] __device__ __forceinline__ uint16_t* scores_of(const LaneView& lane,
                                                             DeviceDescriptor* descriptor,
                                                             uint32_t index) {
  return reinterpret_cast<uint16_t*>(score_row(lane, descriptor, index));
}
// As fp32. Requires: score_bytes is 4.
[[nodiscard]] __device__ __forceinline__ float* sums_of(const LaneView& lane,
                                                        DeviceDescriptor* descriptor,
                                                        uint32_t index) {
  return reinterpret_cast<float*>(score_row(lane, descriptor, index));
}
// A number of either width, as its bits.
[[nodiscard]] __device__ __forceinline__ uint32_t read_score(const LaneView& lane, const void* row,
                                                             uint32_t i) {
  return lane.score_bytes == 4 ? static_cast<const uint32_t*>(row)[i]
                               : static_cast<const uint16_t*>(row)[i];
}
__device__ __forceinline__ void write_score(const LaneView& lane, void* row, uint32_t i,
                                            uint32_t bits) {
  if (lane.score_bytes == 4) {
    static_cast<uint32_t*>(row)[i] = bits;
  } else {
    static_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(bits);
  }
}
// Position of a slot. Requires: slot < slots of the format.
[[nodiscard]] __device__ __forceinline__ uint32_t position_of(const unsigned char* page,
                                                              uint32_t position_offset,
                                                              uint32_t slot) {
  return *reinterpret_cast<const uint32_t*>(page + position_offset + slot * kPositionBytes);
}

// Slots of pages of that format become free, or stop to be; those of a block are never free alone.
// By one thread.
__device__ __forceinline__ void count_free(const LaneView& lane, uint32_t format, uint32_t more,
                                           uint32_t fewer) {
  if (format < kFormatCount) lane.lane->free_slots[format] += more - fewer;
}
// The page is the descriptor's lane's to give back; else the second layer's lane of a pair owns it.
[[nodiscard]] __device__ __forceinline__ bool owns_page(const DeviceDescriptor* descriptor) {
  return !is_pair(static_cast<Format>(descriptor->format));
}

// The slots stop to count and, but of a block, become writable. Called by one thread of the lane's
// warp. Requires: all of `slots` live.
__device__ __forceinline__ void drop_slots(const LaneView& lane, DeviceDescriptor* descriptor,
                                           uint64_t slots) {
  const auto count = static_cast<uint32_t>(__popcll(slots));
  descriptor->live &= ~slots;
  lane.lane->live -= count;
  count_free(lane, descriptor->format, count, 0);
}

// Whole-warp functions, in lane_write.cuh:
//   sweep_lane(lane)                    gives back the pages that drops emptied, and empty tables
//   put_pages_aside(lane)               the same in a kernel that takes pages: kept for later
//   place_tokens(lane, format, ...)     slots for new tokens: evicted, never written, new pages

}  // namespace thinkv::cuda
