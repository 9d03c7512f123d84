// prompt_attention.cpp: what the prompt's newest queries look at, added to the slots' sums
// (kernels/policy/prompt_attention.h).
#include "kernels/policy/prompt_attention.h"

#include <algorithm>

#include "kernels/policy/rank_signal.h"
#include "kernels/sequence/rank.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// One kv head's queries and the tokens of its lane.
struct QueryWork {
  std::vector<float>& queries;  // [group, dim] of one position
  std::vector<float>& logits;   // [group, tokens]
  std::vector<float>& keys;     // [tokens, dim]
  uint32_t dim;
  uint32_t group;
  float scale;
};

void score_tokens(const QueryWork& work, uint32_t seen) {
  for (uint32_t h = 0; h < work.group; ++h) {
    const float* const query = work.queries.data() + size_t{h} * work.dim;
    float* const logits = work.logits.data() + size_t{h} * seen;
    for (uint32_t t = 0; t < seen; ++t) {
      logits[t] =
          policy::dot(query, work.keys.data() + size_t{t} * work.dim, work.dim) * work.scale;
    }
  }
}

// The number of each token, in the first row of the logits: the heads' probabilities together.
void reduce_heads(const QueryWork& work, GqaReduce reduce, uint32_t seen) {
  const std::span<float> all(work.logits);
  const std::span<float> first = all.subspan(0, seen);
  const auto head = [&](uint32_t h) { return all.subspan(size_t{h} * seen, seen); };
  if (reduce == GqaReduce::kMaxLogit) {
    for (uint32_t h = 1; h < work.group; ++h) {
      for (uint32_t t = 0; t < seen; ++t) first[t] = policy::larger(first[t], head(h)[t]);
    }
    return policy::softmax_by_chunks(first);
  }
  policy::softmax_by_chunks(first);
  for (uint32_t h = 1; h < work.group; ++h) {
    policy::softmax_by_chunks(head(h));
    for (uint32_t t = 0; t < seen; ++t) {
      const float other = head(h)[t];
      first[t] = reduce == GqaReduce::kMeanProbability ? first[t] + other
                                                       : policy::larger(first[t], other);
    }
  }
  if (reduce != GqaReduce::kMeanProbability) return;
  for (float& p : first) p /= static_cast<float>(work.group);
}

}  // namespace

void add_prompt_attention(SequenceState& state, uint32_t lane_index, const float* q,
                          const policy::PromptSample& sample) {
  const uint32_t dim = state.geometry.head_dim, group = state.geometry.group();
  const uint32_t tokens = state.prompt_tokens;
  const Lane lane = state.lane(lane_index);
  std::vector<SlotRow>& rows = state.rank.lane_rows;
  rows.resize(tokens);
  THINKV_CHECK(lane.gather(0, tokens, rows) == tokens);  // nothing goes before the prompt's end
  state.rank.keys.resize(std::max(state.rank.keys.size(), rows.size() * dim));
  lane.decode(rows, state.rank.keys.data(), nullptr);
  std::vector<float*> sums(lane.pages().size());
  lane.pages().for_each([&](uint32_t i, const PageDescriptor& page) { sums[i] = lane.sums(page); });
  const QueryWork work{.queries = state.rank.more_numbers,
                       .logits = state.rank.numbers,
                       .keys = state.rank.keys,
                       .dim = dim,
                       .group = group,
                       .scale = state.softmax_scale};
  const size_t values = size_t{group} * dim, stride = size_t{state.geometry.q_heads} * dim;
  work.queries.resize(values);
  for (uint32_t i = 0; i < sample.used; ++i) {
    const uint32_t place = policy::sampled_query(sample, i);
    const uint32_t seen = tokens - sample.given + place + 1;
    std::copy_n(q + place * stride, values, work.queries.data());
    if (state.policy().rotate != 0) state.kernels.rotate(work.queries.data(), group, dim);
    work.logits.resize(size_t{group} * seen);
    score_tokens(work, seen);
    reduce_heads(work, static_cast<GqaReduce>(state.policy().score_reduce), seen);
    for (uint32_t t = 0; t < seen; ++t) sums[rows[t].page][rows[t].slot] += work.logits[t];
  }
}

}  // namespace thinkv::kernels
