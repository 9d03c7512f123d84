// gpu_calls.h: calls of the C ABI on sequences that lie on the GPU.
#pragma once

#include <cstdint>
#include <span>

#include "client/objects.h"
#include "thinkv/thinkv.h"

namespace thinkv::client {

[[nodiscard]] cuda::Element element_of(uint32_t dtype);

// k is not null; shapes as in c_api.cpp's prefill.
[[nodiscard]] Status prefill_on_gpu(GpuSequence& sequence, uint32_t layer, const thinkv_tensor& k,
                                    const thinkv_tensor* v, std::span<const int64_t> k_shape,
                                    std::span<const int64_t> v_shape);
// q is not null.
[[nodiscard]] Status prefill_queries_on_gpu(GpuSequence& sequence, uint32_t layer,
                                            const thinkv_tensor& q, std::span<const int64_t> shape);
[[nodiscard]] Status prefill_end_on_gpu(SequenceObject& object);

}  // namespace thinkv::client
