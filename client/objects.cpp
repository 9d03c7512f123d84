#include "client/objects.h"

#include <algorithm>
#include <utility>

#include "client/error_text.h"
#include "kernels/kernels.h"

namespace thinkv::client {
namespace {

HandleTable& table() {
  return HandleTable::instance();
}

// The generations of the table make the handle; the object wants to know it.
template <class Object>
Result<Handle> publish(HandleKind kind, std::unique_ptr<Object> object, Children& siblings) {
  THINKV_ASSIGN_OR_RETURN(const Handle handle, table().add(kind, object.get()));
  object.release()->handle = handle;
  siblings.add(handle);
  return handle;
}

Status make_on_host(SequenceObject& object, const PolicyParams& policy,
                    const SequenceOpenOptions& options) {
  const Model& model = *object.model;
  object.source = model.client->session->make_source(page_class(model.geometry.head_dim));
  THINKV_ASSIGN_OR_RETURN(
      kernels::Sequence sequence,
      kernels::Sequence::create(
          *object.source, kernels::host(), model.geometry, policy,
          {.budget_tokens = options.budget_tokens, .trace_sparsity = options.trace_sparsity}));
  object.sequence.emplace(std::move(sequence));
  object.source->settle();
  return {};
}

Status make_on_gpu(SequenceObject& object, const PolicyParams& policy,
                   const SequenceOpenOptions& options) {
  THINKV_ASSIGN_OR_RETURN(object.gpu,
                          GpuSequence::open(*object.model->gpu, policy,
                                            {.budget_tokens = options.budget_tokens,
                                             .trace_sparsity = options.trace_sparsity}));
  return {};
}

// The numbers of a sequence on the GPU in the words of one on the host.
kernels::SequenceStats to_stats(const cuda::SequenceNumbers& n, uint64_t page_size,
                                uint64_t token_bytes_f16) {
  kernels::SequenceStats stats;
  stats.tokens = n.tokens;
  stats.prompt_tokens = n.prompt_tokens;
  stats.live_slots = n.live_slots;
  stats.live_tokens_max = n.live_tokens_max;
  stats.pages = n.data_pages;
  stats.metadata_pages = n.metadata_pages;
  stats.page_bytes = page_size;
  stats.metadata_bytes = n.metadata_pages * page_size;
  stats.bytes_held = (n.data_pages + n.metadata_pages) * page_size;
  stats.bytes_f16 = n.tokens * token_bytes_f16;
  stats.evicted_slots = n.evicted_slots;
  stats.reused_slots = n.reused_slots;
  stats.recoded_slots = n.recoded_slots;
  stats.recoded_bytes = n.recoded_bytes;
  stats.demotions = n.demotions;
  stats.merges = n.merges;
  stats.over_budget_steps = n.over_budget_steps;
  stats.gathered_bytes = n.gathered_bytes;
  stats.refreshes = n.refreshes;
  stats.steps = n.steps;
  std::copy_n(n.segments, kThoughtCount, stats.segments);
  stats.budget_tokens = n.budget_tokens;
  return stats;
}

// The daemon forgets a sequence that could not be made.
Error close_failed(Session& session, uint64_t id, const Error& error) {
  // A copy of the text: closing may describe an error of its own into this thread's buffer.
  const ErrorCode code = error.code;
  const std::string text = error.what;
  session.close_sequence(id);
  return describe(code, "%s", text.c_str());
}

Result<std::unique_ptr<SequenceObject>> make_sequence(Model& model,
                                                      const SequenceOpenOptions& options) {
  Session& session = *model.client->session;
  THINKV_ASSIGN_OR_RETURN(const PolicyEntry policy, session.policy(options.policy));
  auto object = std::make_unique<SequenceObject>();
  object->model = &model;
  object->budget_tokens = options.budget_tokens;
  THINKV_ASSIGN_OR_RETURN(object->id,
                          session.open_sequence(model.id, policy.id, options.budget_tokens));
  const Status made = model.gpu ? make_on_gpu(*object, policy.params, options)
                                : make_on_host(*object, policy.params, options);
  if (made) return object;
  return close_failed(session, object->id, made.error());
}

}  // namespace

void Children::add(Handle handle) {
  const std::lock_guard lock(mutex_);
  handles_.push_back(handle);
}

void Children::remove(Handle handle) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find(handles_.begin(), handles_.end(), handle);
  if (found == handles_.end()) return;
  *found = handles_.back();
  handles_.pop_back();
}

std::vector<Handle> Children::all() const {
  const std::lock_guard lock(mutex_);
  return handles_;
}

Result<kernels::SequenceStats> SequenceObject::stats() {
  if (!gpu) return sequence->stats();
  THINKV_ASSIGN_OR_RETURN(const cuda::SequenceNumbers numbers, gpu->numbers());
  kernels::SequenceStats stats =
      to_stats(numbers, page_bytes(model->geometry.head_dim), model->geometry.token_bytes_f16());
  if (gpu->tier() != nullptr) stats.tier_bytes = gpu->tier()->bytes();
  return stats;
}

// On the GPU the batch counts what every step changes: a sequence adds what only it knows.
Status SequenceObject::report() {
  THINKV_ASSIGN_OR_RETURN(const kernels::SequenceStats now, stats());
  CounterDelta delta{.tokens = now.tokens - reported.tokens,
                     .live_slots = now.live_slots - reported.live_slots,
                     .evicted_slots = now.evicted_slots - reported.evicted_slots,
                     .reused_slots = now.reused_slots - reported.reused_slots,
                     .steps = now.steps - reported.steps,
                     .demotions = now.demotions - reported.demotions,
                     .over_budget_steps = now.over_budget_steps - reported.over_budget_steps,
                     .thoughts = {},
                     .held_bytes = now.bytes_held - reported.bytes_held,
                     .f16_bytes = now.bytes_f16 - reported.bytes_f16};
  for (uint32_t i = 0; i < kThoughtCount; ++i) {
    delta.thoughts[i] = now.segments[i] - reported.segments[i];
  }
  if (gpu) delta.tokens = delta.live_slots = delta.steps = delta.held_bytes = delta.f16_bytes = 0;
  model->client->session->add_counters(delta);
  reported = now;
  live_tokens = now.live_slots / model->geometry.lanes();
  return {};
}

Result<Handle> open_client(const SessionOptions& options, uint32_t threads) {
  THINKV_ASSIGN_OR_RETURN(std::unique_ptr<Session> session, Session::open(options));
  auto client = std::make_unique<Client>(std::move(session), threads);
  THINKV_ASSIGN_OR_RETURN(const Handle handle, table().add(HandleKind::kClient, client.get()));
  static_cast<void>(client.release());  // the table's, until close_client
  return handle;
}

void close_client(Handle handle) {
  auto* client = static_cast<Client*>(table().begin_close(handle, HandleKind::kClient));
  if (client == nullptr) return;
  for (const Handle model : client->models.all()) close_model(model);
  delete client;
  table().end_close(handle);
}

Result<Handle> open_model(Handle client_handle, const ModelGeometry& geometry,
                          const std::string& name) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Client> client,
                          Pinned<Client>::get(client_handle, HandleKind::kClient, Use::kShared));
  THINKV_TRY(validate(geometry));
  auto model = std::make_unique<Model>();
  model->client = &*client;
  model->geometry = geometry;
  if (client->session->device_window() != nullptr) {
    THINKV_ASSIGN_OR_RETURN(model->gpu, GpuEngine::open(*client->session, geometry));
  }
  THINKV_ASSIGN_OR_RETURN(model->id, client->session->register_model(geometry, name));
  return publish(HandleKind::kModel, std::move(model), client->models);
}

void close_model(Handle handle) {
  auto* model = static_cast<Model*>(table().begin_close(handle, HandleKind::kModel));
  if (model == nullptr) return;
  for (const Handle step : model->steps.all()) close_step(step);
  for (const Handle batch : model->batches.all()) close_batch(batch);
  for (const Handle sequence : model->sequences.all()) close_sequence(sequence);
  model->client->models.remove(handle);
  delete model;
  table().end_close(handle);
}

Result<Handle> open_sequence(Handle model_handle, const SequenceOpenOptions& options) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Model> model,
                          Pinned<Model>::get(model_handle, HandleKind::kModel, Use::kShared));
  THINKV_ASSIGN_OR_RETURN(std::unique_ptr<SequenceObject> object, make_sequence(*model, options));
  if (!object->gpu) static_cast<void>(object->report());  // the GPU's numbers come with its steps
  return publish(HandleKind::kSequence, std::move(object), model->sequences);
}

Result<Handle> copy_sequence(SequenceObject& source) {
  Model& model = *source.model;
  if (!source.gpu) {
    return make_error(ErrorCode::kUnsupported, "sequences are copied on the cuda backend only");
  }
  Session& session = *model.client->session;
  THINKV_ASSIGN_OR_RETURN(const PolicyEntry policy, session.policy(source.gpu->policy().name));
  auto object = std::make_unique<SequenceObject>();
  object->model = &model;
  object->budget_tokens = source.budget_tokens;
  THINKV_ASSIGN_OR_RETURN(object->id,
                          session.open_sequence(model.id, policy.id, source.budget_tokens));
  Result<std::unique_ptr<GpuSequence>> copied = source.gpu->copy();
  if (!copied) return close_failed(session, object->id, copied.error());
  object->gpu = std::move(copied).value();
  // Counted as its close takes it away; the rest comes with the numbers of its steps.
  const uint64_t tokens = object->gpu->prompt_tokens() + object->gpu->generated_tokens();
  CounterDelta delta{};
  delta.f16_bytes = tokens * model.geometry.token_bytes_f16();
  session.add_counters(delta);
  THINKV_ASSIGN_OR_RETURN(object->reported, object->stats());
  return publish(HandleKind::kSequence, std::move(object), model.sequences);
}

void close_sequence(Handle handle) {
  auto* object = static_cast<SequenceObject*>(table().begin_close(handle, HandleKind::kSequence));
  if (object == nullptr) return;
  // A step without one of its sequences has no meaning: it ends with it.
  if (const Handle step = object->step.load(std::memory_order_acquire); step != 0) {
    close_step(step);
  }
  CounterDelta gone{};
  if (object->gpu) {
    static_cast<void>(object->report());  // last numbers; a broken GPU has none
    const uint64_t tokens = object->gpu->prompt_tokens() + object->gpu->generated_tokens();
    gone.f16_bytes = 0 - tokens * object->model->geometry.token_bytes_f16();
    object->gpu.reset();
  } else {
    object->sequence->release();
    object->source->settle();
    gone.live_slots = 0 - object->reported.live_slots;
    gone.held_bytes = 0 - object->reported.bytes_held;
    gone.f16_bytes = 0 - object->reported.bytes_f16;
  }
  // What was done stays counted; what is held does not.
  Session& session = *object->model->client->session;
  session.add_counters(gone);
  session.close_sequence(object->id);
  object->model->sequences.remove(handle);
  delete object;
  table().end_close(handle);
}

Result<Handle> open_batch(Handle model_handle, const GpuBatch::Options& options) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Model> model,
                          Pinned<Model>::get(model_handle, HandleKind::kModel, Use::kShared));
  if (!model->gpu) {
    return make_error(
        ErrorCode::kUnsupported,
        "batches are for the cuda backend; on the host backend use thinkv_step_begin");
  }
  auto object = std::make_unique<BatchObject>();
  object->model = &*model;
  THINKV_ASSIGN_OR_RETURN(object->batch, GpuBatch::open(*model->gpu, options));
  return publish(HandleKind::kBatch, std::move(object), model->batches);
}

void close_batch(Handle handle) {
  auto* object = static_cast<BatchObject*>(table().begin_close(handle, HandleKind::kBatch));
  if (object == nullptr) return;
  object->batch.reset();
  object->model->batches.remove(handle);
  delete object;
  table().end_close(handle);
}

Result<SequencePin> SequencePin::get(Handle handle) {
  THINKV_ASSIGN_OR_RETURN(
      Pinned<SequenceObject> sequence,
      Pinned<SequenceObject>::get(handle, HandleKind::kSequence, Use::kExclusive));
  const Handle step = sequence->step.load(std::memory_order_acquire);
  if (step == 0) return SequencePin(std::move(sequence), std::nullopt);
  Result<Pinned<StepObject>> pinned =
      Pinned<StepObject>::get(step, HandleKind::kStep, Use::kExclusive);
  if (pinned) return SequencePin(std::move(sequence), std::move(pinned).value());
  // The step ended just now, and no other can take the sequence while it is pinned here.
  if (pinned.error().code == ErrorCode::kStale &&
      sequence->step.load(std::memory_order_acquire) != step) {
    return SequencePin(std::move(sequence), std::nullopt);
  }
  return describe(ErrorCode::kInvalidArgument,
                  "the step of this sequence is in use by another call");
}

}  // namespace thinkv::client
