// rank_recode.cuh: the rows of a lane that a rule recodes, many pages at a time (rank.h). Of a
// whole block.
//
// The host recodes page by page. Places for the tokens of several pages are the same in one
// request: what leaves a page makes no room in the format that the tokens go to.
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_blocks.cuh"

namespace thinkv::cuda {
namespace rank_detail {

// Slots to recode, a mask a page, where the scores were. Result: how many.
template <int kDim>
[[nodiscard]] __device__ inline uint32_t mark_recoded(const RankItem& item, const LaneView& lane,
                                                      uint32_t n, Format format, uint32_t* masks) {
  RankShared& shared = *item.shared;
  const RankRows& rows = item.rows;
  const uint32_t bytes = payload_bytes<kDim>(format);
  for (uint32_t i = threadIdx.x; i < 2 * lane.lane->pages; i += blockDim.x) masks[i] = 0;
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (rows.fate[i] != kRankRecode) continue;
    const uint32_t page = rows.place[i] >> 6, slot = rows.place[i] & 63u;
    const DeviceDescriptor* d = descriptor_at(lane, page);
    // A token never gains bits that its codes no longer have.
    if (d == nullptr || bytes >= payload_bytes<kDim>(static_cast<Format>(d->format))) continue;
    atomicOr(&masks[2 * page + slot / 32], 1u << slot % 32);
    atomicAdd(&shared.count, 1u);
  }
  __syncthreads();
  return shared.count;
}

// RankRecode.from: tokens first .. first + kRankRecodeMax - 1 of those that are marked, by page and
// slot. One warp; masks: two words a page.
__device__ inline void list_marked(const uint32_t* masks, uint32_t pages, uint32_t first,
                                   RankRecode& recode) {
  const uint32_t thread = threadIdx.x % 32;
  uint32_t all = 0;
  for (uint32_t base = 0; base < pages && all < first + kRankRecodeMax; base += 32) {
    const uint32_t page = base + thread;
    uint64_t left = 0;
    if (page < pages) left = masks[2 * page] | uint64_t{masks[2 * page + 1]} << 32;
    const auto mine = static_cast<uint32_t>(__popcll(left));
    uint32_t through = mine;
    for (uint32_t x = 1; x < 32; x *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, through, x);
      if (thread >= x) through += below;
    }
    for (uint32_t at = all + through - mine; left != 0; left &= left - 1, ++at) {
      const auto slot = static_cast<uint32_t>(__ffsll(static_cast<int64_t>(left))) - 1;
      if (at >= first && at < first + kRankRecodeMax) recode.from[at - first] = page << 6 | slot;
    }
    all += __shfl_sync(kAllLanes, through, 31);
  }
  __syncwarp();
}

// Position and sum of each listed token.
__device__ inline void read_listed(const LaneView& lane, uint32_t count, RankRecode& recode) {
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t index = recode.from[i] >> 6, slot = recode.from[i] & 63u;
    DeviceDescriptor* d = descriptor_at(lane, index);
    const unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
    if (page == nullptr) continue;
    recode.positions[i] =
        position_of(page, slot_shape(lane.head_dim, d->format).position_offset, slot);
    if (!lane.scored()) continue;
    write_score(lane, recode.scores, i, read_score(lane, score_row(lane, d, index), slot));
  }
}

// Codes of each listed token to its place; eight threads a token.
template <int kDim>
__device__ inline void move_listed(const LaneView& lane, uint32_t count, Format format,
                                   const RankRecode& recode) {
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(format));
  for (uint32_t base = 0; base < count; base += blockDim.x / 8) {
    const uint32_t token = base + threadIdx.x / 8;
    const uint32_t from = token < count ? recode.from[token] : 0;
    const SlotPlace place = token < count ? recode.places[token] : SlotPlace{nullptr, 0};
    const DeviceDescriptor* d = place.page != nullptr ? descriptor_at(lane, from >> 6) : nullptr;
    unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
    const bool active = page != nullptr;
    const Format old = active ? static_cast<Format>(d->format) : format;
    float x[kDim / 8] = {};
    if (active) decode_token<kDim, true>(x, page, old, from & 63u);
    encode_vector<kDim, true>(
        x, format, vector_place<kDim, true>(place.page, shape, coding_of<true>(format), place.slot),
        active);
    if (active) decode_token<kDim, false>(x, page, old, from & 63u);
    encode_vector<kDim, false>(
        x, format,
        vector_place<kDim, false>(place.page, shape, coding_of<false>(format), place.slot), active);
    if (!active || threadIdx.x % 8 != 0) continue;
    *reinterpret_cast<uint32_t*>(place.page + shape.position_offset + place.slot * kPositionBytes) =
        recode.positions[token];
  }
}

// The slots that the listed tokens had. A token without a place stays. Result: how many moved.
[[nodiscard]] __device__ inline uint32_t drop_listed(const RankItem& item, const LaneView& lane,
                                                     uint32_t count) {
  RankShared& shared = *item.shared;
  const auto has_moved = [&](uint32_t i) { return shared.recode.places[i].page != nullptr; };
  const uint32_t moved = count_rows(shared, count, has_moved);
  clear_slots(shared, lane, shared.recode.from, count, has_moved);
  if (threadIdx.x == 0) lane.lane->live -= moved;
  __syncthreads();
  return moved;
}

// Result: how many rows were recoded. Requires: a page for every 64 rows at most, so no more pages
// than rows.
template <int kDim>
__device__ inline uint32_t recode_fated(const RankItem& item, Format format, const LaneView& lane,
                                        uint32_t n) {
  const uint32_t pages = lane.lane->pages;  // those that come are already in the format
  if (pages > n || !format_valid(static_cast<uint8_t>(format))) return 0;
  auto* masks = reinterpret_cast<uint32_t*>(item.rows.score);
  RankRecode& recode = item.shared->recode;
  const uint32_t marked = mark_recoded<kDim>(item, lane, n, format, masks);
  uint32_t moved = 0;
  for (uint32_t first = 0; first < marked; first += kRankRecodeMax) {
    const uint32_t count = min(marked - first, kRankRecodeMax);
    __syncthreads();  // all have read the count
    if (threadIdx.x < 32) list_marked(masks, pages, first, recode);
    __syncthreads();
    read_listed(lane, count, recode);
    __syncthreads();
    if (threadIdx.x < 32) {
      // Not counted as reused, as on the host: no new token came.
      static_cast<void>(
          place_tokens(lane, {format, recode.positions, recode.scores, count, recode.places}));
    }
    __syncthreads();
    move_listed<kDim>(lane, count, format, recode);
    __syncthreads();
    moved += drop_listed(item, lane, count);
  }
  if (threadIdx.x == 0 && moved != 0) {
    add_64(&lane.sequence->counters.recoded_slots, moved);
    add_64(&lane.sequence->counters.recoded_bytes, uint64_t{moved} * payload_bytes<kDim>(format));
  }
  __syncthreads();
  return moved;
}

}  // namespace rank_detail
}  // namespace thinkv::cuda
