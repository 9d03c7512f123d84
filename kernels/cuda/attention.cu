// attention.cu: the host side of decode attention: sizes, and which kernel serves.
#include "kernels/cuda/attention.h"

#include <cstdint>

#include "kernels/cuda/attention_emit.cuh"
#include "kernels/cuda/attention_launch.h"
#include "kernels/cuda/attention_output.cuh"

namespace thinkv::cuda {

AttendShape attend_shape(uint32_t multiprocessors, uint32_t lanes, uint32_t head_dim,
                         bool two_bits) {
  // Every warp more is another start and another part of a cut lane. It pays where there is much to
  // compute for a byte and many lanes to share (H200, 128 x 4096: k2v2 103 us with 12 warps, 111
  // with 8; k4v4 158 and 153).
  constexpr uint32_t kManyLanes = 512;
  const bool more = two_bits && lanes >= kManyLanes;
  const uint32_t warps = head_dim == 64 ? 16 : head_dim == 128 && more ? 12 : 8;
  return {multiprocessors, warps};
}

uint64_t attend_part_floats(const AttendShape& shape, uint32_t lanes, uint32_t group,
                            uint32_t head_dim) {
  const uint64_t parts = uint64_t{shape.ctas} * (2 + shape.warps);
  return parts * part_floats(group, head_dim) + uint64_t{lanes} * group;
}

uint64_t emit_scratch_bytes(uint64_t pages, uint32_t group) {
  return pages * emit_page_bytes(group);
}

cudaError_t launch_attend(const AttendParams& p, const AttendShape& shape, cudaStream_t stream) {
  if (p.group == 0 || p.group > 16 || p.kv_heads == 0) return cudaErrorInvalidValue;
  if (p.lanes == 0) return cudaSuccess;
  switch (p.head_dim) {
    case 64:
      return launch_attend_64(p, shape, stream);
    case 128:
      return launch_attend_128(p, shape, stream);
    case 256:
      return launch_attend_256(p, shape, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
