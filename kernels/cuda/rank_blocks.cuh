// rank_blocks.cuh: tokens of a lane recoded into pages of a block format, whole blocks at a time,
// as kernels/sequence/block.cpp does it (rank.h). Functions of a whole block.
//
// A rule's numbers are no longer needed when it recodes, so their memory holds the tokens that go
// into blocks. Of a layer pair the second layer's block of threads does the work of both.
#pragma once

#include <cstdint>

#include "kernels/cuda/channel_energy.cuh"
#include "kernels/cuda/codec_block_encode.cuh"
#include "kernels/cuda/codec_token.cuh"
#include "kernels/cuda/rank_rows.cuh"

namespace thinkv::cuda {
namespace rank_detail {

// Takes the bits of place[i] away, i < n, where `yes`. The caller counts the tokens.
template <class Yes>
__device__ inline void clear_slots(RankShared& shared, const LaneView& lane, const uint32_t* place,
                                   uint32_t n, const Yes& yes) {
  if (threadIdx.x < kFormatCount) shared.counts.freed[threadIdx.x] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (!yes(i)) continue;
    DeviceDescriptor* d = descriptor_at(lane, place[i] >> 6);
    if (d == nullptr) continue;
    // The bit is set, so taking its value away clears it and touches no other.
    add_64(&d->live, ~(uint64_t{1} << (place[i] & 63u)) + 1);
    if (d->format < kFormatCount) atomicAdd(&shared.counts.freed[d->format], 1u);
  }
  __syncthreads();
  if (threadIdx.x < kFormatCount) {
    lane.lane->free_slots[threadIdx.x] += shared.counts.freed[threadIdx.x];
  }
  __syncthreads();
}

// Calls put(i, k) for the k-th row i that `yes` says yes to, ascending. Result: how many.
template <class Yes, class Put>
[[nodiscard]] __device__ inline uint32_t pick_rows(RankShared& shared, uint32_t n, const Yes& yes,
                                                   const Put& put) {
  const uint32_t thread = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t done = 0;
  for (uint32_t base = 0; base < n; base += blockDim.x) {
    const uint32_t i = base + threadIdx.x;
    const bool mine = i < n && yes(i);
    const uint32_t ballot = __ballot_sync(kAllLanes, mine);
    if (thread == 0) shared.bins[warp] = static_cast<uint32_t>(__popc(ballot));
    __syncthreads();
    uint32_t at = done + static_cast<uint32_t>(__popc(ballot & ((1u << thread) - 1)));
    for (uint32_t w = 0; w < blockDim.x / 32; ++w) {
      if (w < warp) at += shared.bins[w];
      done += shared.bins[w];
    }
    if (mine) put(i, at);
    __syncthreads();
  }
  return done;
}

// What goes into blocks, ascending by position.
struct BlockTokens {
  uint32_t* place;
  uint32_t* position;
  uint32_t* first_place;  // of a pair: the same tokens in the first layer's lane
  uint32_t count;
};

// The lanes of a recoding. `first`: of a pair's first layer, else lane null.
struct BlockLanes {
  LaneView lane;
  LaneView first;
};

// At most half of the block lives: its tokens are written anew with others.
[[nodiscard]] __device__ __forceinline__ bool is_sparse_block(const LaneView& lane,
                                                              const DeviceDescriptor* d) {
  const uint32_t slots = slot_shape(lane.head_dim, d->format).slots;
  return 2 * static_cast<uint32_t>(__popcll(d->live & low_slots(slots))) <= slots;
}

// The oldest of the rows whose fate it is, as many as fill whole blocks.
[[nodiscard]] __device__ inline BlockTokens choose_tokens(const RankItem& item,
                                                          const LaneView& lane, uint32_t n,
                                                          Format format) {
  const RankRows& rows = item.rows;
  BlockTokens tokens{.place = reinterpret_cast<uint32_t*>(rows.score),
                     .position = reinterpret_cast<uint32_t*>(rows.number),
                     .first_place = reinterpret_cast<uint32_t*>(rows.attention),
                     .count = 0};
  const auto goes = [&](uint32_t i) {
    if (rows.fate[i] != kRankRecode) return false;
    const DeviceDescriptor* d = descriptor_at(lane, rows.place[i] >> 6);
    if (d == nullptr) return false;
    if (d->format != static_cast<uint8_t>(format)) return true;
    // What two layers share stays as it is.
    return !is_second(format) && is_sparse_block(lane, d);
  };
  const uint32_t count = pick_rows(*item.shared, n, goes, [&](uint32_t i, uint32_t at) {
    tokens.place[at] = rows.place[i];
    tokens.position[at] = rows.position[i];
  });
  const uint32_t slots = slot_shape(lane.head_dim, static_cast<uint32_t>(format)).slots;
  tokens.count = count / slots * slots;
  return tokens;
}

[[nodiscard]] __device__ __forceinline__ uint32_t position_at(const LaneView& lane,
                                                              uint32_t place) {
  const DeviceDescriptor* d = descriptor_at(lane, place >> 6);
  const unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
  if (page == nullptr) return 0;
  return position_of(page, slot_shape(lane.head_dim, d->format).position_offset, place & 63u);
}

// tokens.first_place. Result: false, with kBadMetadata raised, where the lane lacks one of them.
// The rows of the item are those of that lane afterwards.
[[nodiscard]] __device__ inline bool find_in_first(const RankItem& item, const BlockLanes& lanes,
                                                   const BlockTokens& tokens) {
  const RankRows& rows = item.rows;
  const uint32_t n = gather_lane(item, lanes.first);
  bool lacks = n >= rows.room;
  for (uint32_t i = threadIdx.x; i < tokens.count && !lacks; i += blockDim.x) {
    // Gathering works where the positions were.
    tokens.position[i] = position_at(lanes.lane, tokens.place[i]);
    uint32_t low = 0, high = n;
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (rows.position[middle] < tokens.position[i]) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    lacks = low == n || rows.position[low] != tokens.position[i];
    if (!lacks) tokens.first_place[i] = rows.place[low];
  }
  const bool failed = __syncthreads_or(lacks ? 1 : 0) != 0;
  if (failed && threadIdx.x == 0) raise_fault(item.batch->lease, kBadMetadata);
  return !failed;
}

// Of tokens at `place`, which begins with the block's first: what encode_block() asks for.
template <int kDim>
__device__ THINKV_OUT_OF_LINE void load_tokens(const LaneView& lane, const uint32_t* place,
                                               const BlockPart& part, float* out) {
  for (uint32_t i = threadIdx.x / 8; i < part.slots; i += blockDim.x / 8) {
    float x[kDim / 8] = {};
    const uint32_t from = place[part.first_slot + i];
    if (part.is_k) {
      decode_place<kDim, true>(x, lane, from);
    } else {
      decode_place<kDim, false>(x, lane, from);
    }
#pragma unroll
    for (uint32_t c = 0; c < kDim / 8; ++c) {
      const uint32_t dim = threadIdx.x % 8 + 8 * c - part.first_dim;
      if (dim < part.dims) out[i * part.dims + dim] = x[c];
    }
  }
}

// policy::choose_channels by the keys of all tokens of the lane in pages, and by the prompt's
// queries where they were given. Requires: blockDim.x >= kDim.
template <int kDim>
__device__ inline void choose_channels(const RankItem& item, const LaneView& lane, uint32_t n) {
  BlockTile& tile = item.shared->tile;
  constexpr uint32_t kRows = kTileValues / kDim;
  const uint32_t channel = threadIdx.x;
  float energy = 0.0f;
  for (uint32_t base = 0; base < n; base += kRows) {
    const uint32_t count = min(kRows, n - base);
    __syncthreads();
    load_tokens<kDim>(lane, item.rows.place + base, {true, false, 0, count, 0, kDim}, tile.values);
    __syncthreads();
    for (uint32_t i = 0; i < count && channel < kDim; ++i) {
      const float x = tile.values[i * kDim + channel];
      energy = exact_add(energy, exact_mul(x, x));
    }
  }
  if (item.sequence->prompt_queries != 0 && channel < kDim) {
    const float* of_queries = channel_energy<kDim>(lane, channel);
    if (of_queries != nullptr) energy = exact_mul(energy, *of_queries);
  }
  constexpr float kMost = 3.40282347e+38f;
  energy = energy < kMost ? energy : kMost;
  __syncthreads();
  if (channel < kDim) tile.values[channel] = energy;
  __syncthreads();
  uint32_t better = channel < kDim ? 0 : kDim;
  for (uint32_t c = 0; c < kDim && channel < kDim; ++c) {
    const float other = tile.values[c];
    better += other > energy || (other == energy && c < channel) ? 1u : 0u;
  }
  const uint32_t kept = __ballot_sync(kAllLanes, better < think_channels(kDim));
  if (channel < kDim && channel % 32 == 0) lane.lane->channels[channel / 32] = kept;
  if (channel == 0) lane.lane->channels_chosen = 1;
  __syncthreads();
}

// A page of its own for `lane`, or with `shared` that one. Result: its descriptor's index; kNoPage
// where there was none.
inline constexpr uint32_t kNoPage = 0xFFFF'FFFFu;
[[nodiscard]] __device__ inline uint32_t push_block(RankShared& shared, const LaneView& lane,
                                                    Format format,
                                                    uint32_t page = PageId::kNoneRaw) {
  if (threadIdx.x < 32) {
    const uint32_t slots = slot_shape(lane.head_dim, static_cast<uint32_t>(format)).slots;
    const bool pushed = lane_detail::push_page(lane, format, slots, page);
    if (threadIdx.x == 0) shared.count = pushed ? lane.lane->pages - 1 : kNoPage;
  }
  __syncthreads();
  const uint32_t index = shared.count;
  __syncthreads();
  return index;
}

// The tokens at `place` become those of page `index`, ascending by position.
__device__ inline void adopt_block(const LaneView& lane, uint32_t index, const uint32_t* place,
                                   const uint32_t* position) {
  DeviceDescriptor* d = descriptor_at(lane, index);
  if (d == nullptr) return;
  const uint32_t slots = slot_shape(lane.head_dim, d->format).slots;
  for (uint32_t i = threadIdx.x; i < slots && lane.scored(); i += blockDim.x) {
    DeviceDescriptor* from = descriptor_at(lane, place[i] >> 6);
    if (from == nullptr) continue;
    write_score(lane, score_row(lane, d, index), i,
                read_score(lane, score_row(lane, from, place[i] >> 6), place[i] & 63u));
  }
  if (threadIdx.x != 0) return;
  d->live = low_slots(slots);
  d->filled = static_cast<uint8_t>(slots);
  d->first_position = position[0];
  d->last_position = position[slots - 1];
  lane.lane->live += slots;
}

// One new page with the tokens from `at` on. Result: false where there was no page.
template <int kDim>
[[nodiscard]] __device__ inline bool write_block(const RankItem& item, const BlockLanes& lanes,
                                                 const BlockTokens& tokens, uint32_t at,
                                                 Format format) {
  const bool pair = lanes.first.lane != nullptr;
  const Format view = pair ? first_of(format) : format;
  const uint32_t index = push_block(*item.shared, lanes.lane, format);
  const DeviceDescriptor* d = index == kNoPage ? nullptr : descriptor_at(lanes.lane, index);
  unsigned char* page = d == nullptr ? nullptr : page_at(*item.batch, d->page);
  if (page == nullptr) return false;
  const uint32_t in_first = pair ? push_block(*item.shared, lanes.first, view, d->page) : 0;
  if (in_first == kNoPage) return false;
  const BlockLayout layout = block_shape(kDim, view);
  const auto load = [&](const BlockPart& part, float* out) {
    // What the page's first view shows of a pair is the first layer's.
    if (pair && !part.second) {
      load_tokens<kDim>(lanes.first, tokens.first_place + at, part, out);
    } else {
      load_tokens<kDim>(lanes.lane, tokens.place + at, part, out);
    }
  };
  const float eta = layout.bits <= 2 ? item.sequence->policy.block_eta[layout.bits - 1] : 0.0f;
  encode_block(page, layout, {tokens.position + at, lanes.lane.lane->channels, eta}, load,
               item.shared->tile);
  adopt_block(lanes.lane, index, tokens.place + at, tokens.position + at);
  if (pair) adopt_block(lanes.first, in_first, tokens.first_place + at, tokens.position + at);
  __syncthreads();
  return true;
}

// Tokens [0, moved) of the list leave the pages where they were.
__device__ inline void leave_pages(const RankItem& item, const LaneView& lane,
                                   const uint32_t* place, uint32_t moved) {
  clear_slots(*item.shared, lane, place, moved, [](uint32_t) { return true; });
  if (threadIdx.x == 0) lane.lane->live -= moved;
  __syncthreads();
}

}  // namespace rank_detail

// Rows of the lane, and of a pair those of the first layer's, into blocks. Result: how many of the
// lane's. The item's rows may be another lane's afterwards. Requires: a block format, and of a pair
// the second's.
template <int kDim>
__device__ inline uint32_t recode_to_blocks(const RankItem& item, const LaneView& lane,
                                            uint32_t index, uint32_t n, Format format) {
  const rank_detail::BlockTokens tokens = rank_detail::choose_tokens(item, lane, n, format);
  if (tokens.count == 0) return 0;
  const bool pair = is_second(format);
  rank_detail::BlockLanes lanes{lane, {}};
  if (is_think(format) && lane.lane->channels_chosen == 0) {
    rank_detail::choose_channels<kDim>(item, lane, n);
  }
  if (pair) {
    lanes.first = lane_view(*item.batch, item.sequence, index - item.batch->geometry.kv_heads);
    if (lanes.first.lane == nullptr) return 0;
    if (!rank_detail::find_in_first(item, lanes, tokens)) return 0;
  }
  const uint32_t slots = slot_shape(kDim, static_cast<uint32_t>(format)).slots;
  uint32_t moved = 0;
  while (moved < tokens.count &&
         rank_detail::write_block<kDim>(item, lanes, tokens, moved, format)) {
    moved += slots;
  }
  rank_detail::leave_pages(item, lane, tokens.place, moved);
  if (pair) {
    rank_detail::leave_pages(item, lanes.first, tokens.first_place, moved);
    if (threadIdx.x < 32) put_pages_aside(lanes.first);
  }
  if (threadIdx.x == 0) {
    add_64(&item.sequence->counters.recoded_slots, uint64_t{moved} * (pair ? 2 : 1));
    add_64(&item.sequence->counters.recoded_bytes, uint64_t{moved} * payload_bytes<kDim>(format));
  }
  __syncthreads();
  return moved;
}

}  // namespace thinkv::cuda
