// codec_token.cuh: K or V of a token of a lane, whatever the format of its page.
#pragma once

#include <cstdint>

#include "kernels/cuda/codec.cuh"
#include "kernels/cuda/codec_block.cuh"

namespace thinkv::cuda {

// Eight threads hold the vector, as in codec.cuh. No shuffles. Requires: page_format_valid(format),
// slot < slots of the format.
template <int kDim, bool kIsK>
__device__ __forceinline__ void decode_token(float (&x)[kDim / 8], unsigned char* page,
                                             Format format, uint32_t slot) {
  if (is_block(format)) {
    return decode_block_vector<kDim, kIsK>(x, page, block_shape(kDim, format), slot);
  }
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(format));
  decode_vector<kDim, kIsK>(x, format,
                            vector_place<kDim, kIsK>(page, shape, coding_of<kIsK>(format), slot));
}

// The token at a place, descriptor << 6 | slot; x stays as it is where metadata is bad.
template <int kDim, bool kIsK>
__device__ __forceinline__ void decode_place(float (&x)[kDim / 8], const LaneView& lane,
                                             uint32_t place) {
  const DeviceDescriptor* d = descriptor_at(lane, place >> 6);
  unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
  if (page == nullptr) return;
  decode_token<kDim, kIsK>(x, page, static_cast<Format>(d->format), place & 63u);
}

}  // namespace thinkv::cuda
