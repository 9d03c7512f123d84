// page_stream.cuh: the pages of one warp, on their way to its shared memory.
//
// A ring of kStages pages that belongs to one warp (page_ring.cuh). Descriptors come in batches
// through shared memory, one batch ahead, so that no step waits for device memory but for its page.
// The steps have no branch that depends on the page: control flow was a quarter of the time of a
// page.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/page_ring.cuh"
#include "thinkv/internal/page_format.h"

namespace thinkv::cuda {

// Sixteenths of the bytes of a page that are copied: up to the positions, or with them. kFormats:
// those before it can come. Every
// entry of the layout table must be named in a constant expression: the table is the host's.
template <int kHeadDim, bool kPositions, uint32_t kFormats, uint32_t kFormat = 1>
[[nodiscard]] __device__ __forceinline__ uint32_t copied_sixteenths(Format format) {
  if constexpr (kFormat == kFormats) {
    return 0;
  } else {
    constexpr PageLayout kLayout = page_layout(static_cast<Format>(kFormat), kHeadDim);
    constexpr uint32_t kBytes = kPositions ? kLayout.bytes_used : kLayout.position_offset;
    return format == static_cast<Format>(kFormat)
               ? (kBytes + 15) / 16
               : copied_sixteenths<kHeadDim, kPositions, kFormats, kFormat + 1>(format);
  }
}
// Where the positions are.
template <int kHeadDim, uint32_t kFormats, uint32_t kFormat = 1>
[[nodiscard]] __device__ __forceinline__ uint32_t position_offset(Format format) {
  if constexpr (kFormat == kFormats) {
    return 0;
  } else {
    constexpr PageLayout kLayout = page_layout(static_cast<Format>(kFormat), kHeadDim);
    return format == static_cast<Format>(kFormat)
               ? kLayout.position_offset
               : position_offset<kHeadDim, kFormats, kFormat + 1>(format);
  }
}

// A descriptor made ready, in shared memory: two batches a warp, one is walked while the next is
// on its way from device memory.
struct ReadyPage {
  uint64_t live;
  uint64_t packed;  // Format | address (64-byte aligned, below 2^54) | sixteenths to copy << 54
  [[nodiscard]] __device__ __forceinline__ Format format() const {
    return static_cast<Format>(packed & 63u);
  }
  [[nodiscard]] __device__ __forceinline__ uint64_t address() const {
    return packed & 0x003F'FFFF'FFFF'FFC0u;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t bytes() const {
    return static_cast<uint32_t>(packed >> 54) * 16;
  }
};
constexpr uint32_t kBatch = 16;

template <int kHeadDim, uint32_t kStages, bool kPositions, uint32_t kFormats>
class PageStream {
 public:
  static constexpr uint32_t kPage = page_bytes(kHeadDim);
  using Ring = PageRing<kPage, kStages>;
  static_assert(kStages < kBatch && kPage / 16 < 1024);

  // Pages [begin, end) of the flat list. `ring`: kStages pages of shared memory, `barriers`:
  // [kStages], made ready by Ring::prepare(); `ready`: [2 x kBatch]; all of this warp alone. Every
  // thread of the warp calls.
  __device__ __forceinline__ PageStream(const PageView* pages, uint32_t begin, uint32_t end,
                                        uint32_t ring, uint32_t barriers, ReadyPage* ready)
      : pages_(pages + begin), count_(end - begin), ring_(ring, barriers), ready_(ready) {
    store_batch(0, load_page(thread() % kBatch));
    pending_ = load_page(kBatch + thread() % kBatch);
    __syncwarp();
    start_copy(0, 0);
  }
  // Starts the copies of the first pages but one, the first time. Not at once: the loads that a
  // warp still needs to begin (its lane, q) would queue behind all the pages of the GPU.
  __device__ __forceinline__ void fill() {
    if (filled_) return;
    filled_ = true;
#pragma unroll
    for (uint32_t i = 1; i < kStages; ++i) start_copy(i, i);
  }

  // The descriptor of the page that wait() waits for. Requires: there is one.
  [[nodiscard]] __device__ __forceinline__ ReadyPage peek() const {
    return ready_[step_ % (2 * kBatch)];
  }
  // Until that page is in shared memory. Requires: fill() was called. Result: its shared address.
  __device__ __forceinline__ uint32_t wait() const {
    return ring_.wait(stage_, parity_);
  }
  // Requires: fill() was called. Done with that page: every thread of the warp has read what it
  // needs. Its place takes the page kStages later.
  __device__ __forceinline__ void release() {
    __syncwarp();
    const uint32_t next = step_ + kStages;
    if (next % kBatch == 0) {  // the batch that is walked lies in the other half
      store_batch(next / kBatch, pending_);
      pending_ = load_page(next + kBatch + thread() % kBatch);
      __syncwarp();
    }
    start_copy(next, stage_);
    ++step_;
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1u;
    }
  }

 private:
  static __device__ __forceinline__ uint32_t thread() {
    return threadIdx.x % 32;
  }

  [[nodiscard]] __device__ __forceinline__ PageView load_page(uint32_t index) const {
    return index < count_ ? pages_[index] : PageView{0, 0};
  }
  __device__ __forceinline__ void store_batch(uint32_t batch, const PageView& view) {
    const Format format = static_cast<Format>(view.tagged & 63u);
    const uint64_t sixteenths =
        view.live == 0 ? 0 : copied_sixteenths<kHeadDim, kPositions, kFormats>(format);
    ready_[batch % 2 * kBatch + thread() % kBatch] = {view.live, view.tagged | sixteenths << 54};
  }
  __device__ __forceinline__ void start_copy(uint32_t index, uint32_t stage) const {
    const ReadyPage page = ready_[index % (2 * kBatch)];
    ring_.start(stage, index < count_, page.address(), page.bytes());
  }

  const PageView* pages_;  // the first of the run
  uint32_t count_;
  Ring ring_;
  ReadyPage* ready_;
  PageView pending_{};  // of the batch after the stored ones
  uint32_t step_ = 0, stage_ = 0, parity_ = 0;
  bool filled_ = false;
};

}  // namespace thinkv::cuda
