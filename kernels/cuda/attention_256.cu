// attention_256.cu: decode attention at head_dim 256.
#include "kernels/cuda/attention_kernel.cuh"
#include "kernels/cuda/attention_launch.h"

namespace thinkv::cuda {

cudaError_t launch_attend_256(const AttendParams& p, const AttendShape& shape,
                              cudaStream_t stream) {
  return p.group > 8 ? launch_shape<256, 2, 8, 3>(p, shape.ctas, stream)
                     : launch_shape<256, 1, 8, 3>(p, shape.ctas, stream);
}

void visit_attend_256(AttendKernelVisit visit) {
  visit_shape<256, 1, 8, 3>(visit);
  visit_shape<256, 2, 8, 3>(visit);
}

}  // namespace thinkv::cuda
