#include "client/tensor.h"

#include <cstdio>
#include <cstring>
#include <string>

#include "client/error_text.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::client {
namespace {

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape[i] == kAny ? "n" : std::to_string(shape[i]);
  }
  return text + "]";
}

Status check_shape(const char* name, uint32_t ndim, const int64_t* given,
                   std::span<const int64_t> expected) {
  if (ndim < 1 || ndim > 4) {
    return describe(ErrorCode::kInvalidArgument, "%s: ndim is %u, expected %zu", name, ndim,
                    expected.size());
  }
  bool ok = ndim == expected.size();
  for (uint32_t i = 0; ok && i < ndim; ++i) {
    ok = expected[i] == kAny ? given[i] >= 1 : given[i] == expected[i];
  }
  if (ok) return {};
  return describe(ErrorCode::kInvalidArgument, "%s: shape is %s, expected %s", name,
                  shape_text(std::span(given, ndim)).c_str(), shape_text(expected).c_str());
}

Status check_data(const char* name, const void* data, size_t alignment) {
  if (data == nullptr) return describe(ErrorCode::kInvalidArgument, "%s: data is null", name);
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) {
    return describe(ErrorCode::kInvalidArgument, "%s: data is not aligned to %zu bytes", name,
                    alignment);
  }
  return {};
}

template <float (*kToFloat)(uint16_t)>
void convert(const void* data, size_t count, std::vector<float>& out) {
  const auto* halves = static_cast<const uint16_t*>(data);
  out.resize(count);
  for (size_t i = 0; i < count; ++i) out[i] = kToFloat(halves[i]);
}

// What kernels load and store at once.
constexpr size_t kDeviceAlignment = 16;

Error unknown_type(const char* name, uint32_t dtype) {
  return describe(ErrorCode::kUnsupported,
                  "%s: data type %u is none of float32 (0), float16 (1), bfloat16 (2)", name,
                  dtype);
}

}  // namespace

Result<const void*> device_input(const char* name, const thinkv_tensor* tensor,
                                 std::span<const int64_t> shape) {
  if (tensor == nullptr) return describe(ErrorCode::kInvalidArgument, "%s is null", name);
  THINKV_TRY(check_shape(name, tensor->ndim, tensor->shape, shape));
  if (tensor->dtype > THINKV_BFLOAT16) return unknown_type(name, tensor->dtype);
  THINKV_TRY(check_data(name, tensor->data, kDeviceAlignment));
  return tensor->data;
}

Result<void*> device_output(const char* name, const thinkv_output* output,
                            std::span<const int64_t> shape, bool fp32_only) {
  if (output == nullptr) return describe(ErrorCode::kInvalidArgument, "%s is null", name);
  THINKV_TRY(check_shape(name, output->ndim, output->shape, shape));
  if (output->dtype > THINKV_BFLOAT16) return unknown_type(name, output->dtype);
  if (fp32_only && output->dtype != THINKV_FLOAT32) {
    return describe(ErrorCode::kUnsupported, "%s: data type %u; it is float32 (0)", name,
                    output->dtype);
  }
  THINKV_TRY(check_data(name, output->data, kDeviceAlignment));
  return output->data;
}

Result<const float*> input_rows(const char* name, const thinkv_tensor* tensor,
                                std::span<const int64_t> shape, std::vector<float>& converted) {
  if (tensor == nullptr) return describe(ErrorCode::kInvalidArgument, "%s is null", name);
  THINKV_TRY(check_shape(name, tensor->ndim, tensor->shape, shape));
  if (tensor->dtype > THINKV_BFLOAT16) return unknown_type(name, tensor->dtype);
  THINKV_TRY(check_data(name, tensor->data, tensor->dtype == THINKV_FLOAT32 ? 4 : 2));
  if (tensor->dtype == THINKV_FLOAT32) return static_cast<const float*>(tensor->data);
  size_t count = 1;
  for (uint32_t i = 0; i < tensor->ndim; ++i) count *= static_cast<size_t>(tensor->shape[i]);
  if (tensor->dtype == THINKV_FLOAT16) {
    convert<fp16_to_float>(tensor->data, count, converted);
  } else {
    convert<bf16_to_float>(tensor->data, count, converted);
  }
  return converted.data();
}

Result<float*> output_rows(const char* name, const thinkv_output* output,
                           std::span<const int64_t> shape) {
  if (output == nullptr) return describe(ErrorCode::kInvalidArgument, "%s is null", name);
  THINKV_TRY(check_shape(name, output->ndim, output->shape, shape));
  if (output->dtype != THINKV_FLOAT32) {
    return describe(ErrorCode::kUnsupported, "%s: data type %u; outputs are float32 (0)", name,
                    output->dtype);
  }
  THINKV_TRY(check_data(name, output->data, 4));
  return static_cast<float*>(output->data);
}

}  // namespace thinkv::client
