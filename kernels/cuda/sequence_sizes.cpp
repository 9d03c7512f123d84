// sequence_sizes.cpp: how many pages what a kernel does can take, said before it is launched.
#include <algorithm>

#include "kernels/cuda/device_format.h"
#include "kernels/cuda/rank.h"
#include "kernels/cuda/rank_sizes.h"
#include "kernels/cuda/refresh.h"
#include "kernels/cuda/sequence.h"
#include "kernels/policy/coded_tokens.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kBufferTokens = 2 * kBufferPageSlots;
constexpr uint32_t kPagesOfALane = 3;  // two of its buffer, one of its table

uint32_t divide_up(uint64_t a, uint64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

Format resolve(const ModelGeometry& geometry, Format format) {
  const bool bf16 = geometry.value_type == ValueType::kBf16;
  if (is_think(format)) return bf16 ? Format::kThinkBf16 : Format::kThink;
  if (!is_16bit(format)) return format;
  return bf16 ? Format::kBf16 : Format::kF16;
}

uint32_t slots_of(const ModelGeometry& geometry, Format format) {
  return page_layout(resolve(geometry, format), geometry.head_dim).slots;
}

// Pages for `sinks` tokens in the sink format and `others` in another. A lane's free slots may make
// it fewer.
uint32_t pages_for(const ModelGeometry& geometry, Format sink, uint64_t sinks, Format other,
                   uint64_t others) {
  return divide_up(sinks, slots_of(geometry, sink)) + divide_up(others, slots_of(geometry, other));
}

// How many of `tokens` tokens from position `first` on are written as sinks.
uint32_t sinks_among(const ModelGeometry& geometry, const PolicyParams& policy, Format other,
                     uint32_t first, uint32_t tokens) {
  if (first >= policy.sink_tokens) return 0;
  if (resolve(geometry, policy.sink_format) == resolve(geometry, other)) return 0;
  return std::min(tokens, policy.sink_tokens - first);
}

uint32_t per_table(const ModelGeometry& geometry, const PolicyParams& policy) {
  return descriptors_per_page(geometry.head_dim, score_bytes(policy));
}

bool writes_any_blocks(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) any = any || writes_blocks(policy.rules[i]);
  return any;
}

// The formats that pages of the policy's lanes can have are below it.
uint32_t formats_end(const PolicyParams& policy) {
  return writes_any_blocks(policy) ? kAllFormatCount : kFormatCount;
}

// Tables that a lane can grow by where it gets `more` pages.
uint32_t more_tables(const ModelGeometry& geometry, const PolicyParams& policy,
                     uint32_t lane_pages_max, uint64_t more) {
  const uint32_t each = per_table(geometry, policy);
  if (uint64_t{lane_pages_max} + more <= each) return 0;
  return divide_up(more, each) + 1;
}

}  // namespace

namespace {

// Pages that a stream can grow by where it gets `blocks` blocks, whatever they hold.
uint32_t stream_pages(uint32_t head_dim, uint64_t blocks) {
  const uint32_t data =
      divide_up(blocks * kernels::raw_block_bytes(head_dim), page_bytes(head_dim)) + 1;
  return data + divide_up(blocks, stream_blocks_per_page(head_dim)) +
         divide_up(data, stream_ids_per_page(head_dim));
}

// Blocks that a step adds to the stream of a lane.
uint32_t step_blocks(const PolicyParams& policy, uint64_t tokens) {
  if (!policy.entropy.on() || tokens > limits::kTokensMax) return 0;
  const auto before = static_cast<uint32_t>(tokens);
  return (policy::coded_tokens(policy.entropy, before + 1) -
          policy::coded_tokens(policy.entropy, before)) /
         kernels::kBlockTokens;
}

}  // namespace

uint32_t open_pages(const ModelGeometry& geometry, const PolicyParams& policy) {
  const uint32_t segment_and_work = 2;
  const uint32_t of_a_lane = kPagesOfALane + (policy.entropy.on() ? 1 : 0);
  return divide_up(geometry.lanes(), lanes_per_page(geometry.head_dim)) + segment_and_work +
         of_a_lane * geometry.lanes();
}

uint32_t prefill_pages(const ModelGeometry& geometry, const PolicyParams& policy, uint32_t layer,
                       uint32_t tokens) {
  Format other = policy.prompt_format;
  if (policy.tier.on() && policy.tier.dense(layer)) {
    other = policy.tier.dense_format;
  } else if (policy.tier.on()) {
    tokens -= policy.tier.tier_tokens(tokens);
  }
  const uint32_t coded =
      policy.entropy.on() ? std::min(policy::coded_tokens(policy.entropy, tokens), tokens) : 0;
  const bool one_format = policy.tier.on();
  const uint32_t sinks = one_format ? 0 : sinks_among(geometry, policy, other, 0, tokens);
  const uint32_t pages =
      pages_for(geometry, policy.sink_format, sinks, other, uint64_t{tokens} - coded - sinks);
  const uint32_t tables = std::max(divide_up(pages, per_table(geometry, policy)), 1u);
  const uint32_t streamed =
      coded == 0 ? 0 : stream_pages(geometry.head_dim, coded / kernels::kBlockTokens);
  return geometry.kv_heads * (pages + tables - 1 + streamed);
}

uint32_t prefill_end_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                           uint32_t budget, const Prompt& prompt) {
  if (policy.evict != EvictRule::kRank) return 0;
  const uint32_t before =
      divide_up(prefill_pages(geometry, policy, 0, prompt.tokens), std::max(geometry.kv_heads, 1u));
  const uint32_t pages =
      rule_pages(geometry, policy, rank_moment_at(policy, prompt, 0),
                 {.prompt = prompt, .pages_max = before, .budget = budget, .settled_from = 0});
  if (pages == 0) return 0;
  return geometry.lanes() * (pages + more_tables(geometry, policy, before, pages));
}

namespace {

// Pages of a flush in one lane.
uint32_t flush_pages(const ModelGeometry& geometry, const PolicyParams& policy, uint32_t prompt,
                     uint32_t generated) {
  // Segments are multiples of 16 tokens, so a closing step is one that fills the buffers.
  if ((uint64_t{generated} + 1) % kBufferTokens != 0) return 0;
  const uint32_t first = prompt + generated + 1 - kBufferTokens;
  // Whatever the open segment's label is. Without label layers it is always reasoning.
  const uint32_t labels = policy.label_layer_count == 0 ? 1 : kThoughtCount;
  uint32_t pages = 0;
  for (uint32_t label = 0; label < labels; ++label) {
    const Format thought = policy.thought_format[label];
    const uint32_t sinks = sinks_among(geometry, policy, thought, first, kBufferTokens);
    pages = std::max(pages, pages_for(geometry, policy.sink_format, sinks, thought,
                                      uint64_t{kBufferTokens} - sinks));
  }
  if (!policy.tier.on()) return pages;
  return std::max(pages, divide_up(kBufferTokens, slots_of(geometry, policy.tier.dense_format)));
}

}  // namespace

uint32_t step_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                    const StepSequence& sequence) {
  const uint32_t generated = sequence.generated, held = sequence.lane_pages_max;
  const uint32_t flushed = flush_pages(geometry, policy, sequence.prompt, generated);
  uint32_t pages = flushed;
  if (policy.evict == EvictRule::kRank) {
    const Prompt prompt{.tokens = sequence.prompt, .queries = sequence.prompt_queries};
    pages += rule_pages(geometry, policy, rank_moment_at(policy, prompt, generated + 1),
                        {.prompt = prompt,
                         .pages_max = held,
                         .budget = sequence.budget,
                         .settled_from = sequence.settled_from});
  }
  const uint32_t blocks = step_blocks(policy, uint64_t{sequence.prompt} + generated);
  const uint32_t streamed = blocks == 0 ? 0 : stream_pages(geometry.head_dim, blocks);
  if (pages + streamed == 0) return 0;
  const bool closing = (uint64_t{generated} + 1) % policy.segment_tokens == 0;
  // Every lane has a table page from the start, and no flush fills more than one.
  const bool table_may_grow = uint64_t{held} + pages > per_table(geometry, policy);
  const uint32_t tables =
      pages > flushed ? more_tables(geometry, policy, held, pages) : (table_may_grow ? 1 : 0);
  return geometry.lanes() * (pages + tables + streamed) + (closing ? 1 : 0);
}

uint32_t recode_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                      uint32_t lane_pages_max, Format format) {
  const Format target = resolve(geometry, format);
  uint32_t most_slots = 0;  // of a page that is not yet in the format
  for (uint32_t raw = 1; raw < formats_end(policy); ++raw) {
    const Format other = resolve(geometry, static_cast<Format>(raw));
    if (other != target) most_slots = std::max(most_slots, slots_of(geometry, other));
  }
  const uint32_t pages =
      divide_up(uint64_t{lane_pages_max} * most_slots, slots_of(geometry, target));
  const uint64_t all = uint64_t{lane_pages_max} + pages;
  const uint32_t tables = std::max(divide_up(all, per_table(geometry, policy)), 1u);
  return geometry.lanes() * (pages + tables - 1);
}

namespace {

// Rules read rows of lanes.
bool ranks_rows(const PolicyParams& policy) {
  return policy.evict == EvictRule::kRank && policy.rule_count > 0;
}

// The most slots that a page of a lane can have.
uint32_t most_slots(const ModelGeometry& geometry, const PolicyParams& policy) {
  uint32_t slots = slots_of(geometry, policy.prompt_format);
  slots = std::max<uint32_t>(slots, slots_of(geometry, policy.sink_format));
  for (const Format format : policy.thought_format) {
    slots = std::max(slots, slots_of(geometry, format));
  }
  for (uint32_t i = 0; i < policy.rule_count; ++i) {
    if (policy.rules[i].action != RankAction::kRecode) continue;
    const Format format = policy.rules[i].recode_format;
    slots = std::max({slots, slots_of(geometry, format), slots_of(geometry, single_of(format))});
  }
  return slots;
}

}  // namespace

uint32_t lane_pages_limit(const ModelGeometry& geometry, const PolicyParams& policy) {
  const uint32_t held = kTablePagesMax * per_table(geometry, policy);
  if (!ranks_rows(policy)) return held;
  // Keys are compared with each other in the memory of a block alone.
  const uint32_t slots = most_slots(geometry, policy);
  const uint32_t rows =
      compares_keys(policy) ? rank_rows_max(policy, geometry.head_dim) : 1u << kRankRowBits;
  return std::min(held, (rows - 1) / slots);
}

RankNeed rank_need(const ModelGeometry& geometry, const PolicyParams& policy, uint32_t pages,
                   uint64_t tokens) {
  if (!ranks_rows(policy)) return {};
  RankNeed need{.tokens = 0, .dims = rank_medoid_dims(geometry, policy)};
  if (compares_keys(policy)) return need;
  const uint64_t live =
      std::min(tokens, uint64_t{pages} * most_slots(geometry, policy) + kBufferTokens);
  if (live >= rank_rows_max(policy, geometry.head_dim)) need.tokens = live;
  return need;
}

RankMemoryShape rank_memory_shape(const RankNeed& need, uint32_t multiprocessors) {
  constexpr uint64_t kStep = 8192, kBytesMax = 256ull << 20;
  const uint64_t room = std::min((need.tokens / kStep + 1) * kStep, uint64_t{1} << kRankRowBits);
  const uint64_t each = rank_region_bytes(static_cast<uint32_t>(room), need.dims);
  const uint64_t blocks = std::clamp<uint64_t>(kBytesMax / each, 1, std::max(multiprocessors, 1u));
  return {static_cast<uint32_t>(room), need.dims, static_cast<uint32_t>(blocks), blocks * each};
}

uint32_t class_pages(const ModelGeometry& geometry, uint32_t end) {
  const uint32_t directory = end > 0 ? 1 : 0;
  return directory + divide_up(end, page_bytes(geometry.head_dim));
}

uint32_t classes_max(const ModelGeometry& geometry) {
  return class_pages_max(geometry.head_dim) * page_bytes(geometry.head_dim);
}

Status supported(const ModelGeometry& geometry, const PolicyParams& policy) {
  using enum ErrorCode;
  THINKV_TRY(validate(geometry));
  if (!policy_params_valid(policy)) {
    return make_error(kInvalidArgument, "the policy's parameters contradict each other");
  }
  if (policy.evict == EvictRule::kRank) {
    for (uint32_t i = 0; i < policy.rule_count; ++i) {
      const BudgetRule budget = policy.rules[i].budget;
      if (geometry.kv_heads <= kSharedHeadsMax) break;
      if (budget == BudgetRule::kShared) {
        return make_error(kUnsupported, "budget.rule: shared takes at most 64 kv heads on a GPU");
      }
      if (budget == BudgetRule::kSplit) {
        return make_error(kUnsupported, "budget.rule: split takes at most 64 kv heads on a GPU");
      }
    }
  }
  for (uint32_t i = 0; i < policy.label_layer_count; ++i) {
    if (policy.label_layers[i] >= geometry.layers) {
      return make_error(kInvalidArgument, "the policy labels by a layer that the model lacks");
    }
  }
  if (geometry.lanes() > lane_pages_max(geometry.head_dim) * lanes_per_page(geometry.head_dim)) {
    return make_error(kUnsupported, "the model has more lanes than a root page can name");
  }
  if (!refresh_supported(geometry, policy)) {
    return make_error(kUnsupported,
                      "selecting by keys needs more shared memory than the GPU has: use a smaller "
                      "segment_tokens, grain kv_head, or select by attention");
  }
  return {};
}

}  // namespace thinkv::cuda
