// step.cpp: a decode step over a batch: begin, append, attend, end.
#include <algorithm>
#include <atomic>

#include "client/error_text.h"
#include "client/objects.h"

namespace thinkv::client {
namespace {

HandleTable& table() {
  return HandleTable::instance();
}

// Multiply-adds below which waking the workers costs more than they save.
constexpr uint64_t kParallelWorkMin = 1'500'000;

template <class Fn>
void for_each_index(kernels::ThreadPool& pool, uint32_t count, uint64_t work, Fn&& fn) {
  if (work >= kParallelWorkMin && count > 1 && pool.threads() > 1) {
    pool.parallel_for(count, fn);
    return;
  }
  for (uint32_t i = 0; i < count; ++i) fn(i);
}

// The first error of a loop whose turns may run on several threads.
class FirstError {
 public:
  void take(const Status& status) {
    if (status) return;
    bool expected = false;
    if (any_.compare_exchange_strong(expected, true)) error_ = status.error();
  }
  // Requires: the loop is over.
  [[nodiscard]] Status get() const { return any_.load() ? Status(error_) : Status(); }

 private:
  std::atomic<bool> any_{false};
  Error error_{};
};

using PinnedSequences = std::vector<Pinned<SequenceObject>>;

Result<PinnedSequences> pin_all(const Model& model, std::span<const Handle> handles) {
  PinnedSequences pins;
  pins.reserve(handles.size());
  for (size_t i = 0; i < handles.size(); ++i) {
    // A sequence that is given twice is found here: it is in use by its first mention.
    Result<Pinned<SequenceObject>> pin =
        Pinned<SequenceObject>::get(handles[i], HandleKind::kSequence, Use::kExclusive);
    if (!pin) return describe(pin.error().code, "sequences[%zu]: %s", i, pin.error().what);
    if (pin.value()->model != &model) {
      return describe(ErrorCode::kInvalidArgument, "sequences[%zu] is of another model", i);
    }
    if (pin.value()->step.load(std::memory_order_acquire) != 0) {
      return describe(ErrorCode::kInvalidArgument, "sequences[%zu] is in another step", i);
    }
    pins.push_back(std::move(pin).value());
  }
  return pins;
}

// All sequences or none: what has begun is cancelled when a later one fails.
Status begin_all(std::span<SequenceObject* const> sequences) {
  for (size_t i = 0; i < sequences.size(); ++i) {
    Status begun = sequences[i]->sequence->begin_step();
    if (begun) continue;
    const Error error = describe(begun.error().code, "sequences[%zu]: %s", i, begun.error().what);
    for (size_t done = 0; done < i; ++done) {
      sequences[done]->sequence->cancel_step();
      sequences[done]->source->settle();
    }
    sequences[i]->source->settle();
    return error;
  }
  return {};
}

}  // namespace

Result<Handle> begin_step(Handle model_handle, std::span<const Handle> handles) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Model> model,
                          Pinned<Model>::get(model_handle, HandleKind::kModel, Use::kShared));
  if (model->gpu) {
    return make_error(ErrorCode::kUnsupported,
                      "steps are for the host backend; on the cuda backend use thinkv_batch_open");
  }
  if (handles.empty() || handles.size() > limits::kBatchMax) {
    return describe(ErrorCode::kInvalidArgument, "a step takes 1 to %u sequences, not %zu",
                    limits::kBatchMax, handles.size());
  }
  THINKV_ASSIGN_OR_RETURN(const PinnedSequences pins, pin_all(*model, handles));
  auto step = std::make_unique<StepObject>();
  step->model = &*model;
  step->appended.assign(model->geometry.layers, 0);
  for (const Pinned<SequenceObject>& pin : pins) step->sequences.push_back(&*pin);
  THINKV_TRY(begin_all(step->sequences));
  Result<Handle> handle = table().add(HandleKind::kStep, step.get());
  if (!handle) {
    step->cancel();
    return handle;
  }
  step->handle = handle.value();
  for (SequenceObject* sequence : step->sequences) {
    sequence->step.store(step->handle, std::memory_order_release);
  }
  model->steps.add(step->handle);
  static_cast<void>(step.release());  // the table's, until it ends
  return handle;
}

Status StepObject::append(uint32_t layer, const float* k, const float* v) {
  if (layer >= appended.size()) {
    return describe(ErrorCode::kInvalidArgument, "layer %u of a model with %zu layers", layer,
                    appended.size());
  }
  if (appended[layer] != 0) {
    return describe(ErrorCode::kInvalidArgument, "layer %u was appended in this step already",
                    layer);
  }
  const size_t row = size_t{model->geometry.kv_heads} * model->geometry.head_dim;
  const auto batch = static_cast<uint32_t>(sequences.size());
  // A flush encodes 16 tokens a lane with a search over scales: far more than a copy.
  const uint64_t work = uint64_t{batch} * row * 64;
  FirstError failed;
  for_each_index(model->client->pool, batch, work, [&](uint32_t i) {
    failed.take(sequences[i]->sequence->append(layer, k + i * row, v + i * row));
  });
  THINKV_TRY(failed.get());
  appended[layer] = 1;
  return {};
}

Status StepObject::attend(uint32_t layer, const float* q, float* out, float* lse) {
  if (layer >= appended.size() || appended[layer] == 0) {
    return describe(ErrorCode::kInvalidArgument, "layer %u was not appended in this step", layer);
  }
  const ModelGeometry& geometry = model->geometry;
  const uint32_t group = geometry.group();
  const uint32_t heads = geometry.kv_heads;
  const size_t rows = size_t{group} * geometry.head_dim;
  uint64_t tokens = 0;
  for (const SequenceObject* object : sequences) tokens += object->live_tokens;
  const uint64_t work = tokens * heads * rows * 2;
  FirstError failed;
  const auto lanes = static_cast<uint32_t>(sequences.size()) * heads;
  for_each_index(model->client->pool, lanes, work, [&](uint32_t i) {
    static thread_local kernels::AttendScratch scratch;
    kernels::Sequence& sequence = *sequences[i / heads]->sequence;
    failed.take(sequence.attend_lane(layer, i % heads, q + i * rows, out + i * rows,
                                     lse == nullptr ? nullptr : lse + size_t{i} * group, scratch));
  });
  return failed.get();
}

Status StepObject::end() {
  for (size_t layer = 0; layer < appended.size(); ++layer) {
    if (appended[layer] != 0) continue;
    cancel();
    return describe(ErrorCode::kInvalidArgument,
                    "the step was cancelled: layer %zu was not appended", layer);
  }
  FirstError failed;
  // Most ends only count.
  uint64_t work = 0;
  for (const SequenceObject* object : sequences) {
    if (object->sequence->selects_at_end()) work += kParallelWorkMin;
  }
  for_each_index(model->client->pool, static_cast<uint32_t>(sequences.size()), work,
                 [&](uint32_t i) { failed.take(sequences[i]->sequence->end_step()); });
  for (SequenceObject* object : sequences) {
    object->sequence->cancel_step();  // nothing, unless its end failed
    object->source->settle();
    static_cast<void>(object->report());  // cannot fail on the host
  }
  dissolve();
  return failed.get();
}

void StepObject::cancel() {
  for (SequenceObject* object : sequences) {
    object->sequence->cancel_step();
    object->source->settle();
  }
  dissolve();
}

void StepObject::dissolve() {
  for (SequenceObject* object : sequences) object->step.store(0, std::memory_order_release);
  sequences.clear();
}

Status end_step(Handle handle) {
  {
    // Says null, stale, busy or forked in words; begin_close only says no.
    THINKV_ASSIGN_OR_RETURN(const Pinned<StepObject> pin,
                            Pinned<StepObject>::get(handle, HandleKind::kStep, Use::kExclusive));
  }
  auto* step = static_cast<StepObject*>(table().begin_close(handle, HandleKind::kStep));
  if (step == nullptr) return make_error(ErrorCode::kStale, "the step was closed");
  Status ended = step->end();
  step->model->steps.remove(handle);
  delete step;
  table().end_close(handle);
  return ended;
}

void close_step(Handle handle) {
  auto* step = static_cast<StepObject*>(table().begin_close(handle, HandleKind::kStep));
  if (step == nullptr) return;
  step->cancel();
  step->model->steps.remove(handle);
  delete step;
  table().end_close(handle);
}

}  // namespace thinkv::client
