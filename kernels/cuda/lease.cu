// lease.cu: the host fills the stack of free pages and takes from it, in stream order.
#include "kernels/cuda/lane.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 256;

__global__ void refill_kernel(Lease* lease, const uint32_t* pages, uint32_t count) {
  const uint32_t have = lease->count;
  const uint32_t room = lease->capacity - min(have, lease->capacity);
  const uint32_t taken = min(count, room);
  for (uint32_t i = threadIdx.x; i < taken; i += blockDim.x) lease->pages[have + i] = pages[i];
  __syncthreads();  // all threads have read the old count
  if (threadIdx.x != 0) return;
  lease->count = have + taken;
  if (taken < count) raise_fault(lease, kLeaseFull);
}

__global__ void drain_kernel(Lease* lease, uint32_t* out, uint32_t count) {
  const uint32_t have = lease->count;
  const uint32_t taken = min(count, have);
  for (uint32_t i = threadIdx.x; i < taken; i += blockDim.x) {
    out[1 + i] = lease->pages[have - 1 - i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  out[0] = taken;
  lease->count = have - taken;
}

}  // namespace

cudaError_t launch_refill(Lease* lease, const uint32_t* pages, uint32_t count,
                          cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch(refill_kernel, {.blocks = 1, .threads = kThreads}, stream, lease, pages, count);
}

cudaError_t launch_drain(Lease* lease, uint32_t* out, uint32_t count, cudaStream_t stream) {
  return launch(drain_kernel, {.blocks = 1, .threads = kThreads}, stream, lease, out, count);
}

}  // namespace thinkv::cuda
