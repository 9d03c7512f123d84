#include "client/gpu/batch.h"

#include <algorithm>

#include "client/error_text.h"
#include "kernels/cuda/device_format.h"
#include "thinkv/internal/limits.h"

namespace thinkv::client {
namespace {

using enum ErrorCode;
using Place = GpuMemory::Place;

constexpr uint64_t kListPagesMax = 0xFFFF'FFFFu;
constexpr uint32_t kTokensMaxDefault = 8192;
constexpr uint32_t kTokensPerPage = 32;  // of 4-bit pages
constexpr uint32_t kSparePages = 8;      // of a lane: buffer, partly filled pages of other formats

// One word of what the GPU writes while we read.
uint64_t load(const uint64_t& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}
uint32_t load(const uint32_t& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

bool writes_any_blocks(const PolicyParams& policy) {
  bool any = false;
  for (uint32_t i = 0; i < policy.rule_count; ++i) any = any || writes_blocks(policy.rules[i]);
  return any;
}

bool emits(const PolicyParams& policy) {
  return cuda::keeps_scores(policy) || policy.label_layer_count > 0;
}

const char* fault_text(uint32_t faults) {
  if ((faults & cuda::kLeaseEmpty) != 0) return "a step ran that was not reserved: tokens are lost";
  if ((faults & cuda::kListFull) != 0) {
    return "a batch's page list was too small: attention missed tokens (raise tokens_max)";
  }
  if ((faults & cuda::kRowsFull) != 0) {
    return "rank rules had no memory for a lane's tokens or keys";
  }
  if ((faults & cuda::kBadMetadata) != 0) return "the metadata of a sequence is damaged";
  return "the page lease on the GPU overflowed";
}

}  // namespace

Result<std::unique_ptr<GpuBatch>> GpuBatch::open(GpuEngine& engine, const Options& options) {
  if (options.capacity == 0 || options.capacity > limits::kBatchMax) {
    return describe(kInvalidArgument, "a batch has 1 to %u rows, not %u", limits::kBatchMax,
                    options.capacity);
  }
  std::unique_ptr<GpuBatch> batch(new GpuBatch(engine, options));
  if (options.tokens_max == 0) batch->options_.tokens_max = kTokensMaxDefault;
  THINKV_TRY(batch->make_memory());
  return batch;
}

Status GpuBatch::make_memory() {
  const ModelGeometry& g = engine_->geometry();
  const KernelTable& kernels = engine_->kernels();
  const cuda::Gpu& gpu = engine_->gpu();
  lanes_ = options_.capacity * g.kv_heads;
  rows_.assign(options_.capacity, nullptr);
  joined_at_.assign(options_.capacity, 0);
  const uint64_t lane_pages = options_.tokens_max / kTokensPerPage + kSparePages;
  if (lanes_ * lane_pages > kListPagesMax) {
    return make_error(kInvalidArgument, "tokens_max is too large");
  }
  list_pages_ = static_cast<uint32_t>(lanes_ * lane_pages);
  softmax_scale_ = softmax_scale_of(g);
  // The larger of the two shapes: use_policy() chooses.
  shape_ = kernels.attend_shape(engine_->multiprocessors(), lanes_, g.head_dim, true);
  const auto device = [&](GpuMemory& memory, uint64_t bytes) -> Status {
    THINKV_ASSIGN_OR_RETURN(memory, GpuMemory::make(gpu, Place::kDevice, bytes, "a batch"));
    return {};
  };
  THINKV_TRY(device(roots_, options_.capacity * sizeof(uint32_t)));
  THINKV_TRY(device(positions_, options_.capacity * sizeof(uint32_t)));
  THINKV_TRY(device(emit_, uint64_t{g.layers} * options_.capacity));
  THINKV_TRY(device(lane_begin_, uint64_t{g.layers} * (lanes_ + 1) * sizeof(uint32_t)));
  THINKV_TRY(device(sites_, uint64_t{g.layers} * lanes_ * sizeof(cuda::TokenSite)));
  THINKV_TRY(device(sparsity_, uint64_t{g.layers} * lanes_ * sizeof(cuda::LaneSparsity)));
  THINKV_TRY(device(
      parts_, kernels.attend_part_floats(shape_, lanes_, g.group(), g.head_dim) * sizeof(float)));
  THINKV_ASSIGN_OR_RETURN(
      progress_, GpuMemory::make(gpu, Place::kPinnedHost, sizeof(cuda::Progress), "progress"));
  view_ = engine_->view();
  view_.roots = roots_.as<uint32_t>();
  view_.capacity = options_.capacity;
  view_.progress = progress_.as<cuda::Progress>();
  view_.positions = positions_.as<uint32_t>();
  view_.emit = emit_.as<uint8_t>();
  view_.lane_begin = lane_begin_.as<uint32_t>();
  view_.sites = sites_.as<cuda::TokenSite>();
  view_.sparsity = sparsity_.as<cuda::LaneSparsity>();
  THINKV_TRY(make_lists());
  return clear_rows();
}

// The working memory that grows with the pages of a layer's list.
Status GpuBatch::make_lists() {
  const cuda::Gpu& gpu = engine_->gpu();
  const uint64_t pages = uint64_t{engine_->geometry().layers} * list_pages_;
  THINKV_ASSIGN_OR_RETURN(GpuMemory lists,
                          GpuMemory::make(gpu, Place::kDevice, pages * sizeof(cuda::PageView),
                                          "the page lists of a batch"));
  THINKV_ASSIGN_OR_RETURN(
      GpuMemory score_rows,
      GpuMemory::make(gpu, Place::kDevice, pages * sizeof(uint16_t*), "the page lists of a batch"));
  if (emission_) {
    const uint64_t bytes =
        engine_->kernels().emit_scratch_bytes(list_pages_, engine_->geometry().group());
    THINKV_ASSIGN_OR_RETURN(emit_scratch_,
                            GpuMemory::make(gpu, Place::kDevice, bytes, "attention scores"));
  }
  if (streams_) THINKV_TRY(make_stream_pages());
  pages_ = std::move(lists);
  score_rows_ = std::move(score_rows);
  view_.pages_max = list_pages_;
  view_.pages = pages_.as<cuda::PageView>();
  view_.score_rows = score_rows_.as<uint16_t*>();
  return {};
}

// Room for lists of `pages` pages and half as many again: growing waits for the GPU.
Status GpuBatch::grow(uint64_t pages) {
  THINKV_TRY(engine_->refuse_capture("working memory cannot grow"));
  THINKV_TRY(engine_->synchronise());
  const uint32_t before = list_pages_;
  list_pages_ = static_cast<uint32_t>(std::min(pages + pages / 2, kListPagesMax));
  const Status made = make_lists();
  if (!made) list_pages_ = before;
  return made;
}

// No row has a sequence.
Status GpuBatch::clear_rows() {
  const cuda::Gpu& gpu = engine_->gpu();
  const cuda::ContextScope context(gpu);
  THINKV_TRY(context.status());
  THINKV_TRY(cuda::driver_status(
      gpu.driver(),
      gpu.driver().memset_d8_async(reinterpret_cast<cuda::DevicePointer>(view_.roots), 0xFF,
                                   roots_.bytes(), nullptr),
      "cuMemsetD8Async"));
  return cuda::driver_status(gpu.driver(), gpu.driver().stream_synchronize(nullptr),
                             "cuStreamSynchronize");
}

GpuBatch::~GpuBatch() {
  const auto lock = engine_->lock();
  for (GpuSequence* sequence : rows_) {
    if (sequence != nullptr) sequence->join(nullptr, 0);
  }
  static_cast<void>(engine_->synchronise());
  report_counters(0);
}

// What the kernels of one launch have in common.
Status GpuBatch::use_policy(const GpuSequence& sequence) {
  const uint8_t rotate = sequence.policy().rotate;
  if (rotate_ && *rotate_ != rotate) {
    return make_error(kInvalidArgument, "the policies of one batch must agree in rotation");
  }
  const bool blocks = writes_any_blocks(sequence.policy());
  if (blocks && !blocks_ && launched_) {
    return make_error(kInvalidArgument,
                      "this batch's steps were launched without reading token blocks, which this "
                      "sequence's policy has: open another batch for it");
  }
  THINKV_TRY(use_emission(sequence));
  THINKV_TRY(use_streams(sequence));
  blocks_ = blocks_ || blocks;
  if (!rotate_) {
    const Format usual = sequence.policy().thought_format[0];
    shape_ = engine_->kernels().attend_shape(engine_->multiprocessors(), lanes_,
                                             engine_->geometry().head_dim,
                                             format_info(usual).v.bits == 2);
  }
  rotate_ = rotate;
  const bool centred = sequence.policy().centre != 0;
  if (centred && !centred_ && lse_read_) {
    return make_error(kInvalidArgument,
                      "this batch's steps were launched with an lse that knows no centred keys, "
                      "which this sequence's policy has: open another batch for it");
  }
  centred_ = centred_ || centred;
  return {};
}

Status GpuBatch::use_emission(const GpuSequence& sequence) {
  const PolicyParams& policy = sequence.policy();
  if (!emits(policy) && !sequence.traced()) return {};
  const bool more =
      !emission_ || (cuda::keeps_scores(policy) && !scored_) || (sequence.traced() && !traced_);
  if (more && launched_) {
    return make_error(kInvalidArgument,
                      "this batch's steps were launched without measuring attention as this "
                      "sequence's policy does: open another batch for it");
  }
  if (!emission_) {
    const uint64_t bytes =
        engine_->kernels().emit_scratch_bytes(list_pages_, engine_->geometry().group());
    THINKV_ASSIGN_OR_RETURN(
        emit_scratch_, GpuMemory::make(engine_->gpu(), Place::kDevice, bytes, "attention scores"));
    emission_ = true;
    near_zero_ = policy.near_zero;
    score_reduce_ = policy.score_reduce;
    label_layers_.assign(engine_->geometry().layers, 0);
  }
  if (near_zero_ != policy.near_zero || score_reduce_ != policy.score_reduce) {
    return make_error(kInvalidArgument,
                      "the policies of one batch must agree in near_zero and scores.reduce");
  }
  scored_ = scored_ || cuda::keeps_scores(policy);
  traced_ = traced_ || sequence.traced();
  for (uint32_t i = 0; i < policy.label_layer_count; ++i) label_layers_[policy.label_layers[i]] = 1;
  return {};
}

Status GpuBatch::set(uint32_t row, GpuSequence* sequence) {
  if (row >= rows_.size()) {
    return describe(kInvalidArgument, "row %u of a batch with %zu rows", row, rows_.size());
  }
  if (sequence == rows_[row]) return {};
  if (sequence != nullptr && (sequence->batch() != nullptr || sequence->in_prompt())) {
    return make_error(kInvalidArgument, sequence->in_prompt()
                                            ? "the prompt of the sequence was not ended"
                                            : "the sequence is in a batch already");
  }
  if (sequence != nullptr && rows_[row] != nullptr) {
    return describe(kInvalidArgument, "row %u is taken: let its sequence leave first", row);
  }
  const auto lock = engine_->lock();
  THINKV_TRY(engine_->refuse_capture("a sequence cannot join or leave"));
  if (sequence != nullptr) THINKV_TRY(use_policy(*sequence));
  if (sequence != nullptr) THINKV_TRY(use_tier(*sequence));
  const uint32_t root = sequence == nullptr ? PageId::kNoneRaw : sequence->root().raw();
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(context.status());
  if (view_.tiers != nullptr) {
    THINKV_TRY(tier_memory_.set(*engine_, row, sequence == nullptr ? nullptr : sequence->tier()));
  }
  // By value in the command: a copy from host memory could be read after the next change.
  const cuda::Driver& driver = engine_->gpu().driver();
  THINKV_TRY(cuda::driver_status(
      driver,
      driver.memset_d32_async(reinterpret_cast<cuda::DevicePointer>(view_.roots + row), root, 1,
                              engine_->stream()),
      "cuMemsetD32Async"));
  if (rows_[row] != nullptr) rows_[row]->join(nullptr, 0);
  rows_[row] = sequence;
  joined_at_[row] = reserved_steps_;
  if (sequence != nullptr) sequence->join(this, row);
  return {};
}

Status GpuBatch::poll() {
  const auto& progress = *progress_.as<cuda::Progress>();
  const uint64_t steps = load(progress.steps);
  if (const uint32_t faults = load(progress.faults); faults != 0) {
    return describe(kInternal, "the GPU reported a fault (0x%x): %s", faults, fault_text(faults));
  }
  if (steps == reported_steps_) return {};
  if (steps > reserved_steps_) {
    return describe(kInvalidArgument, "%llu steps ran and %llu were reserved",
                    static_cast<unsigned long long>(steps),
                    static_cast<unsigned long long>(reserved_steps_));
  }
  reported_steps_ = steps;
  uint64_t promised = 0;
  bool known = false;
  for (; !history_.empty() && history_.front().steps <= steps; history_.pop_front()) {
    promised = history_.front().promised;
    known = true;
  }
  if (known) engine_->report(load(progress.used_total), promised);
  if (steps < reserved_steps_) return {};  // the steps under way can still add pages
  const uint32_t bound = load(progress.lane_pages_max) + GpuSequence::kLanePagesPerFlush;
  for (size_t row = 0; row < rows_.size(); ++row) {
    // What joined after the step that was reported is not in its numbers.
    if (rows_[row] != nullptr && joined_at_[row] < steps) rows_[row]->bound_lane_pages(bound);
  }
  return {};
}

// What the rows can take in their next `steps` steps, and what attention will have to list.
Result<GpuBatch::StepPages> GpuBatch::pages_of_steps(uint32_t steps) const {
  StepPages pages{};
  const uint64_t heads = engine_->geometry().kv_heads;
  for (const GpuSequence* sequence : rows_) {
    if (sequence == nullptr) continue;
    uint32_t lane_pages = sequence->lane_pages();
    for (uint32_t i = 0; i < steps; ++i) {
      const uint32_t step = sequence->step_pages(i, lane_pages);
      lane_pages += sequence->lane_pages_of(step);
      pages.taken += step;
    }
    const uint32_t limit =
        engine_->kernels().lane_pages_limit(engine_->geometry(), sequence->policy());
    if (lane_pages > limit) {
      return describe(kUnsupported,
                      "a lane cannot hold more than %u pages: evict or use fewer bits", limit);
    }
    const uint64_t tokens =
        uint64_t{sequence->prompt_tokens()} + sequence->generated_tokens() + steps;
    const uint64_t coded = sequence->coded_tokens(tokens);
    if (coded > cuda::stream_tokens_max(engine_->geometry().head_dim)) {
      return make_error(kUnsupported, "a lane cannot hold more coded blocks");
    }
    const GpuTier* const tier = sequence->tier();
    const uint32_t working = tier == nullptr ? 0 : GpuTierMemory::working_pages(tier->fetched());
    pages.listed += heads * (lane_pages + 2 + working + coded / cuda::kBufferPageSlots);
    pages.ranked = pages.ranked.and_of(
        engine_->kernels().rank_need(engine_->geometry(), sequence->policy(), lane_pages, tokens));
  }
  return pages;
}

// The same, once the lists have room for it. Errors: kInvalidArgument (tokens_max), kExhausted.
Result<GpuBatch::StepPages> GpuBatch::make_room(uint32_t steps) {
  Result<StepPages> pages = pages_of_steps(steps);
  if ((!pages || pages->listed > list_pages_) && !history_.empty()) {
    // The bound may be far above what the GPU holds: ask it.
    THINKV_TRY(engine_->refuse_capture("pages cannot be reserved"));
    THINKV_TRY(engine_->synchronise());
    THINKV_TRY(poll());
    pages = pages_of_steps(steps);
  }
  if (!pages || pages->listed <= list_pages_) return pages;
  if (options_.grows && pages->listed <= kListPagesMax) {
    THINKV_TRY(grow(pages->listed));
    return pages;
  }
  return describe(kInvalidArgument,
                  "the batch was opened for %u live tokens a lane, its sequences may hold more: "
                  "raise tokens_max (a 16-bit page holds a quarter of the tokens)",
                  options_.tokens_max);
}

Status GpuBatch::reserve(uint32_t steps) {
  if (steps == 0) return {};
  const auto lock = engine_->lock();
  THINKV_TRY(poll());
  THINKV_ASSIGN_OR_RETURN(const StepPages pages, make_room(steps));
  THINKV_TRY(engine_->make_rank_memory(pages.ranked));
  THINKV_TRY(engine_->promise(pages.taken));
  for (GpuSequence* sequence : rows_) {
    if (sequence != nullptr) sequence->count_steps(steps);
  }
  reserved_steps_ += steps;
  history_.push_back({steps, reserved_steps_, engine_->promised(), pages.taken});
  report_counters(steps);
  return {};
}

Status GpuBatch::unreserve() {
  const auto lock = engine_->lock();
  THINKV_TRY(poll());
  if (history_.empty() || history_.back().steps != reserved_steps_ ||
      history_.back().count > reserved_steps_ - reported_steps_) {
    return make_error(kInvalidArgument, "there is no reserved step that was not run");
  }
  const Reserved last = history_.back();
  history_.pop_back();
  reserved_steps_ -= last.count;
  engine_->take_back(last.pages);
  for (GpuSequence* sequence : rows_) {
    if (sequence != nullptr) sequence->uncount_steps(last.count);
  }
  CounterDelta delta{};
  const uint64_t tokens = uint64_t{last.count} * row_count();
  delta.tokens = delta.steps = 0 - tokens;
  delta.f16_bytes = 0 - tokens * engine_->geometry().token_bytes_f16();
  engine_->session().add_counters(delta);
  return {};
}

uint64_t GpuBatch::row_count() const {
  return static_cast<uint64_t>(
      std::count_if(rows_.begin(), rows_.end(), [](auto* row) { return row != nullptr; }));
}

// What the daemon shows of this client: numbers of the last step that the GPU reported.
void GpuBatch::report_counters(uint32_t steps) {
  CounterDelta delta{};
  const uint64_t rows = row_count();
  const ModelGeometry& geometry = engine_->geometry();
  delta.tokens = delta.steps = steps * rows;
  delta.f16_bytes = steps * rows * geometry.token_bytes_f16();
  const bool closing = steps == 0;
  const uint64_t live = closing ? 0 : live_slots();
  const uint64_t held = closing ? 0 : engine_->used_pages() * page_bytes(geometry.head_dim);
  delta.live_slots = live - reported_live_;
  delta.held_bytes = held - reported_held_;
  reported_live_ = live;
  reported_held_ = held;
  engine_->session().add_counters(delta);
}

uint64_t GpuBatch::live_slots() const {
  return load(progress_.as<cuda::Progress>()->live_slots);
}

Status GpuBatch::begin() {
  const cuda::ContextScope context(engine_->gpu());
  launched_ = true;
  return GpuEngine::launched(engine_->kernels().begin(view_, engine_->stream()), "begin");
}

Status GpuBatch::require_layer(uint32_t layer) const {
  if (layer < engine_->geometry().layers) return {};
  return describe(kInvalidArgument, "layer %u of a model with %u layers", layer,
                  engine_->geometry().layers);
}

Status GpuBatch::append(uint32_t layer, const void* k, const void* v, cuda::Element element) {
  THINKV_TRY(require_layer(layer));
  const cuda::ContextScope context(engine_->gpu());
  return GpuEngine::launched(
      engine_->kernels().append(view_, layer, k, v, element, engine_->stream()), "append");
}

Status GpuBatch::attend(uint32_t layer, const Attend& io) {
  THINKV_TRY(require_layer(layer));
  const ModelGeometry& g = engine_->geometry();
  const bool measured = emission_ && (scored_ || traced_ || label_layers_[layer] != 0);
  if (io.measure_only && !measured) return {};
  const bool emits_here = measured && !io.silent;
  cuda::AttendParams p{};
  p.pages = view_.pages + size_t{layer} * view_.pages_max;
  p.lane_begin = view_.lane_begin + size_t{layer} * (lanes_ + 1);
  p.q = io.q;
  p.out = io.out;
  p.lse = io.lse;
  p.parts = parts_.as<float>();
  p.lanes = lanes_;
  p.group = g.group();
  p.kv_heads = g.kv_heads;
  p.head_dim = g.head_dim;
  p.softmax_scale = softmax_scale_;
  p.q_element = io.q_element;
  p.out_element = io.out_element;
  p.rotate = rotate_.value_or(0) != 0;
  p.blocks = blocks_;
  p.window = io.window;
  p.sinks = io.sinks;
  p.query_position = view_.positions;
  if (emits_here) {
    p.emit = view_.emit + size_t{layer} * options_.capacity;
    p.score_rows = scored_ ? view_.score_rows + size_t{layer} * view_.pages_max : nullptr;
    p.sparsity = view_.sparsity + size_t{layer} * lanes_;
    p.emit_scratch = emit_scratch_.as<void>();
    p.near_zero = near_zero_;
    p.score_reduce = score_reduce_;
  }
  const cuda::ContextScope context(engine_->gpu());
  THINKV_TRY(fetch(layer, io));
  THINKV_TRY(read_streams(layer));
  THINKV_TRY(
      GpuEngine::launched(engine_->kernels().attend(p, shape_, engine_->stream()), "attend"));
  if (io.lse == nullptr) return {};
  lse_read_ = true;
  if (!centred_) return {};
  return GpuEngine::launched(
      engine_->kernels().centred_lse(view_, layer, io.q, io.q_element, io.lse, engine_->stream()),
      "centred_lse");
}

Status GpuBatch::end() {
  const cuda::ContextScope context(engine_->gpu());
  return GpuEngine::launched(engine_->kernels().end(view_, engine_->stream()), "end");
}

}  // namespace thinkv::client
