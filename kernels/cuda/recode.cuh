// recode.cuh: tokens of one page of a lane, written again in another format. By a whole block.
#pragma once

#include <cstdint>

#include "kernels/cuda/codec_token.cuh"
#include "kernels/cuda/lane_write.cuh"
#include "kernels/cuda/out_of_line.cuh"

namespace thinkv::cuda {

// The tokens of one page that go to another format.
struct RecodeShared {
  uint32_t positions[kSlotsPerPageMax];
  uint32_t scores[kSlotsPerPageMax];  // as wide as the lane's: fp16 or fp32
  uint8_t slots[kSlotsPerPageMax];
  SlotPlace places[kSlotsPerPageMax];
};

// Codes and scales of a token, of a block its share (PageLayout::slot_payload_bytes).
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint32_t payload_bytes(Format format) {
  if (is_block(format)) {
    const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(format));
    return shape.position_offset / shape.slots;
  }
  const VectorCoding k = coding_of<true>(format), v = coding_of<false>(format);
  return kDim * (k.bits + v.bits) / 8 + k.scale_bytes(kDim) + v.scale_bytes(kDim);
}

namespace recode_detail {

__device__ __forceinline__ void list_tokens(const LaneView& lane, DeviceDescriptor* d,
                                            uint32_t index, uint64_t chosen, RecodeShared& shared) {
  const unsigned char* page = page_at(*lane.batch, d->page);
  const SlotShape shape = slot_shape(lane.head_dim, d->format);
  const uint32_t slot = threadIdx.x;
  if (page == nullptr || slot >= kSlotsPerPageMax || ((chosen >> slot) & 1u) == 0) return;
  const auto at = static_cast<uint32_t>(__popcll(chosen & low_slots(slot)));
  shared.slots[at] = static_cast<uint8_t>(slot);
  shared.positions[at] = position_of(page, shape.position_offset, slot);
  if (!lane.scored()) return;
  write_score(lane, shared.scores, at, read_score(lane, score_row(lane, d, index), slot));
}

// A token for each eight threads at a time, from the page `from` to its place.
template <int kDim>
__device__ THINKV_OUT_OF_LINE void move_tokens(const RecodeShared& shared, unsigned char* from,
                                               Format old_format, Format format, uint32_t count) {
  const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(format));
  for (uint32_t base = 0; base < count; base += blockDim.x / 8) {
    const uint32_t token = base + threadIdx.x / 8;
    const bool listed = token < count;
    const uint32_t source = listed ? shared.slots[token] : 0;
    const SlotPlace place = listed ? shared.places[token] : SlotPlace{nullptr, 0};
    const bool active = place.page != nullptr;
    float x[kDim / 8];
    decode_token<kDim, true>(x, from, old_format, source);
    encode_vector<kDim, true>(
        x, format, vector_place<kDim, true>(place.page, shape, coding_of<true>(format), place.slot),
        active);
    decode_token<kDim, false>(x, from, old_format, source);
    encode_vector<kDim, false>(
        x, format,
        vector_place<kDim, false>(place.page, shape, coding_of<false>(format), place.slot), active);
    if (!active || threadIdx.x % 8 != 0) continue;
    *reinterpret_cast<uint32_t*>(place.page + shape.position_offset + place.slot * kPositionBytes) =
        shared.positions[token];
  }
}

}  // namespace recode_detail

// The live slots `chosen` of descriptor `index`. A token without a place stays where it is. Result:
// tokens that moved. Requires: at least 64 threads; the same arguments for all.
template <int kDim>
__device__ uint32_t recode_slots(const LaneView& lane, uint32_t index, uint64_t chosen,
                                 Format format, RecodeShared& shared) {
  DeviceDescriptor* d = descriptor_at(lane, index);
  unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
  if (page == nullptr) return 0;
  const auto count = static_cast<uint32_t>(__popcll(chosen));
  recode_detail::list_tokens(lane, d, index, chosen, shared);
  __syncthreads();
  if (threadIdx.x < 32) {
    // Not counted as reused, as on the host: no new token came.
    static_cast<void>(
        place_tokens(lane, {format, shared.positions, shared.scores, count, shared.places}));
  }
  __syncthreads();
  recode_detail::move_tokens<kDim>(shared, page, static_cast<Format>(d->format), format, count);
  uint64_t dropped = chosen;
  uint32_t moved = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (shared.places[i].page != nullptr) {
      ++moved;
    } else {
      dropped &= ~(uint64_t{1} << shared.slots[i]);
    }
  }
  __syncthreads();  // everybody has read the page and the shared arrays
  if (threadIdx.x == 0) drop_slots(lane, d, dropped);
  return moved;
}

}  // namespace thinkv::cuda
