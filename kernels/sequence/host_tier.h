// host_tier.h: K and V rows of a sequence in the client's own memory (TailorKV, arXiv 2505.19586).
//
// Of each lane of a sparse layer the middle of the prompt: rows in the model's 16-bit type, bit by
// bit as pages would hold them, and the keys once more by channel, because a step reads all rows of
// a few channels to choose the rows that it fetches. Rows never change and are never lost; they do
// not outlive the process, and are no bytes of the pool.
// Threads: const functions may overlap.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "thinkv/internal/placement.h"

namespace thinkv::kernels {

// Working memory of a choice.
struct TierScratch {
  std::vector<float> query;  // [dim]
  std::vector<float> scores;
  std::vector<uint32_t> channels;
  std::vector<uint32_t> rows;       // what was chosen, ascending
  std::vector<uint32_t> positions;  // of them
};

class TierLane {
 public:
  [[nodiscard]] static uint64_t bytes_of(uint32_t head_dim, uint32_t tokens) {
    return uint64_t{tokens} * head_dim * 3 * sizeof(uint16_t) + head_dim * sizeof(float);
  }

  // Replaces what was there. k, v [count, dim]; row i is position first + i.
  void put(Format wide, uint32_t head_dim, uint32_t first, std::span<const float> k,
           std::span<const float> v);
  [[nodiscard]] uint32_t tokens() const { return tokens_; }
  [[nodiscard]] uint32_t first() const { return first_; }
  [[nodiscard]] uint64_t bytes() const { return tokens_ == 0 ? 0 : bytes_of(head_dim_, tokens_); }

  // The rows that `q` [group, dim] looks at most, into scratch.rows.
  void choose(const TierParams& params, const float* q, uint32_t group, TierScratch& scratch) const;
  // Row i as fp32, exact. Requires: i < tokens().
  void read(uint32_t row, float* k, float* v) const;

  // The choice that was made ahead for the step in progress, or none.
  std::vector<uint32_t> prefetched;
  bool has_prefetched = false;

 private:
  Format wide_ = Format::kF16;
  uint32_t head_dim_ = 0;
  uint32_t first_ = 0;
  uint32_t tokens_ = 0;
  std::vector<uint16_t> k_;         // [tokens, dim]
  std::vector<uint16_t> v_;         // [tokens, dim]
  std::vector<uint16_t> channels_;  // [dim, tokens]: k by channel
  std::vector<float> key_max_;      // [dim] of |k|
};

}  // namespace thinkv::kernels
