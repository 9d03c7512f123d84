// rank_rows.cpp: the rows of a layer, what is protected among them, and what each is worth.
#include <algorithm>
#include <cmath>

#include "kernels/policy/distinct.h"
#include "kernels/policy/rank_budget.h"
#include "kernels/policy/rank_signal.h"
#include "kernels/sequence/rank.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// A slot's sum as the policy reads it.
float attention_of(const SequenceState& state, float sum, uint32_t position) {
  const SequenceHeader& h = *state.header;
  if (state.policy().score_kind == ScoreKind::kMean) {
    const policy::Lifetimes lives{
        .tokens = h.tokens,
        .prompt = h.prompt_tokens,
        .queries = policy::prompt_sample(state.policy(), h.prompt_queries)};
    return sum / static_cast<float>(std::max(policy::lifetime(lives, position), 1u));
  }
  if (state.policy().score_kind == ScoreKind::kWindow) {
    return sum / static_cast<float>(std::max(h.window_queries, 1u));
  }
  return sum;
}

void read_attention(SequenceState& state, const Lane& lane, RankHead& head) {
  std::vector<const float*>& sums = state.rank.sums;
  sums.clear();
  lane.pages().for_each(
      [&](uint32_t, const PageDescriptor& page) { sums.push_back(lane.sums(page)); });
  for (uint32_t i = 0; i < head.size(); ++i) {
    const SlotRow& row = head.rows[i];
    head.attention[i] = attention_of(state, sums[row.page][row.slot], row.position);
  }
  const uint32_t buffered = lane.header().buffer_count;
  head.buffer_square = 0.0f;
  for (uint32_t i = 0; i < buffered; ++i) {
    const uint32_t position = state.header->tokens - buffered + i;
    const float value = attention_of(state, lane.rank().buffer_sum[i], position);
    head.buffer_square += value * value;
  }
}

void protect(const SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  const SequenceHeader& h = *state.header;
  const uint32_t recent = std::min(recent_tokens(state, rule, head, lane), h.tokens);
  const uint8_t classes = protected_classes(state, rule, lane);
  for (uint32_t i = 0; i < head.size(); ++i) {
    const uint32_t where = head.rows[i].position;
    const bool outside = rule.counts == BudgetCount::kGenerated && where < h.prompt_tokens;
    head.fixed[i] = where < rule.sinks || where >= h.tokens - recent || outside ||
                            (classes != 0 && (class_of(state, where) & classes) != 0)
                        ? 1
                        : 0;
  }
}

// weights [rows] times the norms of the values.
void multiply_by_value_norm(SequenceState& state, uint32_t lane_index, const RankHead& head,
                            std::span<float> weights) {
  const Lane lane = state.lane(lane_index);
  const uint32_t dim = state.geometry.head_dim;
  for (uint32_t i = 0; i < head.size(); ++i) {
    const PageDescriptor& page = lane.pages()[head.rows[i].page];
    const auto slot = static_cast<uint8_t>(head.rows[i].slot);
    state.kernels.decode({.page = state.pages.address(page.page),
                          .format = static_cast<Format>(page.format),
                          .head_dim = dim,
                          .slots = {&slot, 1},
                          .k = nullptr,
                          .v = state.v_rows.data()});
    weights[i] *= std::sqrt(policy::dot(state.v_rows.data(), state.v_rows.data(), dim));
  }
}

// attention x value norm, pooled over the rows that are not among the protected newest. It is left
// in work.numbers.
void add_attention(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  RankWork& work = state.rank;
  const uint32_t n = head.size();
  work.numbers.assign(head.attention.begin(), head.attention.end());
  if (rule.value_norm != 0) multiply_by_value_norm(state, lane, head, work.numbers);
  if (rule.pool != Pool::kNone) {
    const uint32_t newest = std::min(recent_tokens(state, rule, head, lane), state.header->tokens);
    uint32_t pooled = n;
    while (pooled > 0 && head.rows[pooled - 1].position >= state.header->tokens - newest) --pooled;
    work.more_numbers.resize(n);
    policy::pool_rows(rule.pool, rule.pool_width, {work.numbers.data(), pooled},
                      {work.more_numbers.data(), pooled});
    std::copy_n(work.more_numbers.begin(), pooled, work.numbers.begin());
  }
  for (uint32_t i = 0; i < n; ++i) head.score[i] += rule.attention * work.numbers[i];
}

void add_similarity(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  RankWork& work = state.rank;
  const uint32_t n = head.size();
  const uint32_t dim = state.geometry.head_dim;
  decode_head_keys(state, lane, head, dim);
  for (uint32_t i = 0; i < n; ++i) policy::normalise_row(work.keys.data() + size_t{i} * dim, dim);
  work.numbers.resize(n);
  work.columns.resize(policy::redundancy_scratch(n, dim));
  policy::redundancy({work.keys.data(), size_t{n} * dim}, dim, rule.similarity_above, work.columns,
                     {work.numbers.data(), n});
  for (uint32_t i = 0; i < n; ++i) head.score[i] += rule.similarity * work.numbers[i];
}

// Requires: work.numbers is the lane's attention.
void add_distinct(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  RankWork& work = state.rank;
  const uint32_t n = head.size(), dim = state.geometry.head_dim;
  const std::span<const float> mean = state.centres.of(lane);
  const float mean_norm = std::sqrt(policy::dot(mean.data(), mean.data(), dim));
  const float attention = policy::sum_of_rows({work.numbers.data(), n});
  decode_head_keys(state, lane, head, dim);
  std::vector<float>& distances = work.more_numbers;
  distances.resize(n);
  for (uint32_t i = 0; i < n; ++i) {
    float* const key = work.keys.data() + size_t{i} * dim;
    for (uint32_t d = 0; d < dim; ++d) key[d] += mean[d];
    distances[i] = policy::key_distance(key, mean.data(), mean_norm, dim);
  }
  if (rule.value_norm != 0) multiply_by_value_norm(state, lane, head, distances);
  const float scale = policy::distance_scale(attention, policy::sum_of_rows(distances));
  const float weight = rule.distinct * scale;
  for (uint32_t i = 0; i < n; ++i) head.score[i] += weight * distances[i];
}

// The terms are added in this order: attention, distinct, similarity, position, chance.
void add_signals(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  if (rule.attention != 0.0f) add_attention(state, rule, lane, head);
  if (rule.distinct != 0.0f) add_distinct(state, rule, lane, head);
  if (rule.similarity != 0.0f) add_similarity(state, rule, lane, head);
  // Heads that keep one set draw one number.
  const bool alike = state.policy().grain == SelectGrain::kLayer;
  const uint32_t stream = alike ? lane / state.geometry.kv_heads : lane;
  const auto tokens = static_cast<float>(state.header->tokens);
  for (uint32_t i = 0; i < head.size(); ++i) {
    const uint32_t where = head.rows[i].position;
    head.score[i] += rule.position * (static_cast<float>(where) / tokens);
    if (rule.random == 0.0f) continue;
    head.score[i] += rule.random * policy::random_score(rule.seed, stream, where);
  }
}

// Every head of the layer gets the sum of all, added in ascending order of heads.
void share_scores(const SequenceState& state, std::vector<RankHead>& heads) {
  if (state.policy().grain != SelectGrain::kLayer) return;
  for (size_t h = 1; h < heads.size(); ++h) {
    THINKV_CHECK(heads[h].rows.size() == heads[0].rows.size());
    for (size_t i = 0; i < heads[0].score.size(); ++i) heads[0].score[i] += heads[h].score[i];
  }
  for (size_t h = 1; h < heads.size(); ++h) heads[h].score = heads[0].score;
}

}  // namespace

uint8_t protected_classes(const SequenceState& state, const RankRule& rule, uint32_t lane) {
  uint8_t classes = rule.classes;
  if (rule.budget != BudgetRule::kFirstFit) return classes;
  if (rule.at_prompt_end != 0) return classes;  // the mask is about to be chosen
  const uint32_t mask = state.lane(lane).rank().mask;
  classes = static_cast<uint8_t>(classes | rule.special_classes);
  if (mask >= policy::kMaskPunctuation) {
    classes = static_cast<uint8_t>(classes | rule.punctuation_classes);
  }
  return classes;
}

uint32_t recent_tokens(const SequenceState& state, const RankRule& rule, const RankHead& head,
                       uint32_t lane) {
  const uint32_t recent = policy::newest_protected(rule, head.limit);
  if (rule.budget != BudgetRule::kFirstFit || rule.at_prompt_end != 0) return recent;
  if (state.lane(lane).rank().mask != policy::kMaskLocal) return recent;
  return std::max(recent, policy::percent_of(state.header->prompt_tokens, rule.local_percent));
}

void decode_head_keys(SequenceState& state, uint32_t lane_index, const RankHead& head,
                      size_t stride, size_t offset) {
  RankWork& work = state.rank;
  work.keys.resize(std::max(work.keys.size(), head.rows.size() * stride));
  const Lane lane = state.lane(lane_index);
  for (size_t i = 0; i < head.rows.size(); ++i) {
    const PageDescriptor& page = lane.pages()[head.rows[i].page];
    const auto slot = static_cast<uint8_t>(head.rows[i].slot);
    state.kernels.decode({.page = state.pages.address(page.page),
                          .format = static_cast<Format>(page.format),
                          .head_dim = state.geometry.head_dim,
                          .slots = {&slot, 1},
                          .k = work.keys.data() + i * stride + offset,
                          .v = nullptr});
  }
}

void load_heads(SequenceState& state, const RankRule& rule, uint32_t layer) {
  for (uint32_t h = 0; h < state.geometry.kv_heads; ++h) {
    const uint32_t index = state.lane_index(layer, h);
    const Lane lane = state.lane(index);
    RankHead& head = state.rank.heads[h];
    head.rows.resize(lane.header().live);
    head.rows.resize(lane.gather(0, state.header->tokens, head.rows));
    head.attention.assign(head.rows.size(), 0.0f);
    head.score.assign(head.rows.size(), 0.0f);
    head.fixed.assign(head.rows.size(), 0);
    head.fate.assign(head.rows.size(), kKeep);
    if (uses_attention(rule)) read_attention(state, lane, head);
    protect(state, rule, index, head);
    add_signals(state, rule, index, head);
  }
  share_scores(state, state.rank.heads);
}

}  // namespace thinkv::kernels
