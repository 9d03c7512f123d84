// attention_kernel.cuh: split-KV decode attention over lanes of mixed pages.
//
// One warp walks a run of pages of the flat page list, so every warp has the same bytes to read
// (attention_parts.cuh). Pages come to shared memory through a ring that belongs to the warp alone
// (page_stream.cuh): no CTA barrier in the loop. What a warp computes of a page is in
// attention_codes.cuh (uniform codes), attention_values.cuh (16 bits), attention_groups.cuh.
// Included by one source file a head_dim, so that they compile side by side.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_blocks.cuh"
#include "kernels/cuda/attention_codes.cuh"
#include "kernels/cuda/attention_groups.cuh"
#include "kernels/cuda/attention_launch.h"
#include "kernels/cuda/attention_output.cuh"
#include "kernels/cuda/attention_parts.cuh"
#include "kernels/cuda/attention_query.cuh"
#include "kernels/cuda/attention_values.cuh"
#include "kernels/cuda/emission.h"
#include "kernels/cuda/page_stream.cuh"
#include "thinkv/internal/page_format.h"

namespace thinkv::cuda {

// Windows and emission, and pages of block formats, cost registers and time where there are none.
enum class AttendVariant { kPlain, kExtra, kBlocks };
[[nodiscard]] constexpr uint32_t formats_of(AttendVariant variant) {
  return variant == AttendVariant::kBlocks ? kAllFormatCount : kFormatCount;
}

template <int kHeadDim, int kN, class Emit>
__device__ __forceinline__ void attend_page(LaneState<kHeadDim, kN>& s, Format format,
                                            const PageInput& page, const Emit& emit) {
  switch (format) {
    case Format::kK4V4:
      return attend_codes<kHeadDim, Format::kK4V4>(s, page, emit);
    case Format::kK4V2:
      return attend_codes<kHeadDim, Format::kK4V2>(s, page, emit);
    case Format::kK2V2:
      return attend_codes<kHeadDim, Format::kK2V2>(s, page, emit);
    case Format::kF16:
      return attend_values<kHeadDim, Format::kF16>(s, page, emit);
    case Format::kBf16:
      return attend_values<kHeadDim, Format::kBf16>(s, page, emit);
    case Format::kK8V4:
      return attend_codes<kHeadDim, Format::kK8V4>(s, page, emit);
    case Format::kK8V8:
      return attend_codes<kHeadDim, Format::kK8V8>(s, page, emit);
    case Format::kNvfp4:
      return attend_groups<kHeadDim, Format::kNvfp4>(s, page, emit);
    default:
      return attend_groups<kHeadDim, Format::kTernary>(s, page, emit);
  }
}

// The slots of `live` that are inside the window, by the positions in the page.
template <int kHeadDim, uint32_t kFormats>
[[nodiscard]] __device__ __forceinline__ uint64_t window_live(const AttendParams& p,
                                                              uint32_t lane_index, Format format,
                                                              uint32_t page, uint64_t live) {
  const uint32_t offset = position_offset<kHeadDim, kFormats>(format);
  const uint32_t query = p.query_position[lane_index / p.kv_heads], thread = threadIdx.x % 32;
  const auto counts = [&](uint32_t slot) {
    if (((live >> slot) & 1u) == 0) return false;
    const uint32_t position = load_shared_4(page + offset + 4 * slot);
    return position < p.sinks || uint64_t{position} + p.window > query;
  };
  const uint32_t low = __ballot_sync(kFullWarp, counts(thread));
  const uint32_t high = __ballot_sync(kFullWarp, counts(thread + 32));
  return low | uint64_t{high} << 32;
}

// What of a launch is the same for all warps.
struct Scratch {
  float* ended;     // [warps] parts of lanes that ended inside a run
  float* log_sums;  // [lanes x group]
  __device__ __forceinline__ Scratch(const AttendParams& p, uint64_t part_size, uint32_t ctas,
                                     uint32_t warps)
      : ended(p.parts + 2 * ctas * part_size), log_sums(ended + warps * part_size) {}
};

// A page of any format that the variant knows.
template <AttendVariant kVariant, int kHeadDim, int kN, class Emit>
__device__ __forceinline__ void attend_any(LaneState<kHeadDim, kN>& s, Format format,
                                           const PageInput& page, const Emit& emit) {
  if constexpr (kVariant == AttendVariant::kBlocks) {
    if (is_block(format)) return attend_block_page(s, format, page, emit);
  }
  attend_page(s, format, page, emit);
}

// Reads pages [first, stop) of the flat list, all of one lane, into `s`.
template <AttendVariant kVariant, int kHeadDim, int kN, class Stream>
__device__ __forceinline__ void attend_run(LaneState<kHeadDim, kN>& s, const AttendParams& p,
                                           Stream& stream, uint32_t lane_index, uint32_t first,
                                           uint32_t stop) {
  constexpr bool kExtra = kVariant != AttendVariant::kPlain;
  [[maybe_unused]] bool emits = false;
  if constexpr (kExtra) {
    emits = p.emit != nullptr && p.emit[lane_index / p.kv_heads] != 0;
  }
  for (uint32_t left = stop - first; left != 0; --left) {
    const ReadyPage page = stream.peek();
    const Format format = page.format();
    const Format held = kVariant == AttendVariant::kBlocks ? state_format_of(format) : format;
    if (held != s.format && page.live != 0) {
      change_format(s, p, lane_index, held);
      stream.fill();
    }
    PageInput input{stream.wait(), page.live, p.softmax_scale * kLog2E};
    if constexpr (kExtra) {
      if (p.window != 0) {
        input.live = window_live<kHeadDim, formats_of(kVariant)>(p, lane_index, format,
                                                                 input.shared, page.live);
      }
      const EmitScores emit(emits ? emit_page_of(p, stop - left) : nullptr, p.group);
      if (input.live != 0) {
        attend_any<kVariant>(s, format, input, emit);
      } else if (emits) {
        emit.nothing();
      }
    } else {
      if (input.live != 0) attend_page(s, format, input, NoEmit());
    }
    stream.release();
  }
}

// The run of one warp: whole lanes are written, of cut ones their parts. `ring`: the warp's own;
// `part_lane`: [2], see WarpParts.
template <AttendVariant kVariant, int kHeadDim, int kN, class Stream>
__device__ __forceinline__ void attend_lanes(const AttendParams& p, Stream& stream, uint32_t begin,
                                             uint32_t end, const Scratch& scratch, float* ended,
                                             float* ring, uint32_t* part_lane) {
  LaneState<kHeadDim, kN> s;
  uint32_t lane_index = lane_of_page(p, begin);
  if (stream.peek().live == 0) stream.fill();
  for (uint32_t i = begin; i < end; ++lane_index) {
    uint32_t lane_end = p.lane_begin[lane_index + 1];
    if (lane_end <= i) {  // only after empty lanes
      lane_index = lane_of_page(p, i);
      lane_end = p.lane_begin[lane_index + 1];
    }
    const uint32_t stop = min(lane_end, end);
    if (stop < end) prefetch_query<kHeadDim>(p, lane_index + 1);
    begin_lane(s);
    attend_run<kVariant>(s, p, stream, lane_index, i, stop);
    finish_lane(s);
    i = stop;
    if (p.lane_begin[lane_index] >= begin && lane_end <= end) {
      write_lane(s, p, scratch.log_sums, lane_index);
      continue;
    }
    const bool open = stop == end;
    write_part(s, p.group, open ? ring : ended);
    if (threadIdx.x % 32 == 0) part_lane[open ? 1 : 0] = lane_index;
  }
}

template <int kHeadDim, int kN, int kWarps, int kStages, AttendVariant kVariant>
__global__ void __launch_bounds__(kWarps * 32, 1) attend_kernel(const AttendParams p) {
  using Stream = PageStream<kHeadDim, ring_stages<kHeadDim>(kCode, kWarps, kStages),
                            kVariant != AttendVariant::kPlain, formats_of(kVariant)>;
  constexpr uint32_t kRing = Stream::Ring::kBytes;
  __shared__ __align__(8) uint64_t barriers[kWarps * kStages];
  __shared__ __align__(16) ReadyPage ready[kWarps][2 * kBatch];
  __shared__ uint32_t part_lane[2 * kWarps];
  const uint32_t warp = threadIdx.x / 32, index = blockIdx.x * kWarps + warp;
  const uint32_t warps = gridDim.x * kWarps;
  const uint32_t barrier = shared_address(&barriers[warp * kStages]);
  if (threadIdx.x % 32 == 0) {
    Stream::Ring::prepare(barrier);
    part_lane[2 * warp] = part_lane[2 * warp + 1] = kNoLane;
  }
  __syncwarp();
  wait_for_previous();
  const Split split(p.lane_begin[p.lanes], warps);
  const uint32_t begin = split.begin(index), end = split.begin(index + 1);
  Stream stream(p.pages, begin, end, shared_address(dynamic_shared()) + warp * kRing, barrier,
                ready[warp]);
  let_next_start();
  const uint32_t part_size = part_floats(p.group, kHeadDim);
  const Scratch scratch(p, part_size, gridDim.x, warps);
  write_empty_lanes<kHeadDim>(p, scratch.log_sums, index, warps);
  if (begin < end) {
    attend_lanes<kVariant, kHeadDim, kN>(
        p, stream, begin, end, scratch, scratch.ended + uint64_t{index} * part_size,
        reinterpret_cast<float*>(dynamic_shared() + warp * kRing), part_lane + 2 * warp);
  }
  __syncthreads();
  const WarpParts parts{part_lane, scratch.ended + uint64_t{blockIdx.x} * kWarps * part_size,
                        dynamic_shared(), kRing, part_size};
  merge_cta<kHeadDim, kWarps>(p, scratch.log_sums, parts, split.begin(blockIdx.x * kWarps),
                              split.begin((blockIdx.x + 1) * kWarps));
}

// The parts that CTAs left of a lane, `first` to `last`, merged by several warps a row.
constexpr uint32_t kCombineWarps = 16;
template <int kHeadDim, class Part>
__device__ __forceinline__ void combine_lane(const AttendParams& p, float* log_sums,
                                             uint32_t lane_index, uint32_t first, uint32_t last,
                                             const Part& part) {
  __shared__ float shares[kCombineWarps][part_floats(1, kHeadDim)];
  const uint32_t warps = kCombineWarps / p.group, warp = threadIdx.x / 32;
  const uint32_t head = warp / warps, share = warp % warps;
  Row<kHeadDim> row;
  if (head < p.group) {
#pragma unroll 4
    for (uint32_t cta = first + share; cta <= last; cta += warps) {
      if (const float* data = part(cta)) row.add(data, p.group, head);
    }
    row.store_part(shares[warp], 1, 0);
  }
  __syncthreads();
  if (head >= p.group || share != 0) return;
  for (uint32_t other = 1; other < warps; ++other) row.add(shares[warp + other], 1, 0);
  row.finish(p, log_sums, uint64_t{lane_index} * p.group + head);
}

// Merges the parts of a lane that was cut between CTAs. Each CTA here stands for the start of a CTA
// of the attend kernel and works if that is the first such cut inside its lane.
template <int kHeadDim>
__global__ void __launch_bounds__(kCombineWarps * 32)
    combine_kernel(const AttendParams p, uint32_t ctas, uint32_t cta_warps) {
  wait_for_previous();
  let_next_start();
  const uint32_t total = p.lane_begin[p.lanes];
  const Split split(total, ctas * cta_warps);
  const auto cta_of = [&](uint32_t page) { return split.run_of(page) / cta_warps; };
  const uint32_t cut = split.begin((blockIdx.x + 1) * cta_warps);
  if (cut >= total) return;
  const uint32_t lane_index = lane_of_page(p, cut);
  const uint32_t begin = p.lane_begin[lane_index], end = p.lane_begin[lane_index + 1];
  if (begin == cut || cta_of(begin) != blockIdx.x) return;
  const uint64_t part_size = part_floats(p.group, kHeadDim);
  const Scratch scratch(p, part_size, ctas, ctas * cta_warps);
  // Null: a CTA without pages, which left nothing.
  const auto part = [&](uint32_t cta) -> const float* {
    const uint32_t cta_begin = split.begin(cta * cta_warps);
    if (cta_begin == split.begin((cta + 1) * cta_warps)) return nullptr;
    return p.parts + (2 * cta + (begin < cta_begin ? 0u : 1u)) * part_size;
  };
  combine_lane<kHeadDim>(p, scratch.log_sums, lane_index, blockIdx.x, cta_of(end - 1), part);
}

template <int kHeadDim, int kN, int kWarps, int kStages, AttendVariant kVariant>
cudaError_t launch_variant(const AttendParams& p, uint32_t ctas, cudaStream_t stream) {
  const uint32_t shared =
      kWarps * ring_stages<kHeadDim>(running_code(), kWarps, kStages) * page_bytes(kHeadDim);
  static_assert(ring_stages<kHeadDim>(80, kWarps, kStages) * page_bytes(kHeadDim) >=
                4 * part_floats(8 * kN, kHeadDim));
  const cudaError_t error = launch(
      attend_kernel<kHeadDim, kN, kWarps, kStages, kVariant>,
      {.blocks = ctas, .threads = kWarps * 32, .shared_bytes = shared, .overlaps_previous = true},
      stream, p);
  if (error != cudaSuccess || ctas == 1) return error;
  return launch(combine_kernel<kHeadDim>,
                {.blocks = ctas - 1, .threads = kCombineWarps * 32, .overlaps_previous = true},
                stream, p, ctas, uint32_t{kWarps});
}

template <int kHeadDim, int kN, int kWarps, int kStages>
cudaError_t launch_shape(const AttendParams& p, uint32_t ctas, cudaStream_t stream) {
  using enum AttendVariant;
  if (p.window == 0 && p.emit == nullptr && !p.blocks) {
    return launch_variant<kHeadDim, kN, kWarps, kStages, kPlain>(p, ctas, stream);
  }
  const cudaError_t error =
      p.blocks ? launch_variant<kHeadDim, kN, kWarps, kStages, kBlocks>(p, ctas, stream)
               : launch_variant<kHeadDim, kN, kWarps, kStages, kExtra>(p, ctas, stream);
  if (error != cudaSuccess || p.emit == nullptr) return error;
  const uint64_t parts = (2 * ctas + ctas * kWarps) * part_floats(p.group, kHeadDim);
  return launch_emission(p, p.parts + parts, stream);
}

template <int kHeadDim, int kN, int kWarps, int kStages>
void visit_shape(AttendKernelVisit visit) {
  using enum AttendVariant;
  const auto of = [&](const char* variant, const void* function) {
    visit({kHeadDim, 8 * kN, kWarps, kStages, variant, function});
  };
  of("plain", reinterpret_cast<const void*>(&attend_kernel<kHeadDim, kN, kWarps, kStages, kPlain>));
  of("extra", reinterpret_cast<const void*>(&attend_kernel<kHeadDim, kN, kWarps, kStages, kExtra>));
  of("blocks",
     reinterpret_cast<const void*>(&attend_kernel<kHeadDim, kN, kWarps, kStages, kBlocks>));
}

}  // namespace thinkv::cuda
