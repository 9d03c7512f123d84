// rank_budget.h: how many tokens of a lane stay, by layer, by head, by bytes.
//
// Whole numbers throughout; where a share does not divide, sums are rounded from the first on, so
// that all parts together are the whole exactly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "thinkv/internal/rank_rule.h"

namespace thinkv::policy {

[[nodiscard]] constexpr uint32_t percent_of(uint32_t whole, uint32_t percent) {
  return static_cast<uint32_t>(uint64_t{whole} * percent / 100);
}

// The newest tokens that a rule protects in a lane that may hold `limit`: so many, or a share of
// the limit; where both are given, the smaller.
[[nodiscard]] constexpr uint32_t newest_protected(const RankRule& rule, uint32_t limit) {
  const uint32_t share = percent_of(limit, rule.recent_percent);
  if (rule.recent_percent == 0) return rule.recent;
  return rule.recent != 0 && rule.recent < share ? rule.recent : share;
}

// Of a sequence's tokens so far, those that the rule's budget counts.
[[nodiscard]] constexpr uint32_t tokens_counted(const RankRule& rule, uint32_t tokens,
                                                uint32_t prompt) {
  return rule.counts == BudgetCount::kGenerated ? tokens - prompt : tokens;
}

// PyramidKV (arXiv 2406.02069): linear from `most` in layer 0 to `least` in the last one, `window`
// tokens more in each.
struct Pyramid {
  uint32_t budget;  // mean over the layers, window included
  uint32_t window;
  uint32_t tokens;  // of the lane
  float beta;
  uint32_t layers;
};
// The n-th partial sum of the layers' budgets without their windows, rounded to the nearest.
[[nodiscard]] constexpr uint64_t pyramid_sum(const Pyramid& p, uint32_t layers) {
  const uint32_t mean = p.budget - p.window;
  auto least = static_cast<uint32_t>(static_cast<float>(mean) / p.beta);
  uint32_t most = 2 * mean - least;
  if (most > p.tokens - p.window) {
    most = p.tokens - p.window;
    least = 2 * mean > most ? 2 * mean - most : 0;
  }
  const uint64_t n = layers;
  const uint64_t flat = n * most;
  if (p.layers < 2 || n == 0) return n * mean;
  const uint64_t fall = (most - least) * (n * (n - 1) / 2);  // in steps of 1 / (layers - 1)
  const uint64_t steps = p.layers - 1;
  return flat - (fall + steps / 2) / steps;
}
// Requires: layer < p.layers.
[[nodiscard]] constexpr uint32_t pyramid_budget(const Pyramid& p, uint32_t layer) {
  // Uniform where there is no pyramid to build: nothing beside the window, or no token to drop.
  if (p.budget <= p.window || p.tokens <= p.budget) return p.budget;
  return static_cast<uint32_t>(pyramid_sum(p, layer + 1) - pyramid_sum(p, layer)) + p.window;
}

// The budget of the head at `rank` (0: the largest signal) of `heads` that share heads * mean
// tokens by groups of equal size.
[[nodiscard]] constexpr uint32_t group_budget(uint32_t mean, uint32_t heads, uint32_t rank,
                                              std::span<const uint8_t> shares) {
  const auto groups = static_cast<uint32_t>(shares.size());
  uint64_t all = 0, before = 0;
  for (uint32_t r = 0; r < heads; ++r) {
    const uint64_t share = shares[r * groups / heads];
    all += share;
    if (r < rank) before += share;
  }
  const uint64_t total = uint64_t{mean} * heads;
  const uint64_t through = before + shares[rank * groups / heads];
  return static_cast<uint32_t>(total * through / all - total * before / all);
}

// Tokens in a format with `slots` a page that take the bytes of `tokens` tokens at 16 bits. Pages
// have one size, scales and positions are in it: nothing is left out of the account.
[[nodiscard]] constexpr uint32_t tokens_of_equal_bytes(uint32_t tokens, uint32_t slots,
                                                       uint32_t slots_16bit) {
  return static_cast<uint32_t>(
      std::min<uint64_t>(uint64_t{tokens} * slots / slots_16bit, 0xFFFF'FFFEu));
}

}  // namespace thinkv::policy
