// attention.h: decode attention over lanes of pages on a CUDA device.
//
// Formats: the uniform codes and fp16. head_dim 64, 128, 256; 1 to 8 query heads a kv head.
// Threads: any; work is ordered by the stream. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "thinkv/internal/format.h"

namespace thinkv::cuda {

// One page of a lane, 16 bytes. A page whose live mask is 0 is neither copied nor computed.
struct DevicePage {
  uint64_t live;
  uint32_t page;  // PageId::raw
  Format format;
  uint8_t reserved[3];
};
static_assert(sizeof(DevicePage) == 16);

struct AttendParams {
  const DevicePage* pages;              // [lane_begin[lanes]] lane after lane
  const uint32_t* lane_begin;           // [lanes + 1]
  const unsigned char* const* extents;  // [extents] base address of each extent
  const uint16_t* q;                    // [lanes, group, head_dim] fp16, rotated
  float* out;                           // [lanes, group, head_dim]
  float* lse;                           // [lanes, group] natural log; -inf where nothing is live
  float* parts;                         // part_floats(...) of scratch
  uint32_t lanes;
  uint32_t group;
  float scale_log2;  // softmax scale x log2(e)
};

struct LaunchShape {
  uint32_t ctas;   // one per SM
  uint32_t warps;  // of a CTA
};

// Scratch for the lanes that are cut: two parts a CTA and two a warp.
[[nodiscard]] constexpr uint64_t part_floats(const LaunchShape& shape, uint32_t group,
                                             uint32_t head_dim) {
  return uint64_t{2} * shape.ctas * (1 + 16) * group * (head_dim + 2);
}

// Attention of all lanes: the split kernel and the merge. Errors: cudaErrorInvalidValue for a
// shape that is not built; launch errors.
[[nodiscard]] cudaError_t launch_attend(const AttendParams& params, uint32_t head_dim,
                                        const LaunchShape& shape, cudaStream_t stream);

}  // namespace thinkv::cuda
