// emission.h: from raw scores to what policies see of an attention step.
#pragma once

#include "kernels/cuda/attention.h"

namespace thinkv::cuda {

// Scores and sparsity of the sequences that emit, from emit_scratch and the log-sum-exps (log2) of
// all rows, [lanes x group]. Errors: launch errors.
[[nodiscard]] cudaError_t launch_emission(const AttendParams& params, const float* log_sums,
                                          cudaStream_t stream);

}  // namespace thinkv::cuda
