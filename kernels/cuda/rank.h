// rank.h: rank rules on the device: what kernels/sequence/rank*.cpp does, bit for bit, for all
// sequences of a batch at once.
//
// launch_begin() notes in every sequence which rules fire at the end of the step (RankStep), the
// decide kernel of the refresh makes a bit map of the rows that have any, and a block takes an item
// of such a row: a lane, or all kv heads of a layer where they are decided together. It reads the
// live tokens of the lane into shared memory, or where it has no room for them, into the block's
// part of RankMemory (rank_rows.cuh), gives each a number, chooses (rank_choose.cuh;
// rank_medoids.cuh by keys, which lie in RankMemory too), and drops or recodes (rank_apply.cuh),
// rule after rule. Two launches, the same whatever is due: one for lanes
// of few tokens, of which several run on a multiprocessor at a time, and one for all others. The
// kernels take pages and never give any: what rules empty is put aside (lane_write.cuh) and given
// at the step's end.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_format.h"
#include "kernels/cuda/sequence.h"
#include "kernels/kernels.h"

namespace thinkv::cuda {

// Shared memory of a block, a token; and how many tokens of a lane the two kernels take.
inline constexpr uint32_t kRankRowBytes = 5 * sizeof(uint32_t) + 2 * sizeof(uint8_t);
inline constexpr uint32_t kRankRowsFew = 1536;
inline constexpr uint32_t kRankRowsMax = 6912;
// Beside the rows: tiles of keys where a rule compares them, a number a row for max_drop.
inline constexpr uint32_t kSimilarityTile = 32;
inline constexpr uint32_t kSharedHeadsMax = 64;  // kv heads that may compete
// A row in RankMemory, max_drop's number included, and the most rows there.
inline constexpr uint32_t kRankLongRowBytes = kRankRowBytes + sizeof(float);
inline constexpr uint32_t kRankRowBits = 24;
// Beside keys and centres of a run of medoids. Scratch holds the costs of 16 centres, one for each
// warp that picks.
inline constexpr uint32_t kRankMedoidRowBytes = sizeof(float) + sizeof(uint16_t) + sizeof(uint8_t);
inline constexpr uint32_t kRankMedoidScratchBytes =
    kernels::kMedoidRowsMax * 16 * sizeof(float) + 128;
static_assert(kRankRowsMax * kRankRowBytes <= 150 * 1024, "163 KiB of an A100 less what is static");
static_assert(kRankRowsFew % 16 == 0 && kRankRowsMax % 16 == 0, "arrays begin at 16 bytes");

[[nodiscard]] constexpr uint32_t similarity_bytes(uint32_t head_dim) {
  return kSimilarityTile * (2 * (head_dim + 1) + kSimilarityTile + 1) *
         static_cast<uint32_t>(sizeof(float));
}
[[nodiscard]] constexpr bool compares_keys(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count && i < kRulesMax; ++i) {
    any = any || policy.rules[i].similarity != 0.0f;
  }
  return any;
}
// The heads of a layer are decided together by some rule.
[[nodiscard]] constexpr bool couples_heads(const PolicyParams& policy) {
  bool any = policy.grain == SelectGrain::kLayer;
  for (uint32_t i = 0; i < policy.rule_count && i < kRulesMax; ++i) {
    const BudgetRule budget = policy.rules[i].budget;
    any = any || budget == BudgetRule::kMaxDrop || budget == BudgetRule::kSplit ||
          budget == BudgetRule::kShared;
  }
  return any;
}
[[nodiscard]] constexpr bool drops_prefix(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count && i < kRulesMax; ++i) {
    any = any || policy.rules[i].budget == BudgetRule::kMaxDrop;
  }
  return any;
}
[[nodiscard]] constexpr bool selects_medoids(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count && i < kRulesMax; ++i) {
    any = any || policy.rules[i].select == RankSelect::kMedoids;
  }
  return any;
}
// Only the kernel for most tokens has room for the policy's working memory.
[[nodiscard]] constexpr bool needs_most_room(const PolicyParams& policy) {
  return compares_keys(policy) || drops_prefix(policy) || selects_medoids(policy);
}
// Of the keys that the policy's medoids are chosen by; 0: no rule chooses so.
[[nodiscard]] constexpr uint32_t rank_medoid_dims(const ModelGeometry& geometry,
                                                  const PolicyParams& policy) {
  if (!selects_medoids(policy)) return 0;
  return geometry.head_dim * (policy.grain == SelectGrain::kLayer ? geometry.kv_heads : 1u);
}
// Of a run of medoids: keys and centres, and a weight, a cluster and a mark a row.
[[nodiscard]] constexpr uint64_t rank_medoid_bytes(uint32_t dims) {
  const uint64_t row = 2 * uint64_t{dims} * sizeof(float) + kRankMedoidRowBytes;
  return dims == 0 ? 0 : kernels::kMedoidRowsMax * row + kRankMedoidScratchBytes;
}
// Of a block's part of RankMemory: rows, and behind them what medoids need.
[[nodiscard]] constexpr uint64_t rank_region_bytes(uint32_t room, uint32_t dims) {
  return uint64_t{room} * kRankLongRowBytes + rank_medoid_bytes(dims);
}
// Rows of a lane that there is room for in a block are fewer than this.
[[nodiscard]] constexpr uint32_t rank_rows_max(const PolicyParams& policy, uint32_t head_dim) {
  const uint32_t tiles = compares_keys(policy) ? similarity_bytes(head_dim) : 0;
  const uint32_t row =
      kRankRowBytes + (drops_prefix(policy) ? static_cast<uint32_t>(sizeof(float)) : 0);
  return (kRankRowsMax * kRankRowBytes - tiles) / row / 16 * 16;
}

// The RankStep bits of a moment.
[[nodiscard]] constexpr uint32_t rank_plan(const PolicyParams& policy,
                                           const policy::Moment& moment) {
  uint32_t rules = 0;
  for (uint32_t i = 0; i < policy.rule_count && i < kRulesMax; ++i) {
    if (policy::fires(policy, policy.rules[i], moment)) rules |= 1u << i;
  }
  uint32_t plan = rules | (moment.waiting ? uint32_t{kRankWaiting} : 0u);
  if (moment.generated == 0) return plan | (rules != 0 ? uint32_t{kRankCompacts} : 0u);
  if (moment.waiting && policy::waiting_is_over(policy, moment.generated)) plan |= kRankCompacts;
  if (policy::starts_window(policy, moment)) plan |= kRankClears;
  if (rules != 0 && moment.generated % (2 * kBufferPageSlots) == 0) plan |= kRankFlushesFirst;
  return plan;
}

// The rules that fire at the end of the step in progress. Requires: launch_refresh() before it in
// the same stream.
[[nodiscard]] cudaError_t launch_rank(const BatchView& view, cudaStream_t stream);
// Those of the prompt's end, for one sequence; uses nothing of the view that belongs to a step.
[[nodiscard]] cudaError_t launch_prompt_rules(const BatchView& view, uint32_t root,
                                              cudaStream_t stream);

}  // namespace thinkv::cuda
