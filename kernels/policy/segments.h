// segments.h: the decisions of the ThinKV policy, pure functions on plain data.
//
// A segment is the run of tokens between two refreshes; it has one thought label and one level of
// the retention schedule. The functions say what to do next; they touch no page. Readings of
// arXiv 2510.01290 that the paper leaves open, all of them here:
//   - a label found at a refresh is that of the NEXT segment; the first one is reasoning;
//   - one level counter a segment, whatever demoted it (transition or budget);
//   - the budget takes the least important segment first (transition, execution, reasoning) and
//     the oldest within a type, or simply the oldest (DemoteOrder::kOldest);
//   - at the last level nothing is demoted further; over budget there, FloorRule decides.
// A Table is anything with size() and operator[](uint32_t) -> Segment&, oldest first; its last
// segment is the open one and is never demoted.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "thinkv/internal/policy_params.h"

namespace thinkv::policy {

inline constexpr uint32_t kOpenEnd = 0xFFFF'FFFFu;

// Part of the page format (kernels/sequence/sequence_format.h).
struct Segment {
  uint32_t start;  // position of the first token
  uint32_t end;    // one past the last; kOpenEnd while open
  uint8_t label;   // Thought
  uint8_t level;   // demotions so far: at most schedule_length
  uint8_t merged;  // 1: two or more segments that the floor rule joined
  // Of sequences in device memory only, 0 on the host, which asks its lanes instead:
  uint8_t waiting;  // demotions that a transition ordered and a full list put off
  uint32_t live;    // once closed: tokens of the fullest lane, less what demotions took
};
static_assert(sizeof(Segment) == 16 && std::is_trivially_copyable_v<Segment>);

// Smaller is demoted first (rho of the paper).
[[nodiscard]] constexpr uint32_t importance(Thought label) {
  return label == Thought::kTransition ? 0 : label == Thought::kExecution ? 1 : 2;
}

// The class of a sparsity. One class (kReasoning) where the policy has no label layers or the
// sparsity was not measured (NaN).
[[nodiscard]] constexpr Thought label_of(float sparsity, const PolicyParams& policy) {
  if (policy.label_layer_count == 0 || sparsity != sparsity) return Thought::kReasoning;
  if (sparsity < policy.thresholds[0]) return Thought::kExecution;
  if (sparsity > policy.thresholds[1]) return Thought::kTransition;
  return Thought::kReasoning;
}

// True where a refresh that found `label` takes every earlier segment one level down.
[[nodiscard]] constexpr bool demotes_everything(Thought label, const PolicyParams& policy) {
  return policy.evict == EvictRule::kTbe && policy.demote_on_transition != 0 &&
         label == Thought::kTransition;
}

[[nodiscard]] constexpr bool can_demote(const Segment& segment, const PolicyParams& policy) {
  return segment.end != kOpenEnd && segment.level < policy.schedule_length;
}

// Tokens that a segment keeps once it is demoted. Requires: can_demote.
[[nodiscard]] constexpr uint32_t demotion_target(const Segment& segment,
                                                 const PolicyParams& policy) {
  return policy.schedule[segment.level];
}

// The segment that steps down next when the budget is exceeded; nothing where all closed
// segments are at the last level.
template <class Table>
[[nodiscard]] std::optional<uint32_t> next_demotion(const Table& table,
                                                    const PolicyParams& policy) {
  std::optional<uint32_t> best;
  uint32_t best_importance = 0;
  for (uint32_t i = 0; i < table.size(); ++i) {
    const Segment& segment = table[i];
    if (!can_demote(segment, policy)) continue;
    const uint32_t rank = importance(static_cast<Thought>(segment.label));
    if (best && rank >= best_importance) continue;
    best = i;
    best_importance = rank;
    if (rank == 0 || policy.order == DemoteOrder::kOldest) break;  // nothing comes before it
  }
  return best;
}

// True where the floor rule may join two neighbours: both are closed.
[[nodiscard]] constexpr bool can_merge(const Segment& older, const Segment& newer,
                                       const PolicyParams& policy) {
  return policy.floor_rule == FloorRule::kMerge && policy.schedule_length > 0 &&
         older.end != kOpenEnd && newer.end != kOpenEnd;
}
template <class Table>
[[nodiscard]] bool can_merge_oldest(const Table& table, const PolicyParams& policy) {
  return table.size() >= 2 && can_merge(table[0], table[1], policy);
}

// What two neighbours become: one range at the last level, as important as the more important.
// Requires: both closed, older.end == newer.start.
[[nodiscard]] constexpr Segment merge(const Segment& older, const Segment& newer,
                                      const PolicyParams& policy) {
  Segment joined = older;
  joined.end = newer.end;
  if (importance(static_cast<Thought>(newer.label)) >
      importance(static_cast<Thought>(older.label))) {
    joined.label = newer.label;
  }
  joined.level = policy.schedule_length;
  joined.merged = 1;
  joined.live = older.live + newer.live;
  return joined;
}

}  // namespace thinkv::policy
