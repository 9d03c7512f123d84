// page_ring.cuh: the places of a warp's pages in shared memory, and the copies that fill them.
//
// Two ways to copy, chosen by the code that is compiled. From sm_90 on one elected thread starts a
// bulk copy and the others wait on the stage's barrier. Before that every thread copies 16 bytes at
// a time, and the groups of its copies arrive in their order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/ptx.cuh"
#include "thinkv/internal/page_format.h"

namespace thinkv::cuda {

// Of the 163 KiB that a block of sm_80 has at most; the rest is static, less than 10 KiB.
inline constexpr uint32_t kRingsBytesOf80 = 152 * 1024;

// Stages of each of `warps` rings in code of architecture `code`: `wanted` from sm_90 on, where a
// block has 227 KiB, else at most what fits.
template <int kHeadDim>
[[nodiscard]] __host__ __device__ constexpr uint32_t ring_stages(uint32_t code, uint32_t warps,
                                                                 uint32_t wanted) {
  constexpr uint32_t kPage = page_bytes(kHeadDim);
  const uint32_t fits = kRingsBytesOf80 / (warps * kPage);
  return code >= 90 || wanted < fits ? wanted : fits;
}

template <uint32_t kPage, uint32_t kStages>
class BulkRing {
 public:
  static constexpr uint32_t kBytes = kStages * kPage;

  // By one thread, before the warp's first copy. `barriers`: [kStages] of 8 bytes.
  static __device__ __forceinline__ void prepare(uint32_t barriers) {
    for (uint32_t i = 0; i < kStages; ++i) barrier_init(barriers + 8 * i, 1);
    barrier_init_fence();
  }
  __device__ __forceinline__ BulkRing(uint32_t ring, uint32_t barriers)
      : ring_(ring), barrier_(barriers) {}

  // A page of `bytes` bytes goes into the stage. There is none where not `some`.
  __device__ __forceinline__ void start(uint32_t stage, bool some, uint64_t page,
                                        uint32_t bytes) const {
    bulk_copy_elected(threadIdx.x % 32 == 0 && some, ring_ + stage * kPage, page, bytes,
                      barrier_ + 8 * stage);
  }
  // Until the page is there. Result: its shared address.
  __device__ __forceinline__ uint32_t wait(uint32_t stage, uint32_t parity) const {
    barrier_wait(barrier_ + 8 * stage, parity);
    return ring_ + stage * kPage;
  }

 private:
  uint32_t ring_, barrier_;
};

// As BulkRing. Requires: kStages starts come before the first wait, and one after each but the
// last: wait() counts on it.
template <uint32_t kPage, uint32_t kStages>
class AsyncRing {
 public:
  static constexpr uint32_t kBytes = kStages * kPage;

  static __device__ __forceinline__ void prepare(uint32_t) {}
  __device__ __forceinline__ AsyncRing(uint32_t ring, uint32_t) : ring_(ring) {}

  __device__ __forceinline__ void start(uint32_t stage, bool some, uint64_t page,
                                        uint32_t bytes) const {
    constexpr uint32_t kStep = 32 * 16;
    const uint32_t first = threadIdx.x % 32 * 16, to = ring_ + stage * kPage;
#pragma unroll
    for (uint32_t i = 0; i < (kPage + kStep - 1) / kStep; ++i) {
      const uint32_t at = first + i * kStep;
      copy_16_async(some && at < bytes, to + at, page + at);
    }
    commit_copies();
  }
  __device__ __forceinline__ uint32_t wait(uint32_t stage, uint32_t) const {
    wait_copies<kStages - 1>();
    __syncwarp();
    return ring_ + stage * kPage;
  }

 private:
  uint32_t ring_;
};

template <uint32_t kPage, uint32_t kStages>
using PageRing =
    std::conditional_t<kCode >= 90, BulkRing<kPage, kStages>, AsyncRing<kPage, kStages>>;

}  // namespace thinkv::cuda
