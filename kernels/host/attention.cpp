// Decode attention of one lane. Two passes over its pages: scores from K, then, after the softmax
// of each head, the weighted sum of V. Both decode one tile of slots at a time into rows that stay
// in the first-level cache and serve all query heads; the scale of a vector goes into its score or
// its probability. Only slots that count are decoded or listed: what lies in others cannot matter.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/host/host_set.h"
#include "kernels/host/softmax.h"
#include "kernels/host/tile_decode.h"
#include "thinkv/internal/check.h"

#include "kernels/host/isa_begin.inc"

namespace {

constexpr uint32_t kHeadBlock = 4;  // query heads that share the loads of a row

// The slots that count. Entry e of a head is the e-th of them in page order.
struct Lane {
  const AttendParams& params;
  std::vector<uint64_t>& masks;  // a page
  std::vector<float>& scores;    // [group + 1, stride]: logits, then probabilities; last: maxima
  uint32_t count = 0;
  uint32_t stride = 0;
  [[nodiscard]] float* head(uint32_t h) const { return scores.data() + size_t{h} * stride; }
};

uint64_t window_mask(const PageView& page, const PageLayout& layout, const AttendParams& params) {
  uint64_t mask = page.live & layout.full_mask();
  if (params.window == 0) return mask;
  for (uint64_t left = mask; left != 0; left &= left - 1) {
    const uint32_t slot = static_cast<uint32_t>(std::countr_zero(left));
    const uint32_t position =
        load_word(page.bytes + layout.position_offset + slot * kPositionBytes);
    const bool counts =
        position < params.sinks || uint64_t{position} + params.window > params.query_position;
    if (!counts) mask &= ~(uint64_t{1} << slot);
  }
  return mask;
}

// The wanted slots of one tile, listed.
struct TileSlots {
  uint32_t count = 0;
  uint8_t in_tile[kTileSlotsMax];
  explicit TileSlots(uint32_t wanted) {
    for (; wanted != 0; wanted &= wanted - 1) {
      in_tile[count++] = static_cast<uint8_t>(std::countr_zero(wanted));
    }
  }
};

template <uint32_t kHeads>
void dot_rows(const TileRows& rows, const TileSlots& slots, const float* scales, const float* q,
              uint32_t head_dim, float* scores, uint32_t stride) {
  for (uint32_t i = 0; i < slots.count; ++i) {
    const float* const row = rows.row[slots.in_tile[i]];
    F8 sums[kHeads] = {};
    for (uint32_t d = 0; d < head_dim; d += kLanes) {
      const F8 x = load(row + d);
      for (uint32_t h = 0; h < kHeads; ++h) sums[h] = fused(load(q + h * head_dim + d), x, sums[h]);
    }
    for (uint32_t h = 0; h < kHeads; ++h) scores[h * stride + i] = fold(sums[h]) * scales[i];
  }
}

// out[h] += sum over the slots of weights[h][i] * row i.
template <uint32_t kHeads>
void add_rows(const TileRows& rows, const TileSlots& slots, const float* weights, uint32_t head_dim,
              float* out) {
  for (uint32_t d = 0; d < head_dim; d += 2 * kLanes) {
    F8 low[kHeads], high[kHeads];
    for (uint32_t h = 0; h < kHeads; ++h) {
      low[h] = load(out + h * head_dim + d);
      high[h] = load(out + h * head_dim + d + kLanes);
    }
    for (uint32_t i = 0; i < slots.count; ++i) {
      const float* const row = rows.row[slots.in_tile[i]] + d;
      const F8 x0 = load(row), x1 = load(row + kLanes);
      for (uint32_t h = 0; h < kHeads; ++h) {
        const F8 w = splat(weights[h * kTileSlotsMax + i]);
        low[h] = fused(w, x0, low[h]);
        high[h] = fused(w, x1, high[h]);
      }
    }
    for (uint32_t h = 0; h < kHeads; ++h) {
      store(out + h * head_dim + d, low[h]);
      store(out + h * head_dim + d + kLanes, high[h]);
    }
  }
}

using DotRows = decltype(&dot_rows<1>);
using AddRows = decltype(&add_rows<1>);
constexpr DotRows kDotRows[kHeadBlock] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>};
constexpr AddRows kAddRows[kHeadBlock] = {add_rows<1>, add_rows<2>, add_rows<3>, add_rows<4>};

// Decodes the wanted slots of a tile; scales[i] is the scale of the i-th of them where the coding
// has one scale a vector, else 1.
void decode_tile(const PageSide& side, uint32_t tile, uint32_t wanted, const TileSlots& slots,
                 TileRows& rows, float* scales) {
  side.decode(tile, wanted, rows);
  for (uint32_t i = 0; i < slots.count; ++i) {
    const uint32_t slot = tile * side.section->tile_slots + slots.in_tile[i];
    scales[i] = side.coding.vector_scaled() ? side.vector_scale(slot) : 1.0f;
    if (side.coding.group_scaled()) side.apply_group_scales(slot, rows.row[slots.in_tile[i]]);
  }
}

void score_tile(const Lane& lane, const PageSide& side, uint32_t tile, uint32_t wanted,
                uint32_t entry, TileRows& rows) {
  const AttendParams& params = lane.params;
  const TileSlots slots(wanted);
  float scales[kTileSlotsMax];
  decode_tile(side, tile, wanted, slots, rows, scales);
  for (uint32_t i = 0; i < slots.count; ++i) scales[i] *= params.softmax_scale;
  for (uint32_t h = 0; h < params.group; h += kHeadBlock) {
    const uint32_t heads = std::min(kHeadBlock, params.group - h);
    kDotRows[heads - 1](rows, slots, scales, params.q + size_t{h} * params.head_dim,
                        params.head_dim, lane.head(h) + entry, lane.stride);
  }
}

void weigh_tile(const Lane& lane, const PageSide& side, uint32_t tile, uint32_t wanted,
                uint32_t entry, TileRows& rows) {
  const AttendParams& params = lane.params;
  const TileSlots slots(wanted);
  float scales[kTileSlotsMax];
  decode_tile(side, tile, wanted, slots, rows, scales);
  for (uint32_t h = 0; h < params.group; h += kHeadBlock) {
    const uint32_t heads = std::min(kHeadBlock, params.group - h);
    float weights[kHeadBlock * kTileSlotsMax];
    for (uint32_t j = 0; j < heads; ++j) {
      const float* const p = lane.head(h + j) + entry;
      for (uint32_t i = 0; i < slots.count; ++i) weights[j * kTileSlotsMax + i] = p[i] * scales[i];
    }
    kAddRows[heads - 1](rows, slots, weights, params.head_dim,
                        params.out + size_t{h} * params.head_dim);
  }
}

using TileStep = decltype(&score_tile);

// Runs `step` over every tile with a slot that counts, in page order.
void for_each_tile(const Lane& lane, bool k_side, TileStep step) {
  TileRows rows;
  uint32_t entry = 0;
  for (size_t p = 0; p < lane.params.pages.size(); ++p) {
    if (lane.masks[p] == 0) continue;
    const PageView& page = lane.params.pages[p];
    const PageSide side(page.bytes, page_layout(page.format, lane.params.head_dim), k_side);
    const uint32_t tile_slots = side.section->tile_slots;
    for (uint32_t tile = 0; tile < side.section->tiles(); ++tile) {
      const uint32_t wanted =
          static_cast<uint32_t>(lane.masks[p] >> (tile * tile_slots)) & ((1u << tile_slots) - 1);
      if (wanted == 0) continue;
      step(lane, side, tile, wanted, entry, rows);
      entry += static_cast<uint32_t>(std::popcount(wanted));
    }
  }
}

// Per-slot probabilities, reduced over the heads of the group.
void emit(const Lane& lane, float* reduced) {
  const AttendParams& params = lane.params;
  if (params.reduce == GqaReduce::kMaxLogit) {
    softmax(reduced, lane.count);
  } else {
    std::copy_n(lane.head(0), lane.count, reduced);
    for (uint32_t h = 1; h < params.group; ++h) {
      const float* const p = lane.head(h);
      for (uint32_t e = 0; e < lane.count; ++e) {
        reduced[e] = params.reduce == GqaReduce::kMeanProbability ? reduced[e] + p[e]
                                                                  : std::max(reduced[e], p[e]);
      }
    }
    if (params.reduce == GqaReduce::kMeanProbability) {
      for (uint32_t e = 0; e < lane.count; ++e) reduced[e] /= static_cast<float>(params.group);
    }
  }
  for (size_t p = 0; p < params.pages.size(); ++p) {
    for (uint64_t left = lane.masks[p]; left != 0; left &= left - 1) {
      const uint32_t slot = static_cast<uint32_t>(std::countr_zero(left));
      params.probabilities[p * kSlotsPerPageMax + slot] = *reduced++;
    }
  }
}

void max_over_heads(const Lane& lane, float* maxima) {
  std::copy_n(lane.head(0), lane.count, maxima);
  for (uint32_t h = 1; h < lane.params.group; ++h) {
    const float* const row = lane.head(h);
    for (uint32_t e = 0; e < lane.count; ++e) maxima[e] = std::max(maxima[e], row[e]);
  }
}

// Scratch that grows to the longest lane a thread has seen, so that a step allocates nothing.
struct Scratch {
  std::vector<uint64_t> masks;
  std::vector<float> scores;
};

void attend_lane(Lane& lane) {
  const AttendParams& params = lane.params;
  for_each_tile(lane, true, score_tile);
  float* const maxima = lane.head(params.group);
  if (params.sparsity != nullptr || params.probabilities != nullptr) max_over_heads(lane, maxima);
  if (params.sparsity != nullptr) {
    params.sparsity->live = lane.count;
    params.sparsity->near_zero = count_below(maxima, lane.count, params.near_zero);
  }
  for (uint32_t h = 0; h < params.group; ++h) params.lse[h] = softmax(lane.head(h), lane.count);
  for_each_tile(lane, false, weigh_tile);
  if (params.probabilities != nullptr) emit(lane, maxima);
}

}  // namespace

void attend(const AttendParams& params) {
  THINKV_CHECK(head_dim_supported(params.head_dim));
  THINKV_CHECK(params.group >= 1 && params.group <= kGroupMax);
  static thread_local Scratch scratch;
  Lane lane{.params = params, .masks = scratch.masks, .scores = scratch.scores};
  lane.masks.resize(params.pages.size());
  for (size_t p = 0; p < params.pages.size(); ++p) {
    const PageView& page = params.pages[p];
    THINKV_CHECK(format_valid(static_cast<uint8_t>(page.format)) || is_block(page.format));
    lane.masks[p] = window_mask(page, page_layout(page.format, params.head_dim), params);
    lane.count += static_cast<uint32_t>(std::popcount(lane.masks[p]));
  }
  std::fill_n(params.out, size_t{params.group} * params.head_dim, 0.0f);
  std::fill_n(params.lse, params.group, -std::numeric_limits<float>::infinity());
  if (params.sparsity != nullptr) *params.sparsity = {};
  if (params.probabilities != nullptr) {
    std::fill_n(params.probabilities, params.pages.size() * kSlotsPerPageMax, 0.0f);
  }
  if (lane.count == 0) return;
  lane.stride = (lane.count + kLanes - 1) / kLanes * kLanes;
  const size_t needed = size_t{params.group + 1} * lane.stride;
  if (lane.scores.size() < needed) lane.scores.resize(needed);
  attend_lane(lane);
}

#include "kernels/host/isa_end.inc"
