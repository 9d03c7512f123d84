// attention_128.cu: decode attention at head_dim 128.
#include "kernels/cuda/attention_kernel.cuh"
#include "kernels/cuda/attention_launch.h"

namespace thinkv::cuda {

cudaError_t launch_attend_128(const AttendParams& p, const AttendShape& shape,
                              cudaStream_t stream) {
  if (p.group > 8) return launch_shape<128, 2, 8, 5>(p, shape.ctas, stream);
  switch (shape.warps) {
    case 8:
      return launch_shape<128, 1, 8, 5>(p, shape.ctas, stream);
    case 12:  // before sm_90 shared memory has room for two pages a warp, too few
      if (running_code() < 90) return launch_shape<128, 1, 8, 5>(p, shape.ctas, stream);
      return launch_shape<128, 1, 12, 4>(p, shape.ctas, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

void visit_attend_128(AttendKernelVisit visit) {
  visit_shape<128, 1, 8, 5>(visit);
  visit_shape<128, 1, 12, 4>(visit);
  visit_shape<128, 2, 8, 5>(visit);
}

}  // namespace thinkv::cuda
