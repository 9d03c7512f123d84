// rank.h: the rules of a rank policy at work on the lanes of a sequence.
//
// The decisions are the pure functions of kernels/policy/rank_*.h; here tokens are read, numbers
// filled in, and slots dropped or recoded. A rule runs layer by layer, all heads of a layer
// together, because some budgets and signatures look across them. Tokens of the 16-bit buffer are
// counted and never touched.
#pragma once

#include <cstdint>

#include "kernels/policy/prompt_sample.h"
#include "kernels/policy/rank_trigger.h"
#include "kernels/sequence/sequence_state.h"

namespace thinkv::kernels {

// ---- when (rank.cpp) ----

// Sets what this step measures, whether rules fire at its end, and flushes before them. Requires: a
// rank policy.
void plan_rank_step(SequenceState& state);
// Adds what the rules of the step or prompt in progress can need in one lane. Result: false beyond
// the size of a lane table.
[[nodiscard]] bool add_rank_need(const SequenceState& state, uint32_t lane, uint32_t& data_pages,
                                 MetaNeed& need);
// A window that begins with this step starts from 0. Requires: begin_step() succeeded.
void begin_rank_step(SequenceState& state);
void run_step_rules(SequenceState& state);
// Requires: the header has the prompt's tokens. Errors: those of PageSource::reserve, before
// anything was changed.
[[nodiscard]] Status run_prompt_rules(SequenceState& state);

// ---- what the engine tells (rank_prompt.cpp) ----

// q [count, q_heads, head_dim]: the newest queries of the prompt, as Sequence::prefill_queries.
void measure_prompt(SequenceState& state, uint32_t layer, const float* q, uint32_t count);
// What the policy's rules need of the prompt where no queries were given.
void measure_prompt_keys(SequenceState& state);
// Adds what queries of the prompt look at to the sums of a lane; q: the newest sample.given ones
//
// (prompt_attention.cpp). q: the lane's heads in the first of them. Requires: the store keeps sums.
void add_prompt_attention(SequenceState& state, uint32_t lane, const float* q,
                          const policy::PromptSample& sample);
// As Sequence::token_classes.
[[nodiscard]] Status set_classes(SequenceState& state, uint32_t first,
                                 std::span<const uint8_t> classes);
[[nodiscard]] uint8_t class_of(const SequenceState& state, uint32_t position);

// ---- one rule on one layer ----

// How many tokens stay (rank_limits.cpp): counted and limit of every head. Result: true where the
// rule has something to decide in some head.
[[nodiscard]] bool set_limits(SequenceState& state, const RankRule& rule, uint32_t layer);
// Rows, protection, attention and score of every head (rank_rows.cpp).
void load_heads(SequenceState& state, const RankRule& rule, uint32_t layer);
// Decodes the keys of a head's rows into state.rank.keys, row i at i * stride + offset.
void decode_head_keys(SequenceState& state, uint32_t lane, const RankHead& head, size_t stride,
                      size_t offset = 0);
// Protected newest tokens of a lane with that limit.
[[nodiscard]] uint32_t recent_tokens(const SequenceState& state, const RankRule& rule,
                                     const RankHead& head, uint32_t lane);
// Classes that the rule protects in a lane; of first_fit, those of the mask that was chosen.
[[nodiscard]] uint8_t protected_classes(const SequenceState& state, const RankRule& rule,
                                        uint32_t lane);
// Fate of every row of every head (rank_choose.cpp).
void choose_fates(SequenceState& state, const RankRule& rule, uint32_t layer);
// Those that compare heads or keep more than the best (rank_adaptive.cpp). Requires: as
// choose_fates, which calls them.
void share_layer(SequenceState& state, const RankRule& rule);
void drop_prefix(SequenceState& state, const RankRule& rule);
void keep_strata(SequenceState& state, const RankRule& rule, uint32_t layer);
void sort_into_tiers(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head);
void move_one_tier(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head);
void apply_first_fit(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head);

}  // namespace thinkv::kernels
