// policy_params.h: a policy as the step reads it: plain numbers, no names to look up.
//
// Made from config/policies/*.yaml by the daemon, sent to clients over the control socket, copied
// into each sequence's metadata and read by the refresh on whatever device runs it.
// What goes together is said in policy_check.h.
// Source of the method: arXiv 2510.01290 (ThinKV), reference numbers beside the fields.
#pragma once

#include <cstdint>
#include <type_traits>

#include "thinkv/internal/format.h"
#include "thinkv/internal/placement.h"
#include "thinkv/internal/rank_rule.h"

namespace thinkv {

enum class Thought : uint8_t { kReasoning = 0, kExecution = 1, kTransition = 2 };
inline constexpr uint32_t kThoughtCount = 3;

enum class EvictRule : uint8_t {
  kNone = 0,
  kTbe = 1,   // segments step down a retention schedule on transitions and over budget
  kRank = 2,  // rules over the tokens of a lane (rank_rule.h)
};
// Which tokens of a segment survive a demotion.
enum class SelectRule : uint8_t {
  kMedoids = 0,          // k-means on keys, nearest real token (the paper)
  kWeightedMedoids = 1,  // the same, weighted by decayed attention
  kAttention = 2,        // the highest decayed attention
  kRecent = 3,           // the newest of the segment
};
enum class SelectGrain : uint8_t { kKvHead = 0, kLayer = 1 };
// When every closed segment is at the last step of the schedule and the budget is still exceeded.
enum class FloorRule : uint8_t {
  kSoft = 0,   // stay above the budget and count it
  kMerge = 1,  // the two oldest segments become one
};
enum class DemoteOrder : uint8_t { kImportance = 0, kOldest = 1 };

inline constexpr uint32_t kScheduleMax = 8;
inline constexpr uint32_t kLabelLayersMax = 16;
inline constexpr uint32_t kPolicyNameMax = 48;

// Trivially copyable, no padding that carries data, same bytes in every process of one protocol.
struct PolicyParams {
  char name[kPolicyNameMax] = {};  // zero-terminated
  // Formats. kF16 in a policy means "16 bits": the model's value type decides fp16 or bf16.
  Format prompt_format = Format::kK4V4;
  Format sink_format = Format::kK4V4;  // of the first sink_tokens of the prompt
  Format thought_format[kThoughtCount] = {Format::kK4V4, Format::kK4V4, Format::kK4V4};
  uint8_t rotate = 1;  // randomised Hadamard on K, V, q
  EvictRule evict = EvictRule::kNone;
  SelectRule select = SelectRule::kMedoids;
  SelectGrain grain = SelectGrain::kKvHead;
  FloorRule floor_rule = FloorRule::kSoft;
  DemoteOrder order = DemoteOrder::kImportance;
  uint8_t demote_on_transition = 1;
  uint8_t schedule_length = 0;           // 0: nothing is ever demoted
  uint8_t label_layer_count = 0;         // 0: one class, everything is kReasoning
  uint8_t score_reduce = 0;              // kernels::GqaReduce of the emitted probabilities
  uint8_t centre = 0;                    // 1: the mean of the prompt's keys is taken off all keys
  uint16_t score_every = 1;              // steps between two emissions
  uint32_t sink_tokens = 0;              // first tokens of the prompt kept in sink_format
  uint32_t segment_tokens = 128;         // tau (paper: 128)
  uint32_t budget_tokens = 0;            // k: generated live tokens of a lane; 0: no budget
  uint16_t schedule[kScheduleMax] = {};  // paper: 64, 32, 16, 8, 4
  uint16_t label_layers[kLabelLayersMax] = {};
  float thresholds[2] = {0.0f, 0.0f};  // sparsity: < [0] execution, > [1] transition
  float near_zero = 0.01f;             // share of the row maximum
  float score_decay = 0.97f;           // of accumulated attention, per 16 tokens
  uint32_t kmeans_iterations = 4;
  // kRank.
  ScoreKind score_kind = ScoreKind::kDecayed;
  uint8_t rule_count = 0;
  uint16_t score_window = 1;          // W: prompt queries that count; of kWindow, decode steps too
  float block_eta[2] = {0.0f, 0.0f};  // of affine block formats of 1 and 2 bits, below 0.5
  uint16_t prompt_queries = 0;        // whose attention counts, instead of W; 0: W
  uint8_t prompt_spread = 0;          // 1: from all over the prompt, not the newest
  uint8_t reserved0 = 0;
  uint32_t reserved[3] = {};
  RankRule rules[kRulesMax] = {};
  EntropyParams entropy;
  TierParams tier;
};
static_assert(std::is_trivially_copyable_v<PolicyParams>);
static_assert(sizeof(PolicyParams) ==
              176 + kRulesMax * sizeof(RankRule) + sizeof(EntropyParams) + sizeof(TierParams));

}  // namespace thinkv
