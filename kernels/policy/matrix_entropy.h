// matrix_entropy.h: how many directions the rows of a head use (UNComp, arXiv 2410.03090).
//
// Rows are centred by channel and scaled to length 1; with the singular values s of their
// covariance, scaled to a trace of 1, the result is
//   - sum of s ln s over the `values` largest, divided by ln dim.
// 0 for one direction, 1 for dim equal ones. Not monotone in the rank beyond `values`.
//
// fp64 inside, each step rounded once, in an order that many threads can share, so that a GPU has
// the host's bits: the smaller of the two Gram matrices, its sums ascending, then Jacobi sweeps
// whose rotations come in rounds of pairs that have no index in common (a tournament: everybody
// meets everybody once a sweep). What a round does to a block of two pairs is here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "kernels/policy/exact_steps.h"

namespace thinkv::policy {

inline constexpr uint32_t kEntropyValues = 32;  // singular values that count (paper: "svd32")
inline constexpr uint32_t kEntropyRowsMax = 128;
inline constexpr uint32_t kJacobiSweepsMax = 30;
// Done where the squares beside the diagonal are together at most that share of those on it.
inline constexpr double kJacobiRest = 1e-20;

// How many of a prompt's newest queries are looked at, so that all heads of a group are.
[[nodiscard]] constexpr uint32_t entropy_queries(uint32_t count, uint32_t group) {
  return std::min(count, std::max(kEntropyRowsMax / group, 1u));
}

// ---- the matrix: the lower triangle, row after row ----

[[nodiscard]] constexpr uint32_t packed_place(uint32_t a, uint32_t b) {
  return a >= b ? a * (a + 1) / 2 + b : b * (b + 1) / 2 + a;
}
// Sides are even: an odd one gets a row of zeros.
[[nodiscard]] constexpr uint32_t even_side(uint32_t side) {
  return side + side % 2;
}

// ---- a round ----

struct JacobiPair {
  uint32_t p, q;
};
// Pair `index` of side / 2 in round `round` of side - 1. Requires: an even side.
[[nodiscard]] constexpr JacobiPair jacobi_pair(uint32_t side, uint32_t round, uint32_t index) {
  const uint32_t m = side - 1;
  if (index == 0) return {round, m};
  const uint32_t p = round + index, q = round + m - index;
  return {p >= m ? p - m : p, q >= m ? q - m : q};
}

struct JacobiTurn {
  double c, s, t;  // cosine, sine, tangent
};
// What makes the element between p and q zero.
template <class Steps = PlainSteps64>
[[nodiscard]] constexpr JacobiTurn jacobi_turn(double pp, double pq, double qq) {
  if (pq == 0.0) return {1.0, 0.0, 0.0};
  const double theta = Steps::div(Steps::add(qq, -pp), Steps::mul(2.0, pq));
  const double root = Steps::sqrt(Steps::add(Steps::mul(theta, theta), 1.0));
  const double t = theta >= 0.0 ? Steps::div(1.0, Steps::add(theta, root))
                                : Steps::div(-1.0, Steps::add(-theta, root));
  const double c = Steps::div(1.0, Steps::sqrt(Steps::add(Steps::mul(t, t), 1.0)));
  return {c, Steps::mul(t, c), t};
}

// The elements of a pair alone.
template <class Steps = PlainSteps64>
constexpr void turn_own(const JacobiTurn& turn, double& pp, double& pq, double& qq) {
  const double moved = Steps::mul(turn.t, pq);
  pp = Steps::add(pp, -moved);
  qq = Steps::add(qq, moved);
  pq = 0.0;
}

// a, b = c a - s b, s a + c b.
template <class Steps>
constexpr void turn_both(const JacobiTurn& turn, double& a, double& b) {
  const double x = a, y = b;
  a = Steps::add(Steps::mul(turn.c, x), -Steps::mul(turn.s, y));
  b = Steps::add(Steps::mul(turn.s, x), Steps::mul(turn.c, y));
}
// The elements between two pairs of a round: rows p and q of the one with the lower index, columns
// p and q of the other.
template <class Steps = PlainSteps64>
constexpr void turn_block(const JacobiTurn& rows, const JacobiTurn& columns, double& pp, double& pq,
                          double& qp, double& qq) {
  turn_both<Steps>(columns, pp, pq);
  turn_both<Steps>(columns, qp, qq);
  turn_both<Steps>(rows, pp, qp);
  turn_both<Steps>(rows, pq, qq);
}

// ---- the result ----

// values: the eigenvalues, those below 0 as 0, the largest first.
template <class Steps = PlainSteps64>
[[nodiscard]] constexpr float entropy_of_values(const double* values, uint32_t count, uint32_t dim,
                                                uint32_t counted) {
  double trace = 0.0;
  for (uint32_t i = 0; i < count; ++i) trace = Steps::add(trace, values[i]);
  if (!(trace > 0.0)) return 0.0f;  // all rows alike, or not numbers
  double entropy = 0.0;
  for (uint32_t i = 0; i < count && i < counted; ++i) {
    const double share = Steps::div(values[i], trace);
    if (!(share > 0.0)) continue;
    entropy = Steps::add(entropy, -Steps::mul(share, exact_log<Steps>(share)));
  }
  return static_cast<float>(Steps::div(entropy, exact_log<Steps>(static_cast<double>(dim))));
}

// rows [n, dim], overwritten.
[[nodiscard]] float truncated_entropy(std::span<float> rows, uint32_t dim,
                                      uint32_t values = kEntropyValues);

}  // namespace thinkv::policy
