// centre.cuh: the centre of a lane's keys (kernels/policy/centre.h) on the device.
//
// It lies at the end of both pages of the lane's buffer, behind their positions: pages that a lane
// has from its opening to its end, and that an append has the address of. fp16, in the order in
// which the eight threads of a vector hold it (rotate.cuh): thread l's dims l + 8 i one after
// another. Sequences without centred keys have nothing there and never read it.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_format.h"
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/ptx.cuh"

namespace thinkv::cuda {

template <int kDim>
inline constexpr uint32_t kCentreOffset = page_bytes(kDim) - 2 * kDim;
static_assert(page_layout(Format::kF16, 64).position_offset + 4 * kBufferPageSlots <=
              kCentreOffset<64>);
static_assert(page_layout(Format::kF16, 128).position_offset + 4 * kBufferPageSlots <=
              kCentreOffset<128>);
static_assert(page_layout(Format::kF16, 256).position_offset + 4 * kBufferPageSlots <=
              kCentreOffset<256>);
static_assert(kCentreOffset<64> % 16 == 0, "read in words of 16 bytes");

// True where the appended keys of a sequence are centred: with its prompt the centres came.
[[nodiscard]] __device__ __forceinline__ bool is_centred(const DeviceSequence* sequence) {
  return sequence->policy.centre != 0 && sequence->prompt_tokens > 0;
}

// Eight neighbouring threads call it together; `page` is one of the buffer's.
template <int kDim>
__device__ __forceinline__ void load_centre(float (&centre)[kDim / 8], const unsigned char* page) {
  constexpr int kWords = kDim / 64;
  const auto* words =
      reinterpret_cast<const uint4*>(page + kCentreOffset<kDim>) + threadIdx.x % 8 * kWords;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint4 word = words[w];
    const uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = unpack_f16(pairs[i]);
      centre[8 * w + 2 * i] = both.x;
      centre[8 * w + 2 * i + 1] = both.y;
    }
  }
}

template <int kDim>
__device__ __forceinline__ void take_centre_off(float (&x)[kDim / 8],
                                                const float (&centre)[kDim / 8]) {
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) x[i] = exact_sub(x[i], centre[i]);
}

}  // namespace thinkv::cuda
