// rank.cpp: which rules run when, the pages that they can need, and what becomes of the rows.
#include "kernels/sequence/rank.h"

#include <algorithm>
#include <bit>

#include "kernels/sequence/block.h"
#include "kernels/sequence/scores.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// A flush of 16 tokens in two runs adds at most this many pages of 8 slots.
constexpr uint32_t kFlushPagesMax = kBufferTokens / kBufferPageSlots + 1;

// A token never gains bits that its codes no longer have.
bool lowers(Format to, const PageDescriptor& page, const Lane& lane) {
  const PageLayout& from = lane.layout(page);
  return page_layout(to, from.head_dim).slot_payload_bytes() < from.slot_payload_bytes();
}

// The most tokens of a lane that a rule can recode to `format`.
uint32_t recode_bound(const SequenceState& state, const Lane& lane, const RankRule& rule,
                      Format format) {
  if (rule.action != RankAction::kRecode) return 0;
  const bool prompt = policy::fires_for_prompt(rule, state.moment);
  if (rule.select == RankSelect::kThreshold && !prompt) return 1;
  // Other rules of this moment may thin out blocks, which are then written anew.
  const bool thins = is_block(format) && state.policy().rule_count > 1;
  uint32_t count = lane.header().buffer_count + 1u;  // a flush of this step may bring them
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    const bool there = page.format == static_cast<uint8_t>(format);
    if (there && !thins && !is_sparse_block(lane, page)) return;
    if (!is_block(format) && !lowers(format, page, lane)) return;
    count += static_cast<uint32_t>(std::popcount(page.live));
  });
  return count;
}

void recode_rows(SequenceState& state, const RankRule& rule, uint32_t lane_index, Lane& lane,
                 const RankHead& head) {
  const Format format = state.recode_format(rule, lane_index / state.geometry.kv_heads);
  if (is_block(format)) return recode_blocks(state, format, lane_index, head);
  std::vector<uint64_t>& chosen = state.rank.chosen;
  chosen.assign(lane.pages().size(), 0);
  uint32_t count = 0;
  for (uint32_t i = 0; i < head.size(); ++i) {
    const SlotRow& row = head.rows[i];
    if (head.fate[i] != kRecode) continue;
    if (!lowers(format, lane.pages()[row.page], lane)) continue;
    chosen[row.page] |= uint64_t{1} << row.slot;
    ++count;
  }
  if (count == 0) return;
  lane.grow_for(lane.new_pages(format, count));
  for (uint32_t page = 0; page < chosen.size(); ++page) {
    if (chosen[page] != 0) recode_slots(state, lane, page, chosen[page], format);
  }
  SequenceCounters& counters = state.header->counters;
  counters.recoded_slots += count;
  counters.recoded_bytes +=
      count * uint64_t{page_layout(format, state.geometry.head_dim).slot_payload_bytes()};
}

// Evictions first: a recoded token may take a slot that they free.
void apply_fates(SequenceState& state, const RankRule& rule, uint32_t lane_index,
                 const RankHead& head) {
  Lane lane = state.lane(lane_index);
  uint32_t evicted = 0, of_prompt = 0;
  for (uint32_t i = 0; i < head.size(); ++i) {
    if (head.fate[i] != kDrop) continue;
    lane.drop(head.rows[i].page, uint64_t{1} << head.rows[i].slot);
    of_prompt += head.rows[i].position < state.header->prompt_tokens ? 1 : 0;
    ++evicted;
  }
  recode_rows(state, rule, lane_index, lane, head);
  lane.header().live_prompt -= of_prompt;
  state.header->counters.evicted_slots += evicted;
  lane.sweep();
}

// The first layer of a pair: what it does is done with the second.
bool done_by_partner(const SequenceState& state, const RankRule& rule, uint32_t layer) {
  return rule.action == RankAction::kRecode && is_pair(state.recode_format(rule, layer));
}

// Result: false where what is protected is more than the budget of some head.
bool run_rule(SequenceState& state, const RankRule& rule) {
  bool reached = true;
  for (uint32_t layer = 0; layer < state.geometry.layers; ++layer) {
    if (!covers_layer(rule, layer)) continue;
    if (done_by_partner(state, rule, layer) || !set_limits(state, rule, layer)) continue;
    load_heads(state, rule, layer);
    choose_fates(state, rule, layer);
    for (uint32_t h = 0; h < state.geometry.kv_heads; ++h) {
      const RankHead& head = state.rank.heads[h];
      reached = reached && (is_adaptive(rule.budget) || rule.budget == BudgetRule::kShared ||
                            head.surplus() <= head.free());
      apply_fates(state, rule, state.lane_index(layer, h), head);
    }
  }
  return reached;
}

void run_rules(SequenceState& state) {
  const PolicyParams& p = state.policy();
  bool reached = true;
  for (uint32_t i = 0; i < p.rule_count; ++i) {
    if (!policy::fires(p, p.rules[i], state.moment)) continue;
    reached = run_rule(state, p.rules[i]) && reached;
  }
  if (!reached) state.header->counters.over_budget_steps += 1;
}

// A cut of the prompt leaves few tokens in many pages, and no later write fills them soon. In
// decoding nothing moves: evicted slots are written again within a few flushes.
void compact_lanes(SequenceState& state) {
  for (uint32_t i = 0; i < state.lanes.size(); ++i) {
    state.header->gathered_bytes += state.lane(i).compact();
  }
}

}  // namespace

void plan_rank_step(SequenceState& state) {
  const SequenceHeader& header = *state.header;
  state.moment = {.generated = header.tokens + 1 - header.prompt_tokens,
                  .waiting = header.waiting != 0};
  state.emitting = policy::measures(state.policy(), state.moment);
  state.firing = policy::any_fires(state.policy(), state.moment);
  // Buffers are empty after every 16th token, so rules that fire there find all tokens in pages.
  state.flushing = state.closing || (state.firing && state.moment.generated % kBufferTokens == 0);
}

bool add_rank_need(const SequenceState& state, uint32_t lane_index, uint32_t& data_pages,
                   MetaNeed& need) {
  const PolicyParams& p = state.policy();
  const Lane lane = state.lane(lane_index);
  const uint32_t layer = lane_index / state.geometry.kv_heads;
  uint32_t pages = kFlushPagesMax;
  for (uint32_t i = 0; i < p.rule_count; ++i) {
    const RankRule& rule = p.rules[i];
    if (!policy::fires(p, rule, state.moment) || !covers_layer(rule, layer)) continue;
    const Format format = state.recode_format(rule, layer);
    const uint32_t count = recode_bound(state, lane, rule, format);
    if (count == 0) continue;
    // Free slots of the format are not relied on: the step's flush or an earlier rule takes them.
    const uint32_t slots = page_layout(format, state.geometry.head_dim).slots;
    const uint32_t more = is_block(format) ? count / slots : (count + slots - 1) / slots;
    if (!is_pair(format)) data_pages += more;  // a pair's page is the second layer's
    pages += more;
    // As if the table grew at once by all that comes before too: a bound of its growths in turn.
    if (!lane.add_need(format, pages, need)) return false;
  }
  return true;
}

void begin_rank_step(SequenceState& state) {
  if (!policy::starts_window(state.policy(), state.moment)) return;
  for (uint32_t i = 0; i < state.lanes.size(); ++i) clear_sums(state.lane(i));
  state.header->window_queries = 0;
}

void run_step_rules(SequenceState& state) {
  SequenceHeader& header = *state.header;
  if (state.emitting) header.window_queries += 1;
  if (state.firing) run_rules(state);
  if (header.waiting == 0 || !policy::waiting_is_over(state.policy(), state.moment.generated)) {
    return;
  }
  header.waiting = 0;
  compact_lanes(state);
}

Status run_prompt_rules(SequenceState& state) {
  SequenceHeader& header = *state.header;
  const PolicyParams& p = state.policy();
  // All layers or none (prefill_end).
  const bool given = state.rank.queries_given.front() != 0;
  header.prompt_queries = given ? state.rank.query_count : 0;
  header.window_queries = policy::prompt_sample(p, header.prompt_queries).used;
  header.waiting = !given && policy::any_waits_for_queries(p) ? 1 : 0;
  state.moment = {.generated = 0, .waiting = header.waiting != 0};
  if (!given && policy::reads_entropy(p)) measure_prompt_keys(state);
  if (!policy::any_fires(p, state.moment)) return {};
  uint32_t data_pages = 0;
  MetaNeed need(state.heap.granules_per_page());
  for (uint32_t lane = 0; lane < state.lanes.size(); ++lane) {
    if (!add_rank_need(state, lane, data_pages, need)) return kLaneFull;
  }
  THINKV_TRY(state.pages.reserve(data_pages + need.pages()));
  run_rules(state);
  compact_lanes(state);
  state.pages.end_reservation();
  return {};
}

}  // namespace thinkv::kernels
