#include "kernels/sequence/prompt.h"

#include <algorithm>
#include <numeric>

#include "kernels/policy/centre.h"
#include "kernels/sequence/coding.h"
#include "kernels/sequence/tiering.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// New pages of a lane for the ranges; both in one format share pages.
uint32_t new_pages(const Lane& lane, const PromptPlan& plan) {
  const auto& [one, two] = plan.pages;
  if (one.format == two.format) return lane.new_pages(one.format, one.count + two.count);
  return lane.new_pages(one.format, one.count) + lane.new_pages(two.format, two.count);
}

// The format whose pages take the larger scores.
Format larger_format(const PromptPlan& plan, uint32_t head_dim) {
  const auto& [one, two] = plan.pages;
  return page_layout(one.format, head_dim).slots > page_layout(two.format, head_dim).slots
             ? one.format
             : two.format;
}

// Tokens of one kv head of k and v, in chunks of a page at most.
void write_range(SequenceState& state, uint32_t index, const PromptRange& range,
                 const PromptRows& rows) {
  Lane lane = state.lane(index);
  std::array<uint32_t, kSlotsPerPageMax> positions;
  for (uint32_t done = 0; done < range.count;) {
    const uint32_t chunk = std::min(range.count - done, kSlotsPerPageMax);
    const uint32_t first = range.first + done;
    std::iota(positions.begin(), positions.begin() + chunk, first);
    load_prompt(state, rows, index, first, chunk, state.k_rows.data(), state.v_rows.data());
    const TokenRows written{.k = state.k_rows.data(),
                            .v = state.v_rows.data(),
                            .positions = positions.data(),
                            .scores = nullptr,
                            .count = chunk};
    THINKV_CHECK(lane.write(range.format, written) == 0);  // a lane without evicted slots
    done += chunk;
  }
}

// The sinks are left out: their keys are far from all others, and few.
void centre_layer(SequenceState& state, uint32_t layer, const float* k, uint32_t tokens) {
  const uint32_t dim = state.geometry.head_dim;
  const size_t stride = size_t{state.geometry.kv_heads} * dim;
  const uint32_t first = std::min(state.policy().sink_tokens, tokens);
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    const float* const keys = k + first * stride + size_t{head} * dim;
    float* const mean = state.k_rows.data();
    for (uint32_t d = 0; d < dim; ++d) {
      mean[d] = policy::channel_mean(keys + d, stride, tokens - first);
    }
    if (state.policy().rotate != 0) state.kernels.rotate(mean, 1, dim);
    state.centres.set(state.centre_table(), state.lane_index(layer, head), {mean, dim});
  }
}

Status reserve_layer(SequenceState& state, uint32_t layer, const PromptPlan& plan) {
  uint32_t data_pages = 0;
  MetaNeed need(state.heap.granules_per_page());
  const Format larger = larger_format(plan, state.geometry.head_dim);
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    const uint32_t index = state.lane_index(layer, head);
    const Lane lane = state.lane(index);
    const uint32_t pages = new_pages(lane, plan);
    if (!lane.add_need(larger, pages, need)) return kLaneFull;
    data_pages += pages;
    if (plan.coded > 0 && !add_coding_need(state, index, data_pages, need)) return kLaneFull;
  }
  return state.pages.reserve(data_pages + need.pages());
}

}  // namespace

void load_prompt(const SequenceState& state, const PromptRows& rows, uint32_t lane, uint32_t first,
                 uint32_t count, float* k, float* v) {
  const uint32_t dim = state.geometry.head_dim;
  const size_t stride = size_t{state.geometry.kv_heads} * dim;
  const uint32_t head = lane % state.geometry.kv_heads;
  for (uint32_t i = 0; i < count; ++i) {
    const size_t from = (size_t{first} + i) * stride + size_t{head} * dim;
    std::copy_n(rows.k + from, dim, k + size_t{i} * dim);
    std::copy_n(rows.v + from, dim, v + size_t{i} * dim);
  }
  state.condition(lane, k, v, count);
}

PromptPlan plan_prompt(const SequenceState& state, uint32_t layer, uint32_t tokens) {
  const PolicyParams& p = state.policy();
  const Format format = state.resolve(p.prompt_format);
  PromptPlan plan;
  plan.pages = {PromptRange{0, 0, format}, PromptRange{0, tokens, format}};
  if (p.tier.on()) {
    if (p.tier.dense(layer)) {
      const Format dense = state.resolve(p.tier.dense_format);
      plan.pages = {PromptRange{0, 0, dense}, PromptRange{0, tokens, dense}};
      return plan;
    }
    const uint32_t start = p.tier.kept_first(tokens), far = p.tier.tier_tokens(tokens);
    plan.pages = {PromptRange{0, start, format},
                  PromptRange{start + far, tokens - start - far, format}};
    plan.tier = {start, far, format};
    return plan;
  }
  if (p.entropy.on()) {
    plan.coded = coded_tokens(p.entropy, tokens);
    plan.pages[1] = {plan.coded, tokens - plan.coded, format};
    return plan;
  }
  const Format sink = state.resolve(p.sink_format);
  if (sink == format) return plan;
  const uint32_t sinks = std::min(tokens, p.sink_tokens);
  plan.pages = {PromptRange{0, sinks, sink}, PromptRange{sinks, tokens - sinks, format}};
  return plan;
}

Status prefill_layer(SequenceState& state, uint32_t layer, const float* k, const float* v,
                     uint32_t tokens) {
  const PromptPlan plan = plan_prompt(state, layer, tokens);
  const PromptRows rows{k, v};
  THINKV_TRY(require_tier_room(state, layer, plan.tier.count));
  if (plan.coded > 0) code_prompt(state, layer, rows, plan.coded);
  THINKV_TRY(reserve_layer(state, layer, plan));
  if (state.policy().centre != 0) centre_layer(state, layer, k, tokens);
  if (plan.coded > 0) keep_codebooks(state, layer);
  if (plan.tier.count > 0) put_into_tier(state, layer, rows, plan.tier);
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    const uint32_t index = state.lane_index(layer, head);
    Lane lane = state.lane(index);
    lane.grow_for(new_pages(lane, plan));
    if (plan.coded > 0) write_pending(state, index);
    for (const PromptRange& range : plan.pages) write_range(state, index, range, rows);
    lane.header().live_prompt = tokens - plan.tier.count;
  }
  state.coding.blocks.clear();
  state.pages.end_reservation();
  return {};
}

}  // namespace thinkv::kernels
