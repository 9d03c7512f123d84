// platform.cuh: what kernel sources use of CUDA, on a GPU or in the emulator.
//
// A kernel source includes this instead of CUDA's headers. Compiled by nvcc the names are CUDA's.
// Compiled by a host compiler with THINKV_CUDA_EMULATED they are those of emulated/device.h, which
// runs the threads of a block as fibers of one thread: the shipping kernels are tested against the
// oracle where there is no GPU, under the address sanitizer too. Rules that make that work:
//   launch through launch() below, dynamic shared memory through dynamic_shared();
//   machine instructions only in ptx.cuh, whose functions the emulator has as well;
//   conversions of small floats and exact fp32 steps through small_float.h and exact_*().
#pragma once

// The virtual architecture that this pass of the compiler makes device code for; the host's side of
// a source takes the newest that the sources tell apart. For the emulator the build says it.
#if defined(__CUDA_ARCH__)
#define THINKV_CUDA_CODE (__CUDA_ARCH__ / 10)
#elif !defined(THINKV_CUDA_CODE)
#define THINKV_CUDA_CODE 90
#endif

#if defined(THINKV_CUDA_EMULATED)

#include "kernels/cuda/emulated/device.h"

#else

#include <cuda_runtime.h>

#include <cstdint>

namespace thinkv::cuda {

inline constexpr uint32_t kCode = THINKV_CUDA_CODE;

// The virtual architecture (80, 90, ...) of the code that the current device runs: the driver takes
// the best that the library holds for it, or compiles the library's PTX. 0: it has none.
[[nodiscard]] uint32_t running_code();

// Dynamic shared memory of the block, 128-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char thinkv_shared[];
  return thinkv_shared;
}

// Rounded once each, never contracted to a fused multiply-add: the oracle's order of operations.
__device__ __forceinline__ float exact_add(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ float exact_sub(float a, float b) {
  return __fsub_rn(a, b);
}
__device__ __forceinline__ float exact_mul(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ float exact_div(float a, float b) {
  return __fdiv_rn(a, b);
}
__device__ __forceinline__ float exact_sqrt(float a) {
  return __fsqrt_rn(a);
}

struct LaunchSize {
  uint32_t blocks;
  uint32_t threads;
  uint32_t shared_bytes = 0;
  // From sm_90 on: starts while the kernel before it in the stream still runs; the kernel itself
  // waits by wait_for_previous() (ptx.cuh) before it reads what that one wrote.
  bool overlaps_previous = false;
};

// Errors: launch errors. Dynamic shared memory above 48 KiB is asked for here.
template <class... Parameters, class... Arguments>
[[nodiscard]] cudaError_t launch(void (*kernel)(Parameters...), const LaunchSize& size,
                                 cudaStream_t stream, const Arguments&... arguments) {
  if (size.blocks == 0) return cudaSuccess;
  if (size.shared_bytes > 48 * 1024) {
    const cudaError_t set = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(size.shared_bytes));
    if (set != cudaSuccess) return set;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size.blocks);
  config.blockDim = dim3(size.threads);
  config.dynamicSmemBytes = size.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  // Code without wait_for_previous() must not start early, even on a GPU that could.
  config.numAttrs = size.overlaps_previous && running_code() >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace thinkv::cuda

#endif
