// channels.h: which channels of the keys are kept (ThinK, arXiv 2407.21018).
//
// A channel is worth the energy of its part of the logits, |Q_c K_c^T|_F^2, which is the product of
// the two sums of squares: no logit is computed. Sums are added in ascending order of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "thinkv/internal/check.h"

namespace thinkv::policy {

// sums[c] += the squares of channel c of all rows. Rows are sums.size() values each.
inline void add_energy(std::span<const float> rows, std::span<float> sums) {
  const size_t dim = sums.size();
  for (size_t row = 0; row < rows.size(); row += dim) {
    for (size_t c = 0; c < dim; ++c) sums[c] += rows[row + c] * rows[row + c];
  }
}

// Bits of the `keep` channels with the most energy; of equals the lower channel. `queries` empty:
// by the keys alone. What is not a number counts as the most. Requires: room for as many bits as
// `keys` has channels.
inline void choose_channels(std::span<const float> keys, std::span<const float> queries,
                            uint32_t keep, std::span<uint64_t> bits) {
  THINKV_CHECK(keep <= keys.size() && bits.size() * 64 >= keys.size());
  THINKV_CHECK(queries.empty() || queries.size() == keys.size());
  constexpr float kMost = std::numeric_limits<float>::max();
  std::vector<float> energy(keys.begin(), keys.end());
  for (size_t c = 0; c < queries.size(); ++c) energy[c] *= queries[c];
  for (float& e : energy) e = e < kMost ? e : kMost;
  std::vector<uint32_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return energy[a] > energy[b]; });
  std::fill(bits.begin(), bits.end(), uint64_t{0});
  for (uint32_t i = 0; i < keep; ++i) bits[order[i] / 64] |= uint64_t{1} << (order[i] % 64);
}

}  // namespace thinkv::policy
