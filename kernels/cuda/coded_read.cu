// coded_read.cu: the streams of one layer, decoded into 16-bit pages for the attention that
// follows.
//
// Page i of BatchView::stream_pages belongs to entry i of the layer's list, where launch_begin put
// it. Several blocks of threads share a lane, each with the layer's tables in shared memory; how
// many does not depend on any length, so that a graph can hold the launch.
#include "kernels/cuda/coded_read.cuh"
#include "kernels/cuda/due_rows.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kWarps = 4;              // of a block of threads
constexpr uint32_t kRound = 2 * kWarps;     // blocks that they read at a time
constexpr uint32_t kOfAMultiprocessor = 8;  // blocks of threads, if lanes alone are fewer
constexpr uint32_t kResident = 4;           // of them at a time, at least: registers for more spill

struct ReadParams {
  uint32_t layer;
  uint32_t parts;  // blocks of threads of a lane
};

// Both tables of a layer. Whole block. Result, for all threads: whether they are codes.
[[nodiscard]] __device__ bool load_read_tables(const StreamView& first, CodeShape& shape,
                                               ReadTable (&tables)[2]) {
  if (first.stream == nullptr) return false;
  for (uint32_t side = 0; side < 2; ++side) {
    if (!load_code(shape, first.stream->codes[side])) return false;
    make_read_table(shape, tables[side]);
  }
  return true;
}

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32, kResident)
    read_kernel(const __grid_constant__ BatchView view, const __grid_constant__ ReadParams params) {
  __shared__ CodeShape shape;
  __shared__ ReadTable tables[2];
  __shared__ uint32_t shared_count;
  const uint32_t heads = view.geometry.kv_heads, rows = view.capacity * heads;
  const uint32_t row = blockIdx.x / params.parts, part = blockIdx.x % params.parts;
  const LaneView lane =
      lane_of_root(view, view.roots[row / heads], params.layer * heads + row % heads);
  const StreamView s = stream_of(lane);
  if (__syncthreads_or(s.stream == nullptr ? 1 : 0) != 0) return;
  const uint32_t* begin = view.lane_begin + uint64_t{params.layer} * (rows + 1) + row;
  const uint32_t entry = begin[0], end = min(begin[1], view.pages_max);
  const uint32_t room = end > entry ? (end - entry) / kBlockPages : 0;
  // One number for all threads, whatever another process makes of the stream meanwhile.
  if (threadIdx.x == 0) shared_count = min(s.stream->blocks, room);
  __syncthreads();
  const uint32_t count = shared_count;
  if (part * kRound >= count) return;
  const uint32_t first_lane = params.layer * heads;
  const bool good =
      load_read_tables(stream_of(lane_view(view, lane.sequence, first_lane)), shape, tables);
  const uint32_t warp = threadIdx.x / 32;
  auto& shared = reinterpret_cast<ReadShared<kDim>*>(dynamic_shared())[warp];
  for (uint32_t first = part * kRound + 2 * warp; first < count; first += params.parts * kRound) {
    const uint64_t page = uint64_t{entry} + uint64_t{first} * kBlockPages;
    read_pair(s, first, count, good ? tables : nullptr, shared,
              view.stream_pages + page * page_bytes(kDim));
  }
}

template <int kDim>
cudaError_t launch_read(const BatchView& view, uint32_t layer, cudaStream_t stream) {
  uint32_t multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return error;
  const uint32_t rows = view.capacity * view.geometry.kv_heads;
  const uint32_t most = view.pages_max / (kBlockPages * kRound) + 1;
  const uint32_t wanted = (multiprocessors * kOfAMultiprocessor + rows - 1) / rows;
  const ReadParams params{layer, wanted < most ? wanted : most};
  return launch(read_kernel<kDim>,
                {.blocks = rows * params.parts,
                 .threads = kWarps * 32,
                 .shared_bytes = kWarps * sizeof(ReadShared<kDim>)},
                stream, view, params);
}

}  // namespace

cudaError_t launch_read_streams(const BatchView& view, uint32_t layer, cudaStream_t stream) {
  if (layer >= view.geometry.layers || view.stream_pages == nullptr) return cudaErrorInvalidValue;
  switch (view.geometry.head_dim) {
    case 64:
      return launch_read<64>(view, layer, stream);
    case 128:
      return launch_read<128>(view, layer, stream);
    case 256:
      return launch_read<256>(view, layer, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
