// tier.h: the tier of a sequence on the GPU: rows in pinned memory of this process, and where they
// lie; and the working memory of a batch for what its steps fetch (kernels/cuda/tier.h).
//
// Both are memory outside of the pool. Rows never change once a layer's were put; they go with the
// sequence, and what another process of the tenant can write leads to no address of them.
// Threads: as GpuSequence and GpuBatch. Requires: no kernel uses the memory any more when it goes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "client/gpu/engine.h"
#include "client/gpu/memory.h"

namespace thinkv::client {

class GpuTier {
 public:
  // For a prompt of so many tokens, some of which lie in the tier. Errors: kExhausted.
  [[nodiscard]] static Result<std::unique_ptr<GpuTier>> make(GpuEngine& engine,
                                                             const PolicyParams& policy,
                                                             uint32_t prompt);
  // The same rows in memory of its own. Waits for the stream. Errors: kExhausted, with the bytes.
  [[nodiscard]] Result<std::unique_ptr<GpuTier>> copy() const;
  GpuTier(const GpuTier&) = delete;
  GpuTier& operator=(const GpuTier&) = delete;

  // Pins memory for a sparse layer and enqueues the copy of its rows. On error the layer has none.
  // Errors: kQuotaExceeded (host_bytes), kExhausted with the bytes, kDeviceFailed.
  [[nodiscard]] Status put(uint32_t layer, const void* k, const void* v, cuda::Element element);
  // After the last layer, before the first step: kernels know where the rows are.
  [[nodiscard]] Status publish() const;

  [[nodiscard]] bool holds(uint32_t position) const {
    return position >= table_.first && position - table_.first < table_.tokens;
  }
  [[nodiscard]] uint32_t first() const { return table_.first; }
  [[nodiscard]] uint32_t tokens() const { return table_.tokens; }
  [[nodiscard]] uint32_t fetched() const {
    return table_.tokens < table_.fetch ? table_.tokens : table_.fetch;
  }
  // What host_bytes bounds: the rows and the largest keys of all layers that have rows.
  [[nodiscard]] uint64_t bytes() const;
  // For kernels, in device memory.
  [[nodiscard]] const cuda::TierSequence* sequence() const {
    return device_.as<cuda::TierSequence>();
  }

 private:
  GpuTier(GpuEngine& engine, const PolicyParams& policy) : engine_(&engine), policy_(policy) {}
  [[nodiscard]] Status make_table();
  [[nodiscard]] uint64_t layer_bytes() const;
  [[nodiscard]] float* key_max(uint32_t layer) const;
  GpuEngine* engine_;
  PolicyParams policy_;
  cuda::TierSequence table_{};     // as the device has it
  std::vector<GpuMemory> layers_;  // pinned; empty where a layer has no rows
  GpuMemory device_;               // cuda::TierSequence, then the largest keys
};

// What the steps of a batch need for the tiers of its sequences. Grows between steps; what kernels
// and graphs know is the address of a table in device memory.
class GpuTierMemory {
 public:
  // Errors: kExhausted.
  [[nodiscard]] Status open(GpuEngine& engine, uint32_t capacity);
  [[nodiscard]] bool is_open() const { return rows_ != 0; }
  // Room for one more sequence in any row. Waits for the stream where it has to grow. Errors:
  // kExhausted, with the bytes.
  [[nodiscard]] Status make_room(GpuEngine& engine, const GpuTier& tier);
  // The tier of a row from here on in the stream, or none.
  [[nodiscard]] Status set(GpuEngine& engine, uint32_t row, const GpuTier* tier) const;
  // Adds what the kernels look for.
  void show(cuda::BatchView& view) const;
  // Of a lane, in one layer's list.
  [[nodiscard]] static uint32_t working_pages(uint32_t tokens);

 private:
  [[nodiscard]] Status grow(GpuEngine& engine, uint32_t tokens, uint32_t fetched);

  uint32_t rows_ = 0, lanes_ = 0;
  uint32_t room_ = 0, picks_max_ = 0;
  GpuMemory tiers_;   // [rows] addresses of cuda::TierSequence
  GpuMemory tables_;  // cuda::TierMemory, then cuda::WorkingPages
  GpuMemory scores_, picks_, pages_;
};

}  // namespace thinkv::client
