// policy_check.h: what the core and the step both rely on in a policy's numbers.
#pragma once

#include "thinkv/internal/centring_check.h"
#include "thinkv/internal/placement_check.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/internal/rank_check.h"

namespace thinkv {

[[nodiscard]] constexpr bool rank_rules_valid(const PolicyParams& p) {
  bool ok = static_cast<uint8_t>(p.score_kind) <= 3 && p.rule_count <= kRulesMax;
  ok = ok && p.score_window >= 1 && p.score_window <= kScoreWindowMax;
  ok = ok && p.prompt_queries <= kPromptQueriesMax && p.prompt_spread <= 1;
  ok = ok && (p.evict == EvictRule::kRank) == (p.rule_count > 0);
  for (uint32_t i = 0; ok && i < p.rule_count; ++i) ok = !rank_problem(p, i).any();
  return ok;
}

// Requires nothing: any bytes may be checked.
[[nodiscard]] constexpr bool policy_params_valid(const PolicyParams& p) {
  bool ok = p.name[kPolicyNameMax - 1] == '\0' && p.name[0] != '\0';
  ok = ok && format_valid(static_cast<uint8_t>(p.prompt_format));
  ok = ok && format_valid(static_cast<uint8_t>(p.sink_format));
  for (const Format f : p.thought_format) ok = ok && format_valid(static_cast<uint8_t>(f));
  ok = ok && p.rotate <= 1 && static_cast<uint8_t>(p.evict) <= 2;
  ok = ok && static_cast<uint8_t>(p.select) <= 3 && static_cast<uint8_t>(p.grain) <= 1;
  ok = ok && static_cast<uint8_t>(p.floor_rule) <= 1 && static_cast<uint8_t>(p.order) <= 1;
  ok = ok && p.demote_on_transition <= 1 && p.score_reduce <= 2 && p.score_every >= 1;
  ok = ok && p.schedule_length <= kScheduleMax && p.label_layer_count <= kLabelLayersMax;
  // Flushes of 16 must not straddle two labels; medoids hold one segment in memory.
  ok = ok && p.segment_tokens >= 16 && p.segment_tokens <= 1024 && p.segment_tokens % 16 == 0;
  if (!ok) return false;
  for (uint32_t i = 0; i < p.schedule_length; ++i) {
    const uint32_t before = i == 0 ? p.segment_tokens : p.schedule[i - 1];
    // Evict to a floor, never to zero: a removed segment makes models loop (paper, ablation).
    if (p.schedule[i] == 0 || p.schedule[i] >= before) return false;
  }
  if (p.evict == EvictRule::kTbe && p.schedule_length == 0) return false;
  if (!rank_rules_valid(p) || placement_problem(p).any() || centring_problem(p).any()) {
    return false;
  }
  for (const float eta : p.block_eta) {
    if (!(eta >= 0.0f && eta < 0.5f)) return false;
  }
  if (!(p.near_zero > 0.0f && p.near_zero < 1.0f)) return false;
  if (!(p.score_decay > 0.0f && p.score_decay <= 1.0f)) return false;
  if (p.label_layer_count > 0 && !(p.thresholds[0] <= p.thresholds[1])) return false;
  return p.kmeans_iterations >= 1 && p.kmeans_iterations <= 16;
}

}  // namespace thinkv
