// tier.h: rows of a sequence's prompt in host memory that the device maps (TailorKV, arXiv
// 2505.19586), and how a step chooses and fetches some of them.
//
// As kernels/sequence/host_tier.h: of each lane of a sparse layer the middle of the prompt, in rows
// of the model's 16-bit type and the keys once more by channel. A layer's rows are one run of
// pinned memory, lane after lane:
//   k [tokens, head_dim] | v [tokens, head_dim] | keys by channel
// where the keys by channel are tiles of 2,048 tokens, [head_dim][2048], the last one [head_dim]
// [rest]: full tiles are read 16 bytes a thread, and no byte is there that the host's tier lacks.
// Where all that lies the host alone says (TierSequence), in memory that no other process maps.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/stream.h"
#include "thinkv/internal/geometry.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/placement.h"

namespace thinkv::cuda {

struct BatchView;

inline constexpr uint32_t kTierTile = 2048;  // tokens

// A sequence's tier, in device memory.
struct TierSequence {
  uint32_t tokens;    // of each lane that has rows
  uint32_t first;     // position of row 0
  uint32_t fetch;     // rows a step and lane; 1 to kTierTokensMax
  uint32_t channels;  // 1 to kTierChannelsMax
  uint32_t rotates;   // 0 or 1: rows, and so queries, are rotated
  uint32_t reserved;
  float* key_max;                       // [layers, kv_heads, head_dim] of |k|, in device memory
  uint64_t layers[limits::kLayersMax];  // address of the layer's rows; 0: none
};

// Rows that a step fetches in every lane of the layer.
[[nodiscard]] constexpr uint32_t fetched_rows(const TierSequence& tier, uint32_t layer) {
  if (tier.layers[layer] == 0) return 0;
  return tier.tokens < tier.fetch ? tier.tokens : tier.fetch;
}

}  // namespace thinkv::cuda
