// attention_launch.h: launch_attend for one head_dim each, in source files of their own.
#pragma once

#include "kernels/cuda/attention.h"

namespace thinkv::cuda {

[[nodiscard]] cudaError_t launch_attend_64(const AttendParams& params, const AttendShape& shape,
                                           cudaStream_t stream);
[[nodiscard]] cudaError_t launch_attend_128(const AttendParams& params, const AttendShape& shape,
                                            cudaStream_t stream);
[[nodiscard]] cudaError_t launch_attend_256(const AttendParams& params, const AttendShape& shape,
                                            cudaStream_t stream);

// A kernel of attention, for a report of its resources (tests/gpu/attend_bench.cu).
struct AttendKernel {
  uint32_t head_dim, heads, warps, stages;
  const char* variant;  // plain, extra (windows and emission) or blocks (of tokens, and extra)
  const void* function;
};
using AttendKernelVisit = void (*)(const AttendKernel&);
void visit_attend_64(AttendKernelVisit visit);
void visit_attend_128(AttendKernelVisit visit);
void visit_attend_256(AttendKernelVisit visit);

}  // namespace thinkv::cuda
