// sequence_copy.cu: a copy of a sequence that shares nothing with it: what beams that part and
// samples of one prompt go on from.
//
// The copy's pages hold the same bytes as the source's, except for the page ids in them. Four
// launches: the pages that lead to the lanes, a block a lane, what two lanes share, and the magic
// last, so that nothing follows a copy that is not whole.
#include "kernels/cuda/class_table.cuh"
#include "kernels/cuda/coded_lane.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 128;

// Whole block.
__device__ void copy_page(const BatchView& view, const unsigned char* from, unsigned char* to) {
  const uint32_t words = page_bytes(view.geometry.head_dim) / static_cast<uint32_t>(sizeof(uint4));
  for (uint32_t w = threadIdx.x; w < words; w += blockDim.x) {
    reinterpret_cast<uint4*>(to)[w] = reinterpret_cast<const uint4*>(from)[w];
  }
}

// A new page with the bytes of page `raw`. Whole block; every thread gets the id, kNoneRaw where
// there was no page. `id` is shared memory.
__device__ uint32_t clone_page(const BatchView& view, uint32_t raw, uint32_t* id) {
  __syncthreads();  // everybody has read the id of the last page
  if (threadIdx.x == 0) *id = take_page(view.lease);
  __syncthreads();
  const uint32_t made = *id;
  if (made == PageId::kNoneRaw) return made;
  const unsigned char* from = page_at(view, raw);
  unsigned char* to = page_at(view, made);
  if (from != nullptr && to != nullptr) copy_page(view, from, to);
  return made;
}

// The directory of token classes and its pages.
__device__ void clone_classes(const BatchView& view, const DeviceSequence* source,
                              DeviceSequence* sequence, uint32_t* id) {
  const uint32_t pages = class_pages_of(source, view.geometry.head_dim);
  if (pages == 0) return;
  const uint32_t directory = clone_page(view, source->class_directory, id);
  if (threadIdx.x == 0) sequence->class_directory = directory;
  auto* ids = reinterpret_cast<uint32_t*>(directory == PageId::kNoneRaw ? nullptr
                                                                        : page_at(view, directory));
  if (ids == nullptr) return;
  for (uint32_t i = 0; i < pages; ++i) {
    __syncthreads();  // the directory is whole
    const uint32_t made = clone_page(view, ids[i], id);
    if (threadIdx.x == 0) ids[i] = made;
  }
}

// The stream of a lane whose DeviceStream still names the pages of the source's. Whole block.
__device__ void copy_stream(const StreamView& from, const LaneView& lane, uint32_t* id) {
  const BatchView& view = *lane.batch;
  const uint32_t root = clone_page(view, from.lane.lane->stream_page, id);
  if (threadIdx.x == 0) lane.lane->stream_page = root;
  __syncthreads();
  const StreamView to = stream_of(lane);
  if (to.stream == nullptr) return;
  const uint32_t block_pages = min(from.stream->block_pages, kStreamBlockPagesMax);
  const uint32_t list_pages = min(from.stream->list_pages, kStreamListPagesMax);
  for (uint32_t i = 0; i < block_pages; ++i) {
    const uint32_t made = clone_page(view, from.stream->block_page[i], id);
    if (threadIdx.x == 0) to.stream->block_page[i] = made;
  }
  for (uint32_t i = 0; i < list_pages; ++i) {
    const uint32_t made = clone_page(view, from.stream->list_page[i], id);
    if (threadIdx.x == 0) to.stream->list_page[i] = made;
  }
  __syncthreads();
  for (uint32_t i = 0; i < from.stream->pages; ++i) {
    const uint32_t* old = listed_page(from, i);
    uint32_t* listed = listed_page(to, i);
    if (old == nullptr || listed == nullptr || *old == PageId::kNoneRaw) continue;
    const uint32_t made = clone_page(view, *old, id);
    if (threadIdx.x == 0) *listed = made;
  }
}

// One block: everything but the lanes. The new root has no magic yet.
__global__ void copy_root_kernel(const __grid_constant__ BatchView view, uint32_t from,
                                 uint32_t root) {
  __shared__ uint32_t id;
  DeviceSequence* source = sequence_at(view, from);
  auto* page = page_at(view, root);
  if (page == nullptr) return;
  auto* sequence = reinterpret_cast<DeviceSequence*>(page);
  if (source == nullptr) {
    if (threadIdx.x == 0) sequence->magic = 0;
    return;
  }
  copy_page(view, reinterpret_cast<const unsigned char*>(source), page);
  __syncthreads();
  if (threadIdx.x == 0) sequence->magic = 0;
  for (uint32_t i = 0; i < source->segment_pages; ++i) {
    const uint32_t made = clone_page(view, source->segment_page[i], &id);
    if (threadIdx.x == 0) sequence->segment_page[i] = made;
  }
  const uint32_t work = clone_page(view, source->work_page, &id);
  if (threadIdx.x == 0) sequence->work_page = work;
  clone_classes(view, source, sequence, &id);
  const uint32_t lane_pages = min(source->lane_pages, lane_pages_max(view.geometry.head_dim));
  for (uint32_t i = 0; i < lane_pages; ++i) {
    const uint32_t made = clone_page(view, lane_page_ids(source)[i], &id);
    if (threadIdx.x == 0) lane_page_ids(sequence)[i] = made;
  }
}

// Lane blockIdx.x of the copy, whose DeviceLane still names the pages of the source's.
__global__ void __launch_bounds__(kThreads)
    copy_lanes_kernel(const __grid_constant__ BatchView view, uint32_t from, uint32_t root) {
  __shared__ uint32_t id;
  DeviceSequence* source = sequence_at(view, from);
  auto* sequence = reinterpret_cast<DeviceSequence*>(page_at(view, root));
  if (source == nullptr || sequence == nullptr) return;
  const LaneView old_lane = lane_view(view, source, blockIdx.x);
  const LaneView lane = lane_view(view, sequence, blockIdx.x);
  if (old_lane.lane == nullptr || lane.lane == nullptr) return;
  for (uint32_t i = 0; i < old_lane.lane->table_pages; ++i) {
    const uint32_t made = clone_page(view, old_lane.lane->table[i], &id);
    if (threadIdx.x == 0) lane.lane->table[i] = made;
  }
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t made = clone_page(view, old_lane.lane->buffer_page[i], &id);
    if (threadIdx.x == 0) lane.lane->buffer_page[i] = made;
  }
  __syncthreads();
  const StreamView stream = stream_of(old_lane);
  if (stream.stream != nullptr) copy_stream(stream, lane, &id);
  for (uint32_t i = 0; i < old_lane.lane->pages; ++i) {
    const DeviceDescriptor* old = descriptor_at(old_lane, i);
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (old == nullptr || d == nullptr || !owns_page(old)) continue;
    const uint32_t made = clone_page(view, old->page, &id);
    if (threadIdx.x == 0) d->page = made;
  }
}

// Pages that two layers share were copied by the second layer's lane; the first's, of blockIdx.x,
// gets their new ids. The copy's tables are in the source's order.
__global__ void __launch_bounds__(kThreads)
    copy_pairs_kernel(const __grid_constant__ BatchView view, uint32_t from, uint32_t root) {
  DeviceSequence* source = sequence_at(view, from);
  auto* sequence = reinterpret_cast<DeviceSequence*>(page_at(view, root));
  const uint32_t partner = blockIdx.x + view.geometry.kv_heads;
  if (source == nullptr || sequence == nullptr || partner >= view.geometry.lanes()) return;
  const LaneView lane = lane_view(view, sequence, blockIdx.x);
  const LaneView old_owner = lane_view(view, source, partner);
  const LaneView owner = lane_view(view, sequence, partner);
  if (lane.lane == nullptr || old_owner.lane == nullptr || owner.lane == nullptr) return;
  for (uint32_t i = threadIdx.x; i < lane.lane->pages; i += kThreads) {
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (d == nullptr || owns_page(d)) continue;
    uint32_t made = PageId::kNoneRaw;
    for (uint32_t j = 0; j < old_owner.lane->pages && made == PageId::kNoneRaw; ++j) {
      const DeviceDescriptor* old = descriptor_at(old_owner, j);
      if (old == nullptr || old->page != d->page) continue;
      const DeviceDescriptor* copied = descriptor_at(owner, j);
      if (copied != nullptr) made = copied->page;
    }
    if (made == PageId::kNoneRaw) raise_fault(view.lease, kBadMetadata);
    d->page = made;
  }
}

__global__ void copy_end_kernel(const __grid_constant__ BatchView view, uint32_t from,
                                uint32_t root) {
  auto* sequence = reinterpret_cast<DeviceSequence*>(page_at(view, root));
  if (sequence == nullptr || sequence_at(view, from) == nullptr) return;
  sequence->magic = kDeviceSequenceMagic;
  add_64(&view.lease->used_total, 1);  // the root: the close gives it to the lease
}

}  // namespace

cudaError_t launch_copy(const BatchView& view, uint32_t from, uint32_t root, cudaStream_t stream) {
  cudaError_t error =
      launch(copy_root_kernel, {.blocks = 1, .threads = kThreads}, stream, view, from, root);
  if (error != cudaSuccess) return error;
  error = launch(copy_lanes_kernel, {.blocks = view.geometry.lanes(), .threads = kThreads}, stream,
                 view, from, root);
  if (error != cudaSuccess) return error;
  error = launch(copy_pairs_kernel, {.blocks = view.geometry.lanes(), .threads = kThreads}, stream,
                 view, from, root);
  if (error != cudaSuccess) return error;
  return launch(copy_end_kernel, {.blocks = 1, .threads = 1}, stream, view, from, root);
}

}  // namespace thinkv::cuda
