// sequence_append.cu: one token of one layer into the buffers, and the layer's list of pages.
//
// This runs once a layer in every step, so what counts is the chain of dependent reads: root, page
// of lanes, lane, descriptors. The vectors are read, rotated and rounded while that chain is under
// way.
#include "kernels/cuda/codec_sites.cuh"
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kWarps = 4;  // of a block
// Up to so many lanes there are warps to spare: four share the list of one lane.
constexpr uint32_t kSharedLanesMax = 512;

struct AppendParams {
  const void* k;
  const void* v;
  Element element;
  uint32_t layer;
  uint32_t warps_per_lane;  // 1 or kWarps
};

// The run of the page list that belongs to a lane.
struct ListRun {
  PageView* pages;
  uint16_t** score_rows;
  uint32_t room;
};

__device__ __forceinline__ ListRun list_run(const BatchView& view, uint32_t layer, uint32_t row) {
  const uint32_t lanes = view.capacity * view.geometry.kv_heads;
  const uint32_t* begin = view.lane_begin + uint64_t{layer} * (lanes + 1) + row;
  const uint32_t first = begin[0], end = begin[1];
  return {view.pages + first, view.score_rows + first, end > first ? end - first : 0};
}

// Eight threads hold K, eight hold V; both go to slot `count` of the buffer. Whole warp.
// Result: tokens in the buffer afterwards.
template <int kDim>
__device__ __forceinline__ uint32_t append_token(const LaneView& lane, bool rotate,
                                                 const float (&vector)[kDim / 8]) {
  float x[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) x[i] = vector[i];
  if (rotate) rotate_vector<kDim>(x);
  const BatchView& view = *lane.batch;
  const uint32_t count = lane.lane->buffer_count, thread = threadIdx.x % 32;
  __syncwarp();  // all threads have read the count that one of them raises
  if (count >= kBufferTokens) {
    raise_fault(view.lease, kBadMetadata);
    return kBufferTokens;
  }
  unsigned char* page = page_at(view, lane.lane->buffer_page[count / kBufferPageSlots]);
  if (page == nullptr) return 0;
  const uint32_t slot = count % kBufferPageSlots;
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(wide_format(view)));
  const bool bf16 = view.geometry.value_type == ValueType::kBf16;
  uint32_t raw[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) raw[i] = bf16 ? bf16_from_float(x[i]) : fp16_from_float(x[i]);
  put_k_words<kDim>(page, slot, raw, thread < 8);
  if (thread >= 8 && thread < 16) put_halves<kDim, false>(page + shape.v_offset, slot, raw);
  if (thread == 16) {
    *reinterpret_cast<uint32_t*>(page + shape.position_offset + slot * kPositionBytes) =
        lane.sequence->tokens;
    lane.lane->buffer_score[count] = 0;
    lane.lane->buffer_count = count + 1;
    lane.lane->live += 1;
  }
  return count + 1;
}

[[nodiscard]] __device__ __forceinline__ PageView nothing(const BatchView& view) {
  return {0, view.pool.base | static_cast<uint64_t>(Format::kF16)};
}

// The half of a descriptor that the list is made from, in one read.
struct ListedPage {
  uint64_t live;
  uint32_t page;
  uint32_t format;
};
[[nodiscard]] __device__ __forceinline__ ListedPage read_listed(const DeviceDescriptor* d) {
  static_assert(offsetof(DeviceDescriptor, page) == 8 && offsetof(DeviceDescriptor, format) == 12);
  const uint4 raw = *reinterpret_cast<const uint4*>(d);
  return {raw.x | uint64_t{raw.y} << 32, raw.z, raw.w & 0xFFu};
}

// Descriptors first, first + stride, ... of the lane. kScored: the policy's scores lie beside them.
template <int kDim, bool kScored>
__device__ __forceinline__ void list_table(const LaneView& lane, const ListRun& run, uint32_t first,
                                           uint32_t stride) {
  constexpr uint32_t kPerTable = descriptors_per_page(kDim, kScored);
  const BatchView& view = *lane.batch;
  const uint32_t pages = min(lane.lane->pages, run.room);
#pragma unroll 4
  for (uint32_t i = first; i < pages; i += stride) {
    auto* table =
        reinterpret_cast<const DeviceDescriptor*>(page_at(view, lane.lane->table[i / kPerTable]));
    PageView entry = nothing(view);
    uint16_t* scores = nullptr;
    if (table != nullptr) {
      const ListedPage d = read_listed(table + i % kPerTable);
      const unsigned char* page = page_at(view, d.page);
      if (page != nullptr && format_valid(static_cast<uint8_t>(d.format))) {
        entry.live = d.live & low_slots(slot_shape(kDim, d.format).slots);
        entry.tagged = reinterpret_cast<uint64_t>(page) | d.format;
      } else {
        raise_fault(view.lease, kBadMetadata);
      }
      if constexpr (kScored) {
        auto* rows = reinterpret_cast<const uint16_t*>(table + kPerTable);
        scores = const_cast<uint16_t*>(rows) + i % kPerTable * kSlotsPerPageMax;
      }
    }
    run.pages[i] = entry;
    run.score_rows[i] = scores;
  }
}

// The pages of the buffer, and empty entries where the list has room that the lane does not use.
__device__ __forceinline__ void list_buffer(const LaneView& lane, const ListRun& run,
                                            uint32_t count) {
  const BatchView& view = *lane.batch;
  for (uint32_t i = lane.lane->pages + threadIdx.x % 32; i < run.room; i += 32) {
    const uint32_t b = i - lane.lane->pages;
    PageView entry = nothing(view);
    uint16_t* scores = nullptr;
    if (b < buffer_pages(count)) {
      const unsigned char* page = page_at(view, lane.lane->buffer_page[b]);
      if (page != nullptr) {
        entry.live = low_slots(min(count - b * kBufferPageSlots, kBufferPageSlots));
        entry.tagged = reinterpret_cast<uint64_t>(page) | static_cast<uint64_t>(wide_format(view));
        if (lane.scored) scores = lane.lane->buffer_score + b * kBufferPageSlots;
      }
    }
    run.pages[i] = entry;
    run.score_rows[i] = scores;
  }
}

__device__ __forceinline__ void list_nothing(const BatchView& view, const ListRun& run) {
  for (uint32_t i = threadIdx.x % 32; i < run.room; i += 32) {
    run.pages[i] = nothing(view);
    run.score_rows[i] = nullptr;
  }
}

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32)
    append_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ AppendParams params) {
  wait_for_previous();
  const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / 32, thread = threadIdx.x % 32;
  const uint32_t row = warp / params.warps_per_lane, part = warp % params.warps_per_lane;
  const uint32_t heads = view.geometry.kv_heads;
  // The last of a lane's warps: the first has the first descriptors to list.
  const bool appends = part + 1 == params.warps_per_lane;
  if (row >= view.capacity * heads) return;
  const uint32_t root = view.roots[row / heads];
  const ListRun run = list_run(view, params.layer, row);
  float x[kDim / 8];
  load_row<kDim>(x, thread < 8 ? params.k : params.v, params.element, uint64_t{row} * kDim,
                 appends && thread < 16 && root != PageId::kNoneRaw);
  const LaneView lane = lane_of_root(view, root, params.layer * heads + row % heads);
  if (lane.lane == nullptr) {
    if (appends) list_nothing(view, run);
    return;
  }
  if (appends)
    list_buffer(lane, run, append_token<kDim>(lane, lane.sequence->policy.rotate != 0, x));
  if (lane.scored) {
    list_table<kDim, true>(lane, run, part * 32 + thread, params.warps_per_lane * 32);
  } else {
    list_table<kDim, false>(lane, run, part * 32 + thread, params.warps_per_lane * 32);
  }
}

template <int kDim>
cudaError_t launch_layer(const BatchView& view, const AppendParams& params, cudaStream_t stream) {
  const uint32_t warps = view.capacity * view.geometry.kv_heads * params.warps_per_lane;
  return launch(
      append_kernel<kDim>,
      {.blocks = (warps + kWarps - 1) / kWarps, .threads = kWarps * 32, .overlaps_previous = true},
      stream, view, params);
}

}  // namespace

cudaError_t launch_append(const BatchView& view, uint32_t layer, const void* k, const void* v,
                          Element element, cudaStream_t stream) {
  if (layer >= view.geometry.layers) return cudaErrorInvalidValue;
  const uint32_t lanes = view.capacity * view.geometry.kv_heads;
  const AppendParams params{k, v, element, layer, lanes <= kSharedLanesMax ? kWarps : 1};
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
