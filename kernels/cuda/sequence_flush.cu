// sequence_flush.cu: the 16 tokens of a buffer leave it in the format of their class.
//
// One launch for all lanes of a batch; a block of four warps a lane, four tokens a warp, and where
// there are very many lanes a block takes the kv heads of a layer one after another: most sequences
// of a step have nothing to flush, and blocks that find that out are not free either.
#include "kernels/cuda/codec.cuh"
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/lane_write.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint64_t kLanesOneEach = 4096;  // up to so many lanes have a block each

struct FlushShared {
  uint32_t positions[kBufferTokens];
  SlotPlace places[kBufferTokens];
};

// The two formats that one flush can meet.
struct FlushFormats {
  Format sink;
  Format thought;
  bool good;
};

__device__ __forceinline__ FlushFormats formats_of(const BatchView& view,
                                                   DeviceSequence* sequence) {
  const policy::Segment* open = open_segment(view, sequence);
  const PolicyParams& p = sequence->policy;
  if (open == nullptr || open->label >= kThoughtCount) return {};
  const Format thought = p.thought_format[open->label];
  if (!format_valid(static_cast<uint8_t>(thought)) ||
      !format_valid(static_cast<uint8_t>(p.sink_format))) {
    return {};
  }
  return {resolve_format(view, p.sink_format), resolve_format(view, thought), true};
}

// Those of one layer: the dense layers of a policy with a tier have a format of their own.
__device__ __forceinline__ FlushFormats formats_of_layer(const LaneView& lane,
                                                         const FlushFormats& formats,
                                                         uint32_t layer) {
  const TierParams& tier = lane.sequence->policy.tier;
  if (!tier.on() || !tier.dense(layer)) return formats;
  if (!format_valid(static_cast<uint8_t>(tier.dense_format))) {
    if (threadIdx.x == 0) raise_fault(lane.batch->lease, kBadMetadata);
    return formats;
  }
  const Format dense = resolve_format(*lane.batch, tier.dense_format);
  return {dense, dense, true};
}

// As decay_scores() of the host: what the lane's pages hold, before new tokens come.
__device__ __forceinline__ void decay_scores(const LaneView& lane, float factor) {
  if (factor == 1.0f) return;
  const uint32_t warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  for (uint32_t i = warp; i < lane.lane->pages; i += kThreads / 32) {
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (d == nullptr) continue;
    auto* pairs = reinterpret_cast<uint32_t*>(scores_of(lane, d, i));
    const uint32_t live = static_cast<uint32_t>(d->live >> (2 * thread)) & 3u;
    if (live == 0) continue;
    const uint32_t pair = pairs[thread];
    const float2 scores = unpack_f16(pair);
    const uint32_t decayed = pack_f16(exact_mul(scores.x, factor), exact_mul(scores.y, factor));
    const uint32_t changes =
        ((live & 1u) != 0 ? 0xFFFFu : 0u) | ((live & 2u) != 0 ? 0xFFFF0000u : 0u);
    pairs[thread] = (decayed & changes) | (pair & ~changes);
  }
}

// As scale_sums() of the host.
__device__ __forceinline__ void scale_sums(const LaneView& lane, float factor) {
  if (factor == 1.0f) return;
  const uint32_t warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  for (uint32_t i = warp; i < lane.lane->pages; i += kThreads / 32) {
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (d == nullptr) continue;
    float* sums = sums_of(lane, d, i);
    for (uint32_t slot = thread; slot < kSlotsPerPageMax; slot += 32) {
      if (((d->live >> slot) & 1u) != 0) sums[slot] = exact_mul(sums[slot], factor);
    }
  }
}

// What the lane's pages hold loses a share.
__device__ __forceinline__ void decay_numbers(const LaneView& lane) {
  const PolicyParams& p = lane.sequence->policy;
  if (lane.score_bytes == 2) decay_scores(lane, p.score_decay);
  if (lane.score_bytes == 4 && p.score_kind == ScoreKind::kDecayed) scale_sums(lane, p.score_decay);
}

// A token's halves as they lie in the buffer, two to a register. Read before the token's place is
// looked for: both take as long as a chain of reads does, and neither needs the other.
template <int kDim>
struct BufferedToken {
  uint32_t k[kDim / 16];
  uint32_t v[kDim / 16];
};
template <int kDim, bool kIsK>
__device__ __forceinline__ void read_halves(uint32_t (&packed)[kDim / 16],
                                            const unsigned char* section, uint32_t slot) {
  uint32_t raw[kDim / 8];
  get_halves<kDim, kIsK>(section, slot, raw);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) packed[i] = raw[2 * i] | raw[2 * i + 1] << 16;
}
template <int kDim>
__device__ __forceinline__ void widen(float (&x)[kDim / 8], const uint32_t (&packed)[kDim / 16],
                                      bool bf16) {
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    const auto half = static_cast<uint16_t>(packed[i / 2] >> (16 * (i % 2)));
    x[i] = bf16 ? bf16_to_float(half) : fp16_to_float(half);
  }
}

// Buffered tokens [first, end), which all have one format, to their places.
template <int kDim>
__device__ __forceinline__ void encode_tokens(const LaneView& lane,
                                              const BufferedToken<kDim>& source,
                                              const FlushShared& shared, Format format,
                                              uint32_t first, uint32_t end) {
  const uint32_t warp_first = threadIdx.x / 32 * 4;
  if (warp_first >= end || warp_first + 4 <= first) return;  // the whole warp
  const uint32_t token = threadIdx.x / 8;
  const bool bf16 = lane.batch->geometry.value_type == ValueType::kBf16;
  const SlotShape to = slot_shape(kDim, static_cast<uint32_t>(format));
  const SlotPlace place = shared.places[token];
  const bool active = token >= first && token < end && place.page != nullptr;
  const uint32_t slot = active ? place.slot : 0;
  float x[kDim / 8];
  widen<kDim>(x, source.k, bf16);
  encode_vector<kDim, true>(
      x, format, vector_place<kDim, true>(place.page, to, coding_of<true>(format), slot), active);
  widen<kDim>(x, source.v, bf16);
  encode_vector<kDim, false>(
      x, format, vector_place<kDim, false>(place.page, to, coding_of<false>(format), slot), active);
  if (!active || threadIdx.x % 8 != 0) return;
  *reinterpret_cast<uint32_t*>(place.page + to.position_offset + slot * kPositionBytes) =
      shared.positions[token];
}

// Whole block.
template <int kDim>
__device__ void flush_lane(const LaneView& lane, const FlushFormats& formats, FlushShared& shared) {
  const BatchView& view = *lane.batch;
  const uint32_t count = lane.lane->buffer_count;
  const PolicyParams& p = lane.sequence->policy;
  if (count == 0) return;
  unsigned char* pages[2] = {page_at(view, lane.lane->buffer_page[0]),
                             page_at(view, lane.lane->buffer_page[1])};
  if (pages[0] == nullptr || pages[1] == nullptr) return;
  const SlotShape wide = slot_shape(kDim, static_cast<uint32_t>(wide_format(view)));
  if (threadIdx.x < count) {
    shared.positions[threadIdx.x] =
        position_of(pages[threadIdx.x / kBufferPageSlots], wide.position_offset,
                    threadIdx.x % kBufferPageSlots);
  }
  const uint32_t token = threadIdx.x / 8;
  const unsigned char* page = pages[0];
  if (token >= kBufferPageSlots) page = pages[1];
  BufferedToken<kDim> source;
  read_halves<kDim, true>(source.k, page, token % kBufferPageSlots);
  read_halves<kDim, false>(source.v, page + wide.v_offset, token % kBufferPageSlots);
  decay_numbers(lane);
  __syncthreads();
  const uint32_t first = shared.positions[0];
  const bool split = formats.sink != formats.thought && first < p.sink_tokens;
  const uint32_t sinks = split ? min(count, p.sink_tokens - first) : 0;
  if (threadIdx.x < 32) {
    const unsigned char* scores = nullptr;
    if (lane.scored()) scores = reinterpret_cast<const unsigned char*>(lane.lane->buffer_sum);
    uint32_t reused = 0;
    if (sinks > 0) {
      reused += place_tokens(lane, {formats.sink, shared.positions, scores, sinks, shared.places});
    }
    if (count > sinks) {
      reused += place_tokens(lane, {formats.thought, shared.positions + sinks,
                                    scores == nullptr ? nullptr : scores + sinks * lane.score_bytes,
                                    count - sinks, shared.places + sinks});
    }
    if (threadIdx.x == 0) {
      // The tokens were counted when they came; they have moved, not doubled.
      lane.lane->live -= count;
      lane.lane->buffer_count = 0;
      if (reused > 0) add_64(&lane.sequence->counters.reused_slots, reused);
    }
  }
  __syncthreads();
  encode_tokens<kDim>(lane, source, shared, formats.sink, 0, sinks);
  encode_tokens<kDim>(lane, source, shared, formats.thought, sinks, count);
}

// The step is counted here because the refresh after it must see it counted, and nothing else in
// this kernel reads these numbers.
__device__ void count_step(const BatchView& view, DeviceSequence* sequence) {
  const policy::Segment* open = open_segment(view, sequence);
  if (open != nullptr && open->label < kThoughtCount && sequence->tokens == open->start) {
    sequence->counters.segments[open->label] += 1;
  }
  sequence->tokens += 1;
  sequence->counters.steps += 1;
}

struct FlushParams {
  FlushWhen when;
  uint32_t lanes_per_block;
  uint32_t blocks_per_sequence;
};

// Blocks on a multiprocessor: what a block does is mostly waiting for reads that depend on each
// other.
template <int kDim>
inline constexpr uint32_t kBlocksMin = kDim == 256 ? 2 : 4;

template <int kDim>
__global__ void __launch_bounds__(kThreads, kBlocksMin<kDim>)
    flush_kernel(const __grid_constant__ BatchView view,
                 const __grid_constant__ FlushParams params) {
  __shared__ FlushShared shared;
  const uint32_t row = blockIdx.x / params.blocks_per_sequence;
  const uint32_t part = blockIdx.x % params.blocks_per_sequence;
  if (params.when == FlushWhen::kFull && blockIdx.x == 0 && threadIdx.x == 0) {
    *reinterpret_cast<StepTotals*>(view.pages) = {};
  }
  DeviceSequence* sequence = sequence_at(view, view.roots[row]);
  if (sequence == nullptr) return;
  const uint32_t flushing = sequence->flushing;
  const bool early = (sequence->closing != 0) | ((sequence->rank_step & kRankFlushesFirst) != 0);
  if (params.when == FlushWhen::kFirst && part == 0 && threadIdx.x == 0) {
    count_step(view, sequence);
  }
  const bool due = params.when == FlushWhen::kFirst ? early : !early & (flushing != 0);
  if (!due) return;
  const FlushFormats formats = formats_of(view, sequence);
  if (!formats.good) {
    if (threadIdx.x == 0) raise_fault(view.lease, kBadMetadata);
    return;
  }
  const uint32_t first = part * params.lanes_per_block;
  const uint32_t end = min(first + params.lanes_per_block, view.geometry.lanes());
  for (uint32_t index = first; index < end; ++index) {
    const LaneView lane = lane_view(view, sequence, index);
    if (lane.lane != nullptr) {
      const uint32_t layer = index / view.geometry.kv_heads;
      flush_lane<kDim>(lane, formats_of_layer(lane, formats, layer), shared);
    }
    __syncthreads();
  }
}

template <int kDim>
cudaError_t launch_flush_of(const BatchView& view, FlushWhen when, cudaStream_t stream) {
  const uint32_t lanes = view.geometry.lanes();
  const uint32_t each =
      uint64_t{view.capacity} * lanes <= kLanesOneEach ? 1 : view.geometry.kv_heads;
  const FlushParams params{when, each, (lanes + each - 1) / each};
  return launch(flush_kernel<kDim>,
                {.blocks = view.capacity * params.blocks_per_sequence, .threads = kThreads}, stream,
                view, params);
}

}  // namespace

cudaError_t launch_flush(const BatchView& view, FlushWhen when, cudaStream_t stream) {
  switch (view.geometry.head_dim) {
    case 64:
      return launch_flush_of<64>(view, when, stream);
    case 128:
      return launch_flush_of<128>(view, when, stream);
    case 256:
      return launch_flush_of<256>(view, when, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
