// sequence_centre.cu: the centres of a layer's lanes, from its prompt, and what they are worth to a
// query.
//
// A block a kv head reads the keys of the prompt once, 32 channels at a time; it is called before
// they are written. The order of additions is that of policy::channel_mean.
#include "kernels/cuda/centre.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/policy/centre.h"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kSums = policy::kCentreSums;
constexpr uint32_t kWarps = 16;
constexpr uint32_t kQueryThreads = 128;
static_assert(kSums % kWarps == 0);

struct CentreParams {
  const void* k;
  Element element;
  uint32_t root;
  uint32_t layer;
  uint32_t tokens;
};

struct CentreShared {
  float sums[kSums][33];  // [partial sum][channel]; 33: no two of a column in one bank
  float mean[256];
};

// The mean of the rows [first, params.tokens) of one head to shared.mean. Whole block.
template <int kDim>
__device__ void sum_channels(const BatchView& view, const CentreParams& params, uint32_t first,
                             CentreShared& shared) {
  const uint32_t warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const uint32_t heads = view.geometry.kv_heads;
  const auto rows = static_cast<float>(params.tokens - first);
  for (uint32_t channel = thread; channel < kDim; channel += 32) {
    for (uint32_t part = warp; part < kSums; part += kWarps) {
      float sum = 0.0f;
      for (uint32_t row = first + part; row < params.tokens; row += kSums) {
        const uint64_t at = (uint64_t{row} * heads + blockIdx.x) * kDim + channel;
        sum = exact_add(sum, value_at(params.k, params.element, at));
      }
      shared.sums[part][thread] = sum;
    }
    __syncthreads();
    if (warp == 0) {
      for (uint32_t half = kSums / 2; half >= 1; half /= 2) {
        for (uint32_t i = 0; i < half; ++i) {
          shared.sums[i][thread] = exact_add(shared.sums[i][thread], shared.sums[i + half][thread]);
        }
      }
      shared.mean[channel] =
          params.tokens == first ? 0.0f : exact_div(shared.sums[0][thread], rows);
    }
    __syncthreads();
  }
}

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32)
    centre_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ CentreParams params) {
  __shared__ CentreShared shared;
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr || sequence->policy.centre == 0) return;
  const LaneView lane =
      lane_view(view, sequence, params.layer * view.geometry.kv_heads + blockIdx.x);
  if (lane.lane == nullptr || lane.lane->live != 0) return;
  sum_channels<kDim>(view, params, min(sequence->policy.sink_tokens, params.tokens), shared);
  if (threadIdx.x >= 32) return;
  float x[kDim / 8];
  const uint32_t l = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) x[i] = shared.mean[l + 8 * static_cast<uint32_t>(i)];
  if (sequence->policy.rotate != 0) rotate_vector<kDim>(x);
  if (threadIdx.x >= 16) return;
  unsigned char* page = page_at(view, lane.lane->buffer_page[threadIdx.x / 8]);
  if (page == nullptr) return;
  auto* centre = reinterpret_cast<uint16_t*>(page + kCentreOffset<kDim>) + l * (kDim / 8);
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) centre[i] = policy::centre_bits(x[i]);
}

struct LseParams {
  const void* q;
  Element element;
  uint32_t layer;
  float scale;
  float* lse;
};

// Eight threads a query head.
template <int kDim>
__global__ void __launch_bounds__(kQueryThreads)
    lse_kernel(const __grid_constant__ BatchView view, const __grid_constant__ LseParams params) {
  wait_for_previous();
  const ModelGeometry& g = view.geometry;
  const uint32_t index = (blockIdx.x * kQueryThreads + threadIdx.x) / 8;
  const uint32_t heads = view.capacity * g.q_heads, head = min(index, heads - 1);
  float x[kDim / 8];
  load_row<kDim>(x, params.q, params.element, uint64_t{head} * kDim, true);
  const uint32_t row = head / g.q_heads, kv_head = head % g.q_heads / (g.q_heads / g.kv_heads);
  DeviceSequence* sequence = sequence_at(view, view.roots[row]);
  const bool centred = sequence != nullptr && is_centred(sequence);
  const bool rotates = centred && sequence->policy.rotate != 0;
  float rotated[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) rotated[i] = x[i];
  rotate_vector<kDim>(rotated);
  const unsigned char* page = nullptr;
  if (centred) {
    const LaneView lane = lane_view(view, sequence, params.layer * g.kv_heads + kv_head);
    if (lane.lane != nullptr) page = page_at(view, lane.lane->buffer_page[0]);
  }
  float sum = 0.0f;
  if (page != nullptr) {
    float centre[kDim / 8];
    load_centre<kDim>(centre, page);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) sum += (rotates ? rotated[i] : x[i]) * centre[i];
  }
#pragma unroll
  for (uint32_t h = 1; h < 8; h *= 2) sum += __shfl_xor_sync(kAllLanes, sum, h);
  if (index >= heads || page == nullptr || threadIdx.x % 8 != 0) return;
  params.lse[head] += params.scale * sum;
}

}  // namespace

cudaError_t launch_centre(const BatchView& view, uint32_t root, uint32_t layer, const void* k,
                          Element element, uint32_t tokens, cudaStream_t stream) {
  const CentreParams params{k, element, root, layer, tokens};
  const LaunchSize size{.blocks = view.geometry.kv_heads, .threads = kWarps * 32};
  switch (view.geometry.head_dim) {
    case 64:
      return launch(centre_kernel<64>, size, stream, view, params);
    case 128:
      return launch(centre_kernel<128>, size, stream, view, params);
    case 256:
      return launch(centre_kernel<256>, size, stream, view, params);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_centred_lse(const BatchView& view, uint32_t layer, const void* q,
                               Element element, float* lse, cudaStream_t stream) {
  if (layer >= view.geometry.layers || lse == nullptr) return cudaErrorInvalidValue;
  const LseParams params{q, element, layer, softmax_scale_of(view.geometry), lse};
  const uint32_t threads = view.capacity * view.geometry.q_heads * 8;
  const LaunchSize size{.blocks = (threads + kQueryThreads - 1) / kQueryThreads,
                        .threads = kQueryThreads,
                        .overlaps_previous = true};
  switch (view.geometry.head_dim) {
    case 64:
      return launch(lse_kernel<64>, size, stream, view, params);
    case 128:
      return launch(lse_kernel<128>, size, stream, view, params);
    case 256:
      return launch(lse_kernel<256>, size, stream, view, params);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
