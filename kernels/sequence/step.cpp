// step.cpp: what a decode step does to the lanes: reserve, append, attend, undo.
#include <algorithm>

#include "kernels/sequence/buffer.h"
#include "kernels/sequence/coding.h"
#include "kernels/sequence/rank.h"
#include "kernels/sequence/scores.h"
#include "kernels/sequence/sequence_state.h"
#include "kernels/sequence/tiering.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// The pages that one lane can need between begin_step and end_step.
bool add_lane_need(const SequenceState& state, uint32_t lane, uint32_t& data_pages,
                   MetaNeed& need) {
  LaneHeader& header = *state.lanes[lane];
  const FlushFormats formats = state.flush_formats(lane / state.geometry.kv_heads);
  const uint32_t position = state.header->tokens;
  uint32_t count = header.buffer_count;
  bool promoted = false;
  if (count == kBufferTokens) {
    const FlushNeed flush =
        add_flush_need(state.store, header, formats, count, position, data_pages, need);
    if (!flush.fits) return false;
    promoted = flush.promotes;
    count = 0;
  }
  if (promoted || append_needs_page(header, count)) data_pages += 1;
  // Both flushes of one step together never meet a lane: both come at multiples of 16 tokens.
  if (state.flushing &&
      !add_flush_need(state.store, header, formats, count + 1, position + 1, data_pages, need)
           .fits) {
    return false;
  }
  if (state.coding.due && !add_coding_need(state, lane, data_pages, need)) return false;
  return !state.firing || add_rank_need(state, lane, data_pages, need);
}

bool closes_segment(const SequenceState& state) {
  const SegmentTable table = state.segments();
  const policy::Segment& open = table[table.size() - 1];
  return state.header->tokens + 1 - open.start >= state.policy().segment_tokens;
}

}  // namespace

Status reserve_step(SequenceState& state) {
  SequenceHeader& header = *state.header;
  if (header.tokens >= limits::kTokensMax) {
    return make_error(ErrorCode::kUnsupported, "a sequence holds at most 16,777,216 tokens");
  }
  state.closing = closes_segment(state);
  state.emitting = state.store.scored && header.counters.steps % state.policy().score_every == 0;
  state.firing = false;
  state.flushing = state.closing;
  if (state.policy().evict == EvictRule::kRank) plan_rank_step(state);
  if (state.policy().entropy.on()) THINKV_TRY(code_step(state));
  uint32_t data_pages = 0;
  MetaNeed need(state.heap.granules_per_page());
  for (uint32_t lane = 0; lane < state.lanes.size(); ++lane) {
    if (!add_lane_need(state, lane, data_pages, need)) return kLaneFull;
  }
  if (state.closing) {
    const SegmentTable table = state.segments();
    if (table.size() >= table.size_max()) {
      return make_error(ErrorCode::kUnsupported, "a sequence cannot hold more segments");
    }
    table.add_need(1, need);
  }
  return state.pages.reserve(data_pages + need.pages());
}

void append_layer(SequenceState& state, uint32_t layer, const float* k, const float* v) {
  const uint32_t dim = state.geometry.head_dim;
  const FlushFormats formats = state.flush_formats(layer);
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    const uint32_t index = state.lane_index(layer, head);
    LaneHeader& lane = *state.lanes[index];
    if (lane.buffer_count == kBufferTokens) {
      state.header->counters.reused_slots +=
          flush_buffer(state.store, lane, formats, state.flush_decay(), state.flush_scratch());
    }
    const size_t row = size_t{head} * dim;
    std::copy_n(k + row, dim, state.k_rows.data());
    std::copy_n(v + row, dim, state.v_rows.data());
    state.condition(index, state.k_rows.data(), state.v_rows.data(), 1);
    append_to_buffer(state.store, lane, state.k_rows.data(), state.v_rows.data(),
                     state.header->tokens);
  }
}

void collect_views(const SequenceState& state, uint32_t lane_index, std::vector<PageView>& views) {
  const Lane lane = state.lane(lane_index);
  views.clear();
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    views.push_back({.bytes = state.pages.address(page.page),
                     .live = page.live,
                     .format = static_cast<Format>(page.format)});
  });
  const LaneHeader& header = lane.header();
  for (uint32_t first = 0; first < header.buffer_count; first += kBufferPageSlots) {
    const uint32_t raw = header.buffer_page[first / kBufferPageSlots];
    views.push_back({.bytes = state.pages.address(raw),
                     .live = low_slots(std::min(header.buffer_count - first, kBufferPageSlots)),
                     .format = state.store.wide});
  }
}

Status attend_one_lane(const SequenceState& state, SparsityCount* sparsity, uint32_t lane,
                       bool emit, const float* q, float* out, float* lse, AttendScratch& scratch) {
  const uint32_t dim = state.geometry.head_dim;
  const uint32_t group = state.geometry.group();
  collect_views(state, lane, scratch.views);
  // The query rows, and behind them room for an lse that the caller does not want.
  scratch.query.resize(size_t{group} * dim + group);
  std::copy_n(q, size_t{group} * dim, scratch.query.data());
  const bool rotate = state.policy().rotate != 0;
  if (rotate) state.kernels.rotate(scratch.query.data(), group, dim);
  if (state.policy().entropy.on()) THINKV_TRY(add_stream_views(state, lane, scratch));
  if (state.policy().tier.on()) add_tier_views(state, lane, scratch);
  if (emit) scratch.probabilities.resize(scratch.views.size() * kSlotsPerPageMax);
  state.kernels.attend({.pages = scratch.views,
                        .head_dim = dim,
                        .group = group,
                        .q = scratch.query.data(),
                        .softmax_scale = state.softmax_scale,
                        .out = out,
                        .lse = lse != nullptr ? lse : scratch.query.data() + size_t{group} * dim,
                        .sparsity = sparsity,
                        .near_zero = state.policy().near_zero,
                        .probabilities = emit ? scratch.probabilities.data() : nullptr,
                        .reduce = static_cast<GqaReduce>(state.policy().score_reduce)});
  if (lse != nullptr) {
    for (uint32_t i = 0; i < group; ++i) {
      lse[i] += state.softmax_scale * state.centres.missing(lane, &scratch.query[size_t{i} * dim]);
    }
  }
  if (rotate) state.kernels.rotate_back(out, group, dim);
  if (!emit) return {};
  if (state.store.sums) {
    accumulate_sums(state.lane(lane), scratch.probabilities.data());
  } else {
    accumulate_scores(state.lane(lane), scratch.probabilities.data());
  }
  return {};
}

void undo_step(SequenceState& state) {
  for (uint32_t layer = 0; layer < state.geometry.layers; ++layer) {
    if (state.layer_given[layer] == 0) continue;
    for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
      pop_buffer(*state.lanes[state.lane_index(layer, head)]);
    }
  }
  state.pages.end_reservation();
}

}  // namespace thinkv::kernels
