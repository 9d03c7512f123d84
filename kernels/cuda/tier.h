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
//
// A step, for each layer: launch_tier_fetch between the append and attention. It chooses the rows
// (kernels/policy/tier_select.h, the same ones as the host), unless that was done ahead, and copies
// them into the working pages that the step's list names (working.cuh), in ascending order.
// All launches have a fixed grid and find what grew in device memory, so a graph holds them.
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
  uint32_t fetch;     // rows a step and lane, 1 to kTierTokensMax
  uint32_t channels;  // 1 to kTierChannelsMax
  uint32_t rotates;   // 0 or 1: rows are rotated, and so the query has to be
  uint32_t reserved;
  float* key_max;                       // [layers, kv_heads, head_dim] of |k|, in device memory
  uint64_t layers[limits::kLayersMax];  // address of the layer's rows; 0: none
};

// Rows that a step fetches in every lane of the layer.
[[nodiscard]] constexpr uint32_t fetched_rows(const TierSequence& tier, uint32_t layer) {
  if (tier.layers[layer] == 0) return 0;
  return tier.tokens < tier.fetch ? tier.tokens : tier.fetch;
}

// Bytes of a lane's rows.
[[nodiscard]] constexpr uint64_t tier_row_bytes(uint32_t head_dim, uint32_t tokens) {
  return uint64_t{tokens} * head_dim * 3 * sizeof(uint16_t);
}

// Working memory of choices, in device memory: the host changes it between launches.
struct TierMemory {
  uint32_t* scores;  // [tier_regions(capacity, kv_heads), room]
  // [layers, lanes of a layer, 1 + picks_max]: 1 where the rows were chosen ahead for the step in
  // progress, then the rows, ascending.
  uint32_t* picks;
  uint32_t room;  // rows of a lane
  uint32_t picks_max;
};
// Blocks that choose, each with scores of its own: the bus is the bound, not their number.
[[nodiscard]] constexpr uint32_t tier_blocks(uint32_t lanes) {
  return lanes < 64 ? lanes : 64;
}
// Those of a step, then those of a choice ahead, which may run beside it on another stream.
[[nodiscard]] constexpr uint32_t tier_regions(uint32_t capacity, uint32_t kv_heads) {
  return tier_blocks(capacity * kv_heads) + tier_blocks(kv_heads);
}

// What a layer's rows are made from.
struct TierPut {
  const void* k;  // [tokens, kv_heads, head_dim] of the whole prompt
  const void* v;
  Element element;
  ValueType value_type;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t first;  // token of row 0
  uint32_t count;  // rows
  bool rotate;
  unsigned char* rows;  // of the layer: kv_heads x tier_row_bytes(head_dim, count)
  float* key_max;       // [kv_heads, head_dim] of zeros
};
[[nodiscard]] cudaError_t launch_tier_put(const TierPut& put, cudaStream_t stream);

// q: [lanes, group, head_dim] of lanes first_lane and on, not rotated.
struct TierQuery {
  const void* q;
  Element element;
  uint32_t layer;
  uint32_t first_lane;
  uint32_t lanes;
};
// Chooses ahead for the step that launch_begin began: the lanes' next launch_tier_fetch copies what
// is chosen here and looks at no query. Without a step in progress it changes nothing. query: of
// lanes of one sequence. May run beside other layers of the step, behind its begin and before the
// layer's launch_tier_fetch; one such launch at a time.
[[nodiscard]] cudaError_t launch_tier_choose(const BatchView& view, const TierQuery& query,
                                             cudaStream_t stream);
// Chooses where that was not done ahead, and copies. query: of all lanes of the batch.
[[nodiscard]] cudaError_t launch_tier_fetch(const BatchView& view, const TierQuery& query,
                                            cudaStream_t stream);

}  // namespace thinkv::cuda
