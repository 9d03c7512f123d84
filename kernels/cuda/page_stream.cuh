// page_stream.cuh: the pages of one warp, on their way to its shared memory.
//
// A ring of kStages pages that belongs to one warp: one elected thread starts bulk copies, the
// others wait on the stage's barrier. Descriptors come in batches through shared memory, one
// batch ahead, so that no step waits for device memory but for its page.
// Requires sm_90 (bulk copies complete on an mbarrier).
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/ptx.cuh"
#include "thinkv/internal/page_format.h"

namespace thinkv::cuda {

// The bytes of a page that attention reads: all but the positions.
template <int kHeadDim>
__device__ __forceinline__ uint32_t copied_bytes(Format format) {
  constexpr auto kBytes = [](Format f) {
    return (page_layout(f, kHeadDim).position_offset + 15) / 16 * 16;
  };
  switch (format) {
    case Format::kK8V8:
      return kBytes(Format::kK8V8);
    case Format::kK8V4:
      return kBytes(Format::kK8V4);
    case Format::kK4V4:
      return kBytes(Format::kK4V4);
    case Format::kK4V2:
      return kBytes(Format::kK4V2);
    case Format::kK2V2:
      return kBytes(Format::kK2V2);
    default:
      return kBytes(Format::kF16);
  }
}

// A descriptor made ready: where the page is, its format in the address's low bits. In shared
// memory, two batches a warp: one is walked while the next is on its way from device memory.
struct ReadyPage {
  uint64_t live;
  uint64_t tagged;  // address, 16-byte aligned, | Format
  [[nodiscard]] __device__ __forceinline__ Format format() const {
    return static_cast<Format>(tagged & 15u);
  }
  [[nodiscard]] __device__ __forceinline__ const void* source() const {
    return reinterpret_cast<const void*>(tagged & ~15ull);
  }
};
static_assert(kFormatCount <= 16);
constexpr uint32_t kBatch = 16;

template <int kHeadDim, int kStages>
class PageStream {
 public:
  static constexpr uint32_t kPage = page_bytes(kHeadDim);
  static_assert(kStages <= static_cast<int>(kBatch));

  // Pages [begin, end) of the flat list. `ring`: kStages pages of shared memory, `barriers`:
  // [kStages], `ready`: [2 x kBatch]; all of this warp alone. Every thread of the warp calls.
  __device__ PageStream(const AttendParams& p, uint32_t begin, uint32_t end, uint32_t ring,
                        uint64_t* barriers, ReadyPage* ready)
      : p_(p),
        begin_(begin),
        end_(end),
        ring_(ring),
        barrier_(shared_address(barriers)),
        ready_(ready) {
    if (thread() == 0) {
      for (int i = 0; i < kStages; ++i) barrier_init(barrier_ + 8 * i, 1);
      barrier_init_fence();
    }
    ready_[thread() % kBatch] = make_ready(begin_ + thread() % kBatch);
    pending_ = make_ready(begin_ + kBatch + thread() % kBatch);
    __syncwarp();
    for (int i = 0; i < kStages - 1; ++i) start_copy();
  }

  // Waits for the next page and starts the copy of a later one into the stage that was read before
  // this call: every thread of the warp must be done with it.
  __device__ __forceinline__ ReadyPage next() {
    barrier_wait(barrier_ + 8 * stage_, parity_);
    __syncwarp();
    start_copy();
    const ReadyPage page = ready_[step_ % (2 * kBatch)];
    shared_ = ring_ + stage_ * kPage;
    ++step_;
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1u;
    }
    return page;
  }
  // Shared address of the page that next() returned.
  [[nodiscard]] __device__ __forceinline__ uint32_t shared() const { return shared_; }

 private:
  static __device__ __forceinline__ uint32_t thread() { return threadIdx.x % 32; }

  __device__ __forceinline__ ReadyPage make_ready(uint32_t page_index) const {
    if (page_index >= end_) return {0, 0};
    const DevicePage d = p_.pages[page_index];
    const auto base = reinterpret_cast<uint64_t>(p_.extents[d.page >> 20]);
    return {d.live, (base + uint64_t{d.page & 0xFFFFFu} * kPage) | static_cast<uint64_t>(d.format)};
  }

  __device__ __forceinline__ void start_copy() {
    if (begin_ + copied_ >= end_) return;
    if (copied_ != 0 && copied_ % kBatch == 0) {  // the batch that is walked lies in the other half
      ready_[(copied_ / kBatch % 2) * kBatch + thread() % kBatch] = pending_;
      pending_ = make_ready(begin_ + copied_ + kBatch + thread() % kBatch);
      __syncwarp();
    }
    if (thread() == 0) {
      const ReadyPage page = ready_[copied_ % (2 * kBatch)];
      const uint32_t bytes = page.live == 0 ? 0 : copied_bytes<kHeadDim>(page.format());
      barrier_expect(barrier_ + 8 * copy_stage_, bytes);
      if (bytes != 0) {
        bulk_copy(ring_ + copy_stage_ * kPage, page.source(), bytes, barrier_ + 8 * copy_stage_);
      }
    }
    ++copied_;
    copy_stage_ = copy_stage_ + 1 == kStages ? 0 : copy_stage_ + 1;
  }

  const AttendParams& p_;
  uint32_t begin_, end_;
  uint32_t ring_, barrier_;
  ReadyPage* ready_;
  ReadyPage pending_{};  // of the batch after the stored ones
  uint32_t step_ = 0, stage_ = 0, parity_ = 0, shared_ = 0;
  uint32_t copied_ = 0, copy_stage_ = 0;
};

}  // namespace thinkv::cuda
