// c_api.cpp: thinkv.h on top of the client's objects. The only file where an exception may arrive:
// nothing leaves through the C boundary but a status.
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "client/abi.h"
#include "client/abi_guard.h"
#include "client/gpu_calls.h"
#include "client/objects.h"
#include "client/tensor.h"
#include "thinkv/thinkv.h"
#include "thinkv/version.h"

namespace thinkv::client {
namespace {

std::string client_name(const char* given) {
  if (given != nullptr && given[0] != '\0') return given;
  const char* set = std::getenv("THINKV_CLIENT_NAME");
  return set != nullptr && set[0] != '\0' ? set : program_invocation_short_name;
}

std::string pool_name(const char* given) {
  if (given != nullptr && given[0] != '\0') return given;
  const char* set = std::getenv("THINKV_POOL");
  return set != nullptr ? set : "";
}

Result<Pinned<Client>> pin_client(thinkv_client* client) {
  return Pinned<Client>::get(to_handle(client), HandleKind::kClient, Use::kShared);
}
Result<Pinned<StepObject>> pin_step(thinkv_step* step) {
  return Pinned<StepObject>::get(to_handle(step), HandleKind::kStep, Use::kExclusive);
}

Status open_client_with(const thinkv_client_options* options, thinkv_client** client) {
  thinkv_client_options known = THINKV_CLIENT_OPTIONS_INIT;
  if (options != nullptr) {
    THINKV_TRY(read_options("client options", *options, offsetof(thinkv_client_options, timeout_ms),
                            known));
    THINKV_TRY(check_reserved("client options", known.reserved0));
    THINKV_TRY(check_reserved("client options", known.reserved));
  }
  if (known.threads > 1024) {
    return describe(ErrorCode::kInvalidArgument, "threads is %u, at most 1024", known.threads);
  }
  const uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
  const uint32_t threads = known.threads == 0 ? std::min(cores, 4u) : known.threads;
  const SessionOptions session{.socket_path = control_socket_path(known.socket_path),
                               .client_name = client_name(known.client_name),
                               .timeout = known.timeout_ms == 0
                                              ? std::chrono::milliseconds(10'000)
                                              : std::chrono::milliseconds(known.timeout_ms),
                               .pool = pool_name(known.pool_name)};
  return open_into(client, "client", [&] { return open_client(session, threads); });
}

Status pool_stats(thinkv_client* client, thinkv_pool_stats* stats) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Client> pin, pin_client(client));
  THINKV_ASSIGN_OR_RETURN(const PoolUse use, pin->session->pool_use());
  thinkv_pool_stats known{};
  std::snprintf(known.backend, sizeof(known.backend), "%s", pin->session->backend());
  std::snprintf(known.pool_name, sizeof(known.pool_name), "%s", pin->session->pool());
  known.pool_bytes = use.pool_bytes;
  known.pool_free_bytes = use.pool_free_bytes;
  known.tenant_used_bytes = use.tenant_used_bytes;
  known.tenant_limit_bytes = use.tenant_limit_bytes;
  known.client_granted_bytes = use.granted_bytes;
  known.client_leased_bytes = use.leased_bytes;
  return write_stats("pool stats", known, offsetof(thinkv_pool_stats, pool_name), stats);
}

Status open_model_with(thinkv_client* client, const thinkv_model_options* options,
                       thinkv_model** model) {
  if (options == nullptr) return null_argument("model options");
  thinkv_model_options known{};
  THINKV_TRY(
      read_options("model options", *options, offsetof(thinkv_model_options, value_type), known));
  THINKV_TRY(check_reserved("model options", known.reserved));
  THINKV_TRY(check_reserved("model options", known.reserved0));
  if (known.value_type != THINKV_FLOAT16 && known.value_type != THINKV_BFLOAT16) {
    return describe(ErrorCode::kInvalidArgument,
                    "value_type is %u, expected float16 (1) or bfloat16 (2)", known.value_type);
  }
  ModelGeometry geometry{
      .layers = known.layers,
      .q_heads = known.q_heads,
      .kv_heads = known.kv_heads,
      .head_dim = known.head_dim,
      .value_type = known.value_type == THINKV_FLOAT16 ? ValueType::kFp16 : ValueType::kBf16,
      .softmax_scale = known.softmax_scale};
  if (Status valid = validate(geometry); !valid) {
    return describe(valid.error().code, "%s (layers %u, q_heads %u, kv_heads %u, head_dim %u)",
                    valid.error().what, known.layers, known.q_heads, known.kv_heads,
                    known.head_dim);
  }
  const std::string name = known.model_name == nullptr ? "" : known.model_name;
  return open_into(model, "model", [&] { return open_model(to_handle(client), geometry, name); });
}

Status open_sequence_with(thinkv_model* model, const thinkv_sequence_options* options,
                          thinkv_sequence** sequence) {
  thinkv_sequence_options known = THINKV_SEQUENCE_OPTIONS_INIT;
  if (options != nullptr) {
    THINKV_TRY(read_options("sequence options", *options, offsetof(thinkv_sequence_options, flags),
                            known));
    THINKV_TRY(check_reserved("sequence options", known.reserved));
  }
  if ((known.flags & ~THINKV_SEQUENCE_TRACE_SPARSITY) != 0) {
    return describe(ErrorCode::kInvalidArgument, "sequence options: unknown flags 0x%x",
                    known.flags);
  }
  const SequenceOpenOptions open{
      .policy = known.policy_name == nullptr ? "thinkv" : known.policy_name,
      .budget_tokens = known.budget_tokens,
      .trace_sparsity = (known.flags & THINKV_SEQUENCE_TRACE_SPARSITY) != 0};
  if (open.policy.empty() || open.policy.size() >= kPolicyNameMax) {
    return describe(ErrorCode::kInvalidArgument, "a policy's name has 1 to %u bytes",
                    kPolicyNameMax - 1);
  }
  return open_into(sequence, "sequence", [&] { return open_sequence(to_handle(model), open); });
}

Status prefill(thinkv_sequence* sequence, uint32_t layer, const thinkv_tensor* k,
               const thinkv_tensor* v) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  const ModelGeometry& geometry = pin->model->geometry;
  if (k == nullptr) return null_argument("k");
  const int64_t tokens = k->ndim == 3 ? k->shape[0] : 1;
  if (tokens > int64_t{limits::kTokensMax}) {
    return describe(ErrorCode::kInvalidArgument, "k has %lld tokens, at most %u",
                    static_cast<long long>(tokens), limits::kTokensMax);
  }
  const int64_t k_shape[] = {kAny, geometry.kv_heads, geometry.head_dim};
  const int64_t v_shape[] = {tokens, geometry.kv_heads, geometry.head_dim};
  if (pin->gpu) return prefill_on_gpu(*pin->gpu, layer, *k, v, k_shape, v_shape);
  std::vector<float> k_rows;
  std::vector<float> v_rows;
  THINKV_ASSIGN_OR_RETURN(const float* k_data, input_rows("k", k, k_shape, k_rows));
  THINKV_ASSIGN_OR_RETURN(const float* v_data, input_rows("v", v, v_shape, v_rows));
  return pin->sequence->prefill(layer, k_data, v_data, static_cast<uint32_t>(tokens));
}

Status prefill_end(thinkv_sequence* sequence) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  if (pin->gpu) return prefill_end_on_gpu(*pin);
  THINKV_TRY(pin->sequence->prefill_end());
  pin->source->settle();
  return pin->report();
}

Status evict(thinkv_sequence* sequence, const uint32_t* positions, size_t count,
             uint64_t* evicted_slots) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  if (positions == nullptr && count > 0) return null_argument("positions");
  if (count > limits::kTokensMax) {
    return describe(ErrorCode::kInvalidArgument, "%zu positions, at most %u", count,
                    limits::kTokensMax);
  }
  const std::span wanted(positions, count);
  THINKV_ASSIGN_OR_RETURN(const uint64_t evicted,
                          pin->gpu ? pin->gpu->evict(wanted) : pin->sequence->evict(wanted));
  if (!pin->gpu) pin->source->settle();
  THINKV_TRY(pin->report());
  if (evicted_slots != nullptr) *evicted_slots = evicted;
  return {};
}

Status quantize(thinkv_sequence* sequence, uint32_t first, uint32_t last, const char* format,
                uint64_t* recoded_slots) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  if (format == nullptr) return null_argument("format");
  const std::optional<Format> known = format_from_name(format);
  if (!known) {
    return describe(ErrorCode::kInvalidArgument,
                    "unknown format '%.32s'; known: f16, bf16, k8v8, k8v4, k4v4, k4v2, k2v2, "
                    "nvfp4, ternary",
                    format);
  }
  if (is_block(*known)) {
    return describe(ErrorCode::kUnsupported,
                    "tokens come to format '%.32s' by a rule of the policy only", format);
  }
  Result<uint64_t> recoded = pin->gpu ? pin->gpu->quantize(first, last, *known)
                                      : pin->sequence->quantize(first, last, *known);
  if (!pin->gpu) pin->source->settle();
  if (!recoded) return recoded.error();
  THINKV_TRY(pin->report());
  if (recoded_slots != nullptr) *recoded_slots = recoded.value();
  return {};
}

Status set_budget(thinkv_sequence* sequence, uint32_t budget_tokens) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  THINKV_TRY(pin->gpu ? pin->gpu->set_budget(budget_tokens)
                      : pin->sequence->set_budget(budget_tokens));
  pin->budget_tokens = budget_tokens;
  // The daemon keeps it for its status only, so the sequence decides first.
  return pin->model->client->session->set_budget(pin->id, budget_tokens);
}

thinkv_sequence_stats to_abi(const kernels::SequenceStats& s, uint32_t lanes) {
  thinkv_sequence_stats known{};
  known.lanes = lanes;
  known.tokens = s.tokens;
  known.prompt_tokens = s.prompt_tokens;
  known.live_slots = s.live_slots;
  known.live_tokens_max = s.live_tokens_max;
  known.pages = s.pages;
  known.page_bytes = s.page_bytes;
  known.metadata_bytes = s.metadata_bytes;
  known.bytes_held = s.bytes_held;
  known.bytes_f16 = s.bytes_f16;
  known.evicted_slots = s.evicted_slots;
  known.reused_slots = s.reused_slots;
  known.gathered_bytes = s.gathered_bytes;
  known.recoded_slots = s.recoded_slots;
  known.demotions = s.demotions;
  known.over_budget_steps = s.over_budget_steps;
  for (uint32_t i = 0; i < kThoughtCount; ++i) known.thoughts[i] = s.segments[i];
  known.budget_tokens = s.budget_tokens;
  known.tier_bytes = s.tier_bytes;
  return known;
}

Status sequence_stats(thinkv_sequence* sequence, thinkv_sequence_stats* stats) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  THINKV_ASSIGN_OR_RETURN(const kernels::SequenceStats known, pin->stats());
  return write_stats("sequence stats", to_abi(known, pin->model->geometry.lanes()),
                     offsetof(thinkv_sequence_stats, tier_bytes), stats);
}

Status sparsity_of(thinkv_sequence* sequence, const thinkv_output* sparsity) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  const uint32_t layers = pin->model->geometry.layers;
  const int64_t shape[] = {layers};
  THINKV_ASSIGN_OR_RETURN(float* data, output_rows("sparsity", sparsity, shape));
  if (pin->gpu) return pin->gpu->sparsity(std::span(data, layers));
  pin->sequence->sparsity(std::span(data, layers));
  return {};
}

Status begin_step_of(thinkv_model* model, thinkv_sequence* const* sequences, uint32_t count,
                     thinkv_step** step) {
  if (sequences == nullptr) return null_argument("sequences");
  if (count > limits::kBatchMax) {
    return describe(ErrorCode::kInvalidArgument, "a step takes 1 to %u sequences, not %u",
                    limits::kBatchMax, count);
  }
  std::vector<Handle> handles(count);
  for (uint32_t i = 0; i < count; ++i) handles[i] = to_handle(sequences[i]);
  return open_into(step, "step", [&] { return begin_step(to_handle(model), handles); });
}

Status append(thinkv_step* step, uint32_t layer, const thinkv_tensor* k, const thinkv_tensor* v) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<StepObject> pin, pin_step(step));
  const ModelGeometry& geometry = pin->model->geometry;
  const int64_t shape[] = {static_cast<int64_t>(pin->sequences.size()), geometry.kv_heads,
                           geometry.head_dim};
  THINKV_ASSIGN_OR_RETURN(const float* k_data, input_rows("k", k, shape, pin->k_rows));
  THINKV_ASSIGN_OR_RETURN(const float* v_data, input_rows("v", v, shape, pin->v_rows));
  return pin->append(layer, k_data, v_data);
}

Status attend(thinkv_step* step, uint32_t layer, const thinkv_tensor* q, const thinkv_output* out,
              const thinkv_output* lse) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<StepObject> pin, pin_step(step));
  const ModelGeometry& geometry = pin->model->geometry;
  const auto batch = static_cast<int64_t>(pin->sequences.size());
  const int64_t shape[] = {batch, geometry.q_heads, geometry.head_dim};
  const int64_t lse_shape[] = {batch, geometry.q_heads};
  THINKV_ASSIGN_OR_RETURN(const float* q_data, input_rows("q", q, shape, pin->q_rows));
  THINKV_ASSIGN_OR_RETURN(float* out_data, output_rows("out", out, shape));
  float* lse_data = nullptr;
  if (lse != nullptr) {
    THINKV_ASSIGN_OR_RETURN(lse_data, output_rows("lse", lse, lse_shape));
  }
  return pin->attend(layer, q_data, out_data, lse_data);
}

Status status_json(thinkv_client* client, char** json) {
  if (json == nullptr) return null_argument("json");
  THINKV_ASSIGN_OR_RETURN(const Pinned<Client> pin, pin_client(client));
  THINKV_ASSIGN_OR_RETURN(const std::string text, pin->session->status_json());
  char* copy = ::strdup(text.c_str());
  if (copy == nullptr) return make_error(ErrorCode::kInternal, "out of memory");
  *json = copy;
  return {};
}

Status ping(thinkv_client* client) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Client> pin, pin_client(client));
  return pin->session->ping();
}

}  // namespace
}  // namespace thinkv::client

// At global scope: a declaration inside a namespace would lose the header's visibility.
namespace impl = thinkv::client;

extern "C" {

thinkv_status thinkv_client_open(const thinkv_client_options* options, thinkv_client** client,
                                 thinkv_error* error) {
  return impl::guard(error, [&] { return impl::open_client_with(options, client); });
}

void thinkv_client_close(thinkv_client* client) {
  impl::close_quietly([&] { impl::close_client(impl::to_handle(client)); });
}

thinkv_status thinkv_client_pool_stats(thinkv_client* client, thinkv_pool_stats* stats,
                                       thinkv_error* error) {
  return impl::guard(error, [&] { return impl::pool_stats(client, stats); });
}

thinkv_status thinkv_client_status_json(thinkv_client* client, char** json, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::status_json(client, json); });
}

void thinkv_string_free(char* text) {
  std::free(text);
}

thinkv_status thinkv_client_ping(thinkv_client* client, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::ping(client); });
}

thinkv_status thinkv_model_open(thinkv_client* client, const thinkv_model_options* options,
                                thinkv_model** model, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::open_model_with(client, options, model); });
}

void thinkv_model_close(thinkv_model* model) {
  impl::close_quietly([&] { impl::close_model(impl::to_handle(model)); });
}

thinkv_status thinkv_sequence_open(thinkv_model* model, const thinkv_sequence_options* options,
                                   thinkv_sequence** sequence, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::open_sequence_with(model, options, sequence); });
}

void thinkv_sequence_close(thinkv_sequence* sequence) {
  impl::close_quietly([&] { impl::close_sequence(impl::to_handle(sequence)); });
}

thinkv_status thinkv_sequence_prefill(thinkv_sequence* sequence, uint32_t layer,
                                      const thinkv_tensor* k, const thinkv_tensor* v,
                                      thinkv_error* error) {
  return impl::guard(error, [&] { return impl::prefill(sequence, layer, k, v); });
}

thinkv_status thinkv_sequence_prefill_end(thinkv_sequence* sequence, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::prefill_end(sequence); });
}

thinkv_status thinkv_sequence_evict(thinkv_sequence* sequence, const uint32_t* positions,
                                    size_t count, uint64_t* evicted_slots, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::evict(sequence, positions, count, evicted_slots); });
}

thinkv_status thinkv_sequence_quantize(thinkv_sequence* sequence, uint32_t first, uint32_t last,
                                       const char* format, uint64_t* recoded_slots,
                                       thinkv_error* error) {
  return impl::guard(error,
                     [&] { return impl::quantize(sequence, first, last, format, recoded_slots); });
}

thinkv_status thinkv_sequence_set_budget(thinkv_sequence* sequence, uint32_t budget_tokens,
                                         thinkv_error* error) {
  return impl::guard(error, [&] { return impl::set_budget(sequence, budget_tokens); });
}

thinkv_status thinkv_sequence_get_stats(thinkv_sequence* sequence, thinkv_sequence_stats* stats,
                                        thinkv_error* error) {
  return impl::guard(error, [&] { return impl::sequence_stats(sequence, stats); });
}

thinkv_status thinkv_sequence_sparsity(thinkv_sequence* sequence, const thinkv_output* sparsity,
                                       thinkv_error* error) {
  return impl::guard(error, [&] { return impl::sparsity_of(sequence, sparsity); });
}

thinkv_status thinkv_step_begin(thinkv_model* model, thinkv_sequence* const* sequences,
                                uint32_t count, thinkv_step** step, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::begin_step_of(model, sequences, count, step); });
}

thinkv_status thinkv_step_append(thinkv_step* step, uint32_t layer, const thinkv_tensor* k,
                                 const thinkv_tensor* v, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::append(step, layer, k, v); });
}

thinkv_status thinkv_step_attend(thinkv_step* step, uint32_t layer, const thinkv_tensor* q,
                                 const thinkv_output* out, const thinkv_output* lse,
                                 thinkv_error* error) {
  return impl::guard(error, [&] { return impl::attend(step, layer, q, out, lse); });
}

thinkv_status thinkv_step_end(thinkv_step* step, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::end_step(impl::to_handle(step)); });
}

void thinkv_step_cancel(thinkv_step* step) {
  impl::close_quietly([&] { impl::close_step(impl::to_handle(step)); });
}

const char* thinkv_version(void) {
  return thinkv::kVersionText;
}

const char* thinkv_status_name(thinkv_status status) {
  return thinkv::error_code_name(static_cast<thinkv::ErrorCode>(status));
}

}  // extern "C"
