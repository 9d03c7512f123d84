// sequence_prefill.cu: the prompt of one layer, written at once in the prompt's formats.
//
// The lanes are empty, so where a token goes is known from its index: the sinks fill pages of the
// sink format, all others pages of the prompt's format, in order. A first kernel takes the pages
// and writes their descriptors, a second one encodes: a block a page, in shared memory, so that a
// page is written once and whole. Of a sparse layer of a policy with a tier the prompt's middle is
// left out, as if it were not there; tier_put.cu writes it. With entropy the oldest tokens are in
// streams already (launch_code_prompt).
#include "kernels/cuda/centre.cuh"
#include "kernels/cuda/codec.cuh"
#include "kernels/cuda/prompt_pages.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kBlocksMax = 132 * 16;

struct PrefillParams {
  const void* k;
  const void* v;
  Element element;
  uint32_t root;
  uint32_t layer;
  uint32_t tokens;
};

// Result: false where the table cannot hold the pages.
__device__ bool grow_tables(const LaneView& lane, uint32_t pages) {
  const uint32_t tables = (pages + lane.per_table - 1) / lane.per_table;
  if (tables > kTablePagesMax) {
    raise_fault(lane.batch->lease, kLeaseEmpty);
    return false;
  }
  DeviceLane& header = *lane.lane;
  for (; header.table_pages < tables; header.table_pages += 1) {
    const uint32_t raw = take_page(lane.batch->lease);
    if (raw == PageId::kNoneRaw) return false;
    header.table[header.table_pages] = raw;
    atomicAdd(&lane.sequence->metadata_pages, 1u);
  }
  return true;
}

// Result: false where the lease was empty.
__device__ bool write_descriptor(const LaneView& lane, uint32_t index, const PromptPages& split) {
  const PromptPage page = prompt_page(split, index);
  auto* table = page_at(*lane.batch, lane.lane->table[index / lane.per_table]);
  const uint32_t raw = take_page(lane.batch->lease);
  if (table == nullptr || raw == PageId::kNoneRaw) return false;
  auto* d = reinterpret_cast<DeviceDescriptor*>(table) + index % lane.per_table;
  *d = {.live = low_slots(page.count),
        .page = raw,
        .format = static_cast<uint8_t>(page.format),
        .filled = static_cast<uint8_t>(page.count),
        .reserved0 = 0,
        .first_position = split.position(page.first),
        .last_position = split.position(page.first + page.count - 1),
        .marks = 0};
  if (!lane.scored()) return true;
  auto* scores = reinterpret_cast<uint4*>(score_row(lane, d, index));
  const uint32_t words = kSlotsPerPageMax * lane.score_bytes / 16;
  for (uint32_t i = 0; i < words; ++i) scores[i] = make_uint4(0, 0, 0, 0);
  return true;
}

// A block a lane of the layer.
__global__ void pages_kernel(const __grid_constant__ BatchView view,
                             const __grid_constant__ PrefillParams params) {
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr) return;
  const uint32_t index = params.layer * view.geometry.kv_heads + blockIdx.x;
  const LaneView lane = lane_view(view, sequence, index);
  if (lane.lane == nullptr) return;
  const PromptPages split = split_prompt(view, sequence, params.layer, params.tokens);
  if (blockIdx.x == 0 && threadIdx.x == 0 && split.gap > split.coded) {
    sequence->tier_tokens = split.gap;
  }
  const StreamView stream = stream_of(lane);
  const uint32_t coded = stream.stream == nullptr ? 0 : stream.stream->end_position;
  const bool empty = lane.lane->live == 0 && lane.lane->pages == 0 && coded == split.coded;
  bool good = empty && split.pages > 0;
  __syncthreads();  // all threads have seen the lane as it was
  if (threadIdx.x == 0) good = good && grow_tables(lane, split.pages);
  if (__syncthreads_or(good ? 0 : 1) != 0) {
    if (threadIdx.x == 0 && !empty) raise_fault(view.lease, kBadMetadata);
    return;
  }
  for (uint32_t i = threadIdx.x; i < split.pages; i += blockDim.x) {
    good = write_descriptor(lane, i, split) && good;
  }
  if (__syncthreads_or(good ? 0 : 1) != 0 || threadIdx.x != 0) return;
  DeviceLane& header = *lane.lane;
  const uint32_t others = split.tokens - split.sinks;
  header.free_slots[static_cast<uint32_t>(split.sink_format)] +=
      split.sink_pages * split.sink_slots - split.sinks;
  header.free_slots[static_cast<uint32_t>(split.other_format)] +=
      (split.pages - split.sink_pages) * split.other_slots - others;
  header.pages = split.pages;
  header.live = split.tokens + split.coded;
  header.live_prompt = split.tokens + split.coded;
  atomicAdd(&sequence->data_pages, split.pages);
}

// The vectors of one page, K and V, into the image `page` in shared memory. centre_page: a page of
// the lane's buffer where its keys are centred, else null.
template <int kDim>
__device__ void encode_page(const BatchView& view, const PrefillParams& params, bool rotate,
                            const unsigned char* centre_page, uint32_t head,
                            const PromptPages& split, uint32_t index, unsigned char* page) {
  const PromptPage from = prompt_page(split, index);
  float centre[kDim / 8] = {};
  if (centre_page != nullptr) load_centre<kDim>(centre, centre_page);
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(from.format));
  const uint32_t quarter = threadIdx.x / 8;
  for (uint32_t base = 0; base < from.count; base += kThreads / 8) {
    const uint32_t slot = base + quarter;
    const bool active = slot < from.count;
    const uint32_t place = active ? slot : 0;
    const uint32_t position = split.position(from.first + place);
    const uint64_t row = (uint64_t{position} * view.geometry.kv_heads + head) * uint64_t{kDim};
    float x[kDim / 8];
    load_row<kDim>(x, params.k, params.element, row, active);
    if (rotate) rotate_vector<kDim>(x);
    if (centre_page != nullptr) take_centre_off<kDim>(x, centre);
    encode_vector<kDim, true>(
        x, from.format, vector_place<kDim, true>(page, shape, coding_of<true>(from.format), place),
        active);
    load_row<kDim>(x, params.v, params.element, row, active);
    if (rotate) rotate_vector<kDim>(x);
    encode_vector<kDim, false>(
        x, from.format,
        vector_place<kDim, false>(page, shape, coding_of<false>(from.format), place), active);
    if (!active || threadIdx.x % 8 != 0) continue;
    *reinterpret_cast<uint32_t*>(page + shape.position_offset + slot * kPositionBytes) = position;
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ PrefillParams params) {
  constexpr uint32_t kWords = page_bytes(kDim) / 16;
  __shared__ uint4 image[kWords];
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr) return;
  const PromptPages split = split_prompt(view, sequence, params.layer, params.tokens);
  const uint32_t total = split.pages * view.geometry.kv_heads;
  for (uint32_t i = blockIdx.x; i < total; i += gridDim.x) {
    const uint32_t head = i / split.pages, index = i % split.pages;
    const LaneView lane = lane_view(view, sequence, params.layer * view.geometry.kv_heads + head);
    if (lane.lane == nullptr || lane.lane->pages != split.pages) continue;
    const DeviceDescriptor* d = descriptor_at(lane, index);
    unsigned char* page = d == nullptr ? nullptr : page_at(view, d->page);
    if (page == nullptr) continue;
    for (uint32_t w = threadIdx.x; w < kWords; w += kThreads) {
      image[w] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    const bool centred = sequence->policy.centre != 0;
    const unsigned char* centre = centred ? page_at(view, lane.lane->buffer_page[0]) : nullptr;
    encode_page<kDim>(view, params, sequence->policy.rotate != 0, centre, head, split, index,
                      reinterpret_cast<unsigned char*>(image));
    __syncthreads();
    for (uint32_t w = threadIdx.x; w < kWords; w += kThreads) {
      reinterpret_cast<uint4*>(page)[w] = image[w];
    }
    __syncthreads();
  }
}

template <int kDim>
cudaError_t launch_encode(const BatchView& view, const PrefillParams& params, cudaStream_t stream) {
  // No format has fewer than 8 slots a page; blocks beyond the pages end at once.
  const uint64_t most = uint64_t{view.geometry.kv_heads} * (params.tokens / 8 + 2);
  const auto blocks = static_cast<uint32_t>(most < kBlocksMax ? most : kBlocksMax);
  return launch(encode_kernel<kDim>, {.blocks = blocks, .threads = kThreads}, stream, view, params);
}

}  // namespace

cudaError_t launch_prefill(const BatchView& view, uint32_t root, uint32_t layer, const void* k,
                           const void* v, Element element, uint32_t tokens, cudaStream_t stream) {
  if (layer >= view.geometry.layers || tokens == 0) return cudaErrorInvalidValue;
  const PrefillParams params{k, v, element, root, layer, tokens};
  const cudaError_t centred = launch_centre(view, root, layer, k, element, tokens, stream);
  if (centred != cudaSuccess) return centred;
  const cudaError_t first = launch(
      pages_kernel, {.blocks = view.geometry.kv_heads, .threads = kThreads}, stream, view, params);
  if (first != cudaSuccess) return first;
  switch (view.geometry.head_dim) {
    case 64:
      return launch_encode<64>(view, params, stream);
    case 128:
      return launch_encode<128>(view, params, stream);
    case 256:
      return launch_encode<256>(view, params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
