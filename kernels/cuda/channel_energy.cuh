// channel_energy.cuh: how much energy the prompt's queries have in each channel of a lane, from
// prefill_queries until ThinK has chosen its channels (kernels/policy/channels.h).
//
// fp32, at the ends of the lane's two buffer pages, half of the channels each: where other
// sequences have their keys' centre (centre.cuh), which does not go with formats of blocks. So it
// takes no page, and moves with the sequence. There where DeviceSequence.prompt_queries is not 0.
#pragma once

#include <cstdint>

#include "kernels/cuda/centre.cuh"

namespace thinkv::cuda {

// That of a channel, or null with kBadMetadata raised. Requires: channel < kDim.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ float* channel_energy(const LaneView& lane,
                                                               uint32_t channel) {
  constexpr uint32_t kHalf = kDim / 2;
  static_assert(kCentreOffset<kDim> + kHalf * sizeof(float) == page_bytes(kDim));
  unsigned char* page = page_at(*lane.batch, lane.lane->buffer_page[channel / kHalf]);
  if (page == nullptr) return nullptr;
  return reinterpret_cast<float*>(page + kCentreOffset<kDim>) + channel % kHalf;
}

}  // namespace thinkv::cuda
