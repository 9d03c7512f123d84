// sequence_append.cu: one token of one layer into the buffers of all lanes.
//
// This runs once a layer in every step, so there is one read (TokenSite) before the write; the
// vectors are read, and the rotation is under way, meanwhile.
#include "kernels/cuda/codec_sites.cuh"
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kWarps = 4;  // of a block

struct AppendParams {
  const void* k;
  const void* v;
  Element element;
  uint32_t layer;
};

// Eight threads hold K, eight hold V; both go to the next slot of the buffer. Whole warp.
template <int kDim>
__device__ __forceinline__ void append_token(const BatchView& view, const TokenSite& site,
                                             uint32_t position, float (&x)[kDim / 8]) {
  if ((site.page & TokenSite::kRotates) != 0) rotate_vector<kDim>(x);
  const auto count = static_cast<uint32_t>(site.page & TokenSite::kTokens);
  const uint32_t slot = count % kBufferPageSlots, thread = threadIdx.x % 32;
  auto* page =
      reinterpret_cast<unsigned char*>(site.page & ~(TokenSite::kRotates | TokenSite::kTokens));
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(wide_format(view)));
  const bool bf16 = view.geometry.value_type == ValueType::kBf16;
  uint32_t raw[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) raw[i] = bf16 ? bf16_from_float(x[i]) : fp16_from_float(x[i]);
  put_k_words<kDim>(page, slot, raw, thread < 8);
  if (thread >= 8 && thread < 16) {
    put_v_words_in_order<kDim>(page + shape.v_offset, slot, raw);
  }
  if (thread == 16) {
    *reinterpret_cast<uint32_t*>(page + shape.position_offset + slot * kPositionBytes) = position;
    auto* lane = reinterpret_cast<DeviceLane*>(site.lane);
    lane->buffer_score[count] = 0;
    lane->buffer_count = count + 1;
    lane->live += 1;
  }
}

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32)
    append_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ AppendParams params) {
  wait_for_previous();
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32, thread = threadIdx.x % 32;
  const uint32_t rows = view.capacity * view.geometry.kv_heads;
  if (row >= rows) return;
  const TokenSite site = view.sites[uint64_t{params.layer} * rows + row];
  const uint32_t position = view.positions[row / view.geometry.kv_heads];
  float x[kDim / 8];
  load_row<kDim>(x, thread < 8 ? params.k : params.v, params.element, uint64_t{row} * kDim,
                 thread < 16 && site.page != 0);
  if (site.page != 0) append_token<kDim>(view, site, position, x);
}

template <int kDim>
cudaError_t launch_layer(const BatchView& view, const AppendParams& params, cudaStream_t stream) {
  const uint32_t rows = view.capacity * view.geometry.kv_heads;
  return launch(
      append_kernel<kDim>,
      {.blocks = (rows + kWarps - 1) / kWarps, .threads = kWarps * 32, .overlaps_previous = true},
      stream, view, params);
}

}  // namespace

cudaError_t launch_append(const BatchView& view, uint32_t layer, const void* k, const void* v,
                          Element element, cudaStream_t stream) {
  if (layer >= view.geometry.layers) return cudaErrorInvalidValue;
  const AppendParams params{k, v, element, layer};
  switch (view.geometry.head_dim) {
    case 64:
      return launch_layer<64>(view, params, stream);
    case 128:
      return launch_layer<128>(view, params, stream);
    case 256:
      return launch_layer<256>(view, params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
