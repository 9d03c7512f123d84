// matrix_entropy.h: how many directions the rows of a head use (UNComp, arXiv 2410.03090).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace thinkv::policy {

inline constexpr uint32_t kEntropyValues = 32;  // singular values that count (paper: "svd32")
inline constexpr uint32_t kEntropyRowsMax = 128;

// Rows are centred by channel and scaled to length 1; with the singular values s of their
// covariance, scaled to a trace of 1, the result is
//   - sum of s ln s over the `values` largest, divided by ln dim.
// 0 for one direction, 1 for dim equal ones. Not monotone in the rank beyond `values`.
// rows [n, dim], overwritten. fp64 inside; Jacobi sweeps on the smaller of the two Gram matrices,
// in the order of its indices.
[[nodiscard]] float truncated_entropy(std::span<float> rows, uint32_t dim,
                                      uint32_t values = kEntropyValues);

}  // namespace thinkv::policy
