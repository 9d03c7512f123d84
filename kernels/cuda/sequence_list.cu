// sequence_list.cu: the beginning of a step: what each lane will have once this step's token is in
// its buffer, where that token goes, and the lists of pages that attention reads.
//
// Tables change at the end of a step only, so the lists of all layers are made here at once, with
// all the parallelism that there is. Three launches: a thread a lane finds and counts, a block a
// layer adds up, a warp a lane lists.
#include "kernels/cuda/centre.cuh"
#include "kernels/cuda/coded_lane.cuh"
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rank_step.cuh"
#include "kernels/cuda/step.cuh"
#include "kernels/cuda/working.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kFindThreads = 128;
constexpr uint32_t kScanThreads = 1024;
constexpr uint32_t kListWarps = 4;  // of a block

// ---- find and count ----

struct StepFlags {
  bool closing;
  bool emitting;
  uint32_t rank;  // RankStep
};

__device__ StepFlags flags_of(const BatchView& view, DeviceSequence* sequence) {
  const policy::Segment* open = open_segment(view, sequence);
  const PolicyParams& p = sequence->policy;
  const bool closing = open != nullptr && sequence->tokens + 1 - open->start >= p.segment_tokens;
  if (p.evict == EvictRule::kRank) {
    const policy::Moment moment = rank_moment(sequence, 1);
    const bool measures = sequence->score_bytes != 0 && policy::measures(p, moment);
    return {closing, measures, rank_plan(p, moment)};
  }
  const uint32_t every = p.score_every == 0 ? 1 : p.score_every;
  return {closing, sequence->score_bytes != 0 && sequence->counters.steps % every == 0, 0};
}

// What the first layer's block notes in the sequence.
__device__ void note_step(const BatchView& view, DeviceSequence* sequence, const StepFlags& flags) {
  const LaneView first = lane_view(view, sequence, 0);
  const bool full = first.lane != nullptr && first.lane->buffer_count + 1 >= kBufferTokens;
  sequence->closing = flags.closing ? 1 : 0;
  sequence->emitting = flags.emitting ? 1 : 0;
  sequence->flushing = flags.closing || full ? 1 : 0;
  sequence->rank_step = flags.rank;
  sequence->over_budget = 0;
  if ((flags.rank & kRankClears) != 0) sequence->window_queries = 0;
}

__device__ bool is_label_layer(const PolicyParams& policy, uint32_t layer) {
  for (uint32_t i = 0; i < kLabelLayersMax; ++i) {
    if (i < policy.label_layer_count && policy.label_layers[i] == layer) return true;
  }
  return false;
}

// One row of the batch in one layer; the first layer's block also notes it in the sequence.
__device__ void begin_row(const BatchView& view, uint32_t row, uint32_t layer) {
  DeviceSequence* sequence = sequence_at(view, view.roots[row]);
  uint8_t emit = 0;
  uint32_t position = 0;
  if (sequence != nullptr) {
    position = sequence->tokens;
    const StepFlags flags = flags_of(view, sequence);
    if (flags.emitting) emit |= sequence->score_bytes == 4 ? kEmitSums : kEmitScores;
    if (sequence->trace_sparsity != 0 ||
        (flags.closing && is_label_layer(sequence->policy, layer))) {
      emit |= kEmitSparsity;
    }
    if (layer == 0) note_step(view, sequence, flags);
  }
  view.emit[uint64_t{layer} * view.capacity + row] = emit;
  if (layer == 0) view.positions[row] = position;
}

// Entries of the list in which the lane's coded blocks are read.
[[nodiscard]] __device__ __forceinline__ uint32_t stream_entries(const LaneView& lane) {
  const StreamView s = stream_of(lane);
  if (s.stream == nullptr || s.stream->blocks == 0) return 0;
  if (lane.batch->stream_pages != nullptr) {
    return s.stream->blocks * (kBlockTokens / kBufferPageSlots);
  }
  raise_fault(lane.batch->lease, kListFull);
  return 0;
}

// Notes where the token of this step goes. Result: entries of the lane in the list once it is
// there.
__device__ uint32_t find_lane(const BatchView& view, const LaneView& lane, TokenSite& site) {
  site = {0, 0};
  if (lane.lane == nullptr) return 0;
  const uint32_t count = lane.lane->buffer_count;
  if (count >= kBufferTokens) {
    raise_fault(view.lease, kBadMetadata);
    return lane.lane->pages + buffer_pages(kBufferTokens);
  }
  const auto* page = page_at(view, lane.lane->buffer_page[count / kBufferPageSlots]);
  const uint64_t rotates = lane.sequence->policy.rotate != 0 ? TokenSite::kRotates : 0;
  const uint64_t centred = is_centred(lane.sequence) ? TokenSite::kCentred : 0;
  const uint64_t sums = lane.score_bytes == 4 ? TokenSite::kSums : 0;
  if (page != nullptr) {
    site = {reinterpret_cast<uint64_t>(lane.lane),
            reinterpret_cast<uint64_t>(page) | sums | rotates | centred | count};
  }
  return stream_entries(lane) + lane.lane->pages + buffer_pages(count + 1);
}

// A thread a lane; the count goes where the scan puts the sum of those before it.
__global__ void __launch_bounds__(kFindThreads)
    find_kernel(const __grid_constant__ BatchView view) {
  wait_for_previous();
  const uint32_t heads = view.geometry.kv_heads, rows = view.capacity * heads;
  const uint32_t index = blockIdx.x * kFindThreads + threadIdx.x;
  const uint32_t layer = index / rows, row = index % rows;
  if (layer >= view.geometry.layers) return;
  if (row % heads == 0) begin_row(view, row / heads, layer);
  const LaneView lane = lane_of_root(view, view.roots[row / heads], layer * heads + row % heads);
  if (lane.lane != nullptr && lane.sequence->tier_tokens != 0 &&
      tier_of_row(view, row / heads) == nullptr) {
    raise_fault(view.lease, kBadMetadata);  // its rows are in another process, or gone with it
  }
  uint32_t entries = find_lane(view, lane, view.sites[index]);
  if (entries != 0) entries += working_run(view, layer, row).pages();
  forget_choice(view, index);
  view.lane_begin[uint64_t{layer} * (rows + 1) + row] = entries;
}

// The sum of all earlier threads' values, and the total.
struct BlockScan {
  uint32_t before;
  uint32_t total;
};
__device__ BlockScan block_scan(uint32_t value, uint32_t (&warp_sums)[32]) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
  for (uint32_t x = 1; x < 32; x *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, sum, x);
    if (lane >= x) sum += left;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  uint32_t warps = lane < blockDim.x / 32 ? warp_sums[lane] : 0;
  for (uint32_t x = 1; x < 32; x *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, warps, x);
    if (lane >= x) warps += left;
  }
  const uint32_t below = __shfl_sync(kAllLanes, warps, warp == 0 ? 0 : warp - 1);
  const uint32_t total = __shfl_sync(kAllLanes, warps, 31);
  __syncthreads();  // the sums are read before the next round writes them
  return {(warp == 0 ? 0 : below) + sum - value, total};
}

// A block a layer.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const __grid_constant__ BatchView view) {
  __shared__ uint32_t warp_sums[32];
  wait_for_previous();
  const uint32_t rows = view.capacity * view.geometry.kv_heads;
  uint32_t* begin = view.lane_begin + uint64_t{blockIdx.x} * (rows + 1);
  uint32_t done = 0;
  for (uint32_t base = 0; base < rows; base += blockDim.x) {
    const uint32_t row = base + threadIdx.x;
    const BlockScan scan = block_scan(row < rows ? begin[row] : 0, warp_sums);
    if (row < rows) begin[row] = min(done + scan.before, view.pages_max);
    done += scan.total;
  }
  if (threadIdx.x != 0) return;
  begin[rows] = min(done, view.pages_max);
  if (done > view.pages_max) raise_fault(view.lease, kListFull);
}

// ---- the lists ----

// The run of the page list that belongs to a lane.
struct ListRun {
  PageView* pages;
  uint16_t** score_rows;
  uint32_t room;
  uint64_t entry;  // the first, of the layer's list
};

__device__ __forceinline__ ListRun list_run(const BatchView& view, uint32_t layer, uint32_t row) {
  const uint32_t lanes = view.capacity * view.geometry.kv_heads;
  const uint32_t* begin = view.lane_begin + uint64_t{layer} * (lanes + 1) + row;
  const uint32_t first = begin[0], end = begin[1];
  const uint64_t at = uint64_t{layer} * view.pages_max + first;
  return {view.pages + at, view.score_rows + at, end > first ? end - first : 0, first};
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

struct ListEntry {
  PageView page;
  uint16_t* scores;
  uint32_t format;
};

// Descriptor `i` of the lane; what is not valid counts as an empty page. kWidth: bytes of a slot's
// number beside the descriptors, or 0.
template <int kDim, uint32_t kWidth>
[[nodiscard]] __device__ __forceinline__ ListEntry table_entry(const LaneView& lane, uint32_t i) {
  constexpr uint32_t kPerTable = descriptors_per_page(kDim, kWidth);
  const BatchView& view = *lane.batch;
  ListEntry entry{nothing(view), nullptr, static_cast<uint32_t>(Format::kF16)};
  auto* table =
      reinterpret_cast<const DeviceDescriptor*>(page_at(view, lane.lane->table[i / kPerTable]));
  if (table == nullptr) return entry;
  const ListedPage d = read_listed(table + i % kPerTable);
  const unsigned char* page = page_at(view, d.page);
  if (page != nullptr && page_format_valid(static_cast<uint8_t>(d.format))) {
    entry.page.live = d.live & low_slots(slot_shape(kDim, d.format).slots);
    entry.page.tagged = reinterpret_cast<uint64_t>(page) | d.format;
    entry.format = d.format;
  } else {
    raise_fault(view.lease, kBadMetadata);
  }
  if constexpr (kWidth > 0) {
    const auto* rows = reinterpret_cast<const unsigned char*>(table + kPerTable);
    const unsigned char* row = rows + i % kPerTable * kSlotsPerPageMax * kWidth;
    entry.scores = const_cast<uint16_t*>(reinterpret_cast<const uint16_t*>(row));
  }
  return entry;
}

__device__ __forceinline__ void put(const ListRun& run, uint32_t at, const ListEntry& entry) {
  run.pages[at] = entry.page;
  run.score_rows[at] = entry.scores;
}

// Lists again, format by format (list_rank). `formats`: bit f is set if the lane has pages of f.
template <int kDim, uint32_t kWidth>
__device__ void list_by_format(const LaneView& lane, const ListRun& run, uint32_t pages,
                               uint32_t formats) {
  constexpr uint32_t kWide =
      1u << static_cast<uint32_t>(Format::kF16) | 1u << static_cast<uint32_t>(Format::kBf16);
  const uint32_t thread = threadIdx.x % 32;
  uint32_t done = 0;
  for (uint32_t left = formats; left != 0;) {
    const uint32_t next = (left & ~kWide) != 0 ? left & ~kWide : left;
    const auto format = static_cast<uint32_t>(__ffs(static_cast<int32_t>(next))) - 1;
    left &= ~(1u << format);
    for (uint32_t base = 0; base < pages; base += 32) {
      ListEntry entry{};
      if (base + thread < pages) entry = table_entry<kDim, kWidth>(lane, base + thread);
      const bool mine = base + thread < pages && entry.format == format;
      const uint32_t all = __ballot_sync(kAllLanes, mine);
      if (mine) put(run, done + static_cast<uint32_t>(__popc(all & ((1u << thread) - 1))), entry);
      done += static_cast<uint32_t>(__popc(all));
    }
  }
}

// The descriptors of the lane.
template <int kDim, uint32_t kWidth>
__device__ __forceinline__ void list_table_of(const LaneView& lane, const ListRun& run) {
  const uint32_t pages = min(lane.lane->pages, run.room);
  uint32_t formats = 0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x % 32; i < pages; i += 32) {
    const ListEntry entry = table_entry<kDim, kWidth>(lane, i);
    formats |= 1u << entry.format;
    put(run, i, entry);
  }
  for (uint32_t x = 1; x < 32; x *= 2) formats |= __shfl_xor_sync(kAllLanes, formats, x);
  // Most lanes have one format, and are done.
  if ((formats & (formats - 1)) == 0) return;
  __syncwarp();  // what is listed comes before what replaces it
  list_by_format<kDim, kWidth>(lane, run, pages, formats);
}

template <int kDim>
__device__ __forceinline__ void list_table(const LaneView& lane, const ListRun& run) {
  if (lane.score_bytes == 4) {
    list_table_of<kDim, 4>(lane, run);
  } else if (lane.score_bytes == 2) {
    list_table_of<kDim, 2>(lane, run);
  } else {
    list_table_of<kDim, 0>(lane, run);
  }
}

// As clear_sums() of the host: a window begins.
__device__ void clear_sums(const LaneView& lane) {
  const uint32_t thread = threadIdx.x % 32;
  for (uint32_t i = 0; i < lane.lane->pages; ++i) {
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (d == nullptr) continue;
    float* sums = sums_of(lane, d, i);
    for (uint32_t slot = thread; slot < kSlotsPerPageMax; slot += 32) sums[slot] = 0.0f;
  }
  if (thread < kBufferTokens) lane.lane->buffer_sum[thread] = 0.0f;
}

// The pages of the buffer and, behind them, the working pages; empty entries where the list has
// room that the lane does not use.
__device__ __forceinline__ void list_buffer(const LaneView& lane, const ListRun& run,
                                            uint32_t count, const WorkingRun& working) {
  const BatchView& view = *lane.batch;
  const uint32_t buffered = buffer_pages(count), bytes = page_bytes(lane.head_dim);
  for (uint32_t i = lane.lane->pages + threadIdx.x % 32; i < run.room; i += 32) {
    const uint32_t b = i - lane.lane->pages;
    PageView entry = nothing(view);
    uint16_t* scores = nullptr;
    if (b >= buffered && b - buffered < working.pages()) {
      const unsigned char* page = working.first + uint64_t{b - buffered} * bytes;
      entry = {working.live(b - buffered),
               reinterpret_cast<uint64_t>(page) | static_cast<uint64_t>(wide_format(view))};
    } else if (b < buffered) {
      const unsigned char* page = page_at(view, lane.lane->buffer_page[b]);
      if (page != nullptr) {
        entry.live = low_slots(min(count - b * kBufferPageSlots, kBufferPageSlots));
        entry.tagged = reinterpret_cast<uint64_t>(page) | static_cast<uint64_t>(wide_format(view));
        if (lane.score_bytes == 4) {
          scores = reinterpret_cast<uint16_t*>(lane.lane->buffer_sum + b * kBufferPageSlots);
        } else if (lane.score_bytes == 2) {
          scores = lane.lane->buffer_score + b * kBufferPageSlots;
        }
      }
    }
    run.pages[i] = entry;
    run.score_rows[i] = scores;
  }
}

// The pages that the lane's coded blocks are decoded to. Result: the run behind them.
[[nodiscard]] __device__ __forceinline__ ListRun list_stream(const LaneView& lane,
                                                             const ListRun& run) {
  const BatchView& view = *lane.batch;
  const uint32_t count = min(stream_entries(lane), run.room);
  const unsigned char* first = view.stream_pages + run.entry * page_bytes(view.geometry.head_dim);
  for (uint32_t i = threadIdx.x % 32; i < count; i += 32) {
    const unsigned char* page = first + uint64_t{i} * page_bytes(view.geometry.head_dim);
    // A block of which the list has no room for all pages is not read.
    const uint32_t whole = count - count % (kBlockTokens / kBufferPageSlots);
    const uint64_t live = i < whole ? low_slots(kBufferPageSlots) : 0;
    run.pages[i] = {live,
                    reinterpret_cast<uint64_t>(page) | static_cast<uint64_t>(wide_format(view))};
    run.score_rows[i] = nullptr;
  }
  return {run.pages + count, run.score_rows + count, run.room - count, run.entry + count};
}

__device__ __forceinline__ void list_nothing(const BatchView& view, const ListRun& run) {
  for (uint32_t i = threadIdx.x % 32; i < run.room; i += 32) {
    run.pages[i] = nothing(view);
    run.score_rows[i] = nullptr;
  }
}

template <int kDim>
__global__ void __launch_bounds__(kListWarps * 32)
    list_kernel(const __grid_constant__ BatchView view) {
  wait_for_previous();
  const uint32_t heads = view.geometry.kv_heads, rows = view.capacity * heads;
  const uint32_t warp = blockIdx.x * kListWarps + threadIdx.x / 32;
  const uint32_t layer = warp / rows, row = warp % rows;
  if (layer >= view.geometry.layers) return;
  ListRun run = list_run(view, layer, row);
  if (run.room == 0) return;
  const LaneView lane = lane_of_root(view, view.roots[row / heads], layer * heads + row % heads);
  if (lane.lane == nullptr) return list_nothing(view, run);
  if (view.stream_pages != nullptr) run = list_stream(lane, run);
  list_buffer(lane, run, lane.lane->buffer_count + 1, working_run(view, layer, row));
  list_table<kDim>(lane, run);
  if ((lane.sequence->rank_step & kRankClears) != 0 && lane.score_bytes == 4) clear_sums(lane);
}

}  // namespace

cudaError_t launch_begin(const BatchView& view, cudaStream_t stream) {
  const uint32_t lanes = view.capacity * view.geometry.lanes();
  const uint32_t rows = view.capacity * view.geometry.kv_heads;
  cudaError_t error = launch(find_kernel,
                             {.blocks = (lanes + kFindThreads - 1) / kFindThreads,
                              .threads = kFindThreads,
                              .overlaps_previous = true},
                             stream, view);
  if (error != cudaSuccess) return error;
  error = launch(scan_kernel,
                 {.blocks = view.geometry.layers,
                  .threads = rows < kScanThreads ? (rows + 31) / 32 * 32 : kScanThreads,
                  .overlaps_previous = true},
                 stream, view);
  if (error != cudaSuccess) return error;
  const LaunchSize size{.blocks = (lanes + kListWarps - 1) / kListWarps,
                        .threads = kListWarps * 32,
                        .overlaps_previous = true};
  switch (view.geometry.head_dim) {
    case 64:
      return launch(list_kernel<64>, size, stream, view);
    case 128:
      return launch(list_kernel<128>, size, stream, view);
    case 256:
      return launch(list_kernel<256>, size, stream, view);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
