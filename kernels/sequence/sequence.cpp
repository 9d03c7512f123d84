// sequence.cpp: what may be called when, and the numbers; the work is in the files beside it.
#include "kernels/sequence/sequence.h"

#include <algorithm>
#include <bit>
#include <functional>

#include "kernels/sequence/rank.h"
#include "kernels/sequence/sequence_state.h"
#include "kernels/sequence/tiering.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::kernels {
namespace {

using enum ErrorCode;
using Phase = SequenceState::Phase;

constexpr Error kClosed = make_error(kStale, "the sequence is closed");

Status validate_policy(const PolicyParams& policy, const ModelGeometry& geometry) {
  if (!policy_params_valid(policy)) {
    return make_error(kInvalidArgument, "the policy's parameters contradict each other");
  }
  for (uint32_t i = 0; i < policy.label_layer_count; ++i) {
    if (policy.label_layers[i] >= geometry.layers) {
      return make_error(kInvalidArgument, "the policy labels by a layer that the model lacks");
    }
  }
  if (policy.evict == EvictRule::kTbe && policy.floor_rule == FloorRule::kMerge &&
      2u * policy.schedule[policy.schedule_length - 1] > kMedoidRowsMax) {
    return make_error(kUnsupported, "merging needs a last schedule step of at most 512 tokens");
  }
  return {};
}

Status require(const SequenceState* state, Phase phase, const char* otherwise) {
  if (state == nullptr) return kClosed;
  if (state->phase != phase) return make_error(kInvalidArgument, otherwise);
  return {};
}

Status require_layer(const SequenceState& state, uint32_t layer) {
  if (layer < state.geometry.layers) return {};
  return make_error(kInvalidArgument, "there is no such layer");
}

bool every_layer_given(const SequenceState& state) {
  return std::all_of(state.layer_given.begin(), state.layer_given.end(),
                     [](uint8_t given) { return given != 0; });
}

constexpr const char* kNotIdle = "a step or a prompt of this sequence is open";
constexpr const char* kNoStep = "no step of this sequence is open";

}  // namespace

Sequence::Sequence(std::unique_ptr<SequenceState> state) : state_(std::move(state)) {}
Sequence::Sequence(Sequence&&) noexcept = default;
Sequence& Sequence::operator=(Sequence&& other) noexcept {
  if (this != &other) {
    release();
    state_ = std::move(other.state_);
  }
  return *this;
}
Sequence::~Sequence() {
  release();
}

Result<Sequence> Sequence::create(PageSource& source, const KernelSet& kernels,
                                  const ModelGeometry& geometry, const PolicyParams& policy,
                                  const SequenceOptions& options) {
  THINKV_TRY(validate(geometry));
  THINKV_TRY(validate_policy(policy, geometry));
  auto state = std::make_unique<SequenceState>(source, kernels, geometry);
  THINKV_TRY(state->create(policy, options));
  state->header->budget_tokens = budget_in_tokens(options.budget_tokens, policy);
  return Sequence(std::move(state));
}

Result<Sequence> Sequence::attach(PageSource& source, const KernelSet& kernels, PageId root) {
  if (!root.valid()) return make_error(kInvalidArgument, "there is no root page");
  const std::byte* bytes = source.address(root);
  const auto* page = reinterpret_cast<const MetaPageHeader*>(bytes);
  const auto* header =
      reinterpret_cast<const SequenceHeader*>(bytes + kSequenceHeaderGranule * kGranuleBytes);
  if (page->magic != kMetaPageMagic || header->magic != kSequenceMagic) {
    return make_error(kInvalidArgument, "the page is not the root of a sequence");
  }
  if (header->version != kSequenceLayoutVersion) {
    return make_error(kVersionMismatch, "the sequence has another layout version");
  }
  const ModelGeometry geometry{.layers = header->layers,
                               .q_heads = header->q_heads,
                               .kv_heads = header->kv_heads,
                               .head_dim = header->head_dim,
                               .value_type = static_cast<ValueType>(header->value_type),
                               .softmax_scale = header->softmax_scale};
  THINKV_TRY(validate(geometry));
  THINKV_TRY(validate_policy(header->policy, geometry));
  if (header->tier_tokens != 0) {
    return make_error(kUnsupported, "rows of the sequence were in the memory of another process");
  }
  auto state = std::make_unique<SequenceState>(source, kernels, geometry);
  if (!state->adopt(root)) {
    return make_error(kInvalidArgument, "the pages of the sequence do not fit together");
  }
  return Sequence(std::move(state));
}

Status Sequence::prefill(uint32_t layer, const float* k, const float* v, uint32_t tokens) {
  if (!state_) return kClosed;
  SequenceState& s = *state_;
  THINKV_TRY(require_layer(s, layer));
  if (s.phase == Phase::kStep || s.header->tokens > 0) {
    return make_error(kInvalidArgument, "a prompt comes before the first step, and once");
  }
  if (k == nullptr || v == nullptr || tokens == 0 || tokens > limits::kTokensMax) {
    return make_error(kInvalidArgument, "a prompt needs k, v and 1 to 16,777,216 tokens");
  }
  const bool first = s.phase == Phase::kIdle;
  if (!first && s.prompt_tokens != tokens) {
    return make_error(kInvalidArgument, "every layer takes the same number of prompt tokens");
  }
  if (!first && s.layer_given[layer] != 0) {
    return make_error(kInvalidArgument, "this layer was prefilled before");
  }
  THINKV_TRY(prefill_layer(s, layer, k, v, tokens));
  if (first) {
    std::fill(s.layer_given.begin(), s.layer_given.end(), uint8_t{0});
    s.rank.queries_given.assign(s.geometry.layers, 0);
    s.rank.query_energy.clear();
  }
  s.phase = Phase::kPrompt;
  s.prompt_tokens = tokens;
  s.layer_given[layer] = 1;
  return {};
}

Status Sequence::prefill_end() {
  THINKV_TRY(require(state_.get(), Phase::kPrompt, "no prompt was given"));
  SequenceState& s = *state_;
  if (!every_layer_given(s)) {
    return make_error(kInvalidArgument, "a layer of the prompt is missing");
  }
  const std::vector<uint8_t>& queries = s.rank.queries_given;
  if (std::adjacent_find(queries.begin(), queries.end(), std::not_equal_to<>()) != queries.end()) {
    return make_error(kInvalidArgument, "queries were given for some layers only");
  }
  s.header->tokens = s.header->prompt_tokens = s.prompt_tokens;
  if (s.policy().evict == EvictRule::kRank) {
    if (const Status ruled = run_prompt_rules(s); !ruled) {
      s.header->tokens = s.header->prompt_tokens = 0;  // the prompt stays open
      return ruled;
    }
  }
  s.segments()[0].start = s.prompt_tokens;
  s.phase = Phase::kIdle;
  return {};
}

Status Sequence::prefill_queries(uint32_t layer, const float* q, uint32_t count) {
  THINKV_TRY(require(state_.get(), Phase::kPrompt, "queries come between prefill and prefill_end"));
  SequenceState& s = *state_;
  THINKV_TRY(require_layer(s, layer));
  if (q == nullptr || count == 0 || count > s.prompt_tokens) {
    return make_error(kInvalidArgument,
                      "the newest queries of the prompt are expected: at least 1, at most all");
  }
  std::vector<uint8_t>& given = s.rank.queries_given;
  if (s.layer_given[layer] == 0 || given[layer] != 0) {
    return make_error(kInvalidArgument, "queries come once a layer, after its keys and values");
  }
  const bool first = std::all_of(given.begin(), given.end(), [](uint8_t g) { return g == 0; });
  if (!first && s.rank.query_count != count) {
    return make_error(kInvalidArgument, "every layer takes the same number of queries");
  }
  if (s.policy().evict == EvictRule::kRank) measure_prompt(s, layer, q, count);
  given[layer] = 1;
  s.rank.query_count = count;
  return {};
}

Status Sequence::token_classes(uint32_t first, std::span<const uint8_t> classes) {
  if (!state_) return kClosed;
  if (state_->phase == Phase::kStep) {
    return make_error(kInvalidArgument, "a step of this sequence is open");
  }
  if (first > limits::kTokensMax || classes.size() > limits::kTokensMax - first) {
    return make_error(kInvalidArgument, "a sequence holds at most 16,777,216 tokens");
  }
  return set_classes(*state_, first, classes);
}

Status Sequence::begin_step() {
  THINKV_TRY(require(state_.get(), Phase::kIdle, kNotIdle));
  SequenceState& s = *state_;
  THINKV_TRY(reserve_step(s));
  std::fill(s.layer_given.begin(), s.layer_given.end(), uint8_t{0});
  std::fill(s.lane_attended.begin(), s.lane_attended.end(), uint8_t{0});
  std::fill(s.lane_sparsity.begin(), s.lane_sparsity.end(), SparsityCount{});
  if (s.policy().evict == EvictRule::kRank) begin_rank_step(s);
  for (TierLane& lane : s.tier) lane.has_prefetched = false;
  s.phase = Phase::kStep;
  return {};
}

Status Sequence::append(uint32_t layer, const float* k, const float* v) {
  THINKV_TRY(require(state_.get(), Phase::kStep, kNoStep));
  SequenceState& s = *state_;
  THINKV_TRY(require_layer(s, layer));
  if (k == nullptr || v == nullptr) return make_error(kInvalidArgument, "k and v must be given");
  if (s.layer_given[layer] != 0) {
    return make_error(kInvalidArgument, "this layer was appended before in this step");
  }
  append_layer(s, layer, k, v);
  s.layer_given[layer] = 1;
  return {};
}

Status Sequence::attend_lane(uint32_t layer, uint32_t kv_head, const float* q, float* out,
                             float* lse, AttendScratch& scratch) {
  THINKV_TRY(require(state_.get(), Phase::kStep, kNoStep));
  SequenceState& s = *state_;
  THINKV_TRY(require_layer(s, layer));
  if (kv_head >= s.geometry.kv_heads || q == nullptr || out == nullptr) {
    return make_error(kInvalidArgument, "attend needs q, out and a kv head of the model");
  }
  if (s.layer_given[layer] == 0) {
    return make_error(kInvalidArgument, "append this layer before attending to it");
  }
  const uint32_t lane = s.lane_index(layer, kv_head);
  const bool measure = s.header->trace_sparsity != 0 || (s.closing && s.label_layer[layer] != 0);
  const bool emit = s.emitting && s.lane_attended[lane] == 0;  // a second look scores nothing
  SparsityCount* const sparsity = measure ? &s.lane_sparsity[lane] : nullptr;
  THINKV_TRY(attend_one_lane(s, sparsity, lane, emit, q, out, lse, scratch));
  s.lane_attended[lane] = 1;
  return {};
}

Status Sequence::attend(uint32_t layer, const float* q, float* out, float* lse) {
  if (!state_) return kClosed;
  if (q == nullptr || out == nullptr) {
    return make_error(kInvalidArgument, "attend needs q and out");
  }
  const size_t group = state_->geometry.group();
  const size_t rows = group * state_->geometry.head_dim;
  for (uint32_t head = 0; head < state_->geometry.kv_heads; ++head) {
    THINKV_TRY(attend_lane(layer, head, q + head * rows, out + head * rows,
                           lse == nullptr ? nullptr : lse + head * group, state_->attend_scratch));
  }
  return {};
}

Status Sequence::prefetch(uint32_t layer, const float* q) {
  THINKV_TRY(require(state_.get(), Phase::kStep, kNoStep));
  THINKV_TRY(require_layer(*state_, layer));
  if (q == nullptr) return make_error(kInvalidArgument, "q must be given");
  if (state_->policy().tier.on()) prefetch_layer(*state_, layer, q);
  return {};
}

Status Sequence::end_step() {
  THINKV_TRY(require(state_.get(), Phase::kStep, kNoStep));
  if (!every_layer_given(*state_)) {
    return make_error(kInvalidArgument, "a layer of this step was not appended");
  }
  finish_step(*state_);
  state_->phase = Phase::kIdle;
  return {};
}

void Sequence::cancel_step() {
  if (!state_ || state_->phase != Phase::kStep) return;
  undo_step(*state_);
  state_->phase = Phase::kIdle;
}

Result<uint64_t> Sequence::evict(std::span<const uint32_t> positions) {
  THINKV_TRY(require(state_.get(), Phase::kIdle, kNotIdle));
  if (state_->policy().entropy.on()) return evict_blocks(*state_, positions);
  if (state_->policy().tier.on()) THINKV_TRY(require_none_in_tier(*state_, positions));
  return evict_positions(*state_, positions);
}

Result<uint64_t> Sequence::quantize(uint32_t first, uint32_t last, Format format) {
  THINKV_TRY(require(state_.get(), Phase::kIdle, kNotIdle));
  if (is_block(format)) {
    return make_error(kUnsupported,
                      "a format of blocks comes by a rule of the policy: action recode");
  }
  if (!format_valid(static_cast<uint8_t>(format))) {
    return make_error(kInvalidArgument, "there is no such format");
  }
  if (first > last || last >= state_->header->tokens) {
    return make_error(kInvalidArgument, "the range must lie within the tokens of the sequence");
  }
  if (state_->policy().entropy.on() || state_->policy().tier.on()) {
    return make_error(kUnsupported, "a policy with entropy or tier chooses the formats itself");
  }
  return recode(*state_, first, last + 1, state_->resolve(format));
}

Status Sequence::set_budget(uint32_t budget_tokens) {
  THINKV_TRY(require(state_.get(), Phase::kIdle, kNotIdle));
  state_->header->budget_tokens = budget_in_tokens(budget_tokens, state_->policy());
  return {};
}

SequenceStats Sequence::stats() const {
  SequenceStats stats;
  if (!state_) return stats;
  const SequenceHeader& h = *state_->header;
  const SequenceCounters& c = h.counters;
  stats.tokens = h.tokens;
  stats.prompt_tokens = h.prompt_tokens;
  for (const LaneHeader* lane : state_->lanes) {
    stats.live_slots += lane->live;
    stats.live_tokens_max = std::max<uint64_t>(stats.live_tokens_max, lane->live);
  }
  stats.pages = h.data_pages;
  stats.metadata_pages = state_->heap.pages();
  stats.page_bytes = state_->heap.page_bytes();
  stats.metadata_bytes = stats.metadata_pages * stats.page_bytes;
  stats.bytes_held = (stats.pages + stats.metadata_pages) * stats.page_bytes;
  stats.bytes_f16 = stats.tokens * state_->geometry.token_bytes_f16();
  stats.evicted_slots = c.evicted_slots;
  stats.reused_slots = c.reused_slots;
  stats.recoded_slots = c.recoded_slots;
  stats.recoded_bytes = c.recoded_bytes;
  stats.gathered_bytes = h.gathered_bytes;
  stats.demotions = c.demotions;
  stats.merges = c.merges;
  stats.over_budget_steps = c.over_budget_steps;
  stats.refreshes = c.refreshes;
  stats.steps = c.steps;
  std::copy_n(c.segments, kThoughtCount, stats.segments);
  stats.budget_tokens = state_->budget();
  for (const TierLane& lane : state_->tier) stats.tier_bytes += lane.bytes();
  return stats;
}

void Sequence::sparsity(std::span<float> out) const {
  THINKV_CHECK(state_ && out.size() == state_->layer_sparsity.size());
  std::copy(state_->layer_sparsity.begin(), state_->layer_sparsity.end(), out.begin());
}

const ModelGeometry& Sequence::geometry() const {
  THINKV_CHECK(state_ != nullptr);
  return state_->geometry;
}
const PolicyParams& Sequence::policy() const {
  THINKV_CHECK(state_ != nullptr);
  return state_->policy();
}
uint32_t Sequence::tokens() const {
  return state_ ? state_->header->tokens : 0;
}
bool Sequence::in_step() const {
  return state_ && state_->phase == Phase::kStep;
}
bool Sequence::selects_at_end() const {
  return in_step() && (state_->closing || state_->firing);
}
PageId Sequence::root() const {
  return state_ ? state_->heap.root() : kNoPage;
}

void Sequence::release() {
  if (!state_) return;
  state_->destroy();
  state_.reset();
}

PageId Sequence::detach() {
  if (!state_) return kNoPage;
  cancel_step();
  const PageId root = state_->heap.root();
  state_->pages.end_reservation();
  state_.reset();
  return root;
}

}  // namespace thinkv::kernels
