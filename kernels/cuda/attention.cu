// attention.cu: split-KV decode attention over lanes of mixed pages.
//
// One warp walks a run of pages of the flat page list, so every warp has the same bytes to read
// (attention_parts.cuh). Pages come to shared memory through a ring that belongs to the warp alone
// (page_stream.cuh): no CTA barrier in the loop. What a warp computes is in attention_lane.cuh.
#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_lane.cuh"
#include "kernels/cuda/attention_parts.cuh"
#include "kernels/cuda/page_stream.cuh"
#include "kernels/cuda/ptx.cuh"
#include "thinkv/internal/page_format.h"

namespace thinkv::cuda {
namespace {

template <int kHeadDim>
__device__ __forceinline__ void attend_page(LaneState<kHeadDim>& state, const AttendParams& p,
                                            uint32_t lane_index, uint32_t page, Format format,
                                            uint64_t live) {
  switch (format) {
    case Format::kK4V4:
      return attend_codes<kHeadDim, Format::kK4V4>(state, p, lane_index, page, live);
    case Format::kK4V2:
      return attend_codes<kHeadDim, Format::kK4V2>(state, p, lane_index, page, live);
    case Format::kK2V2:
      return attend_codes<kHeadDim, Format::kK2V2>(state, p, lane_index, page, live);
    case Format::kK8V4:
      return attend_codes<kHeadDim, Format::kK8V4>(state, p, lane_index, page, live);
    case Format::kK8V8:
      return attend_codes<kHeadDim, Format::kK8V8>(state, p, lane_index, page, live);
    default:
      return attend_f16(state, p, lane_index, page, live);
  }
}

// Writes a lane that this warp had whole.
template <int kHeadDim>
__device__ void write_lane(const LaneState<kHeadDim>& state, const AttendParams& p,
                           uint32_t lane_index) {
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t row = uint64_t{lane_index} * p.group;
  const float scale[2] = {state.sum[0] > 0.0f ? 1.0f / state.sum[0] : 0.0f,
                          state.sum[1] > 0.0f ? 1.0f / state.sum[1] : 0.0f};
  write_values(state, p.group, p.out + row * kHeadDim, scale);
  for (uint32_t h = 0; h < 2; ++h) {
    if (lane < 4 && 2 * lane + h < p.group) {
      p.lse[row + 2 * lane + h] = log_sum_exp(state.maximum[h], state.sum[h]);
    }
  }
}

// Writes what this warp has of a lane that was cut.
template <int kHeadDim>
__device__ void write_part(const LaneState<kHeadDim>& state, const AttendParams& p, float* part) {
  const uint32_t lane = threadIdx.x % 32;
  const float one[2] = {1.0f, 1.0f};
  write_values(state, p.group, part + 2 * p.group, one);
  for (uint32_t h = 0; h < 2; ++h) {
    if (lane < 4 && 2 * lane + h < p.group) {
      part[2 * lane + h] = state.maximum[h];
      part[p.group + 2 * lane + h] = state.sum[h];
    }
  }
}

template <int kHeadDim, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 1) attend_kernel(const AttendParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) uint64_t barriers[kWarps * kStages];
  __shared__ ReadyPage ready[kWarps][2 * kBatch];
  __shared__ uint32_t part_lane[2 * kWarps];
  const uint32_t warp = threadIdx.x / 32, index = blockIdx.x * kWarps + warp;
  const uint32_t warps = gridDim.x * kWarps, total = p.lane_begin[p.lanes];
  const uint32_t run = run_length(total, warps);
  const uint32_t begin = min(index * run, total), end = min(begin + run, total);
  using Stream = PageStream<kHeadDim, kStages>;
  Stream stream(p, begin, end, shared_address(shared) + warp * kStages * Stream::kPage,
                &barriers[warp * kStages], ready[warp]);
  write_empty_lanes<kHeadDim>(p, index, warps);
  if (threadIdx.x % 32 < 2) part_lane[2 * warp + threadIdx.x % 32] = kNoLane;
  __syncwarp();

  float* parts =
      p.parts + uint64_t{2 * gridDim.x + 2 * blockIdx.x * kWarps} * part_size<kHeadDim>(p.group);
  uint32_t lane_index = begin == end ? 0 : lane_of_page(p, begin);
  LaneState<kHeadDim> state;
  uint32_t i = begin;
  while (i < end) {
    while (p.lane_begin[lane_index + 1] <= i) ++lane_index;  // skips empty lanes
    const uint32_t lane_first = p.lane_begin[lane_index], lane_end = p.lane_begin[lane_index + 1];
    begin_lane(state);
    for (const uint32_t stop = min(lane_end, end); i < stop; ++i) {
      const ReadyPage page = stream.next();
      if (page.live != 0) {
        attend_page(state, p, lane_index, stream.shared(), page.format(), page.live);
      }
    }
    finish_lane(state);
    if (lane_first >= begin && lane_end <= end) {
      write_lane(state, p, lane_index);
      continue;
    }
    const uint32_t slot = 2 * warp + (lane_first < begin ? 0u : 1u);
    write_part(state, p, parts + slot * part_size<kHeadDim>(p.group));
    if (threadIdx.x % 32 == 0) part_lane[slot] = lane_index;
  }
  __syncthreads();
  const uint32_t cta_begin = min(blockIdx.x * kWarps * run, total);
  merge_cta<kHeadDim, kWarps>(p, parts, part_lane, cta_begin, min(cta_begin + kWarps * run, total));
}

// Merges the parts of a lane that was cut between CTAs. Each CTA here stands for the start of a CTA
// of the attend kernel and works if that is the first such cut inside its lane.
template <int kHeadDim, int kWarps>
__global__ void combine_kernel(const AttendParams p, uint32_t ctas) {
  const uint32_t total = p.lane_begin[p.lanes];
  const uint32_t run = run_length(total, ctas * kWarps) * kWarps;
  const uint32_t cut = (blockIdx.x + 1) * run;
  if (cut >= total) return;
  const uint32_t lane_index = lane_of_page(p, cut);
  const uint32_t begin = p.lane_begin[lane_index], end = p.lane_begin[lane_index + 1];
  if (begin == cut || begin / run != blockIdx.x) return;
  const uint32_t size = part_size<kHeadDim>(p.group);
  const auto part = [&](uint32_t cta) -> const float* {
    return p.parts + uint64_t{2 * cta + (begin < cta * run ? 0u : 1u)} * size;
  };
  for (uint32_t i = threadIdx.x; i < p.group * kHeadDim; i += blockDim.x) {
    float maximum, value;
    const float sum =
        merge(part, begin / run, (end - 1) / run, p.group, i / kHeadDim, i, maximum, value);
    write_merged<kHeadDim>(p, lane_index, i, maximum, sum, value);
  }
}

template <int kHeadDim, int kWarps, int kStages>
cudaError_t launch(const AttendParams& p, uint32_t ctas, cudaStream_t stream) {
  constexpr uint32_t kShared = kWarps * kStages * page_bytes(kHeadDim);
  const cudaError_t set =
      cudaFuncSetAttribute(attend_kernel<kHeadDim, kWarps, kStages>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (set != cudaSuccess) return set;
  attend_kernel<kHeadDim, kWarps, kStages><<<ctas, kWarps * 32, kShared, stream>>>(p);
  if (ctas > 1) {
    combine_kernel<kHeadDim, kWarps><<<ctas - 1, 512, 0, stream>>>(p, ctas);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_attend(const AttendParams& p, uint32_t head_dim, const LaunchShape& shape,
                          cudaStream_t stream) {
  if (p.group == 0 || p.group > 8) return cudaErrorInvalidValue;
  switch (head_dim) {
    case 64:
      return launch<64, 8, 8>(p, shape.ctas, stream);
    case 128:
      return shape.warps == 16   ? launch<128, 16, 3>(p, shape.ctas, stream)
             : shape.warps == 12 ? launch<128, 12, 3>(p, shape.ctas, stream)
                                 : launch<128, 8, 4>(p, shape.ctas, stream);
    case 256:
      return launch<256, 4, 4>(p, shape.ctas, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
