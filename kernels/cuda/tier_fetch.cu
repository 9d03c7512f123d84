// tier_fetch.cu: the rows of a step: chosen by a block a lane, then copied from host memory into
// the working pages by a block a page.
#include "kernels/cuda/codec_sites.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tier_choice.cuh"
#include "kernels/cuda/working.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kFetchThreads = 128;
constexpr uint32_t kFetchBlocksMax = 132 * 8;
constexpr uint32_t kPagesOfALane = 16;  // 128 rows: what a block each is launched for

// Where the rows of a lane are chosen to; null where the memory is too small, which the host made.
[[nodiscard]] __device__ __forceinline__ uint32_t* picks_of(const BatchView& view, uint32_t layer,
                                                            uint32_t row, uint32_t wanted) {
  const TierMemory memory = *view.tier_memory;
  if (memory.picks == nullptr || wanted > memory.picks_max) {
    raise_fault(view.lease, kListFull);
    return nullptr;
  }
  const uint64_t lanes = uint64_t{view.capacity} * view.geometry.kv_heads;
  return memory.picks + (layer * lanes + row) * (uint64_t{1} + memory.picks_max);
}

struct ChooseParams {
  TierQuery query;
  uint32_t ahead;  // 0 or 1
};

template <int kDim>
__device__ void choose_lane(const BatchView& view, const ChooseParams& params, uint32_t row,
                            ChoiceShared& shared) {
  const TierQuery& query = params.query;
  const uint32_t heads = view.geometry.kv_heads;
  const TierSequence* tier = tier_of_row(view, row / heads);
  if (tier == nullptr) return;
  const uint32_t wanted = fetched_rows(*tier, query.layer);
  if (wanted == 0) return;
  uint32_t* picks = picks_of(view, query.layer, row, wanted);
  if (picks == nullptr) return;
  if (params.ahead == 0 && picks[0] != 0) return;
  const TierMemory memory = *view.tier_memory;
  if (tier->tokens > memory.room) {
    raise_fault(view.lease, kListFull);
    return;
  }
  const uint32_t group = view.geometry.q_heads / heads;
  const uint32_t region = blockIdx.x + (params.ahead != 0 ? tier_blocks(view.capacity * heads) : 0);
  const TierLaneView lane = tier_lane(*tier, view.geometry, query.layer, row % heads);
  choose_rows<kDim>(*tier, lane,
                    {.q = query.q,
                     .element = query.element,
                     .first = uint64_t{row - query.first_lane} * group * kDim,
                     .group = group,
                     .bf16 = view.geometry.value_type == ValueType::kBf16,
                     .scores = memory.scores + uint64_t{region} * memory.room},
                    wanted, shared, picks + 1);
  // Everybody has read the mark, and the next lane's numbers may replace these.
  __syncthreads();
  if (threadIdx.x == 0) picks[0] = params.ahead;
}

template <int kDim>
__global__ void __launch_bounds__(kChoiceThreads)
    choose_kernel(const __grid_constant__ BatchView view,
                  const __grid_constant__ ChooseParams params) {
  __shared__ ChoiceShared shared;
  for (uint32_t i = blockIdx.x; i < params.query.lanes; i += gridDim.x) {
    choose_lane<kDim>(view, params, params.query.first_lane + i, shared);
  }
}

// The bytes of eight rows on their way: K, then V.
template <int kDim>
struct FetchShared {
  uint4 rows[2 * kBufferPageSlots][kDim / 8];
  uint4 image[page_bytes(kDim) / 16];
};

// Row `token` of the page's rows, or of no row zeros, 16 bytes a thread.
template <int kDim>
__device__ __forceinline__ void load_rows(const BatchView& view, const TierLaneView& lane,
                                          const uint32_t* picks, uint32_t count,
                                          FetchShared<kDim>& shared) {
  constexpr uint32_t kWords = kDim / 8;
  for (uint32_t i = threadIdx.x; i < 2 * kBufferPageSlots * kWords; i += kFetchThreads) {
    const uint32_t vector = i / kWords, slot = vector % kBufferPageSlots;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (slot < count) {
      const uint32_t row = picks[slot];
      if (row < lane.tokens) {
        const uint16_t* section = vector < kBufferPageSlots ? lane.k : lane.v;
        words = reinterpret_cast<const uint4*>(section + uint64_t{row} * kDim)[i % kWords];
      } else {
        raise_fault(view.lease, kBadMetadata);
      }
    }
    shared.rows[vector][i % kWords] = words;
  }
}

// One working page: the first half of the threads puts keys, the other values.
template <int kDim>
__device__ void fetch_page(const BatchView& view, const TierLaneView& lane, uint32_t first,
                           const uint32_t* picks, uint32_t count, unsigned char* page,
                           FetchShared<kDim>& shared) {
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(wide_format(view)));
  load_rows(view, lane, picks, count, shared);
  for (uint32_t w = threadIdx.x; w < page_bytes(kDim) / 16; w += kFetchThreads) {
    shared.image[w] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  auto* image = reinterpret_cast<unsigned char*>(shared.image);
  const uint32_t vector = threadIdx.x / 8, slot = vector % kBufferPageSlots;
  const auto* halves = reinterpret_cast<const uint16_t*>(shared.rows[vector]);
  uint32_t raw[kDim / 8];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) raw[i] = halves[threadIdx.x % 8 + 8 * i];
  if (vector < kBufferPageSlots) {
    put_halves<kDim, true>(image, slot, raw);
  } else {
    put_halves<kDim, false>(image + shape.v_offset, slot, raw);
  }
  if (threadIdx.x < count) {
    *reinterpret_cast<uint32_t*>(image + shape.position_offset + threadIdx.x * kPositionBytes) =
        first + picks[threadIdx.x];
  }
  __syncthreads();
  for (uint32_t w = threadIdx.x; w < page_bytes(kDim) / 16; w += kFetchThreads) {
    reinterpret_cast<uint4*>(page)[w] = shared.image[w];
  }
  __syncthreads();
}
static_assert(kFetchThreads == 8 * 2 * kBufferPageSlots);

template <int kDim>
__global__ void __launch_bounds__(kFetchThreads)
    fetch_kernel(const __grid_constant__ BatchView view, uint32_t layer) {
  __shared__ FetchShared<kDim> shared;
  const uint32_t heads = view.geometry.kv_heads, lanes = view.capacity * heads;
  const uint32_t each = view.working->lane_pages;
  for (uint64_t i = blockIdx.x; i < uint64_t{lanes} * each; i += gridDim.x) {
    const auto row = static_cast<uint32_t>(i / each), page = static_cast<uint32_t>(i % each);
    const TierSequence* tier = tier_of_row(view, row / heads);
    if (tier == nullptr) continue;
    const WorkingRun run = working_run(view, layer, row);
    if (page >= run.pages()) continue;
    const uint32_t* picks = picks_of(view, layer, row, run.tokens);
    if (picks == nullptr) continue;
    const uint32_t before = page * kBufferPageSlots;
    fetch_page<kDim>(view, tier_lane(*tier, view.geometry, layer, row % heads), tier->first,
                     picks + 1 + before, min(run.tokens - before, kBufferPageSlots),
                     run.first + uint64_t{page} * page_bytes(kDim), shared);
  }
}

template <int kDim>
cudaError_t launch_choose(const BatchView& view, const ChooseParams& params, cudaStream_t stream) {
  const uint32_t heads = view.geometry.kv_heads, lanes = params.query.lanes;
  const uint32_t blocks = tier_blocks(params.ahead != 0 ? heads : view.capacity * heads);
  return launch(choose_kernel<kDim>,
                {.blocks = lanes < blocks ? lanes : blocks, .threads = kChoiceThreads}, stream,
                view, params);
}

template <int kDim>
cudaError_t launch_both(const BatchView& view, const TierQuery& query, cudaStream_t stream) {
  const cudaError_t chosen = launch_choose<kDim>(view, {query, 0}, stream);
  if (chosen != cudaSuccess) return chosen;
  const uint64_t pages = uint64_t{view.capacity} * view.geometry.kv_heads * kPagesOfALane;
  const auto blocks = static_cast<uint32_t>(pages < kFetchBlocksMax ? pages : kFetchBlocksMax);
  return launch(fetch_kernel<kDim>, {.blocks = blocks, .threads = kFetchThreads}, stream, view,
                query.layer);
}

[[nodiscard]] bool query_good(const BatchView& view, const TierQuery& query) {
  const uint64_t lanes = uint64_t{view.capacity} * view.geometry.kv_heads;
  return query.layer < view.geometry.layers && uint64_t{query.first_lane} + query.lanes <= lanes &&
         view.tier_memory != nullptr && view.working != nullptr;
}

}  // namespace

cudaError_t launch_tier_choose(const BatchView& view, const TierQuery& query, cudaStream_t stream) {
  if (!query_good(view, query)) return cudaErrorInvalidValue;
  const ChooseParams params{query, 1};
  switch (view.geometry.head_dim) {
    case 64:
      return launch_choose<64>(view, params, stream);
    case 128:
      return launch_choose<128>(view, params, stream);
    case 256:
      return launch_choose<256>(view, params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_tier_fetch(const BatchView& view, const TierQuery& query, cudaStream_t stream) {
  if (!query_good(view, query)) return cudaErrorInvalidValue;
  switch (view.geometry.head_dim) {
    case 64:
      return launch_both<64>(view, query, stream);
    case 128:
      return launch_both<128>(view, query, stream);
    case 256:
      return launch_both<256>(view, query, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
