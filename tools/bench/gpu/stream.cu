// stream.cu: the streaming read that the other kernels are measured against.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace {

// Four independent 16-byte loads a thread are in flight; nothing is kept in L1 or L2.
__global__ void __launch_bounds__(512)
    stream_read(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t x = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = __ldcs(data + i), b = __ldcs(data + i + stride);
    const uint4 c = __ldcs(data + i + 2 * stride), d = __ldcs(data + i + 3 * stride);
    x ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
    x ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += stride) {
    const uint4 a = __ldcs(data + i);
    x ^= a.x ^ a.y ^ a.z ^ a.w;
  }
  if (x == 0x12345678u) *sink = x;  // keeps the loads
}

}  // namespace

// Reads `bytes` (a multiple of 16) at `data`. Result: a cudaError_t.
extern "C" int thinkv_bench_stream_read(const void* data, uint64_t bytes, void* sink,
                                        cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  stream_read<<<processors * 16, 512, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16,
                                                   static_cast<uint32_t*>(sink));
  return cudaGetLastError();
}
