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

Result<std::unique_ptr<SequenceObject>> make_sequence(Model& model,
                                                      const SequenceOpenOptions& options) {
  Session& session = *model.client->session;
  THINKV_ASSIGN_OR_RETURN(const PolicyEntry policy, session.policy(options.policy));
  auto object = std::make_unique<SequenceObject>();
  object->model = &model;
  THINKV_ASSIGN_OR_RETURN(object->id,
                          session.open_sequence(model.id, policy.id, options.budget_tokens));
  object->source = session.make_source(page_class(model.geometry.head_dim));
  Result<kernels::Sequence> sequence = kernels::Sequence::create(
      *object->source, kernels::host(), model.geometry, policy.params,
      {.budget_tokens = options.budget_tokens, .trace_sparsity = options.trace_sparsity});
  if (!sequence) {
    // A copy of the text: closing may describe an error of its own into this thread's buffer.
    const ErrorCode code = sequence.error().code;
    const std::string text = sequence.error().what;
    session.close_sequence(object->id);
    return describe(code, "%s", text.c_str());
  }
  object->sequence.emplace(std::move(sequence).value());
  object->source->settle();
  return object;
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

void SequenceObject::report() {
  const kernels::SequenceStats now = sequence->stats();
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
  model->client->session->add_counters(delta);
  reported = now;
  live_tokens = now.live_slots / model->geometry.lanes();
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
  THINKV_ASSIGN_OR_RETURN(model->id, client->session->register_model(geometry, name));
  return publish(HandleKind::kModel, std::move(model), client->models);
}

void close_model(Handle handle) {
  auto* model = static_cast<Model*>(table().begin_close(handle, HandleKind::kModel));
  if (model == nullptr) return;
  for (const Handle step : model->steps.all()) close_step(step);
  for (const Handle sequence : model->sequences.all()) close_sequence(sequence);
  model->client->models.remove(handle);
  delete model;
  table().end_close(handle);
}

Result<Handle> open_sequence(Handle model_handle, const SequenceOpenOptions& options) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Model> model,
                          Pinned<Model>::get(model_handle, HandleKind::kModel, Use::kShared));
  THINKV_ASSIGN_OR_RETURN(std::unique_ptr<SequenceObject> object, make_sequence(*model, options));
  object->report();
  return publish(HandleKind::kSequence, std::move(object), model->sequences);
}

void close_sequence(Handle handle) {
  auto* object = static_cast<SequenceObject*>(table().begin_close(handle, HandleKind::kSequence));
  if (object == nullptr) return;
  // A step without one of its sequences has no meaning: it ends with it.
  if (const Handle step = object->step.load(std::memory_order_acquire); step != 0) {
    close_step(step);
  }
  object->sequence->release();
  object->source->settle();
  // What was done stays counted; what is held does not.
  CounterDelta gone{};
  gone.live_slots = 0 - object->reported.live_slots;
  gone.held_bytes = 0 - object->reported.bytes_held;
  gone.f16_bytes = 0 - object->reported.bytes_f16;
  Session& session = *object->model->client->session;
  session.add_counters(gone);
  session.close_sequence(object->id);
  object->model->sequences.remove(handle);
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
