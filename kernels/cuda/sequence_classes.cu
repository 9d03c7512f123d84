// sequence_classes.cu: what a client tells about the classes of its tokens (class_table.cuh).
#include "kernels/cuda/class_table.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 256;

struct ClassParams {
  uint32_t root;
  uint32_t first;  // position
  const uint8_t* classes;
  uint32_t count;
};

__device__ void clear_page(const BatchView& view, unsigned char* page) {
  const uint32_t words = page_bytes(view.geometry.head_dim) / static_cast<uint32_t>(sizeof(uint4));
  for (uint32_t w = threadIdx.x; w < words; w += kThreads) {
    reinterpret_cast<uint4*>(page)[w] = make_uint4(0, 0, 0, 0);
  }
}

// One more page of zeros, by thread 0. Result: false where there was none.
__device__ bool push_page(const BatchView& view, DeviceSequence* sequence) {
  if (sequence->class_pages == 0) {
    sequence->class_directory = take_page(view.lease);
    if (sequence->class_directory == PageId::kNoneRaw) return false;
    sequence->metadata_pages += 1;
  }
  auto* ids = reinterpret_cast<uint32_t*>(page_at(view, sequence->class_directory));
  if (ids == nullptr) return false;
  const uint32_t raw = take_page(view.lease);
  if (raw == PageId::kNoneRaw) return false;
  ids[sequence->class_pages] = raw;
  sequence->class_pages += 1;
  sequence->metadata_pages += 1;
  return true;
}

// One block.
__global__ void __launch_bounds__(kThreads)
    classes_kernel(const __grid_constant__ BatchView view,
                   const __grid_constant__ ClassParams params) {
  DeviceSequence* sequence = sequence_at(view, params.root);
  if (sequence == nullptr) return;
  const uint32_t dim = view.geometry.head_dim, bytes = page_bytes(dim);
  const uint32_t needed = (params.first + params.count + bytes - 1) / bytes;
  if (needed > class_pages_max(dim) || sequence->class_pages > class_pages_max(dim)) {
    if (threadIdx.x == 0) raise_fault(view.lease, kBadMetadata);
    return;
  }
  const uint32_t held = sequence->class_pages;
  __syncthreads();  // all have read it
  bool good = true;
  if (threadIdx.x == 0) {
    while (good && sequence->class_pages < needed) good = push_page(view, sequence);
  }
  if (__syncthreads_or(good ? 0 : 1) != 0) return;
  for (uint32_t i = held; i < needed; ++i) {
    unsigned char* page = class_page(view, sequence, i);
    if (page != nullptr) clear_page(view, page);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < params.count; i += kThreads) {
    const uint32_t position = params.first + i;
    unsigned char* page = class_page(view, sequence, position / bytes);
    if (page != nullptr) page[position % bytes] = params.classes[i];
  }
}

}  // namespace

cudaError_t launch_classes(const BatchView& view, uint32_t root, uint32_t first,
                           const uint8_t* classes, uint32_t count, cudaStream_t stream) {
  const uint32_t most = classes_max(view.geometry);
  if (first > most || count > most - first) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const ClassParams params{root, first, classes, count};
  return launch(classes_kernel, {.blocks = 1, .threads = kThreads}, stream, view, params);
}

}  // namespace thinkv::cuda
