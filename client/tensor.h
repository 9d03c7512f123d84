// tensor.h: tensors of the C ABI, checked and turned into fp32 rows.
//
// Threads: pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "thinkv/result.h"
#include "thinkv/thinkv.h"

namespace thinkv::client {

// One dimension; kAny where the caller decides (it must be at least 1).
inline constexpr int64_t kAny = -1;

// Checks data type, number of dimensions, shape, null and alignment; fp32 data is used in place,
// 16-bit data is converted into `converted`. Result: the first of the product of shape values.
// Errors: kInvalidArgument (shape; the text has expected and given), kUnsupported (data type).
[[nodiscard]] Result<const float*> input_rows(const char* name, const thinkv_tensor* tensor,
                                              std::span<const int64_t> shape,
                                              std::vector<float>& converted);
// The same for memory that the library writes: fp32 only.
[[nodiscard]] Result<float*> output_rows(const char* name, const thinkv_output* output,
                                         std::span<const int64_t> shape);

// The same checks for tensors in GPU memory, which are used as they are. Whether the address is one
// of the GPU is the engine's to say.
[[nodiscard]] Result<const void*> device_input(const char* name, const thinkv_tensor* tensor,
                                               std::span<const int64_t> shape);
[[nodiscard]] Result<void*> device_output(const char* name, const thinkv_output* output,
                                          std::span<const int64_t> shape, bool fp32_only);

}  // namespace thinkv::client
