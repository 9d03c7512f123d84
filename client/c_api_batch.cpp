// c_api_batch.cpp: thinkv.h's batches, and sequences on the GPU.
#include "client/abi.h"
#include "client/abi_guard.h"
#include "client/error_text.h"
#include "client/gpu_calls.h"
#include "client/tensor.h"
#include "thinkv/thinkv.h"

namespace thinkv::client {
namespace {

Result<Pinned<BatchObject>> pin_batch(thinkv_batch* batch) {
  return Pinned<BatchObject>::get(to_handle(batch), HandleKind::kBatch, Use::kExclusive);
}

Status open_batch_with(thinkv_model* model, const thinkv_batch_options* options,
                       thinkv_batch** batch) {
  thinkv_batch_options known = THINKV_BATCH_OPTIONS_INIT;
  if (options != nullptr) {
    THINKV_TRY(
        read_options("batch options", *options, offsetof(thinkv_batch_options, flags), known));
    THINKV_TRY(check_reserved("batch options", known.reserved));
  }
  if ((known.flags & ~THINKV_BATCH_GROWS) != 0) {
    return describe(ErrorCode::kInvalidArgument, "batch options: unknown flags 0x%x", known.flags);
  }
  return open_into(batch, "batch", [&] {
    return open_batch(to_handle(model), {.capacity = known.capacity,
                                         .tokens_max = known.tokens_max,
                                         .grows = (known.flags & THINKV_BATCH_GROWS) != 0});
  });
}

Status set_row(thinkv_batch* batch, uint32_t row, thinkv_sequence* sequence) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<BatchObject> pin, pin_batch(batch));
  if (sequence == nullptr) return pin->batch->set(row, nullptr);
  THINKV_ASSIGN_OR_RETURN(const SequencePin joins, SequencePin::get(to_handle(sequence)));
  if (joins->model != pin->model) {
    return make_error(ErrorCode::kInvalidArgument, "the sequence is of another model");
  }
  return pin->batch->set(row, joins->gpu.get());
}

// A tensor of the batch in GPU memory.
Result<const void*> input(const BatchObject& object, const char* name, const thinkv_tensor* tensor,
                          std::span<const int64_t> shape) {
  THINKV_ASSIGN_OR_RETURN(const void* data, device_input(name, tensor, shape));
  THINKV_TRY(object.batch->engine().check_pointer(name, data));
  return data;
}

Status append(thinkv_batch* batch, uint32_t layer, const thinkv_tensor* k, const thinkv_tensor* v) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<BatchObject> pin, pin_batch(batch));
  const ModelGeometry& geometry = pin->model->geometry;
  const int64_t shape[] = {pin->batch->capacity(), geometry.kv_heads, geometry.head_dim};
  THINKV_ASSIGN_OR_RETURN(const void* k_data, input(*pin, "k", k, shape));
  THINKV_ASSIGN_OR_RETURN(const void* v_data, input(*pin, "v", v, shape));
  if (k->dtype != v->dtype) {
    return make_error(ErrorCode::kInvalidArgument, "k and v must have the same data type");
  }
  return pin->batch->append(layer, k_data, v_data, element_of(k->dtype));
}

// What the options say; null: nothing.
Result<GpuBatch::Attend> read_attend(const thinkv_attend_options* options) {
  thinkv_attend_options known = THINKV_ATTEND_OPTIONS_INIT;
  if (options != nullptr) {
    THINKV_TRY(
        read_options("attend options", *options, offsetof(thinkv_attend_options, reserved), known));
    THINKV_TRY(check_reserved("attend options", known.reserved));
  }
  constexpr uint32_t kFlags = THINKV_ATTEND_SILENT | THINKV_ATTEND_MEASURE_ONLY;
  if ((known.flags & ~kFlags) != 0 || known.flags == kFlags) {
    return describe(ErrorCode::kInvalidArgument,
                    "attend options: flags 0x%x are unknown or contradict each other", known.flags);
  }
  GpuBatch::Attend io;
  io.window = known.window;
  io.sinks = known.sinks;
  io.silent = (known.flags & THINKV_ATTEND_SILENT) != 0;
  io.measure_only = (known.flags & THINKV_ATTEND_MEASURE_ONLY) != 0;
  return io;
}

Status attend(thinkv_batch* batch, uint32_t layer, const thinkv_attend_options* options,
              const thinkv_tensor* q, const thinkv_output* out, const thinkv_output* lse) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<BatchObject> pin, pin_batch(batch));
  THINKV_ASSIGN_OR_RETURN(GpuBatch::Attend io, read_attend(options));
  const ModelGeometry& geometry = pin->model->geometry;
  const int64_t rows = pin->batch->capacity();
  const int64_t shape[] = {rows, geometry.q_heads, geometry.head_dim};
  const int64_t lse_shape[] = {rows, geometry.q_heads};
  THINKV_ASSIGN_OR_RETURN(io.q, input(*pin, "q", q, shape));
  THINKV_ASSIGN_OR_RETURN(io.out, device_output("out", out, shape, false));
  THINKV_TRY(pin->batch->engine().check_pointer("out", io.out));
  if (lse != nullptr) {
    THINKV_ASSIGN_OR_RETURN(void* data, device_output("lse", lse, lse_shape, true));
    THINKV_TRY(pin->batch->engine().check_pointer("lse", data));
    io.lse = static_cast<float*>(data);
  }
  io.q_element = element_of(q->dtype);
  io.out_element = element_of(out->dtype);
  return pin->batch->attend(layer, io);
}

Status trim(thinkv_sequence* sequence, uint32_t keep) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  if (!pin->gpu) {
    return make_error(ErrorCode::kUnsupported, "on the host backend use thinkv_sequence_evict");
  }
  if (keep == 0) return make_error(ErrorCode::kInvalidArgument, "keep is 0, at least 1");
  return pin->gpu->trim(keep);
}

Status copy(thinkv_sequence* sequence, thinkv_sequence** out) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  return open_into(out, "copy", [&] { return copy_sequence(*pin); });
}

Status set_stream(thinkv_model* model, void* stream) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<Model> pin,
                          Pinned<Model>::get(to_handle(model), HandleKind::kModel, Use::kShared));
  if (!pin->gpu) return make_error(ErrorCode::kUnsupported, "streams are for the cuda backend");
  pin->gpu->set_stream(stream);
  return {};
}

template <class Fn>
Status on_batch(thinkv_batch* batch, Fn&& fn) {
  THINKV_ASSIGN_OR_RETURN(const Pinned<BatchObject> pin, pin_batch(batch));
  return fn(*pin->batch);
}

}  // namespace

cuda::Element element_of(uint32_t dtype) {
  return dtype == THINKV_FLOAT16    ? cuda::Element::kF16
         : dtype == THINKV_BFLOAT16 ? cuda::Element::kBf16
                                    : cuda::Element::kF32;
}

Status prefill_on_gpu(GpuSequence& sequence, uint32_t layer, const thinkv_tensor& k,
                      const thinkv_tensor* v, std::span<const int64_t> k_shape,
                      std::span<const int64_t> v_shape) {
  THINKV_ASSIGN_OR_RETURN(const void* k_data, device_input("k", &k, k_shape));
  THINKV_ASSIGN_OR_RETURN(const void* v_data, device_input("v", v, v_shape));
  THINKV_TRY(sequence.engine().check_pointer("k", k_data));
  THINKV_TRY(sequence.engine().check_pointer("v", v_data));
  if (k.dtype != v->dtype) {
    return make_error(ErrorCode::kInvalidArgument, "k and v must have the same data type");
  }
  return sequence.prefill(layer, k_data, v_data, element_of(k.dtype),
                          static_cast<uint32_t>(k.shape[0]));
}

Status prefill_queries_on_gpu(GpuSequence& sequence, uint32_t layer, const thinkv_tensor& q,
                              std::span<const int64_t> shape) {
  THINKV_ASSIGN_OR_RETURN(const void* data, device_input("q", &q, shape));
  THINKV_TRY(sequence.engine().check_pointer("q", data));
  return sequence.prefill_queries(layer, data, element_of(q.dtype),
                                  static_cast<uint32_t>(q.shape[0]));
}

// The tokens are counted here; what they hold is in the numbers of the next step.
Status prefill_end_on_gpu(SequenceObject& object) {
  THINKV_TRY(object.gpu->prefill_end());
  CounterDelta delta{};
  delta.tokens = object.gpu->prompt_tokens();
  delta.f16_bytes = delta.tokens * object.model->geometry.token_bytes_f16();
  object.model->client->session->add_counters(delta);
  return {};
}

}  // namespace thinkv::client

namespace impl = thinkv::client;

extern "C" {

thinkv_status thinkv_model_set_stream(thinkv_model* model, void* stream, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::set_stream(model, stream); });
}

thinkv_status thinkv_batch_open(thinkv_model* model, const thinkv_batch_options* options,
                                thinkv_batch** batch, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::open_batch_with(model, options, batch); });
}

void thinkv_batch_close(thinkv_batch* batch) {
  impl::close_quietly([&] { impl::close_batch(impl::to_handle(batch)); });
}

thinkv_status thinkv_batch_set(thinkv_batch* batch, uint32_t row, thinkv_sequence* sequence,
                               thinkv_error* error) {
  return impl::guard(error, [&] { return impl::set_row(batch, row, sequence); });
}

thinkv_status thinkv_batch_reserve(thinkv_batch* batch, uint32_t steps, thinkv_error* error) {
  return impl::guard(error, [&] {
    return impl::on_batch(batch, [&](auto& rows) { return rows.reserve(steps); });
  });
}

thinkv_status thinkv_batch_begin(thinkv_batch* batch, thinkv_error* error) {
  return impl::guard(
      error, [&] { return impl::on_batch(batch, [](auto& rows) { return rows.begin(); }); });
}

thinkv_status thinkv_batch_append(thinkv_batch* batch, uint32_t layer, const thinkv_tensor* k,
                                  const thinkv_tensor* v, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::append(batch, layer, k, v); });
}

thinkv_status thinkv_batch_attend(thinkv_batch* batch, uint32_t layer, const thinkv_tensor* q,
                                  const thinkv_output* out, const thinkv_output* lse,
                                  thinkv_error* error) {
  return impl::guard(error, [&] { return impl::attend(batch, layer, nullptr, q, out, lse); });
}

thinkv_status thinkv_batch_attend_with(thinkv_batch* batch, uint32_t layer,
                                       const thinkv_attend_options* options, const thinkv_tensor* q,
                                       const thinkv_output* out, const thinkv_output* lse,
                                       thinkv_error* error) {
  return impl::guard(error, [&] { return impl::attend(batch, layer, options, q, out, lse); });
}

thinkv_status thinkv_batch_unreserve(thinkv_batch* batch, thinkv_error* error) {
  return impl::guard(
      error, [&] { return impl::on_batch(batch, [](auto& rows) { return rows.unreserve(); }); });
}

thinkv_status thinkv_sequence_trim(thinkv_sequence* sequence, uint32_t keep, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::trim(sequence, keep); });
}

thinkv_status thinkv_sequence_copy(thinkv_sequence* sequence, thinkv_sequence** copy,
                                   thinkv_error* error) {
  return impl::guard(error, [&] { return impl::copy(sequence, copy); });
}

thinkv_status thinkv_batch_end(thinkv_batch* batch, thinkv_error* error) {
  return impl::guard(error,
                     [&] { return impl::on_batch(batch, [](auto& rows) { return rows.end(); }); });
}

}  // extern "C"
