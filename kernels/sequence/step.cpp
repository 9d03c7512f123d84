// step.cpp: what a decode step does to the lanes: reserve, append, attend, undo.
#include <algorithm>
#include <array>

#include "kernels/sequence/buffer.h"
#include "kernels/sequence/rank.h"
#include "kernels/sequence/scores.h"
#include "kernels/sequence/sequence_state.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

constexpr Error kLaneFull =
    make_error(ErrorCode::kUnsupported, "a lane cannot hold more pages: evict or use fewer bits");

// The pages that one lane can need between begin_step and end_step.
bool add_lane_need(const SequenceState& state, uint32_t lane, uint32_t& data_pages,
                   MetaNeed& need) {
  LaneHeader& header = *state.lanes[lane];
  const FlushFormats formats = state.flush_formats();
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
  const FlushFormats formats = state.flush_formats();
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    LaneHeader& lane = *state.lanes[state.lane_index(layer, head)];
    if (lane.buffer_count == kBufferTokens) {
      state.header->counters.reused_slots +=
          flush_buffer(state.store, lane, formats, state.flush_decay(), state.flush_scratch());
    }
    const size_t row = size_t{head} * dim;
    std::copy_n(k + row, dim, state.k_rows.data());
    std::copy_n(v + row, dim, state.v_rows.data());
    if (state.policy().rotate != 0) {
      state.kernels.rotate(state.k_rows.data(), 1, dim);
      state.kernels.rotate(state.v_rows.data(), 1, dim);
    }
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

void attend_one_lane(const SequenceState& state, SparsityCount* sparsity, uint32_t lane, bool emit,
                     const float* q, float* out, float* lse, AttendScratch& scratch) {
  const uint32_t dim = state.geometry.head_dim;
  const uint32_t group = state.geometry.group();
  collect_views(state, lane, scratch.views);
  // The query rows, and behind them room for an lse that the caller does not want.
  scratch.query.resize(size_t{group} * dim + group);
  std::copy_n(q, size_t{group} * dim, scratch.query.data());
  const bool rotate = state.policy().rotate != 0;
  if (rotate) state.kernels.rotate(scratch.query.data(), group, dim);
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
  if (rotate) state.kernels.rotate_back(out, group, dim);
  if (!emit) return;
  if (state.store.sums) {
    accumulate_sums(state.lane(lane), scratch.probabilities.data());
  } else {
    accumulate_scores(state.lane(lane), scratch.probabilities.data());
  }
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

namespace {

struct PromptNeed {
  uint32_t sinks;  // tokens in the sink format
  uint32_t others;
  Format sink_format;
  Format other_format;
};

PromptNeed split_prompt(const SequenceState& state, uint32_t tokens) {
  const PolicyParams& p = state.policy();
  PromptNeed need{.sinks = std::min(tokens, p.sink_tokens),
                  .others = 0,
                  .sink_format = state.resolve(p.sink_format),
                  .other_format = state.resolve(p.prompt_format)};
  if (need.sink_format == need.other_format) need.sinks = 0;
  need.others = tokens - need.sinks;
  return need;
}

// Tokens [first, first + count) of one kv head of k and v, in chunks of a page at most.
void write_prompt(SequenceState& state, Lane lane, Format format, uint32_t first, uint32_t count,
                  const float* k, const float* v) {
  const uint32_t dim = state.geometry.head_dim;
  const size_t stride = size_t{state.geometry.kv_heads} * dim;
  std::array<uint32_t, kSlotsPerPageMax> positions;
  for (uint32_t done = 0; done < count;) {
    const uint32_t chunk = std::min(count - done, kSlotsPerPageMax);
    for (uint32_t i = 0; i < chunk; ++i) {
      const size_t token = size_t{first} + done + i;
      std::copy_n(k + token * stride, dim, state.k_rows.data() + size_t{i} * dim);
      std::copy_n(v + token * stride, dim, state.v_rows.data() + size_t{i} * dim);
      positions[i] = static_cast<uint32_t>(token);
    }
    if (state.policy().rotate != 0) {
      state.kernels.rotate(state.k_rows.data(), chunk, dim);
      state.kernels.rotate(state.v_rows.data(), chunk, dim);
    }
    const TokenRows rows{.k = state.k_rows.data(),
                         .v = state.v_rows.data(),
                         .positions = positions.data(),
                         .scores = nullptr,
                         .count = chunk};
    THINKV_CHECK(lane.write(format, rows) == 0);  // a lane without evicted slots
    done += chunk;
  }
}

}  // namespace

Status prefill_layer(SequenceState& state, uint32_t layer, const float* k, const float* v,
                     uint32_t tokens) {
  const PromptNeed prompt = split_prompt(state, tokens);
  uint32_t data_pages = 0;
  MetaNeed need(state.heap.granules_per_page());
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    const Lane lane = state.lane(state.lane_index(layer, head));
    const uint32_t sinks = lane.new_pages(prompt.sink_format, prompt.sinks);
    const uint32_t others = lane.new_pages(prompt.other_format, prompt.others);
    const Format larger = page_layout(prompt.sink_format, state.geometry.head_dim).slots >
                                  page_layout(prompt.other_format, state.geometry.head_dim).slots
                              ? prompt.sink_format
                              : prompt.other_format;
    if (!lane.add_need(larger, sinks + others, need)) return kLaneFull;
    data_pages += sinks + others;
  }
  THINKV_TRY(state.pages.reserve(data_pages + need.pages()));
  const size_t dim = state.geometry.head_dim;
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    Lane lane = state.lane(state.lane_index(layer, head));
    lane.grow_for(lane.new_pages(prompt.sink_format, prompt.sinks) +
                  lane.new_pages(prompt.other_format, prompt.others));
    const size_t row = head * dim;
    write_prompt(state, lane, prompt.sink_format, 0, prompt.sinks, k + row, v + row);
    write_prompt(state, lane, prompt.other_format, prompt.sinks, prompt.others, k + row, v + row);
    lane.header().live_prompt = tokens;
  }
  state.pages.end_reservation();
  return {};
}

}  // namespace thinkv::kernels
