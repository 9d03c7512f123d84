// prompt_energy.cu: the energy of the channels of a prompt's newest queries, by kv head; added by
// ascending rows, as kernels/sequence/rank_prompt.cpp does it.
#include <cstdint>

#include "kernels/cuda/channel_energy.cuh"
#include "kernels/cuda/prompt_queries.h"
#include "kernels/cuda/rows.cuh"

namespace thinkv::cuda {
namespace {

// A block a kv head, a thread a channel.
template <int kDim>
__global__ void __launch_bounds__(kDim) energy_kernel(const __grid_constant__ BatchView view,
                                                      const __grid_constant__ QueryParams params) {
  const ModelGeometry& g = view.geometry;
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr) return;
  const LaneView lane = lane_view(view, sequence, params.layer * g.kv_heads + blockIdx.x);
  if (lane.lane == nullptr) return;
  const uint32_t group = g.group(), channel = threadIdx.x;
  float energy = 0.0f;
  for (uint32_t i = params.count - params.window; i < params.count; ++i) {
    for (uint32_t h = 0; h < group; ++h) {
      const uint64_t row = uint64_t{i} * g.q_heads + blockIdx.x * group + h;
      const float x = value_at(params.q, params.element, row * kDim + channel);
      energy = exact_add(energy, exact_mul(x, x));
    }
  }
  float* const kept = channel_energy<kDim>(lane, channel);
  if (kept != nullptr) *kept = energy;
}

}  // namespace

cudaError_t launch_query_energy(const BatchView& view, const QueryParams& params,
                                cudaStream_t stream) {
  const LaunchSize size{.blocks = view.geometry.kv_heads, .threads = view.geometry.head_dim};
  switch (view.geometry.head_dim) {
    case 64:
      return launch(energy_kernel<64>, size, stream, view, params);
    case 128:
      return launch(energy_kernel<128>, size, stream, view, params);
    case 256:
      return launch(energy_kernel<256>, size, stream, view, params);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
