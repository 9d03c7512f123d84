// coded_step.cu: at the end of a step, the 64 tokens that the newest no longer reach into leave the
// 16-bit pages of their lane for its stream.
//
// Of most steps nothing is due. Three launches: the codebooks of layers that have none yet, a block
// of threads a lane that codes and writes, and, because that one takes pages, another that gives
// back the pages whose tokens left.
#include "kernels/cuda/coded_step.cuh"
#include "kernels/cuda/step.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint64_t kLanesOneEach = 4096;  // up to so many lanes have a block of threads each
constexpr uint32_t kSweepWarps = 4;       // of a block

[[nodiscard]] __device__ __forceinline__ StepShares shares_of(const DeviceSequence* sequence) {
  return {sequence->policy.entropy.key_step, sequence->policy.entropy.value_step};
}
[[nodiscard]] __device__ __forceinline__ bool has_streams(const DeviceSequence* sequence) {
  return sequence != nullptr && sequence->policy.entropy.on();
}

// Counts the codes of the block that is due in every lane of a layer. Result, for all threads:
// false where one lane has none to give.
template <int kDim>
[[nodiscard]] __device__ bool count_layer(const BatchView& view, DeviceSequence* sequence,
                                          uint32_t layer, BlockPlaces& places,
                                          uint32_t (&counts)[2][kSymbolCount]) {
  CodingShared<kDim>& shared = coding_shared<kDim>();
  counts[0][threadIdx.x] = counts[1][threadIdx.x] = 0;
  for (uint32_t head = 0; head < view.geometry.kv_heads; ++head) {
    const LaneView lane = lane_view(view, sequence, layer * view.geometry.kv_heads + head);
    const StreamView s = stream_of(lane);
    if (__syncthreads_or(block_due(sequence, s) ? 0 : 1) != 0) return false;
    if (!find_tokens(lane, s.stream->end_position, places)) return false;
    const PageSource<kDim> source{&places, wide_format(view)};
    if (quantise_block(shared, source, shares_of(sequence))) count_codes(shared, counts);
  }
  __syncthreads();
  return true;
}

// A block of threads a row and layer.
template <int kDim>
__global__ void __launch_bounds__(kCodingThreads)
    codes_kernel(const __grid_constant__ BatchView view) {
  __shared__ uint32_t counts[2][kSymbolCount];
  __shared__ BlockPlaces places;
  __shared__ CodeMaking making;
  const uint32_t row = blockIdx.x / view.geometry.layers, layer = blockIdx.x % view.geometry.layers;
  DeviceSequence* sequence = sequence_at(view, view.roots[row]);
  if (!has_streams(sequence)) return;
  const StreamView first = stream_of(lane_view(view, sequence, layer * view.geometry.kv_heads));
  const bool missing = block_due(sequence, first) && first.stream->codes[0][0] == 0;
  if (__syncthreads_or(missing ? 0 : 1) != 0) return;
  if (!count_layer<kDim>(view, sequence, layer, places, counts)) return;
  for (uint32_t side = 0; side < 2; ++side) {
    make_lengths(making, counts[side][threadIdx.x], first.stream->codes[side]);
  }
}

// The block's place at the end of the stream, and its pages. Result: success.
[[nodiscard]] __device__ bool append_block(const StreamView& s, uint32_t bytes, bool raw) {
  DeviceStream& d = *s.stream;
  if (!grow_blocks(s, d.blocks + 1) || !grow_bytes(s, bytes)) return false;
  StreamBlock* block = block_at(s, d.blocks);
  if (block == nullptr) return false;
  *block = {
      .unit = d.end_unit, .bytes = bytes, .first_position = d.end_position, .raw = raw ? 1u : 0u};
  return true;
}

// What a coded block changes in its lane. One thread.
__device__ void count_block(const StreamView& s, uint32_t bytes) {
  DeviceStream& d = *s.stream;
  d.blocks += 1;
  d.end_unit += units_of(bytes);
  d.end_position += kBlockTokens;
  add_64(&s.lane.sequence->counters.recoded_slots, kBlockTokens);
  add_64(&s.lane.sequence->counters.recoded_bytes, bytes);
}

// Of one block of threads.
struct CodeLaneShared {
  BlockPlaces places;
  LayerTables tables;
  bool placed;
};

// Whole block. Requires: the block is due in the lane.
template <int kDim>
__device__ void code_lane(const StreamView& s, const StreamView& first, CodeLaneShared& mine) {
  const LaneView& lane = s.lane;
  const uint32_t begin = s.stream->end_position, unit = s.stream->end_unit;
  if (!find_tokens(lane, begin, mine.places) || !load_tables(mine.tables, first)) return;
  CodingShared<kDim>& shared = coding_shared<kDim>();
  const PageSource<kDim> source{&mine.places, wide_format(*lane.batch)};
  uint32_t bytes = kernels::raw_block_bytes(kDim);
  const bool coded = quantise_block(shared, source, shares_of(lane.sequence));
  if (coded) {
    const CodePart part = measure_runs(shared, mine.tables);
    bytes = bytes_before(shared, kAllRuns);
    encode_block(shared, part);
  } else {
    encode_raw_block(shared, source, source.wide);
  }
  if (threadIdx.x == 0) mine.placed = append_block(s, bytes, !coded);
  __syncthreads();
  if (!mine.placed) return;  // the tokens stay in their pages
  store_block(shared, s, unit, bytes);
  drop_tokens(lane, begin);
  __syncthreads();  // everybody is done with the stream as it was
  if (threadIdx.x == 0) count_block(s, bytes);
}

struct CodeParams {
  uint32_t lanes_per_block;
  uint32_t blocks_per_sequence;
};

template <int kDim>
__global__ void __launch_bounds__(kCodingThreads)
    code_kernel(const __grid_constant__ BatchView view, const __grid_constant__ CodeParams params) {
  __shared__ CodeLaneShared mine;
  const uint32_t part = blockIdx.x % params.blocks_per_sequence;
  DeviceSequence* sequence = sequence_at(view, view.roots[blockIdx.x / params.blocks_per_sequence]);
  if (!has_streams(sequence)) return;
  const uint32_t heads = view.geometry.kv_heads;
  const uint32_t begin = part * params.lanes_per_block;
  const uint32_t end = min(begin + params.lanes_per_block, view.geometry.lanes());
  for (uint32_t index = begin; index < end; ++index) {
    const StreamView s = stream_of(lane_view(view, sequence, index));
    const StreamView first = stream_of(lane_view(view, sequence, index / heads * heads));
    const bool due = block_due(sequence, s) && first.stream != nullptr;
    if (__syncthreads_or(due ? 0 : 1) == 0) code_lane<kDim>(s, first, mine);
    __syncthreads();
  }
}

// A warp a lane. Tokens leave at multiples of a block only.
__global__ void __launch_bounds__(kSweepWarps * 32)
    sweep_kernel(const __grid_constant__ BatchView view) {
  const uint32_t lanes = view.geometry.lanes();
  const uint32_t index = blockIdx.x * kSweepWarps + threadIdx.x / 32;
  if (index >= view.capacity * lanes) return;
  DeviceSequence* sequence = sequence_at(view, view.roots[index / lanes]);
  if (!has_streams(sequence) || sequence->tokens % kBlockTokens != 0) return;
  const LaneView lane = lane_view(view, sequence, index % lanes);
  if (lane.lane != nullptr) sweep_lane(lane);
}

template <int kDim>
cudaError_t launch_code_of(const BatchView& view, cudaStream_t stream) {
  const uint32_t lanes = view.geometry.lanes();
  const uint32_t each =
      uint64_t{view.capacity} * lanes <= kLanesOneEach ? 1 : view.geometry.kv_heads;
  const CodeParams params{each, (lanes + each - 1) / each};
  const auto size = [](uint32_t blocks) -> LaunchSize {
    return {
        .blocks = blocks, .threads = kCodingThreads, .shared_bytes = sizeof(CodingShared<kDim>)};
  };
  cudaError_t error =
      launch(codes_kernel<kDim>, size(view.capacity * view.geometry.layers), stream, view);
  if (error == cudaSuccess) {
    error = launch(code_kernel<kDim>, size(view.capacity * params.blocks_per_sequence), stream,
                   view, params);
  }
  return error;
}

}  // namespace

cudaError_t launch_code_step(const BatchView& view, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (view.geometry.head_dim) {
    case 64:
      error = launch_code_of<64>(view, stream);
      break;
    case 128:
      error = launch_code_of<128>(view, stream);
      break;
    case 256:
      error = launch_code_of<256>(view, stream);
      break;
    default:
      break;
  }
  if (error != cudaSuccess) return error;
  const uint32_t lanes = view.capacity * view.geometry.lanes();
  return launch(sweep_kernel,
                {.blocks = (lanes + kSweepWarps - 1) / kSweepWarps, .threads = kSweepWarps * 32},
                stream, view);
}

}  // namespace thinkv::cuda
