// rank_prompt.cpp: what the engine tells about a prompt: its newest queries, classes of tokens.
#include <algorithm>

#include "kernels/policy/channels.h"
#include "kernels/policy/matrix_entropy.h"
#include "kernels/policy/rank_trigger.h"
#include "kernels/sequence/rank.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// Adds the squares of query rows of a kv head, channel by channel, in ascending order of rows.
void add_query_energy(SequenceState& state, uint32_t lane, const float* q, uint32_t count) {
  const size_t dim = state.geometry.head_dim;
  std::vector<float>& energy = state.rank.query_energy;
  energy.resize(state.lanes.size() * dim, 0.0f);
  const size_t stride = size_t{state.geometry.q_heads} * dim;
  const std::span<float> sums(energy.data() + lane * dim, dim);
  for (uint32_t i = 0; i < count; ++i) {
    policy::add_energy({q + i * stride, state.geometry.group() * dim}, sums);
  }
}

// The truncated entropy of the newest query rows of a kv head.
float query_entropy(SequenceState& state, uint32_t head, const float* q, uint32_t count) {
  const size_t values = size_t{state.geometry.group()} * state.geometry.head_dim;
  const size_t stride = size_t{state.geometry.q_heads} * state.geometry.head_dim;
  const uint32_t queries = policy::entropy_queries(count, state.geometry.group());
  std::vector<float>& rows = state.rank.numbers;
  rows.resize(queries * values);
  for (uint32_t i = 0; i < queries; ++i) {
    std::copy_n(q + (count - queries + i) * stride + head * values, values,
                rows.data() + i * values);
  }
  return policy::truncated_entropy(rows, state.geometry.head_dim);
}

}  // namespace

void measure_prompt(SequenceState& state, uint32_t layer, const float* q, uint32_t count) {
  const PolicyParams& p = state.policy();
  const size_t values = size_t{state.geometry.group()} * state.geometry.head_dim;
  const size_t stride = size_t{state.geometry.q_heads} * state.geometry.head_dim;
  const uint32_t window = std::min<uint32_t>(count, p.score_window);
  for (uint32_t h = 0; h < state.geometry.kv_heads; ++h) {
    const uint32_t lane = state.lane_index(layer, h);
    if (policy::reads_entropy(p))
      state.lane(lane).rank().head_signal = query_entropy(state, h, q, count);
    if (policy::leaves_channels_out(p)) {
      add_query_energy(state, lane, q + (count - window) * stride + h * values, window);
    }
    if (!state.store.sums) continue;
    const policy::PromptSample sample = policy::prompt_sample(p, count);
    add_prompt_attention(state, lane, q + (count - sample.given) * stride + h * values, sample);
  }
}

// Of the newest keys, where no queries were given.
void measure_prompt_keys(SequenceState& state) {
  const uint32_t dim = state.geometry.head_dim;
  const uint32_t rows = std::min(state.prompt_tokens, policy::kEntropyRowsMax);
  std::vector<float>& keys = state.rank.numbers;
  for (uint32_t i = 0; i < state.lanes.size(); ++i) {
    const Lane lane = state.lane(i);
    std::vector<SlotRow>& newest = state.rank.lane_rows;
    newest.resize(rows);
    const uint32_t found = lane.gather(state.prompt_tokens - rows, state.prompt_tokens, newest);
    THINKV_CHECK(found == rows);  // nothing goes before the prompt's end
    keys.resize(size_t{rows} * dim);
    lane.decode(newest, keys.data(), nullptr);
    lane.rank().head_signal = policy::truncated_entropy(keys, dim);
  }
}

Status set_classes(SequenceState& state, uint32_t first, std::span<const uint8_t> classes) {
  if (classes.empty() || !policy::reads_classes(state.policy())) return {};
  ClassTable table = state.classes();
  const auto end = static_cast<uint32_t>(first + classes.size());
  if (end > table.size_max()) {
    return make_error(ErrorCode::kUnsupported, "classes of so late tokens cannot be held");
  }
  if (end > table.size()) {
    const uint32_t more = end - table.size();
    MetaNeed need(state.heap.granules_per_page());
    table.add_need(more, need);
    THINKV_TRY(state.pages.reserve(need.pages()));
    table.grow_for(more);
    for (uint32_t i = 0; i < more; ++i) table.push(0);
    state.pages.end_reservation();
  }
  for (size_t i = 0; i < classes.size(); ++i) {
    table[static_cast<uint32_t>(first + i)] = classes[i];
  }
  return {};
}

uint8_t class_of(const SequenceState& state, uint32_t position) {
  const ClassTable table = state.classes();
  return position < table.size() ? table[position] : uint8_t{0};
}

}  // namespace thinkv::kernels
