// sequence_requests.cu: what is asked of one sequence between steps: evict by position, keep
// the newest, recode a range, close.
#include "kernels/cuda/class_table.cuh"
#include "kernels/cuda/coded_lane.cuh"
#include "kernels/cuda/lane_write.cuh"
#include "kernels/cuda/recode.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kRecodeThreads = 128;
constexpr uint32_t kWarpsOfABlock = 4;  // of the kernels with a warp a lane

// The warp's lane; lane.lane is null where there is none.
__device__ __forceinline__ LaneView lane_of_warp(const BatchView& view, DeviceSequence* sequence) {
  const uint32_t index = blockIdx.x * kWarpsOfABlock + threadIdx.x / 32;
  if (sequence == nullptr || index >= view.geometry.lanes()) return {};
  return lane_view(view, sequence, index);
}

// ---- evict ----

[[nodiscard]] __device__ __forceinline__ bool is_listed(const uint32_t* positions, uint32_t count,
                                                        uint32_t wanted) {
  uint32_t low = 0, high = count;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (positions[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && positions[low] == wanted;
}

// Live slots of a page whose positions `wanted` says yes to. Whole warp, same answer for all.
template <class Wanted>
[[nodiscard]] __device__ __forceinline__ uint64_t slots_where(const LaneView& lane,
                                                              const DeviceDescriptor* d,
                                                              Wanted wanted) {
  const unsigned char* page = page_at(*lane.batch, d->page);
  if (page == nullptr) return 0;
  const SlotShape shape = slot_shape(lane.head_dim, d->format);
  uint64_t found = 0;
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t slot = threadIdx.x % 32 + 32 * half;
    const bool live = slot < shape.slots && ((d->live >> slot) & 1u) != 0;
    const bool yes = live && wanted(position_of(page, shape.position_offset, slot));
    found |= uint64_t{__ballot_sync(kAllLanes, yes)} << (32 * half);
  }
  return found;
}

// Live tokens outside the buffer with first <= position <= last that `wanted` says yes to.
template <class Wanted>
__device__ __forceinline__ void evict_from_lane(const LaneView& lane, uint32_t first, uint32_t last,
                                                Wanted wanted) {
  uint32_t evicted = 0;
  const uint32_t pages = lane.lane->pages;
  for (uint32_t i = 0; i < pages; ++i) {
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (d == nullptr || d->last_position < first || d->first_position > last) continue;
    uint32_t of_prompt = 0;
    const uint64_t slots = slots_where(lane, d, [&](uint32_t position) {
      const bool yes = wanted(position);
      if (yes && position < lane.sequence->prompt_tokens) ++of_prompt;
      return yes;
    });
    for (uint32_t x = 16; x > 0; x /= 2) of_prompt += __shfl_xor_sync(kAllLanes, of_prompt, x);
    if (slots != 0 && threadIdx.x % 32 == 0) {
      drop_slots(lane, d, slots);
      lane.lane->live_prompt -= of_prompt;
    }
    evicted += static_cast<uint32_t>(__popcll(slots));
  }
  __syncwarp();
  if (evicted == 0) return;
  sweep_lane(lane);
  if (threadIdx.x % 32 == 0) add_64(&lane.sequence->counters.evicted_slots, evicted);
}

// Whole blocks: those of which all 64 tokens are named. One thread.
__device__ void evict_blocks(const StreamView& s, const uint32_t* positions, uint32_t count) {
  DeviceStream& d = *s.stream;
  const uint32_t prompt = s.lane.sequence->prompt_tokens, before = d.blocks;
  uint32_t kept = 0, of_prompt = 0;
  for (uint32_t i = 0; i < before; ++i) {
    const StreamBlock* block = block_at(s, i);
    StreamBlock* to = block_at(s, kept);
    if (block == nullptr || to == nullptr) return;
    const uint32_t first = block->first_position;
    bool named = true;
    for (uint32_t t = 0; named && t < kBlockTokens; ++t) {
      named = is_listed(positions, count, first + t);
    }
    if (!named) {
      *to = *block;
      ++kept;
    } else if (first < prompt) {
      of_prompt += min(prompt - first, kBlockTokens);
    }
  }
  if (kept == before) return;
  d.blocks = kept;
  const uint32_t evicted = (before - kept) * kBlockTokens;
  s.lane.lane->live -= evicted;
  s.lane.lane->live_prompt -= of_prompt;
  add_64(&s.lane.sequence->counters.evicted_slots, evicted);
  free_unused_pages(s);
}

__global__ void evict_kernel(const __grid_constant__ BatchView view, uint32_t root,
                             const uint32_t* positions, uint32_t count) {
  const LaneView lane = lane_of_warp(view, sequence_at(view, root));
  if (lane.lane == nullptr) return;
  if (lane.lane->stream_page != PageId::kNoneRaw) {
    const StreamView s = stream_of(lane);
    if (s.stream != nullptr && threadIdx.x % 32 == 0) evict_blocks(s, positions, count);
    return;
  }
  evict_from_lane(lane, positions[0], positions[count - 1],
                  [&](uint32_t position) { return is_listed(positions, count, position); });
}

__global__ void trim_kernel(const __grid_constant__ BatchView view, uint32_t root, uint32_t keep) {
  DeviceSequence* sequence = sequence_at(view, root);
  const LaneView lane = lane_of_warp(view, sequence);
  keep = max(keep, 2 * kBufferPageSlots);
  if (lane.lane == nullptr || sequence->tokens <= keep) return;
  const uint32_t first_kept = sequence->tokens - keep;
  evict_from_lane(lane, 0, first_kept - 1,
                  [&](uint32_t position) { return position < first_kept; });
}

// ---- recode ----

struct RecodeParams {
  uint32_t root;
  uint32_t first;
  uint32_t end;
  Format format;  // kF16 and kBf16: the model's 16-bit type
};

// Result: tokens of one page that were recoded.
template <int kDim>
__device__ uint32_t recode_page(const LaneView& lane, uint32_t index, const RecodeParams& params,
                                Format format, RecodeShared& shared) {
  DeviceDescriptor* d = descriptor_at(lane, index);
  if (d == nullptr || d->format == static_cast<uint8_t>(format) ||
      d->last_position < params.first || d->first_position >= params.end) {
    return 0;
  }
  const uint64_t chosen = slots_where(lane, d, [&](uint32_t position) {
    return position >= params.first && position < params.end;
  });
  if (chosen == 0) return 0;
  return recode_slots<kDim>(lane, index, chosen, format, shared);
}

// A block a lane. Pages that it empties are given back by sweep_kernel: this one takes pages.
template <int kDim>
__global__ void __launch_bounds__(kRecodeThreads)
    recode_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ RecodeParams params) {
  __shared__ RecodeShared shared;
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr) return;
  const LaneView lane = lane_view(view, sequence, blockIdx.x);
  if (lane.lane == nullptr) return;
  const Format format = resolve_format(view, params.format);
  const uint32_t pages = lane.lane->pages;  // those that come are already in the format
  __syncthreads();
  uint32_t moved = 0;
  for (uint32_t i = 0; i < pages; ++i) {
    moved += recode_page<kDim>(lane, i, params, format, shared);
  }
  if (threadIdx.x != 0 || moved == 0) return;
  add_64(&sequence->counters.recoded_slots, moved);
  add_64(&sequence->counters.recoded_bytes, uint64_t{moved} * payload_bytes<kDim>(format));
}

__global__ void sweep_kernel(const __grid_constant__ BatchView view, uint32_t root) {
  const LaneView lane = lane_of_warp(view, sequence_at(view, root));
  if (lane.lane != nullptr) sweep_lane(lane);
}

// ---- close ----

__device__ __forceinline__ void give_if_good(const BatchView& view, uint32_t raw) {
  if (page_at(view, raw) != nullptr) give_page(view.lease, raw);
}

// Whole warp.
__device__ void close_stream(const StreamView& s) {
  if (s.stream == nullptr) return;
  const BatchView& view = *s.lane.batch;
  const uint32_t thread = threadIdx.x % 32;
  for (uint32_t i = thread; i < s.stream->pages; i += 32) {
    const uint32_t* id = listed_page(s, i);
    if (id != nullptr && *id != PageId::kNoneRaw) give_if_good(view, *id);
  }
  __syncwarp();
  for (uint32_t i = thread; i < s.stream->block_pages; i += 32) {
    give_if_good(view, s.stream->block_page[i]);
  }
  for (uint32_t i = thread; i < s.stream->list_pages; i += 32) {
    give_if_good(view, s.stream->list_page[i]);
  }
  __syncwarp();
  if (thread == 0) give_if_good(view, s.lane.lane->stream_page);
}

__global__ void close_lanes_kernel(const __grid_constant__ BatchView view, uint32_t root) {
  const LaneView lane = lane_of_warp(view, sequence_at(view, root));
  if (lane.lane == nullptr) return;
  const uint32_t thread = threadIdx.x % 32;
  for (uint32_t i = thread; i < lane.lane->pages; i += 32) {
    const DeviceDescriptor* d = descriptor_at(lane, i);
    if (d != nullptr && owns_page(d)) give_if_good(view, d->page);
  }
  for (uint32_t i = thread; i < lane.lane->table_pages; i += 32) {
    give_if_good(view, lane.lane->table[i]);
  }
  if (thread < 2) give_if_good(view, lane.lane->buffer_page[thread]);
  close_stream(stream_of(lane));
}

// One block, after the lanes: what led to them, and the root itself.
__global__ void close_root_kernel(const __grid_constant__ BatchView view, uint32_t root) {
  DeviceSequence* sequence = sequence_at(view, root);
  if (sequence == nullptr) return;
  const uint32_t dim = view.geometry.head_dim;
  const uint32_t lane_pages =
      (view.geometry.lanes() + lanes_per_page(dim) - 1) / lanes_per_page(dim);
  for (uint32_t i = threadIdx.x; i < lane_pages; i += blockDim.x) {
    give_if_good(view, lane_page_ids(sequence)[i]);
  }
  for (uint32_t i = threadIdx.x; i < sequence->segment_pages; i += blockDim.x) {
    give_if_good(view, sequence->segment_page[i]);
  }
  const uint32_t class_pages = class_pages_of(sequence, dim);
  const auto* classes = reinterpret_cast<const uint32_t*>(
      class_pages == 0 ? nullptr : page_at(view, sequence->class_directory));
  for (uint32_t i = threadIdx.x; i < class_pages && classes != nullptr; i += blockDim.x) {
    give_if_good(view, classes[i]);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (classes != nullptr) give_page(view.lease, sequence->class_directory);
  give_if_good(view, sequence->work_page);
  sequence->magic = 0;  // nobody follows a root that is closed
  give_page(view.lease, root);
}

[[nodiscard]] LaunchSize warp_a_lane(const BatchView& view) {
  const uint32_t lanes = view.geometry.lanes();
  return {.blocks = (lanes + kWarpsOfABlock - 1) / kWarpsOfABlock, .threads = kWarpsOfABlock * 32};
}

template <int kDim>
cudaError_t launch_recode_of(const BatchView& view, const RecodeParams& params,
                             cudaStream_t stream) {
  return launch(recode_kernel<kDim>, {.blocks = view.geometry.lanes(), .threads = kRecodeThreads},
                stream, view, params);
}

}  // namespace

cudaError_t launch_evict(const BatchView& view, uint32_t root, const uint32_t* positions,
                         uint32_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch(evict_kernel, warp_a_lane(view), stream, view, root, positions, count);
}

cudaError_t launch_trim(const BatchView& view, uint32_t root, uint32_t keep, cudaStream_t stream) {
  return launch(trim_kernel, warp_a_lane(view), stream, view, root, keep);
}

cudaError_t launch_recode(const BatchView& view, uint32_t root, uint32_t first, uint32_t end,
                          Format format, cudaStream_t stream) {
  if (!format_valid(static_cast<uint8_t>(format))) return cudaErrorInvalidValue;
  const RecodeParams params{root, first, end, format};
  cudaError_t error = cudaErrorInvalidValue;
  switch (view.geometry.head_dim) {
    case 64:
      error = launch_recode_of<64>(view, params, stream);
      break;
    case 128:
      error = launch_recode_of<128>(view, params, stream);
      break;
    case 256:
      error = launch_recode_of<256>(view, params, stream);
      break;
    default:
      break;
  }
  if (error != cudaSuccess) return error;
  return launch(sweep_kernel, warp_a_lane(view), stream, view, root);
}

cudaError_t launch_close(const BatchView& view, uint32_t root, cudaStream_t stream) {
  const cudaError_t error = launch(close_lanes_kernel, warp_a_lane(view), stream, view, root);
  if (error != cudaSuccess) return error;
  return launch(close_root_kernel, {.blocks = 1, .threads = 256}, stream, view, root);
}

}  // namespace thinkv::cuda
