// rank_apply.cuh: what a rule decided, done to the pages of a lane: evictions first, then recoding,
// and pages that are empty are put aside (rank.h; kernels/sequence/rank.cpp). Of a whole block.
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_blocks.cuh"
#include "kernels/cuda/rank_recode.cuh"

namespace thinkv::cuda {
namespace rank_detail {

// Result: how many rows were dropped.
__device__ inline uint32_t drop_fated(const RankItem& item, const LaneView& lane, uint32_t n) {
  RankShared& shared = *item.shared;
  const RankRows& rows = item.rows;
  const uint32_t prompt = item.sequence->prompt_tokens;
  if (threadIdx.x == 0) shared.of_prompt = 0;
  const uint32_t dropped =
      count_rows(shared, n, [&](uint32_t i) { return rows.fate[i] == kRankDrop; });
  if (dropped == 0) return 0;
  clear_slots(shared, lane, rows.place, n, [&](uint32_t i) {
    if (rows.fate[i] != kRankDrop) return false;
    if (rows.position[i] < prompt) atomicAdd(&shared.of_prompt, 1u);
    return true;
  });
  if (threadIdx.x == 0) {
    lane.lane->live -= dropped;
    lane.lane->live_prompt -= shared.of_prompt;
    add_64(&lane.sequence->counters.evicted_slots, dropped);
  }
  __syncthreads();
  return dropped;
}

// As SequenceState::recode_format() of the host: of a pair format, the layer's view. kNone where no
// rule may have the format.
[[nodiscard]] __device__ __forceinline__ Format recode_format(const BatchView& view,
                                                              const RankRule& rule,
                                                              uint32_t layer) {
  if (!recode_format_valid(static_cast<uint8_t>(rule.recode_format))) return Format::kNone;
  const Format format = resolve_format(view, rule.recode_format);
  if (!is_pair(format)) return format;
  if (layer % 2 == 1) return second_of(format);
  return layer + 1 < view.geometry.layers ? format : single_of(format);
}

}  // namespace rank_detail

// The first layer of a pair: what the rule does to it is done with the second.
[[nodiscard]] __device__ __forceinline__ bool done_by_partner(const BatchView& view,
                                                              const RankRule& rule,
                                                              uint32_t layer) {
  return rule.action == RankAction::kRecode &&
         is_pair(rank_detail::recode_format(view, rule, layer));
}

// `lane`: number `index` of the sequence, whose rows are gathered.
template <int kDim>
__device__ THINKV_OUT_OF_LINE void apply_fates(const RankItem& item, const RankRule& rule,
                                               const LaneView& lane, uint32_t index, uint32_t n) {
  uint32_t changed = rank_detail::drop_fated(item, lane, n);
  if (rule.action == RankAction::kRecode) {
    const Format format = rank_detail::recode_format(*item.batch, rule, item.layer());
    changed += is_block(format) ? recode_to_blocks<kDim>(item, lane, index, n, format)
                                : rank_detail::recode_fated<kDim>(item, format, lane, n);
  }
  if (changed != 0 && threadIdx.x < 32) put_pages_aside(lane);
  __syncthreads();
}

}  // namespace thinkv::cuda
