// c_api_hints.cpp: thinkv.h's hints: the prompt's queries and token classes for policies with
// rules, a layer's next query for policies with a tier.
#include "client/abi.h"
#include "client/abi_guard.h"
#include "client/error_text.h"
#include "client/gpu_calls.h"
#include "client/objects.h"
#include "client/tensor.h"
#include "thinkv/internal/limits.h"
#include "thinkv/thinkv.h"

namespace thinkv::client {
namespace {

Status prefill_queries(thinkv_sequence* sequence, uint32_t layer, const thinkv_tensor* q) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  const ModelGeometry& geometry = pin->model->geometry;
  if (q == nullptr) return null_argument("q");
  const int64_t shape[] = {kAny, geometry.q_heads, geometry.head_dim};
  const int64_t count = q->ndim == 3 ? q->shape[0] : 1;
  if (count > int64_t{limits::kTokensMax}) {
    return describe(ErrorCode::kInvalidArgument, "q has %lld queries, more than a prompt's tokens",
                    static_cast<long long>(count));
  }
  if (pin->gpu) return prefill_queries_on_gpu(*pin->gpu, layer, *q, shape);
  std::vector<float> rows;
  THINKV_ASSIGN_OR_RETURN(const float* data, input_rows("q", q, shape, rows));
  return pin->sequence->prefill_queries(layer, data, static_cast<uint32_t>(count));
}

Status token_classes(thinkv_sequence* sequence, uint32_t first, const uint8_t* classes,
                     size_t count) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  if (classes == nullptr && count > 0) return null_argument("classes");
  if (count > limits::kTokensMax) {
    return describe(ErrorCode::kInvalidArgument, "%zu classes, at most %u", count,
                    limits::kTokensMax);
  }
  if (pin->gpu) return pin->gpu->token_classes(first, std::span(classes, count));
  const Status told = pin->sequence->token_classes(first, std::span(classes, count));
  pin->source->settle();
  THINKV_TRY(told);
  return pin->report();
}

// The step is the batch's that the sequence is in: whether it has begun the device knows, and a
// guess without a step is forgotten when the next one begins.
Status prefetch_on_gpu(GpuSequence& sequence, uint32_t layer, const thinkv_tensor* q,
                       std::span<const int64_t> shape) {
  THINKV_ASSIGN_OR_RETURN(const void* data, device_input("q", q, shape));
  THINKV_TRY(sequence.engine().check_pointer("q", data));
  if (sequence.batch() == nullptr) {
    return make_error(ErrorCode::kInvalidArgument, "the sequence is in no step: it has no batch");
  }
  return sequence.batch()->prefetch(sequence.row(), layer, data, element_of(q->dtype));
}

Status prefetch(thinkv_sequence* sequence, uint32_t layer, const thinkv_tensor* q) {
  THINKV_ASSIGN_OR_RETURN(const SequencePin pin, SequencePin::get(to_handle(sequence)));
  const ModelGeometry& geometry = pin->model->geometry;
  const int64_t shape[] = {geometry.q_heads, geometry.head_dim};
  if (pin->gpu) return prefetch_on_gpu(*pin->gpu, layer, q, shape);
  std::vector<float> rows;
  THINKV_ASSIGN_OR_RETURN(const float* data, input_rows("q", q, shape, rows));
  return pin->sequence->prefetch(layer, data);
}

}  // namespace
}  // namespace thinkv::client

// At global scope: a declaration inside a namespace would lose the header's visibility.
namespace impl = thinkv::client;

extern "C" {

thinkv_status thinkv_sequence_prefill_queries(thinkv_sequence* sequence, uint32_t layer,
                                              const thinkv_tensor* q, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::prefill_queries(sequence, layer, q); });
}

thinkv_status thinkv_sequence_token_classes(thinkv_sequence* sequence, uint32_t first,
                                            const uint8_t* classes, size_t count,
                                            thinkv_error* error) {
  return impl::guard(error, [&] { return impl::token_classes(sequence, first, classes, count); });
}

thinkv_status thinkv_sequence_prefetch(thinkv_sequence* sequence, uint32_t layer,
                                       const thinkv_tensor* q, thinkv_error* error) {
  return impl::guard(error, [&] { return impl::prefetch(sequence, layer, q); });
}

}  // extern "C"
