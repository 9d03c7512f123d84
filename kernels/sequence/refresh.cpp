// refresh.cpp: the end of a step: budget, label, segment, demotions.
//
// Order within a step that completes a segment: the buffers are flushed first, while the pages
// promised for it still match the lanes; then the budget; then the refresh. So a segment is closed
// when its last token has been attended, and can be demoted from the next step on, except by the
// transition that ends it.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/sequence/buffer.h"
#include "kernels/sequence/coding.h"
#include "kernels/sequence/rank.h"
#include "kernels/sequence/sequence_state.h"
#include "kernels/sequence/survivors.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

using policy::Segment;

void decode_keys(const SequenceState& state, const Lane& lane, std::span<const SlotRow> rows,
                 size_t stride, float* keys) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const PageDescriptor& page = lane.pages()[rows[i].page];
    const auto slot = static_cast<uint8_t>(rows[i].slot);
    state.kernels.decode({.page = state.pages.address(page.page),
                          .format = static_cast<Format>(page.format),
                          .head_dim = state.geometry.head_dim,
                          .slots = {&slot, 1},
                          .k = keys + i * stride,
                          .v = nullptr});
  }
}

void add_scores(const Lane& lane, std::span<const SlotRow> rows, std::span<float> sums) {
  for (size_t i = 0; i < rows.size(); ++i) {
    sums[i] += fp16_to_float(lane.scores(lane.pages()[rows[i].page])[rows[i].slot]);
  }
}

// Drops the rows that are not kept. Result: how many.
uint32_t drop_rows(Lane& lane, std::span<const SlotRow> rows, std::span<const uint8_t> keep) {
  uint32_t dropped = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (keep[i] != 0) continue;
    lane.drop(rows[i].page, uint64_t{1} << rows[i].slot);
    ++dropped;
  }
  if (dropped > 0) lane.sweep();
  return dropped;
}

// One selection for `heads` lanes from `first_lane` on: their keys side by side, their scores
// added. With more than one head every lane holds the same tokens.
void reduce_lanes(SequenceState& state, uint32_t first_lane, uint32_t heads, const Segment& segment,
                  uint32_t target) {
  const PolicyParams& p = state.policy();
  const size_t dim = state.geometry.head_dim;
  const uint32_t n = state.lane(first_lane).gather(segment.start, segment.end, state.rows);
  if (n <= target) return;
  const std::span<SlotRow> rows(state.rows.data(), n);
  const std::span<float> weights(state.weights.data(), n);
  const std::span<uint8_t> keep(state.keep.data(), n);
  std::fill(weights.begin(), weights.end(), 0.0f);
  for (uint32_t head = 0; head < heads; ++head) {
    const Lane lane = state.lane(first_lane + head);
    if (head > 0) THINKV_CHECK(lane.gather(segment.start, segment.end, state.rows) == n);
    if (selects_by_keys(p.select)) {
      decode_keys(state, lane, rows, heads * dim, state.keys.data() + head * dim);
    }
    if (selects_by_scores(p.select)) add_scores(lane, rows, weights);
  }
  select_survivors(state.kernels, {.rule = p.select,
                                   .target = target,
                                   .iterations = p.kmeans_iterations,
                                   .dim = static_cast<uint32_t>(heads * dim),
                                   .keys = state.keys.data(),
                                   .scores = weights,
                                   .scratch = {state.order.data(), n},
                                   .keep = keep});
  for (uint32_t head = 0; head < heads; ++head) {
    Lane lane = state.lane(first_lane + head);
    if (heads > 1) THINKV_CHECK(lane.gather(segment.start, segment.end, state.rows) == n);
    state.header->counters.evicted_slots += drop_rows(lane, rows, keep);
  }
}

void reduce_segment(SequenceState& state, const Segment& segment, uint32_t target) {
  const uint32_t heads = state.policy().grain == SelectGrain::kLayer ? state.geometry.kv_heads : 1;
  for (uint32_t lane = 0; lane < state.lanes.size(); lane += heads) {
    reduce_lanes(state, lane, heads, segment, target);
  }
}

void demote(SequenceState& state, uint32_t index) {
  const SegmentTable table = state.segments();
  Segment& segment = table[index];
  reduce_segment(state, segment, policy::demotion_target(segment, state.policy()));
  segment.level = static_cast<uint8_t>(segment.level + 1);
  state.header->counters.demotions += 1;
}

void merge_oldest(SequenceState& state) {
  const PolicyParams& p = state.policy();
  SegmentTable table = state.segments();
  table[0] = policy::merge(table[0], table[1], p);
  table.remove_ordered(1);
  reduce_segment(state, table[0], p.schedule[p.schedule_length - 1]);
  state.header->counters.merges += 1;
}

void enforce_budget(SequenceState& state) {
  const uint32_t budget = state.policy().evict == EvictRule::kTbe ? state.budget() : 0;
  if (budget == 0) return;
  while (state.generated_live() > budget) {
    const SegmentTable table = state.segments();
    if (const auto next = policy::next_demotion(table, state.policy())) {
      demote(state, *next);
    } else if (policy::can_merge_oldest(table, state.policy())) {
      merge_oldest(state);
    } else {
      state.header->counters.over_budget_steps += 1;
      return;
    }
  }
}

// The mean over kv heads of the share of near-zero entries; NaN where not measured.
void collect_sparsity(SequenceState& state) {
  const uint32_t heads = state.geometry.kv_heads;
  for (uint32_t layer = 0; layer < state.geometry.layers; ++layer) {
    float sum = 0.0f;
    uint32_t measured = 0;
    for (uint32_t lane = layer * heads; lane < (layer + 1) * heads; ++lane) {
      const SparsityCount& count = state.lane_sparsity[lane];
      if (count.live == 0) continue;
      sum += static_cast<float>(count.near_zero) / static_cast<float>(count.live);
      ++measured;
    }
    state.layer_sparsity[layer] = measured == heads ? sum / static_cast<float>(heads)
                                                    : std::numeric_limits<float>::quiet_NaN();
  }
}

// The mean over the label layers; NaN where one was not measured.
float label_sparsity(const SequenceState& state) {
  const PolicyParams& p = state.policy();
  float sum = 0.0f;
  for (uint32_t i = 0; i < p.label_layer_count; ++i) sum += state.layer_sparsity[p.label_layers[i]];
  return sum / static_cast<float>(std::max<uint32_t>(p.label_layer_count, 1));
}

void refresh(SequenceState& state) {
  const PolicyParams& p = state.policy();
  const Thought label = policy::label_of(label_sparsity(state), p);
  SegmentTable table = state.segments();
  table[table.size() - 1].end = state.header->tokens;
  if (policy::demotes_everything(label, p)) {
    for (uint32_t i = 0; i < table.size(); ++i) {
      if (policy::can_demote(table[i], p)) demote(state, i);
    }
  }
  table.grow_for(1);
  table.push({.start = state.header->tokens,
              .end = policy::kOpenEnd,
              .label = static_cast<uint8_t>(label),
              .level = 0,
              .merged = 0,
              .waiting = 0,
              .live = 0});
  state.header->counters.refreshes += 1;
}

}  // namespace

void finish_step(SequenceState& state) {
  SequenceHeader& header = *state.header;
  {
    const SegmentTable table = state.segments();
    const Segment& open = table[table.size() - 1];
    if (header.tokens == open.start) header.counters.segments[open.label] += 1;
  }
  header.tokens += 1;
  header.counters.steps += 1;
  if (state.flushing) {
    for (uint32_t lane = 0; lane < state.lanes.size(); ++lane) {
      header.counters.reused_slots += flush_buffer(
          state.store, *state.lanes[lane], state.flush_formats(lane / state.geometry.kv_heads),
          state.flush_decay(), state.flush_scratch());
    }
  }
  if (state.policy().entropy.on()) finish_coding_step(state);
  collect_sparsity(state);
  enforce_budget(state);
  if (state.policy().evict == EvictRule::kRank) run_step_rules(state);
  if (state.closing) refresh(state);
  state.pages.end_reservation();
}

}  // namespace thinkv::kernels
