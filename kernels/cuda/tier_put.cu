// tier_put.cu: the rows of a layer's tier, made from the prompt's tensors and written to host
// memory once.
//
// A block takes 64 tokens of one kv head through shared memory, so that the rows and the keys by
// channel both leave it in runs of at least 64 bytes.
#include "kernels/cuda/rotate.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tier.h"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kTokens = 64;  // of a block
constexpr uint32_t kBlocksMax = 132 * 8;
static_assert(kTierTile % kTokens == 0, "a block's tokens lie in one tile");

// Rows as they will lie in memory. Two bytes more a row: a channel's column then lies in 32 banks.
template <int kDim>
struct PutShared {
  uint16_t rows[kTokens][kDim + 2];
};

// Tokens begin .. begin + count - 1 of the tier, of one head, as 16 bits.
template <int kDim>
__device__ __forceinline__ void load_tokens(const TierPut& put, const void* from, uint32_t head,
                                            uint32_t begin, uint32_t count,
                                            PutShared<kDim>& shared) {
  for (uint32_t base = 0; base < kTokens; base += kThreads / 8) {
    const uint32_t token = base + threadIdx.x / 8;
    const uint64_t row =
        (uint64_t{put.first + begin + token} * put.kv_heads + head) * uint64_t{kDim};
    float x[kDim / 8];
    load_row<kDim>(x, from, put.element, row, token < count);
    if (put.rotate) rotate_vector<kDim>(x);
    uint32_t raw[kDim / 8];
    to_16_bits(raw, x, put.value_type == ValueType::kBf16);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      shared.rows[token][threadIdx.x % 8 + 8 * i] = static_cast<uint16_t>(raw[i]);
    }
  }
}

template <int kDim>
__device__ __forceinline__ void store_rows(const PutShared<kDim>& shared, uint32_t begin,
                                           uint32_t count, unsigned char* section) {
  auto* to = reinterpret_cast<uint32_t*>(section) + uint64_t{begin} * kDim / 2;
  for (uint32_t i = threadIdx.x; i < count * kDim / 2; i += kThreads) {
    const uint16_t* pair = &shared.rows[2 * i / kDim][2 * i % kDim];
    to[i] = pair[0] | uint32_t{pair[1]} << 16;
  }
}

// A warp a channel: its keys to their tile, and the largest of them.
template <int kDim>
__device__ __forceinline__ void store_channels(const TierPut& put, const PutShared<kDim>& shared,
                                               uint32_t begin, uint32_t count,
                                               unsigned char* section, float* key_max) {
  const uint32_t tile = begin / kTierTile * kTierTile, width = min(put.count - tile, kTierTile);
  auto* to = reinterpret_cast<uint16_t*>(section) + uint64_t{tile} * kDim + (begin - tile);
  for (uint32_t channel = threadIdx.x / 32; channel < kDim; channel += kThreads / 32) {
    uint32_t largest = 0;
    for (uint32_t token = threadIdx.x % 32; token < count; token += 32) {
      const uint16_t raw = shared.rows[token][channel];
      to[uint64_t{channel} * width + token] = raw;
      const float key =
          put.value_type == ValueType::kBf16 ? bf16_to_float(raw) : fp16_to_float(raw);
      // Bits of numbers that are not negative are in the numbers' order; NaN is no maximum.
      if (key == key) largest = max(largest, __float_as_uint(key) & 0x7FFF'FFFFu);
    }
    for (uint32_t x = 16; x > 0; x /= 2) {
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, x));
    }
    if (threadIdx.x % 32 == 0) {
      atomicMax(reinterpret_cast<uint32_t*>(key_max) + channel, largest);
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) put_kernel(const __grid_constant__ TierPut put) {
  __shared__ PutShared<kDim> shared;
  const uint32_t pieces = (put.count + kTokens - 1) / kTokens;
  const uint64_t section = uint64_t{put.count} * kDim * sizeof(uint16_t);
  for (uint64_t i = blockIdx.x; i < uint64_t{pieces} * put.kv_heads; i += gridDim.x) {
    const auto head = static_cast<uint32_t>(i / pieces);
    const uint32_t begin = static_cast<uint32_t>(i % pieces) * kTokens;
    const uint32_t count = min(put.count - begin, kTokens);
    unsigned char* lane = put.rows + head * tier_row_bytes(kDim, put.count);
    load_tokens(put, put.v, head, begin, count, shared);
    __syncthreads();
    store_rows(shared, begin, count, lane + section);
    __syncthreads();
    load_tokens(put, put.k, head, begin, count, shared);
    __syncthreads();
    store_rows(shared, begin, count, lane);
    store_channels(put, shared, begin, count, lane + 2 * section,
                   put.key_max + uint64_t{head} * kDim);
    __syncthreads();
  }
}

template <int kDim>
cudaError_t launch_put(const TierPut& put, cudaStream_t stream) {
  const uint64_t pieces = uint64_t{put.kv_heads} * ((put.count + kTokens - 1) / kTokens);
  const auto blocks = static_cast<uint32_t>(pieces < kBlocksMax ? pieces : kBlocksMax);
  return launch(put_kernel<kDim>, {.blocks = blocks, .threads = kThreads}, stream, put);
}

}  // namespace

cudaError_t launch_tier_put(const TierPut& put, cudaStream_t stream) {
  if (put.count == 0) return cudaErrorInvalidValue;
  switch (put.head_dim) {
    case 64:
      return launch_put<64>(put, stream);
    case 128:
      return launch_put<128>(put, stream);
    case 256:
      return launch_put<256>(put, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace thinkv::cuda
