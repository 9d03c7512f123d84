#include "kernels/sequence/tiering.h"

#include <algorithm>

#include "kernels/sequence/coding.h"

namespace thinkv::kernels {

Status require_tier_room(const SequenceState& state, uint32_t layer, uint32_t tokens) {
  if (tokens == 0) return {};
  uint64_t bytes = state.geometry.kv_heads * TierLane::bytes_of(state.geometry.head_dim, tokens);
  const uint32_t heads = state.geometry.kv_heads;
  for (uint32_t lane = 0; lane < state.tier.size(); ++lane) {
    if (lane / heads != layer) bytes += state.tier[lane].bytes();
  }
  if (bytes <= state.policy().tier.host_bytes) return {};
  return make_error(ErrorCode::kQuotaExceeded,
                    "the prompt's rows need more host memory than the policy's tier.host_bytes");
}

void put_into_tier(SequenceState& state, uint32_t layer, const PromptRows& rows,
                   const PromptRange& range) {
  const uint32_t dim = state.geometry.head_dim;
  std::vector<float> k(size_t{range.count} * dim), v(k.size());
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    load_prompt(state, rows, state.lane_index(layer, head), range.first, range.count, k.data(),
                v.data());
    state.tier[state.lane_index(layer, head)].put(state.store.wide, dim, range.first, k, v);
  }
  state.header->tier_tokens = range.count;
}

void prefetch_layer(SequenceState& state, uint32_t layer, const float* q) {
  const uint32_t group = state.geometry.group();
  const size_t values = size_t{group} * state.geometry.head_dim;
  std::vector<float>& query = state.attend_scratch.query;
  for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
    TierLane& lane = state.tier[state.lane_index(layer, head)];
    if (lane.tokens() == 0) continue;
    query.assign(q + head * values, q + (head + 1) * values);
    if (state.policy().rotate != 0) {
      state.kernels.rotate(query.data(), group, state.geometry.head_dim);
    }
    lane.choose(state.policy().tier, query.data(), group, state.tier_scratch);
    lane.prefetched = state.tier_scratch.rows;
    lane.has_prefetched = true;
  }
}

void add_tier_views(const SequenceState& state, uint32_t lane, AttendScratch& scratch) {
  const TierLane& tier = state.tier[lane];
  if (tier.tokens() == 0) return;
  if (!tier.has_prefetched) {
    tier.choose(state.policy().tier, scratch.query.data(), state.geometry.group(), scratch.tier);
  }
  const std::vector<uint32_t>& chosen = tier.has_prefetched ? tier.prefetched : scratch.tier.rows;
  const auto count = static_cast<uint32_t>(chosen.size());
  const uint32_t dim = state.geometry.head_dim;
  scratch.k_rows.resize(size_t{count} * dim);
  scratch.v_rows.resize(size_t{count} * dim);
  std::vector<uint32_t>& positions = scratch.tier.positions;
  positions.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    tier.read(chosen[i], scratch.k_rows.data() + size_t{i} * dim,
              scratch.v_rows.data() + size_t{i} * dim);
    positions[i] = tier.first() + chosen[i];
  }
  scratch.staging.start(state.store.wide, dim, count);
  scratch.staging.write(state.kernels, scratch.k_rows.data(), scratch.v_rows.data(),
                        positions.data(), count, scratch.views);
}

Status require_none_in_tier(const SequenceState& state, std::span<const uint32_t> positions) {
  const uint32_t first = state.policy().tier.start;
  const uint32_t end = first + state.header->tier_tokens;
  const bool any = std::any_of(positions.begin(), positions.end(),
                               [&](uint32_t p) { return p >= first && p < end; });
  if (!any) return {};
  return make_error(ErrorCode::kUnsupported,
                    "a token in the host tier cannot be evicted: it takes no byte of the pool");
}

}  // namespace thinkv::kernels
