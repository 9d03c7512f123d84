#include "client/gpu/sequence.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "client/error_text.h"
#include "client/gpu/batch.h"
#include "kernels/cuda/device_format.h"
#include "kernels/policy/coded_tokens.h"
#include "kernels/policy/rank_trigger.h"
#include "kernels/sequence/sequence.h"
#include "thinkv/internal/limits.h"

namespace thinkv::client {
namespace {

using enum ErrorCode;

uint32_t pages_for(const ModelGeometry& geometry, Format format, uint32_t tokens) {
  const uint32_t slots = page_layout(format, geometry.head_dim).slots;
  return (tokens + slots - 1) / slots;
}

}  // namespace

Result<std::unique_ptr<GpuSequence>> GpuSequence::open(GpuEngine& engine,
                                                       const PolicyParams& policy,
                                                       const Options& options) {
  const KernelTable& kernels = engine.kernels();
  THINKV_TRY(kernels.supported(engine.geometry(), policy));
  const auto lock = engine.lock();
  THINKV_TRY(engine.refuse_capture("a sequence cannot be opened"));
  THINKV_TRY(engine.promise(kernels.open_pages(engine.geometry(), policy)));
  THINKV_ASSIGN_OR_RETURN(const PageId root, engine.take_root());
  const uint32_t budget = kernels::budget_in_tokens(options.budget_tokens, policy);
  std::unique_ptr<GpuSequence> sequence(new GpuSequence(engine, policy, budget, root));
  sequence->traced_ = options.trace_sparsity;
  sequence->layer_given_.assign(engine.geometry().layers, 0);
  sequence->queries_given_.assign(engine.geometry().layers, 0);
  const cuda::ContextScope context(engine.gpu());
  const int code = kernels.open(engine.view(), root.raw(), policy, budget, options.trace_sparsity,
                                engine.stream());
  if (const Status launched = GpuEngine::launched(code, "open"); !launched) {
    engine.give_root(root);
    sequence->root_ = kNoPage;
    return launched.error();
  }
  return sequence;
}

Result<std::unique_ptr<GpuSequence>> GpuSequence::copy() {
  THINKV_TRY(require_idle());
  const auto lock = engine_->lock();
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers held, numbers());
  std::unique_ptr<GpuTier> tier;
  if (this->tier() != nullptr) {
    THINKV_ASSIGN_OR_RETURN(tier, tier_->copy());
  }
  THINKV_TRY(engine_->promise(held.data_pages + held.metadata_pages - 1));  // the root apart
  THINKV_ASSIGN_OR_RETURN(const PageId root, engine_->take_root());
  std::unique_ptr<GpuSequence> copy(new GpuSequence(*engine_, policy_, budget_, root));
  copy->settled_from_ = settled_from_;
  copy->traced_ = traced_;
  copy->prompt_ = prompt_;
  copy->prompt_queries_ = prompt_queries_;
  copy->classes_end_ = classes_end_;
  copy->generated_ = generated_;
  copy->lane_pages_ = lane_pages_;
  copy->layer_given_ = layer_given_;
  copy->queries_given_ = queries_given_;
  copy->tier_ = std::move(tier);
  copy->block_gone_ = block_gone_;
  const cuda::ContextScope context(engine_->gpu());
  const int code =
      engine_->kernels().copy(engine_->view(), root_.raw(), root.raw(), engine_->stream());
  if (const Status launched = GpuEngine::launched(code, "copy"); !launched) {
    engine_->give_root(root);
    copy->root_ = kNoPage;
    return launched.error();
  }
  return copy;
}

GpuSequence::~GpuSequence() {
  if (!root_.valid()) return;
  const auto lock = engine_->lock();
  if (batch_ != nullptr) static_cast<void>(batch_->set(row_, nullptr));
  const cuda::ContextScope context(engine_->gpu());
  // A context that is broken keeps its pages until the process ends: the daemon takes them then.
  if (!context.status()) return;
  if (engine_->kernels().close(engine_->view(), root_.raw(), engine_->stream()) == 0) {
    static_cast<void>(engine_->settle());
  }
}

Status GpuSequence::require_idle() const {
  if (prompt_open_) return make_error(kInvalidArgument, "the prompt was not ended");
  return engine_->refuse_capture("a sequence cannot be changed");
}

uint32_t GpuSequence::coded_tokens(uint64_t tokens) const {
  if (!policy_.entropy.on()) return 0;
  return policy::coded_tokens(
      policy_.entropy, static_cast<uint32_t>(std::min<uint64_t>(tokens, limits::kTokensMax)));
}

uint32_t GpuSequence::prompt_pages(uint32_t layer, uint32_t tokens) const {
  const ModelGeometry& geometry = engine_->geometry();
  const TierParams& tier = policy_.tier;
  if (tier.on() && tier.dense(layer)) return pages_for(geometry, tier.dense_format, tokens);
  const uint32_t far = tier.on() ? tier.tier_tokens(tokens) : 0;
  const uint32_t coded = std::min(coded_tokens(tokens), tokens);
  return pages_for(geometry, policy_.sink_format, std::min(tokens, policy_.sink_tokens)) +
         pages_for(geometry, policy_.prompt_format, tokens - far - coded);
}

Status GpuSequence::put_into_tier(uint32_t layer, const void* k, const void* v,
                                  cuda::Element element, uint32_t tokens) {
  if (!policy_.tier.on() || policy_.tier.tier_tokens(tokens) == 0) return {};
  if (tier_ == nullptr) {
    THINKV_ASSIGN_OR_RETURN(tier_, GpuTier::make(*engine_, policy_, tokens));
  }
  return tier_->put(layer, k, v, element);
}

Result<uint32_t> GpuSequence::prompt_lane_pages(uint32_t layer, uint32_t tokens) const {
  const ModelGeometry& geometry = engine_->geometry();
  const uint64_t coded_max = cuda::coded_prompt_max(geometry.kv_heads, geometry.head_dim);
  if (std::min(coded_tokens(tokens), tokens) > coded_max) {
    return describe(kUnsupported, "the GPU codes at most %llu tokens of a prompt",
                    static_cast<unsigned long long>(coded_max));
  }
  const uint32_t lane_pages = prompt_pages(layer, tokens);
  const uint32_t limit = engine_->kernels().lane_pages_limit(geometry, policy_);
  if (lane_pages > limit) {
    return describe(kUnsupported, "a lane of %u pages is more than one on the GPU may have (%u)",
                    lane_pages, limit);
  }
  return lane_pages;
}

Status GpuSequence::prefill(uint32_t layer, const void* k, const void* v, cuda::Element element,
                            uint32_t tokens) {
  const ModelGeometry& geometry = engine_->geometry();
  if (layer >= geometry.layers) return make_error(kInvalidArgument, "there is no such layer");
  if (generated_ > 0 || (prompt_ > 0 && !prompt_open_)) {
    return make_error(kInvalidArgument, "a prompt comes before the first step, and once");
  }
  if (tokens == 0 || tokens > limits::kTokensMax) {
    return make_error(kInvalidArgument, "a prompt needs k, v and 1 to 16,777,216 tokens");
  }
  if (prompt_open_ && prompt_ != tokens) {
    return make_error(kInvalidArgument, "every layer takes the same number of prompt tokens");
  }
  if (layer_given_[layer] != 0) {
    return make_error(kInvalidArgument, "this layer was prefilled before");
  }
  THINKV_ASSIGN_OR_RETURN(const uint32_t lane_pages, prompt_lane_pages(layer, tokens));
  const KernelTable& kernels = engine_->kernels();
  const auto lock = engine_->lock();
  THINKV_TRY(engine_->refuse_capture("a prompt cannot be written"));
  THINKV_TRY(engine_->make_rank_memory(kernels.rank_need(geometry, policy_, lane_pages, tokens)));
  const uint32_t pages = kernels.prefill_pages(geometry, policy_, layer, tokens);
  THINKV_TRY(engine_->promise(pages));
  if (const Status put = put_into_tier(layer, k, v, element, tokens); !put) {
    engine_->take_back(pages);
    return put;
  }
  const cuda::ContextScope context(engine_->gpu());
  const PromptLayer prompt{layer, k, v, element, tokens};
  THINKV_TRY(coded_tokens(tokens) > 0 ? code_prompt(prompt, pages) : write_prompt(prompt));
  prompt_open_ = true;
  prompt_ = tokens;
  lane_pages_ = std::max(lane_pages_, lane_pages);
  layer_given_[layer] = 1;
  return {};
}

Status GpuSequence::write_prompt(const PromptLayer& prompt) {
  return GpuEngine::launched(
      engine_->kernels().prefill(engine_->view(), root_.raw(), prompt.layer, prompt.k, prompt.v,
                                 prompt.element, prompt.tokens, engine_->stream()),
      "prefill");
}

Status GpuSequence::code_prompt(const PromptLayer& prompt, uint64_t promised) {
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers before, numbers());
  THINKV_TRY(GpuEngine::launched(
      engine_->kernels().code_prompt(engine_->view(), root_.raw(), prompt.layer, prompt.k, prompt.v,
                                     prompt.element, prompt.tokens, engine_->stream()),
      "code_prompt"));
  THINKV_TRY(write_prompt(prompt));
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers after, numbers());
  const uint64_t taken =
      after.data_pages + after.metadata_pages - before.data_pages - before.metadata_pages;
  prompt_surplus_ = promised - std::min(taken, promised);
  engine_->take_back(prompt_surplus_);
  return {};
}

Status GpuSequence::prefill_queries(uint32_t layer, const void* q, cuda::Element element,
                                    uint32_t count) {
  if (!prompt_open_) {
    return make_error(kInvalidArgument, "queries come between prefill and prefill_end");
  }
  if (layer >= engine_->geometry().layers) {
    return make_error(kInvalidArgument, "there is no such layer");
  }
  if (count == 0 || count > prompt_) {
    return make_error(kInvalidArgument,
                      "the newest queries of the prompt are expected: at least 1, at most all");
  }
  if (layer_given_[layer] == 0 || queries_given_[layer] != 0) {
    return make_error(kInvalidArgument, "queries come once a layer, after its keys and values");
  }
  if (prompt_queries_ != 0 && prompt_queries_ != count) {
    return make_error(kInvalidArgument, "every layer takes the same number of queries");
  }
  const auto lock = engine_->lock();
  THINKV_TRY(engine_->refuse_capture("queries of a prompt cannot be given"));
  const cuda::ContextScope context(engine_->gpu());
  const int code =
      engine_->kernels().prefill_queries(engine_->view(), root_.raw(), policy_, layer, q, element,
                                         {.tokens = prompt_, .queries = count}, engine_->stream());
  THINKV_TRY(GpuEngine::launched(code, "prefill_queries"));
  prompt_queries_ = count;
  queries_given_[layer] = 1;
  return {};
}

Status GpuSequence::token_classes(uint32_t first, std::span<const uint8_t> classes) {
  if (first > limits::kTokensMax || classes.size() > limits::kTokensMax - first) {
    return make_error(kInvalidArgument, "a sequence holds at most 16,777,216 tokens");
  }
  if (classes.empty() || !policy::reads_classes(policy_)) return {};
  const KernelTable& kernels = engine_->kernels();
  const ModelGeometry& geometry = engine_->geometry();
  const auto end = static_cast<uint32_t>(first + classes.size());
  if (end > kernels.classes_max(geometry)) {
    return make_error(kUnsupported, "classes of so late tokens cannot be held");
  }
  const auto lock = engine_->lock();
  THINKV_TRY(engine_->refuse_capture("classes cannot be given"));
  if (end > classes_end_) {
    THINKV_TRY(engine_->promise(kernels.class_pages(geometry, end) -
                                kernels.class_pages(geometry, classes_end_)));
  }
  const cuda::ContextScope context(engine_->gpu());
  for (size_t done = 0; done < classes.size(); done += GpuEngine::kAnswerBytes) {
    const size_t count = std::min<size_t>(GpuEngine::kAnswerBytes, classes.size() - done);
    std::memcpy(engine_->answer(), classes.data() + done, count);
    THINKV_TRY(GpuEngine::launched(
        kernels.classes(engine_->view(), root_.raw(), static_cast<uint32_t>(first + done),
                        static_cast<const uint8_t*>(engine_->answer()),
                        static_cast<uint32_t>(count), engine_->stream()),
        "classes"));
    THINKV_TRY(engine_->synchronise());
  }
  classes_end_ = std::max(classes_end_, end);
  return {};
}

Status GpuSequence::prefill_end() {
  if (!prompt_open_) return make_error(kInvalidArgument, "no prompt was given");
  if (std::find(layer_given_.begin(), layer_given_.end(), uint8_t{0}) != layer_given_.end()) {
    return make_error(kInvalidArgument, "a layer of the prompt is missing");
  }
  if (std::adjacent_find(queries_given_.begin(), queries_given_.end(), std::not_equal_to<>()) !=
      queries_given_.end()) {
    return make_error(kInvalidArgument, "queries were given for some layers only");
  }
  const cuda::Prompt prompt{.tokens = prompt_, .queries = prompt_queries_};
  const auto lock = engine_->lock();
  const uint32_t pages =
      engine_->kernels().prefill_end_pages(engine_->geometry(), policy_, budget_, prompt);
  THINKV_TRY(engine_->promise(pages));
  if (tier() != nullptr) THINKV_TRY(tier_->publish());
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(GpuEngine::launched(engine_->kernels().prefill_end(engine_->view(), root_.raw(),
                                                                policy_, prompt, engine_->stream()),
                                 "prefill_end"));
  prompt_open_ = false;
  lane_pages_ += pages / engine_->geometry().lanes();
  return prompt_surplus_ == 0 ? Status() : engine_->release(std::exchange(prompt_surplus_, 0));
}

Status GpuSequence::require_none_in_tier(std::span<const uint32_t> positions) const {
  const GpuTier* const tier = this->tier();
  if (tier == nullptr) return {};
  const bool any = std::any_of(positions.begin(), positions.end(),
                               [&](uint32_t position) { return tier->holds(position); });
  if (!any) return {};
  return make_error(kUnsupported,
                    "a token in the host tier cannot be evicted: it takes no byte of the pool");
}

Result<uint64_t> GpuSequence::evict(std::span<const uint32_t> positions) {
  THINKV_TRY(require_idle());
  THINKV_TRY(require_none_in_tier(positions));
  const uint32_t tokens = prompt_ + generated_;
  if (tokens <= 16) return uint64_t{0};
  std::vector<uint32_t> wanted(positions.begin(), positions.end());
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  wanted.erase(std::lower_bound(wanted.begin(), wanted.end(), tokens - 16), wanted.end());
  if (wanted.empty()) return uint64_t{0};
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers before, numbers());
  if (policy_.entropy.on()) {
    THINKV_ASSIGN_OR_RETURN(wanted, whole_blocks(wanted, before.tokens));
  }
  const auto lock = engine_->lock();
  const cuda::ContextScope context(engine_->gpu());
  constexpr size_t kAtOnce = GpuEngine::kAnswerBytes / sizeof(uint32_t);
  for (size_t done = 0; done < wanted.size(); done += kAtOnce) {
    const auto count = static_cast<uint32_t>(std::min(kAtOnce, wanted.size() - done));
    std::memcpy(engine_->answer(), wanted.data() + done, count * sizeof(uint32_t));
    THINKV_TRY(GpuEngine::launched(
        engine_->kernels().evict(engine_->view(), root_.raw(),
                                 static_cast<const uint32_t*>(engine_->answer()), count,
                                 engine_->stream()),
        "evict"));
    THINKV_TRY(engine_->synchronise());
  }
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers after, numbers());
  if (policy_.entropy.on()) {
    block_gone_.resize(coded_tokens(before.tokens) / kStreamBlockTokens);
    for (const uint32_t position : wanted) block_gone_[position / kStreamBlockTokens] = 1;
  }
  THINKV_TRY(engine_->settle());
  return after.evicted_slots - before.evicted_slots;
}

Result<std::vector<uint32_t>> GpuSequence::whole_blocks(std::span<const uint32_t> wanted,
                                                        uint64_t tokens) const {
  const uint32_t end = coded_tokens(tokens);
  if (!wanted.empty() && wanted.back() >= end) {
    return make_error(kUnsupported,
                      "under a policy with entropy only tokens in whole coded blocks can go");
  }
  std::vector<uint32_t> whole;
  for (auto from = wanted.begin(); from != wanted.end();) {
    const uint32_t block = *from / kStreamBlockTokens;
    const auto to = std::lower_bound(from, wanted.end(), (block + 1) * kStreamBlockTokens);
    const bool gone = block < block_gone_.size() && block_gone_[block] != 0;
    if (!gone && to - from != kStreamBlockTokens) {
      return make_error(kUnsupported,
                        "a token of an entropy-coded block cannot be evicted alone: name all 64");
    }
    if (!gone) whole.insert(whole.end(), from, to);
    from = to;
  }
  return whole;
}

Status GpuSequence::trim(uint32_t keep) {
  THINKV_TRY(require_idle());
  if (policy_.entropy.on()) {
    return make_error(kUnsupported,
                      "under a policy with entropy whole coded blocks alone can go: evict them");
  }
  const uint32_t tokens = prompt_ + generated_;
  const GpuTier* const tier = this->tier();
  // All before the oldest that is kept would go.
  if (tier != nullptr && tokens > std::max(keep, 16u)) {
    const uint32_t oldest[] = {tier->first()};
    if (oldest[0] < tokens - std::max(keep, 16u)) THINKV_TRY(require_none_in_tier(oldest));
  }
  const auto lock = engine_->lock();
  const cuda::ContextScope context(engine_->gpu());
  return GpuEngine::launched(
      engine_->kernels().trim(engine_->view(), root_.raw(), keep, engine_->stream()), "trim");
}

Result<uint64_t> GpuSequence::quantize(uint32_t first, uint32_t last, Format format) {
  THINKV_TRY(require_idle());
  if (first > last || last >= prompt_ + generated_) {
    return make_error(kInvalidArgument, "the range must lie within the tokens of the sequence");
  }
  if (is_block(format)) return make_error(kUnsupported, "tokens come into blocks by rules only");
  if (policy_.entropy.on() || policy_.tier.on()) {
    return make_error(kUnsupported, "a policy with entropy or tier chooses the formats itself");
  }
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers before, numbers());
  const auto lock = engine_->lock();
  const KernelTable& kernels = engine_->kernels();
  const uint32_t pages = kernels.recode_pages(engine_->geometry(), policy_, lane_pages_, format);
  THINKV_TRY(engine_->promise(pages));
  THINKV_TRY(unsettle(lane_pages_ + pages / engine_->geometry().lanes()));
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(GpuEngine::launched(
      kernels.recode(engine_->view(), root_.raw(), first, last + 1, format, engine_->stream()),
      "recode"));
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers after, numbers());
  if (batch_ == nullptr || batch_->unreported_steps() == 0) lane_pages_ = after.lane_pages_max;
  THINKV_TRY(engine_->settle());
  return after.recoded_slots - before.recoded_slots;
}

Status GpuSequence::set_budget(uint32_t budget_tokens) {
  THINKV_TRY(require_idle());
  const uint32_t budget = kernels::budget_in_tokens(budget_tokens, policy_);
  if (budget == budget_) return {};
  const auto lock = engine_->lock();
  const uint32_t before = std::exchange(budget_, budget);
  if (const Status promised = unsettle(lane_pages_); !promised) {
    budget_ = before;
    return promised;
  }
  const cuda::ContextScope context(engine_->gpu());
  return GpuEngine::launched(
      engine_->kernels().budget(engine_->view(), root_.raw(), budget, engine_->stream()), "budget");
}

Result<cuda::SequenceNumbers> GpuSequence::numbers() {
  const auto lock = engine_->lock();
  THINKV_TRY(engine_->refuse_capture("numbers cannot be read"));
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(GpuEngine::launched(
      engine_->kernels().numbers(engine_->view(), root_.raw(),
                                 static_cast<cuda::SequenceNumbers*>(engine_->answer()),
                                 engine_->stream()),
      "numbers"));
  THINKV_TRY(engine_->synchronise());
  cuda::SequenceNumbers numbers;
  std::memcpy(&numbers, engine_->answer(), sizeof(numbers));
  return numbers;
}

Status GpuSequence::sparsity(std::span<float> out) {
  const auto lock = engine_->lock();
  THINKV_TRY(engine_->refuse_capture("sparsity cannot be read"));
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(GpuEngine::launched(
      engine_->kernels().sparsity(engine_->view(), root_.raw(),
                                  static_cast<float*>(engine_->answer()), engine_->stream()),
      "sparsity"));
  THINKV_TRY(engine_->synchronise());
  std::memcpy(out.data(), engine_->answer(), out.size_bytes());
  return {};
}

cuda::StepSequence GpuSequence::before_step(uint32_t generated, uint32_t lane_pages) const {
  return {.prompt = prompt_,
          .generated = generated,
          .lane_pages_max = lane_pages,
          .budget = budget_,
          .settled_from = settled_from_,
          .prompt_queries = prompt_queries_};
}

uint32_t GpuSequence::step_pages(uint32_t ahead, uint32_t lane_pages) const {
  return engine_->kernels().step_pages(engine_->geometry(), policy_,
                                       before_step(generated_ + ahead, lane_pages));
}

Status GpuSequence::unsettle(uint32_t lane_pages) {
  if (policy_.evict != EvictRule::kRank) return {};
  const uint32_t before = std::exchange(settled_from_, generated_ + 1);
  const uint64_t waiting = batch_ == nullptr ? 0 : batch_->unreported_steps();
  uint64_t pages = 0;
  for (auto at = static_cast<uint32_t>(generated_ - std::min<uint64_t>(waiting, generated_));
       at < generated_; ++at) {
    const uint32_t step =
        engine_->kernels().step_pages(engine_->geometry(), policy_, before_step(at, lane_pages));
    lane_pages += lane_pages_of(step);
    pages += step;
  }
  const Status promised = engine_->promise(pages);
  if (promised) {
    lane_pages_ = std::max(lane_pages_, lane_pages);
  } else {
    settled_from_ = before;
  }
  return promised;
}

uint32_t GpuSequence::lane_pages_of(uint32_t step_pages) const {
  if (step_pages == 0) return 0;
  if (policy_.entropy.on()) return kLanePagesPerFlush;  // the others are its stream's
  return std::max(kLanePagesPerFlush, step_pages / engine_->geometry().lanes());
}

void GpuSequence::count_steps(uint32_t steps) {
  for (uint32_t i = 0; i < steps; ++i) {
    lane_pages_ += lane_pages_of(step_pages(0, lane_pages_));
    generated_ += 1;
  }
}

}  // namespace thinkv::client
