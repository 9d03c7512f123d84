// attention_64.cu: decode attention at head_dim 64.
#include "kernels/cuda/attention_kernel.cuh"
#include "kernels/cuda/attention_launch.h"

namespace thinkv::cuda {

cudaError_t launch_attend_64(const AttendParams& p, const AttendShape& shape, cudaStream_t stream) {
  // Two n-tiles need more registers than 16 warps leave each.
  return p.group > 8 ? launch_shape<64, 2, 12, 8>(p, shape.ctas, stream)
                     : launch_shape<64, 1, 16, 6>(p, shape.ctas, stream);
}

void visit_attend_64(AttendKernelVisit visit) {
  visit_shape<64, 1, 16, 6>(visit);
  visit_shape<64, 2, 12, 8>(visit);
}

}  // namespace thinkv::cuda
