// rank_rule.h: one rule of a rank policy: when to look, what a token is worth, how many stay.
//
// A rank policy (EvictRule::kRank) is up to four rules over the tokens of a lane, run in their
// order at the prompt's end and at the end of decode steps:
//   trigger   at_prompt_end, every
//   signal    a weighted sum of attention, key similarity, position and chance, a number a token
//   budget    how many tokens of the lane stay
//   select    which: what is protected always, then the best of the rest
//   action    what happens to the others
//   layers    where it holds
// What attention means is one setting of the policy (ScoreKind), because a slot keeps one number.
// Plain data, the same bytes in every process of one protocol. Which fields go together is said in
// rank_check.h; where the methods come from, in config/policies/README.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "thinkv/internal/format.h"

namespace thinkv {

inline constexpr uint32_t kRulesMax = 4;
inline constexpr uint32_t kScoreWindowMax = 64;
inline constexpr uint32_t kPromptQueriesMax = 1024;  // whose attention counts
inline constexpr uint32_t kRankGroupsMax = 4;
inline constexpr uint32_t kPoolWidthMax = 15;
inline constexpr uint32_t kRankEveryMax = 1024;

// What a slot's number is made of from the attention that its token received.
enum class ScoreKind : uint8_t {
  kDecayed = 0,  // a sum that loses a share with each flush
  kSum = 1,
  kMean = 2,    // the sum by the number of queries that saw the token
  kWindow = 3,  // the mean of the last score_window queries before the rule
};

// How many tokens of a lane stay. B is the policy's budget times budget_percent.
enum class BudgetRule : uint8_t {
  kFixed = 0,      // B
  kPyramid = 1,    // falls from layer to layer; B on average
  kGroups = 2,     // heads in groups by a head signal, a share each; B on average
  kBytes = 3,      // as many tokens of the policy's formats as B 16-bit tokens have bytes
  kSplit = 4,      // B, of them representative_percent chosen among the rejected
  kMaxDrop = 5,    // as few as lose at most budget_low of the attention's norm, at least B
  kThreshold = 6,  // those with more than budget_low of uniform attention, at least B
  kFirstFit = 7,   // the cheapest of five masks that recovers budget_low of the attention
  kShared = 8,  // B a head on average: the heads of a layer compete, budget_low of B is each's own
};

enum class RankSelect : uint8_t {
  kTopK = 0,       // the highest
  kArgMin1 = 1,    // all but the lowest one: one token a step
  kThreshold = 2,  // two tiers by threshold; in decoding at most one token a step
  kPrefix = 3,     // drops from the low end of the order
  kStrata = 4,     // the highest, and evenly spread ones of the others (KVCrush)
  kMedoids = 5,    // k-means on the keys, the nearest real tokens
};

// To a block format, the oldest of the chosen tokens are recoded, as many as fill whole blocks.
enum class RankAction : uint8_t { kEvict = 0, kRecode = 1 };
enum class BudgetCount : uint8_t { kAll = 0, kGenerated = 1 };
enum class Pool : uint8_t { kNone = 0, kAverage = 1, kMaximum = 2 };
enum class Anchor : uint8_t { kRandom = 0, kZeros = 1, kOnes = 2, kMean = 3, kAlternating = 4 };

struct RankRule {
  // Trigger. Nothing happens in a lane that is within its budget.
  uint16_t every = 0;  // generated tokens between two firings; 0: not in decoding
  uint8_t at_prompt_end = 0;
  BudgetCount counts = BudgetCount::kAll;  // kGenerated: the prompt is outside, and stays
  // Budget.
  BudgetRule budget = BudgetRule::kFixed;
  uint8_t budget_percent = 100;        // of the policy's budget, 1..100
  uint8_t representative_percent = 0;  // kSplit: of the rule's budget
  uint8_t group_count = 0;             // kGroups
  uint8_t group_share[kRankGroupsMax] = {};
  float budget_low = 0.0f;   // kPyramid beta, kMaxDrop and kFirstFit T, kThreshold a_low,
                             // kShared the share that no head goes below
  float budget_high = 0.0f;  // kThreshold a_high
  // Select.
  RankSelect select = RankSelect::kTopK;
  RankAction action = RankAction::kEvict;
  Format recode_format = Format::kK4V2;  // kRecode
  uint8_t recent_percent = 0;            // protected: the newest, a share of the rule's budget
  uint16_t recent = 0;                   // protected: the newest; the smaller, where both are given
  uint16_t sinks = 0;                    // protected: the first of the sequence
  uint8_t classes = 0;                   // protected: tokens whose class has one of these bits
  Anchor anchor = Anchor::kRandom;       // kStrata
  Pool pool = Pool::kNone;               // of attention over neighbours
  uint8_t pool_width = 1;                // odd
  // Signal: the highest stay.
  float attention = 0.0f;
  float similarity = 0.0f;  // of the softmaxed mean cosine to all keys; negative drops duplicates
  float position = 0.0f;    // newer is higher
  float random = 0.0f;
  float distinct = 0.0f;  // of the key's angle to its prompt's mean, as a share of attention
  float similarity_above = 0.5f;  // cosines up to it are no near-duplicates
  uint32_t seed = 0;
  uint8_t value_norm = 0;  // attention is multiplied by the norm of the value
  // kFirstFit.
  uint8_t frequent_percent = 0;  // of the prompt
  uint8_t local_percent = 0;     // of the prompt
  uint8_t special_classes = 0;   // class bits
  uint8_t punctuation_classes = 0;
  // Layers: layer_first <= layer < layer_end; 0 is no end.
  uint8_t layer_first = 0;
  uint8_t layer_end = 0;
  uint8_t reserved = 0;
};
static_assert(std::is_trivially_copyable_v<RankRule> && sizeof(RankRule) == 68);

[[nodiscard]] constexpr bool covers_layer(const RankRule& rule, uint32_t layer) {
  return layer >= rule.layer_first && (rule.layer_end == 0 || layer < rule.layer_end);
}
[[nodiscard]] constexpr bool share_layers(const RankRule& a, const RankRule& b) {
  return (a.layer_end == 0 || b.layer_first < a.layer_end) &&
         (b.layer_end == 0 || a.layer_first < b.layer_end);
}
[[nodiscard]] constexpr bool writes_blocks(const RankRule& rule) {
  return rule.action == RankAction::kRecode && is_block(rule.recode_format);
}

}  // namespace thinkv
