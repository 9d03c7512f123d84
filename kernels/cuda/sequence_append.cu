// sequence_append.cu: one token of one layer into the buffers of all lanes.
//
// This runs once a layer in every step, so there is one read (TokenSite) before the write; the
// vectors are read, and the rotation is under way, meanwhile.
#include "kernels/cuda/centre.cuh"
#include "kernels/cuda/codec_sites.cuh"
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kWarps = 4;  // of a block
constexpr uint32_t kLaneThreads = 16;

struct AppendParams {
  const void* k;
  const void* v;
  Element element;
  uint32_t layer;
};

// Where the token of a lane goes. A null page: no sequence.
struct Place {
  unsigned char* page;
  DeviceLane* lane;
  uint32_t count;  // tokens in the buffer before
  bool rotates;
  bool centred;
  bool sums;  // fp32 instead of fp16

  __device__ __forceinline__ explicit Place(const TokenSite& site)
      : page(reinterpret_cast<unsigned char*>(
            site.page &
            ~(TokenSite::kSums | TokenSite::kCentred | TokenSite::kRotates | TokenSite::kTokens))),
        lane(reinterpret_cast<DeviceLane*>(site.lane)),
        count(static_cast<uint32_t>(site.page & TokenSite::kTokens)),
        rotates((site.page & TokenSite::kRotates) != 0),
        centred((site.page & TokenSite::kCentred) != 0),
        sums((site.page & TokenSite::kSums) != 0) {}
  [[nodiscard]] __device__ __forceinline__ uint32_t slot() const {
    return count % kBufferPageSlots;
  }
};

// Half a warp works on a lane: eight threads hold K, eight V. Time is spent waiting for memory, so
// all reads come first; and shuffles come before anything that only some threads do.
template <int kDim>
__global__ void __launch_bounds__(kWarps * 32)
    append_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ AppendParams params) {
  wait_for_previous();
  const uint32_t index = (blockIdx.x * kWarps * 32 + threadIdx.x) / kLaneThreads;
  const uint32_t rows = view.capacity * view.geometry.kv_heads, row = min(index, rows - 1);
  const bool is_v = threadIdx.x % kLaneThreads >= 8;
  float x[kDim / 8];
  load_row<kDim>(x, is_v ? params.v : params.k, params.element, uint64_t{row} * kDim, true);
  const Place place(view.sites[uint64_t{params.layer} * rows + row]);
  const bool active = index < rows && place.page != nullptr;
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(wide_format(view)));
  unsigned char* section = place.page + (is_v ? shape.v_offset : 0);
  uint4 words[kDim / 32] = {};
  if (active && is_v && place.slot() % 2 != 0) get_v_words<kDim>(section, place.slot(), words);
  const bool centres = active && !is_v && place.centred;
  float centre[kDim / 8];
  if (centres) load_centre<kDim>(centre, place.page);
  const bool counts = active && threadIdx.x % kLaneThreads == 0;
  const uint32_t live = counts ? place.lane->live : 0;

  float rotated[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) rotated[i] = x[i];
  rotate_vector<kDim>(rotated);
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) x[i] = place.rotates ? rotated[i] : x[i];
  if (centres) take_centre_off<kDim>(x, centre);
  uint32_t raw[kDim / 8];
  to_16_bits(raw, x, view.geometry.value_type == ValueType::kBf16);
  put_k_words<kDim>(section, place.slot(), raw, active && !is_v);
  if (active && is_v) put_v_words_in_order<kDim>(section, place.slot(), words, raw);
  if (!counts) return;
  *reinterpret_cast<uint32_t*>(place.page + shape.position_offset + place.slot() * kPositionBytes) =
      view.positions[row / view.geometry.kv_heads];
  if (place.sums) {
    place.lane->buffer_sum[place.count] = 0.0f;
  } else {
    place.lane->buffer_score[place.count] = 0;
  }
  place.lane->buffer_count = place.count + 1;
  place.lane->live = live + 1;
}

template <int kDim>
cudaError_t launch_layer(const BatchView& view, const AppendParams& params, cudaStream_t stream) {
  const uint32_t threads = view.capacity * view.geometry.kv_heads * kLaneThreads;
  return launch(append_kernel<kDim>,
                {.blocks = (threads + kWarps * 32 - 1) / (kWarps * 32),
                 .threads = kWarps * 32,
                 .overlaps_previous = true},
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
