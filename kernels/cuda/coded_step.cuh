// coded_step.cuh: which block of a lane leaves its pages at the end of a step, and its tokens
// there.
#pragma once

#include "kernels/cuda/coded_block.cuh"
#include "kernels/cuda/lane_write.cuh"

namespace thinkv::cuda {

// The tokens of one block in the pages of a lane: shared memory. page: null where one is missing.
struct BlockPlaces {
  SlotPlace of[kBlockTokens];
};

template <int kDim>
struct PageSource {
  const BlockPlaces* places;
  Format wide;
  template <bool kIsK>
  __device__ __forceinline__ void load(float (&x)[kDim / 8], uint32_t token) const {
    const SlotPlace place = places->of[token];
    const SlotShape shape = slot_shape(kDim, static_cast<uint32_t>(wide));
    decode_vector<kDim, kIsK>(
        x, wide, vector_place<kDim, kIsK>(place.page, shape, coding_of<kIsK>(wide), place.slot));
  }
};

// True where this step, which is counted in sequence->tokens, ends with a block leaving the pages.
[[nodiscard]] __device__ __forceinline__ bool block_due(const DeviceSequence* sequence,
                                                        const StreamView& s) {
  return s.stream != nullptr &&
         policy::coded_tokens(sequence->policy.entropy, sequence->tokens) > s.stream->end_position;
}

// Calls visit(descriptor, page, slot, token) for every live slot of a token of the block that
// begins at `first`. Whole block; a descriptor a thread.
template <class Visit>
__device__ __forceinline__ void for_each_slot_of(const LaneView& lane, uint32_t first,
                                                 Visit visit) {
  const Format wide = wide_format(*lane.batch);
  const SlotShape shape = slot_shape(lane.head_dim, static_cast<uint32_t>(wide));
  for (uint32_t i = threadIdx.x; i < lane.lane->pages; i += blockDim.x) {
    DeviceDescriptor* d = descriptor_at(lane, i);
    if (d == nullptr || d->format != static_cast<uint8_t>(wide)) continue;
    unsigned char* page = page_at(*lane.batch, d->page);
    if (page == nullptr) continue;
    for (uint64_t left = d->live & low_slots(shape.slots); left != 0; left &= left - 1) {
      const auto slot = static_cast<uint32_t>(__ffsll(static_cast<int64_t>(left)) - 1);
      const uint32_t token = position_of(page, shape.position_offset, slot) - first;
      if (token < kBlockTokens) visit(d, page, slot, token);
    }
  }
}

// Result, for all threads: whether all tokens of the block are in the lane's pages.
[[nodiscard]] __device__ inline bool find_tokens(const LaneView& lane, uint32_t first,
                                                 BlockPlaces& places) {
  __syncthreads();
  if (threadIdx.x < kBlockTokens) places.of[threadIdx.x] = {nullptr, 0};
  __syncthreads();
  for_each_slot_of(lane, first,
                   [&](DeviceDescriptor*, unsigned char* page, uint32_t slot, uint32_t token) {
                     places.of[token] = {page, slot};
                   });
  __syncthreads();
  const bool missing = threadIdx.x < kBlockTokens && places.of[threadIdx.x].page == nullptr;
  if (__syncthreads_or(missing ? 1 : 0) == 0) return true;
  if (threadIdx.x == 0) raise_fault(lane.batch->lease, kBadMetadata);
  return false;
}

// Their slots are free; the tokens stay counted. Whole block.
__device__ inline void drop_tokens(const LaneView& lane, uint32_t first) {
  for_each_slot_of(lane, first, [&](DeviceDescriptor* d, unsigned char*, uint32_t slot, uint32_t) {
    d->live &= ~(uint64_t{1} << slot);
    atomicAdd(&lane.lane->free_slots[d->format], 1u);
  });
}

}  // namespace thinkv::cuda
