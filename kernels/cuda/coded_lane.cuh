// coded_lane.cuh: the stream of a lane as kernels see it: checked ways to a block, to the pages
// that its bytes lie in, and room for more at the end. As kernels/sequence/stream.h of the host.
//
// Counts, ids and lengths that come out of the stream's metadata are checked before they are used;
// a bad one raises kBadMetadata. Functions that change a stream are for one thread of its lane.
#pragma once

#include "kernels/cuda/lane.cuh"
#include "kernels/policy/coded_tokens.h"
#include "kernels/stream/block_rule.h"

namespace thinkv::cuda {

using kernels::kBlockTokens;
using kernels::kStreamUnitBytes;
using kernels::StreamBlock;

struct StreamView {
  LaneView lane;
  DeviceStream* stream;  // null: the lane has none, or bad metadata
  uint32_t page;         // bytes
  uint32_t blocks_each;  // of a page
  uint32_t ids_each;
};

// True where the counts of a stream are within their bounds; read at once, as in lane_good().
[[nodiscard]] __device__ __forceinline__ bool stream_good(const StreamView& s,
                                                          const DeviceStream* d) {
  const uint32_t blocks = d->blocks, pages = d->pages;
  const uint32_t block_pages = d->block_pages, list_pages = d->list_pages;
  const uint64_t end = uint64_t{d->end_unit} * kStreamUnitBytes;
  return (block_pages <= kStreamBlockPagesMax) & (list_pages <= kStreamListPagesMax) &
         (blocks <= block_pages * s.blocks_each) & (pages <= list_pages * s.ids_each) &
         (end <= uint64_t{pages} * s.page);
}

[[nodiscard]] __device__ __forceinline__ StreamView stream_of(const LaneView& lane) {
  const uint32_t dim = lane.head_dim;
  StreamView s{lane, nullptr, page_bytes(dim), stream_blocks_per_page(dim),
               stream_ids_per_page(dim)};
  if (lane.lane == nullptr || lane.lane->stream_page == PageId::kNoneRaw) return s;
  auto* found = reinterpret_cast<DeviceStream*>(page_at(*lane.batch, lane.lane->stream_page));
  if (found == nullptr) return s;
  if (stream_good(s, found)) {
    s.stream = found;
  } else {
    raise_fault(lane.batch->lease, kBadMetadata);
  }
  return s;
}

// Block `index`, or null with kBadMetadata raised. Requires: index < block_pages * blocks_each.
[[nodiscard]] __device__ __forceinline__ StreamBlock* block_at(const StreamView& s,
                                                               uint32_t index) {
  auto* page = page_at(*s.lane.batch, s.stream->block_page[index / s.blocks_each]);
  if (page == nullptr) return nullptr;
  return reinterpret_cast<StreamBlock*>(page) + index % s.blocks_each;
}
// The id of the stream's page `index`. Requires: index < list_pages * ids_each.
[[nodiscard]] __device__ __forceinline__ uint32_t* listed_page(const StreamView& s,
                                                               uint32_t index) {
  auto* page = page_at(*s.lane.batch, s.stream->list_page[index / s.ids_each]);
  return page == nullptr ? nullptr : reinterpret_cast<uint32_t*>(page) + index % s.ids_each;
}
// The first byte of the stream's page `index`, or null with kBadMetadata raised.
[[nodiscard]] __device__ __forceinline__ unsigned char* stream_page(const StreamView& s,
                                                                    uint32_t index) {
  if (index >= s.stream->pages) {
    raise_fault(s.lane.batch->lease, kBadMetadata);
    return nullptr;
  }
  const uint32_t* id = listed_page(s, index);
  return id == nullptr ? nullptr : page_at(*s.lane.batch, *id);
}

// A block whose bytes are in the stream and fit a raw one's. Requires: `block` is a copy.
[[nodiscard]] __device__ __forceinline__ bool block_good(const StreamView& s,
                                                         const StreamBlock& block) {
  const uint64_t begin = uint64_t{block.unit} * kStreamUnitBytes;
  return (block.bytes - 1 < kernels::raw_block_bytes(s.lane.head_dim)) &
         (begin + block.bytes <= uint64_t{s.stream->pages} * s.page) & (block.raw <= 1);
}

// How many pages a block can lie in.
[[nodiscard]] constexpr uint32_t block_pages_max(uint32_t head_dim) {
  return (kernels::raw_block_bytes(head_dim) - 1) / page_bytes(head_dim) + 2;
}

// ---- room, by one thread ----

// A metadata page more. Result: kNoneRaw where the lease was empty.
[[nodiscard]] __device__ __forceinline__ uint32_t take_metadata_page(const StreamView& s) {
  const uint32_t raw = take_page(s.lane.batch->lease);
  if (raw != PageId::kNoneRaw) atomicAdd(&s.lane.sequence->metadata_pages, 1u);
  return raw;
}

// Room in the table for `count` blocks. Result: success.
[[nodiscard]] __device__ __forceinline__ bool grow_blocks(const StreamView& s, uint32_t count) {
  DeviceStream& d = *s.stream;
  while (uint64_t{d.block_pages} * s.blocks_each < count) {
    if (d.block_pages >= kStreamBlockPagesMax) {
      raise_fault(s.lane.batch->lease, kLeaseEmpty);
      return false;
    }
    const uint32_t raw = take_metadata_page(s);
    if (raw == PageId::kNoneRaw) return false;
    d.block_page[d.block_pages] = raw;
    d.block_pages += 1;
  }
  return true;
}

// The list names `count` pages at least; those that are new are kNoneRaw. Result: success.
[[nodiscard]] __device__ __forceinline__ bool grow_list(const StreamView& s, uint32_t count) {
  DeviceStream& d = *s.stream;
  while (uint64_t{d.list_pages} * s.ids_each < count) {
    if (d.list_pages >= kStreamListPagesMax) {
      raise_fault(s.lane.batch->lease, kLeaseEmpty);
      return false;
    }
    const uint32_t raw = take_metadata_page(s);
    if (raw == PageId::kNoneRaw) return false;
    d.list_page[d.list_pages] = raw;
    d.list_pages += 1;
  }
  for (; d.pages < count; d.pages += 1) {
    uint32_t* id = listed_page(s, d.pages);
    if (id == nullptr) return false;
    *id = PageId::kNoneRaw;
  }
  return true;
}

// The page `index` of the list is there. Result: success.
[[nodiscard]] __device__ __forceinline__ bool fill_listed(const StreamView& s, uint32_t index) {
  uint32_t* id = listed_page(s, index);
  if (id == nullptr) return false;
  if (*id != PageId::kNoneRaw) return true;
  *id = take_page(s.lane.batch->lease);
  if (*id == PageId::kNoneRaw) return false;
  atomicAdd(&s.lane.sequence->data_pages, 1u);
  return true;
}

// Pages for `bytes` bytes behind the end. Result: success; what was taken stays in the list.
[[nodiscard]] __device__ __forceinline__ bool grow_bytes(const StreamView& s, uint64_t bytes) {
  const uint64_t begin = uint64_t{s.stream->end_unit} * kStreamUnitBytes;
  const uint64_t pages = (begin + bytes + s.page - 1) / s.page;
  if (pages > uint64_t{kStreamListPagesMax} * s.ids_each) {
    raise_fault(s.lane.batch->lease, kLeaseEmpty);
    return false;
  }
  if (!grow_list(s, static_cast<uint32_t>(pages))) return false;
  for (uint64_t i = begin / s.page; i < pages; ++i) {
    if (!fill_listed(s, static_cast<uint32_t>(i))) return false;
  }
  return true;
}

[[nodiscard]] __device__ __forceinline__ uint32_t units_of(uint32_t bytes) {
  return (bytes + kStreamUnitBytes - 1) / kStreamUnitBytes;
}

// ---- blocks that go, by one thread ----

// The pages that no block is left in go to the lease.
__device__ inline void free_unused_pages(const StreamView& s) {
  const auto free_range = [&](uint64_t from, uint64_t end) {
    for (; from < end; ++from) {
      uint32_t* id = listed_page(s, static_cast<uint32_t>(from));
      if (id == nullptr || *id == PageId::kNoneRaw) continue;
      if (page_at(*s.lane.batch, *id) != nullptr) give_page(s.lane.batch->lease, *id);
      atomicSub(&s.lane.sequence->data_pages, 1u);
      *id = PageId::kNoneRaw;
    }
  };
  const uint64_t pages = s.stream->pages;
  uint64_t next = 0;  // the first page that no earlier block lies in
  for (uint32_t b = 0; b < s.stream->blocks; ++b) {
    const StreamBlock* listed = block_at(s, b);
    if (listed == nullptr) return;
    const StreamBlock block = *listed;
    if (!block_good(s, block)) return raise_fault(s.lane.batch->lease, kBadMetadata);
    const uint64_t begin = uint64_t{block.unit} * kStreamUnitBytes;
    free_range(next, begin / s.page);
    const uint64_t behind = (begin + block.bytes - 1) / s.page + 1;
    next = behind > next ? behind : next;
  }
  free_range(next, pages);
}

}  // namespace thinkv::cuda
