// device_tier.h: the tier of one sequence as kernels see it, in memory that host and device map.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/tier.h"
#include "tests/support/device_pool.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::testing {

// What lies in host memory for the device: there it is pinned, so that kernels go over the bus.
class PinnedBytes {
 public:
  explicit PinnedBytes(uint64_t bytes) {
#if defined(THINKV_CUDA_EMULATED)
    data_ = static_cast<unsigned char*>(device_allocate(bytes));
#else
    void* memory = nullptr;
    THINKV_CHECK(cudaMallocHost(&memory, bytes) == cudaSuccess);
    data_ = static_cast<unsigned char*>(memory);
#endif
    std::memset(data_, 0xFF, bytes);
  }
  ~PinnedBytes() {
#if defined(THINKV_CUDA_EMULATED)
    device_free(data_);
#else
    static_cast<void>(cudaFreeHost(data_));
#endif
  }
  PinnedBytes(const PinnedBytes&) = delete;
  PinnedBytes& operator=(const PinnedBytes&) = delete;
  [[nodiscard]] unsigned char* data() const {
    return data_;
  }

 private:
  unsigned char* data_ = nullptr;
};

class DeviceTier {
 public:
  // For a prompt of so many tokens.
  DeviceTier(const ModelGeometry& geometry, const PolicyParams& policy, uint32_t prompt)
      : geometry_(geometry),
        policy_(policy),
        tokens_(policy.tier.tier_tokens(prompt)),
        layer_bytes_(geometry.kv_heads *
                     cuda::tier_row_bytes(geometry.head_dim, std::max(tokens_, 1u))),
        rows_(layer_bytes_ * geometry.layers),
        key_max_(uint64_t{geometry.lanes()} * geometry.head_dim),
        sequence_(1) {
    std::fill_n(key_max_.data(), key_max_.size(), 0.0f);
    sequence_[0] = {.tokens = tokens_,
                    .first = policy.tier.kept_first(prompt),
                    .fetch = policy.tier.fetch,
                    .channels = policy.tier.channels,
                    .rotates = policy.rotate,
                    .reserved = 0,
                    .key_max = key_max_.data(),
                    .layers = {}};
  }
  [[nodiscard]] bool any() const { return tokens_ > 0; }
  [[nodiscard]] cuda::TierSequence& sequence() const { return sequence_[0]; }

  // The rows of a layer; nothing where it is dense.
  [[nodiscard]] cudaError_t put(uint32_t layer, const void* k, const void* v,
                                cuda::Element element) {
    if (!any() || policy_.tier.dense(layer)) return cudaSuccess;
    unsigned char* rows = rows_.data() + layer * layer_bytes_;
    sequence_[0].layers[layer] = reinterpret_cast<uint64_t>(rows);
    return cuda::launch_tier_put(
        {.k = k,
         .v = v,
         .element = element,
         .value_type = geometry_.value_type,
         .kv_heads = geometry_.kv_heads,
         .head_dim = geometry_.head_dim,
         .first = sequence_[0].first,
         .count = tokens_,
         .rotate = policy_.rotate != 0,
         .rows = rows,
         .key_max = key_max_.data() + uint64_t{layer} * geometry_.kv_heads * geometry_.head_dim},
        nullptr);
  }

 private:
  ModelGeometry geometry_;
  PolicyParams policy_;
  uint32_t tokens_;
  uint64_t layer_bytes_;
  PinnedBytes rows_;
  DeviceVector<float> key_max_;
  DeviceVector<cuda::TierSequence> sequence_;
};

}  // namespace thinkv::testing
