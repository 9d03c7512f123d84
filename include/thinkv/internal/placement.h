// placement.h: where tokens of a policy lie that are not in pages of their own: streams and tiers.
//
// Both take tokens from the 16-bit pages and give them back to attention in working pages, so they
// go with policies that evict nothing. Plain data, the same bytes in every process of one protocol.
#pragma once

#include <cstdint>
#include <type_traits>

#include "thinkv/internal/format.h"
#include "thinkv/internal/limits.h"

namespace thinkv {

inline constexpr uint32_t kStreamBlockTokens = 64;
inline constexpr uint32_t kEntropyRecentMax = 4096;
// Below, a range has more steps than a byte has codes; above, two or three values are left.
inline constexpr float kStepShareMin = 0.005f;
inline constexpr float kStepShareMax = 0.5f;

// Entropy-coded streams (KVComp, arXiv 2509.00579): blocks of 64 tokens that left the newest ones.
struct EntropyParams {
  float key_step = 0.0f;    // share of a channel's range in a block; 0: no streams
  float value_step = 0.0f;  // share of a token's range
  uint32_t recent = 128;  // the open block, as if it were whole, and the blocks before it that stay
  uint32_t reserved = 0;
  [[nodiscard]] constexpr bool on() const { return key_step != 0.0f; }
};

inline constexpr uint32_t kTierChannelsMax = 64;
inline constexpr uint32_t kTierTokensMax = 4096;  // start, recent and fetch, each
inline constexpr uint64_t kTierBytesMax = uint64_t{1} << 44;

// A host tier (TailorKV, arXiv 2505.19586): of the sparse layers, the middle of the prompt lies in
// the client's memory and is fetched row by row.
struct TierParams {
  uint64_t host_bytes = 0;                              // of one sequence, at most; 0: no tier
  uint32_t dense_layers[limits::kLayersMax / 32] = {};  // bit mask: all in pages, in dense_format
  uint16_t start = 8;    // first tokens of the prompt that stay in pages
  uint16_t recent = 56;  // newest tokens of the prompt that do
  uint16_t fetch = 128;  // rows a step and kv head
  uint8_t channels = 8;  // of the keys, that rows are chosen by
  Format dense_format = Format::kK2V2;
  [[nodiscard]] constexpr bool on() const { return host_bytes != 0; }
  [[nodiscard]] constexpr bool dense(uint32_t layer) const {
    return (dense_layers[layer / 32] >> (layer % 32) & 1u) != 0;
  }
  // Of a prompt of so many tokens, those of a sparse layer that stay in pages at its start, and
  // those in the tier behind them.
  [[nodiscard]] constexpr uint32_t kept_first(uint32_t tokens) const {
    return tokens < start ? tokens : start;
  }
  [[nodiscard]] constexpr uint32_t tier_tokens(uint32_t tokens) const {
    const uint32_t others = tokens - kept_first(tokens);
    return others < recent ? 0 : others - recent;
  }
};
static_assert(std::is_trivially_copyable_v<EntropyParams> && sizeof(EntropyParams) == 16);
static_assert(std::is_trivially_copyable_v<TierParams> && sizeof(TierParams) == 48);

}  // namespace thinkv
