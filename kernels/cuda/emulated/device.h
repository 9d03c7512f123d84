// device.h: the part of CUDA that the kernels use, on one CPU thread.
//
// A launch runs its blocks one after another; the threads of a block are fibers (Boost.Context)
// that give way at barriers and shuffles. So a run is deterministic, memory errors are the
// address sanitizer's to find, and a barrier or shuffle that not every thread of its warp or block
// reaches ends the program with a message instead of being undefined. It does not find races
// between barriers: compute-sanitizer on a GPU does. Speed: tens of nanoseconds a shuffle.
// Threads: launches from one thread at a time.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// ---- names that nvcc has built in ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, and all its threads see the one object.
#define __shared__ static

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // NOLINT: CUDA's names

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
inline constexpr cudaError_t cudaSuccess = 0;
inline constexpr cudaError_t cudaErrorInvalidValue = 1;

namespace thinkv::cuda {

inline constexpr uint32_t kCode = THINKV_CUDA_CODE;
[[nodiscard]] constexpr uint32_t running_code() {
  return kCode;
}

}  // namespace thinkv::cuda

namespace thinkv::cuda::emulated {

// The asynchronous copies of one thread. What is on its way is NaN bits at its destination, and
// arrives when its group is waited for and not before.
class CopyQueue {
 public:
  static constexpr size_t kBytes = 16;

  void add(unsigned char* to, const unsigned char* from) {
    std::memset(to, 0xFF, kBytes);
    open_.push_back({to, from});
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t later) {
    while (groups_.size() > later) {
      for (const Copy& copy : groups_.front()) std::memcpy(copy.to, copy.from, kBytes);
      groups_.erase(groups_.begin());
    }
  }

 private:
  struct Copy {
    unsigned char* to;
    const unsigned char* from;
  };
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;  // few at a time
};

// Runs `blocks` blocks of `threads` threads; `body` is one thread's kernel.
void run(uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
         const std::function<void()>& body);

// Called by the running fiber. All threads of the warp (block) that have not returned must arrive.
void warp_barrier();
void block_barrier();
// For every thread of the warp a 32-byte place that the others may read after a warp_barrier().
[[nodiscard]] unsigned char* exchange(uint32_t lane);
[[nodiscard]] unsigned char* dynamic_shared();
[[nodiscard]] uint32_t dynamic_shared_bytes();
// True where the thread has not returned: a warp's last threads may be missing.
[[nodiscard]] bool lane_runs(uint32_t lane);
[[nodiscard]] CopyQueue& copies();  // of the running thread

// Every lane gives a value, then sees those of all.
template <class T>
class Exchanged {
 public:
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 32);
  explicit Exchanged(const T& mine) {
    std::memcpy(exchange(threadIdx.x % 32), &mine, sizeof(T));
    warp_barrier();
  }
  ~Exchanged() { warp_barrier(); }  // nobody overwrites what another still reads
  Exchanged(const Exchanged&) = delete;
  Exchanged& operator=(const Exchanged&) = delete;
  [[nodiscard]] T of(uint32_t lane) const {
    T value;
    std::memcpy(&value, exchange(lane % 32), sizeof(T));
    return value;
  }
};

}  // namespace thinkv::cuda::emulated

// ---- warp and block ----

inline void __syncwarp(uint32_t = 0xFFFFFFFFu) {
  thinkv::cuda::emulated::warp_barrier();
}
inline void __syncthreads() {
  thinkv::cuda::emulated::block_barrier();
}
template <class T>
T __shfl_sync(uint32_t, T value, uint32_t lane) {
  return thinkv::cuda::emulated::Exchanged<T>(value).of(lane);
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, uint32_t mask) {
  return thinkv::cuda::emulated::Exchanged<T>(value).of((threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(uint32_t, T value, uint32_t delta) {
  const uint32_t lane = threadIdx.x % 32;
  return thinkv::cuda::emulated::Exchanged<T>(value).of(lane < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(uint32_t, T value, uint32_t delta) {
  const uint32_t lane = threadIdx.x % 32;
  return thinkv::cuda::emulated::Exchanged<T>(value).of(lane + delta > 31 ? lane : lane + delta);
}
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  const thinkv::cuda::emulated::Exchanged<bool> all(predicate);
  uint32_t bits = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (thinkv::cuda::emulated::lane_runs(lane) && all.of(lane)) bits |= 1u << lane;
  }
  return bits;
}
inline int __any_sync(uint32_t mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
inline int __syncthreads_or(int predicate) {
  static int any;
  thinkv::cuda::emulated::block_barrier();
  any = 0;
  thinkv::cuda::emulated::block_barrier();
  any |= predicate;
  thinkv::cuda::emulated::block_barrier();
  return any;
}

// ---- bits, atomics (one thread runs at a time), memory ----

inline int __popc(uint32_t x) {
  return std::popcount(x);
}
inline int __popcll(uint64_t x) {
  return std::popcount(x);
}
inline int __ffs(uint32_t x) {
  return x == 0 ? 0 : std::countr_zero(x) + 1;
}
inline int __ffsll(uint64_t x) {
  return x == 0 ? 0 : std::countr_zero(x) + 1;
}
inline int __clz(uint32_t x) {
  return std::countl_zero(x);
}
template <class T>
T atomicAdd(T* where, std::type_identity_t<T> value) {
  const T old = *where;
  *where = static_cast<T>(old + value);
  return old;
}
template <class T>
T atomicSub(T* where, std::type_identity_t<T> value) {
  const T old = *where;
  *where = static_cast<T>(old - value);
  return old;
}
template <class T>
T atomicMax(T* where, std::type_identity_t<T> value) {
  const T old = *where;
  if (value > old) *where = value;
  return old;
}
template <class T>
T atomicMin(T* where, std::type_identity_t<T> value) {
  const T old = *where;
  if (value < old) *where = value;
  return old;
}
template <class T>
T atomicOr(T* where, std::type_identity_t<T> value) {
  const T old = *where;
  *where = static_cast<T>(old | value);
  return old;
}
template <class T>
T atomicExch(T* where, std::type_identity_t<T> value) {
  const T old = *where;
  *where = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* where) {
  return *where;
}
template <class T>
T __ldcg(const T* where) {
  return *where;
}
template <class T>
T __ldcs(const T* where) {
  return *where;
}
template <class T>
T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
// As CUDA: NaN loses.
inline float __uint_as_float(uint32_t x) {
  return std::bit_cast<float>(x);
}
inline uint32_t __float_as_uint(float x) {
  return std::bit_cast<uint32_t>(x);
}

namespace thinkv::cuda {

using emulated::dynamic_shared;

inline float exact_add(float a, float b) {
  return a + b;
}
inline float exact_sub(float a, float b) {
  return a - b;
}
inline float exact_mul(float a, float b) {
  return a * b;
}
inline float exact_div(float a, float b) {
  return a / b;
}
inline float exact_sqrt(float a) {
  return std::sqrt(a);
}

struct LaunchSize {
  uint32_t blocks;
  uint32_t threads;
  uint32_t shared_bytes = 0;
  bool overlaps_previous = false;
};

template <class... Parameters, class... Arguments>
[[nodiscard]] cudaError_t launch(void (*kernel)(Parameters...), const LaunchSize& size,
                                 cudaStream_t, const Arguments&... arguments) {
  if (size.threads == 0 || size.threads > 1024) return cudaErrorInvalidValue;
  // A kernel's parameters are copied at launch.
  const std::tuple<std::decay_t<Parameters>...> copies(static_cast<Parameters>(arguments)...);
  emulated::run(size.blocks, size.threads, size.shared_bytes,
                [&] { std::apply([&](const auto&... copy) { kernel(copy...); }, copies); });
  return cudaSuccess;
}

}  // namespace thinkv::cuda
