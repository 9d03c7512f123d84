// running_code.cu: which of the library's codes the current device runs.
#include <atomic>
#include <cstdint>

#include "kernels/cuda/platform.cuh"

namespace thinkv::cuda {
namespace {

constexpr int kDevices = 64;

__global__ void probe_kernel() {}

uint32_t ask() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, probe_kernel) != cudaSuccess) return 0;
  return static_cast<uint32_t>(attributes.ptxVersion);
}

}  // namespace

// Asked once a device, of any kernel: all are compiled for the same architectures.
uint32_t running_code() {
  static std::atomic<uint32_t> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kDevices) return ask();
  uint32_t code = known[device].load(std::memory_order_relaxed);
  if (code == 0) {
    code = ask();
    known[device].store(code, std::memory_order_relaxed);
  }
  return code;
}

}  // namespace thinkv::cuda
