// rank_select.h: which tokens of a lane stay, once each has a number.
//
// Rows ascend by position. `fixed` marks rows that stay whatever their number; `keep` is written
// for every row. Higher numbers stay; of equal ones, the newer. What is not a number ranks lowest.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>

#include "thinkv/internal/rank_rule.h"

namespace thinkv::policy {

// True where row `a` stays rather than row `b`: a strict order of all rows.
[[nodiscard]] inline bool ranks_above(std::span<const float> score, uint32_t a, uint32_t b) {
  const float x = std::isnan(score[a]) ? -INFINITY : score[a];
  const float y = std::isnan(score[b]) ? -INFINITY : score[b];
  return x != y ? x > y : a > b;
}

// Writes the rows that are not fixed to `order`. Result: how many.
[[nodiscard]] inline uint32_t free_rows(std::span<const uint8_t> fixed, std::span<uint32_t> order) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < fixed.size(); ++i) {
    if (fixed[i] == 0) order[count++] = i;
  }
  return count;
}

// The fixed rows and the `target` best of the others. order [n]: working memory.
inline void keep_best(std::span<const float> score, std::span<const uint8_t> fixed, uint32_t target,
                      std::span<uint32_t> order, std::span<uint8_t> keep) {
  std::copy(fixed.begin(), fixed.end(), keep.begin());
  const uint32_t free = free_rows(fixed, order);
  if (target >= free) return std::fill(keep.begin(), keep.end(), uint8_t{1});
  if (target == 0) return;
  const auto begin = order.begin();
  std::nth_element(begin, begin + (target - 1), begin + free,
                   [&](uint32_t a, uint32_t b) { return ranks_above(score, a, b); });
  for (uint32_t i = 0; i < target; ++i) keep[order[i]] = 1;
}

// All rows but the lowest that is not fixed. Result: false where all are fixed.
inline bool drop_lowest(std::span<const float> score, std::span<const uint8_t> fixed,
                        std::span<uint8_t> keep) {
  std::fill(keep.begin(), keep.end(), uint8_t{1});
  const auto n = static_cast<uint32_t>(fixed.size());
  uint32_t lowest = n;
  for (uint32_t i = 0; i < n; ++i) {
    if (fixed[i] == 0 && (lowest == n || ranks_above(score, lowest, i))) lowest = i;
  }
  if (lowest == n) return false;
  keep[lowest] = 0;
  return true;
}

// ---- shared: the heads of a layer compete (Ada-KV, arXiv 2407.11550) ----

struct SharedRow {
  float score;
  uint32_t head;
  uint32_t row;  // of the head; of equal scores the newer stays, then the lower head
  [[nodiscard]] bool above(const SharedRow& other) const {
    if (score != other.score) return score > other.score;
    return row != other.row ? row > other.row : head < other.head;
  }
};

// How many rows each head keeps of those that may go: `target` in all, each head its first `least`
// ones, the best of the others wherever they are. candidates: rows that may go, those of a head one
// after the other and its best first; reordered. least, places [heads].
inline void share_places(std::span<SharedRow> candidates, std::span<const uint32_t> least,
                         uint32_t target, std::span<uint32_t> places) {
  std::fill(places.begin(), places.end(), 0u);
  size_t open = 0;
  uint32_t given = 0;
  for (const SharedRow& each : candidates) {
    if (given < target && places[each.head] < least[each.head]) {
      places[each.head] += 1;
      given += 1;
    } else {
      candidates[open++] = each;
    }
  }
  const size_t left = std::min<size_t>(target - given, open);
  if (left == 0) return;
  std::nth_element(candidates.begin(), candidates.begin() + (left - 1), candidates.begin() + open,
                   [](const SharedRow& a, const SharedRow& b) { return a.above(b); });
  for (size_t i = 0; i < left; ++i) places[candidates[i].head] += 1;
}

// ---- max_drop: DBudgetKV (arXiv 2502.16886) ----

// How many rows of `order` (least important first) every head of a layer drops: the largest m with
//   (base - mean_h tail_h[m]) / base <= loss
// with base = mean_h ||a_h|| and tail_h[m] = ||a_h[order[m..]]||.
// Squares are added from the important end on, heads in ascending order.
// attention_in_order [heads][n + 1]: the weights in that order on entry, tails (the last one that
// of the rows that are never dropped, 0 on entry for none) on return. fixed_square [heads]: the sum
// of squares of what is not in the order.
[[nodiscard]] inline uint32_t droppable(std::span<float> attention_in_order, uint32_t heads,
                                        std::span<const float> fixed_square, float loss) {
  const size_t stride = attention_in_order.size() / heads;
  const size_t n = stride - 1;
  for (uint32_t h = 0; h < heads; ++h) {
    float* row = attention_in_order.data() + h * stride;
    float sum = fixed_square[h];
    row[n] = std::sqrt(sum);
    for (size_t m = n; m-- > 0;) {
      sum += row[m] * row[m];
      row[m] = std::sqrt(sum);
    }
  }
  const auto mean = [&](size_t m) {
    float sum = 0.0f;
    for (uint32_t h = 0; h < heads; ++h) sum += attention_in_order[h * stride + m];
    return sum / static_cast<float>(heads);
  };
  const float base = mean(0);
  uint32_t most = 0;
  for (size_t m = 1; m <= n && base - mean(m) <= loss * base; ++m) {
    most = static_cast<uint32_t>(m);
  }
  return most;
}

// ---- threshold: DiffKV (arXiv 2412.03131) ----

enum class Tier : uint8_t { kPruned = 0, kLow = 1, kHigh = 2 };
// Thresholds are shares of uniform attention over `tokens`.
struct Tiers {
  float low;
  float high;
};
[[nodiscard]] constexpr Tiers tiers_of(float a_low, float a_high, uint32_t tokens) {
  return {a_low / static_cast<float>(tokens), a_high / static_cast<float>(tokens)};
}
[[nodiscard]] constexpr Tier tier_of(float mean_attention, const Tiers& t) {
  if (mean_attention < t.low) return Tier::kPruned;
  return mean_attention < t.high ? Tier::kLow : Tier::kHigh;
}

// What a decode step does for the token that it brings: at most one token leaves its slot.
enum class TierMove : uint8_t {
  kNone = 0,
  kEvictHigh = 1,      // the lowest of the high tier goes
  kRecode = 2,         // it goes to the low tier, a new slot
  kRecodeReplace = 3,  // it takes the slot of the lowest of the low tier, which goes
};
// least_*: the lowest mean attention of each tier; infinite for an empty one.
[[nodiscard]] constexpr TierMove tier_move(float least_high, float least_low, const Tiers& t) {
  if (least_high < t.low && least_high < least_low) return TierMove::kEvictHigh;
  if (least_high >= t.high) return TierMove::kNone;
  return least_low < t.low ? TierMove::kRecodeReplace : TierMove::kRecode;
}

// ---- strata: KVCrush (arXiv 2503.00022) ----

struct Signature {
  uint64_t bits[2];  // bit h: head h counts the token among its important ones
};
[[nodiscard]] constexpr uint32_t hamming(const Signature& a, const Signature& b) {
  return static_cast<uint32_t>(std::popcount(a.bits[0] ^ b.bits[0]) +
                               std::popcount(a.bits[1] ^ b.bits[1]));
}
[[nodiscard]] constexpr Signature first_bits(const Signature& s, uint32_t heads) {
  const auto mask = [](uint32_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
  return {{s.bits[0] & mask(heads), s.bits[1] & mask(heads > 64 ? heads - 64 : 0)}};
}
// kMean: bit h is set where more than half of the rows have it.
[[nodiscard]] inline Signature anchor_of(Anchor kind, uint32_t heads, uint64_t random0,
                                         uint64_t random1, std::span<const Signature> rows) {
  constexpr uint64_t kAll = ~uint64_t{0};
  constexpr uint64_t kOdd = 0xAAAA'AAAA'AAAA'AAAAu;
  Signature a{};
  if (kind == Anchor::kRandom) a = {{random0, random1}};
  if (kind == Anchor::kOnes) a = {{kAll, kAll}};
  if (kind == Anchor::kAlternating) a = {{kOdd, kOdd}};
  for (uint32_t h = 0; kind == Anchor::kMean && h < heads; ++h) {
    size_t set = 0;
    for (const Signature& row : rows) set += row.bits[h / 64] >> (h % 64) & 1u;
    if (2 * set > rows.size()) a.bits[h / 64] |= uint64_t{1} << (h % 64);
  }
  return first_bits(a, heads);
}

// Picks `target` of the n rejected rows, evenly over their order by distance to the anchor (equal
// ones by row): every floor(n / target)-th, from the first on. distance [n]; order [n] working
// memory; picked [n] out.
inline void pick_strata(std::span<const uint32_t> distance, uint32_t target,
                        std::span<uint32_t> order, std::span<uint8_t> picked) {
  const auto n = static_cast<uint32_t>(distance.size());
  std::fill(picked.begin(), picked.end(), uint8_t{0});
  if (target == 0 || n == 0) return;
  for (uint32_t i = 0; i < n; ++i) order[i] = i;
  std::sort(order.begin(), order.begin() + n, [&](uint32_t a, uint32_t b) {
    return distance[a] != distance[b] ? distance[a] < distance[b] : a < b;
  });
  const uint32_t step = std::max(n / target, 1u);
  for (uint32_t i = 0; i < std::min(target, n); ++i) picked[order[i * step]] = 1;
}

// ---- first_fit: FastGen (arXiv 2310.01801) ----

// The masks, cheapest first; each holds the ones before it.
inline constexpr uint32_t kMaskSpecial = 0;
inline constexpr uint32_t kMaskPunctuation = 1;
inline constexpr uint32_t kMaskFrequent = 2;
inline constexpr uint32_t kMaskLocal = 3;
inline constexpr uint32_t kMaskFull = 4;
inline constexpr uint32_t kMasks = 5;

// Marks each row with the first mask that holds it. frequent and local are counts of tokens; local
// rows are the newest, frequent ones those with the most attention that no cheaper mask holds.
// special, punctuation: 1 a row. order [n]: working memory. first [n] out.
inline void first_masks(std::span<const float> attention, std::span<const uint8_t> special,
                        std::span<const uint8_t> punctuation, uint32_t frequent, uint32_t local,
                        std::span<uint32_t> order, std::span<uint8_t> first) {
  const auto n = static_cast<uint32_t>(attention.size());
  uint32_t free = 0;
  for (uint32_t i = 0; i < n; ++i) {
    first[i] = static_cast<uint8_t>(special[i] != 0       ? kMaskSpecial
                                    : punctuation[i] != 0 ? kMaskPunctuation
                                    : n - i <= local      ? kMaskLocal
                                                          : kMaskFull);
    if (first[i] > kMaskPunctuation) order[free++] = i;
  }
  std::sort(order.begin(), order.begin() + free,
            [&](uint32_t a, uint32_t b) { return ranks_above(attention, a, b); });
  for (uint32_t i = 0; i < std::min(frequent, free); ++i) first[order[i]] = kMaskFrequent;
}

// The share of the attention that each mask holds, added in ascending order of rows; and the first
// mask that holds at least `recover` (kMaskFull where none does).
struct MaskChoice {
  std::array<float, kMasks> recovered;
  uint32_t mask;
};
[[nodiscard]] inline MaskChoice choose_mask(std::span<const float> attention,
                                            std::span<const uint8_t> first, float recover) {
  MaskChoice choice{.recovered = {}, .mask = kMaskFull};
  float all = 0.0f;
  for (size_t i = 0; i < attention.size(); ++i) {
    all += attention[i];
    for (uint32_t m = first[i]; m < kMasks; ++m) choice.recovered[m] += attention[i];
  }
  for (float& share : choice.recovered) share = all > 0.0f ? share / all : 0.0f;
  choice.recovered[kMaskFull] = 1.0f;
  for (uint32_t m = kMasks; m-- > 0;) {
    if (choice.recovered[m] >= recover) choice.mask = m;
  }
  return choice;
}

}  // namespace thinkv::policy
