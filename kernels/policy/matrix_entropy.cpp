#include "kernels/policy/matrix_entropy.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "thinkv/internal/check.h"

namespace thinkv::policy {
namespace {

void centre_and_scale(std::span<float> rows, uint32_t n, uint32_t dim) {
  for (uint32_t d = 0; d < dim; ++d) {
    double sum = 0.0;
    for (uint32_t i = 0; i < n; ++i) sum += double{rows[size_t{i} * dim + d]};
    const auto mean = static_cast<float>(sum / n);
    for (uint32_t i = 0; i < n; ++i) rows[size_t{i} * dim + d] -= mean;
  }
  for (uint32_t i = 0; i < n; ++i) {
    const std::span<float> row = rows.subspan(size_t{i} * dim, dim);
    double square = 0.0;
    for (const float x : row) square += double{x} * double{x};
    const double factor = square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
    for (float& x : row) x = static_cast<float>(double{x} * factor);
  }
}

// Of the smaller side: rows by rows where there are at most as many rows as channels.
std::vector<double> gram(std::span<const float> rows, uint32_t n, uint32_t dim, uint32_t side) {
  const uint32_t even = even_side(side);
  std::vector<double> g(size_t{even} * (even + 1) / 2);
  const bool by_rows = side == n;
  for (uint32_t a = 0; a < side; ++a) {
    for (uint32_t b = 0; b <= a; ++b) {
      double sum = 0.0;
      for (uint32_t k = 0; k < (by_rows ? dim : n); ++k) {
        const size_t x = by_rows ? size_t{a} * dim + k : size_t{k} * dim + a;
        const size_t y = by_rows ? size_t{b} * dim + k : size_t{k} * dim + b;
        sum += double{rows[x]} * double{rows[y]};
      }
      g[packed_place(a, b)] = sum;
    }
  }
  return g;
}

// Squares beside the diagonal are added row by row, then the rows.
bool is_diagonal(const std::vector<double>& g, uint32_t side) {
  double off = 0.0, diagonal = 0.0;
  for (uint32_t a = 0; a < side; ++a) {
    double of_row = 0.0;
    for (uint32_t b = 0; b < a; ++b) {
      of_row += g[packed_place(a, b)] * g[packed_place(a, b)];
    }
    off += of_row;
    diagonal += g[packed_place(a, a)] * g[packed_place(a, a)];
  }
  return off <= kJacobiRest * diagonal;
}

void turn_round(std::vector<double>& g, uint32_t side, uint32_t round,
                std::vector<JacobiTurn>& turns) {
  const uint32_t half = side / 2;
  for (uint32_t i = 0; i < half; ++i) {
    const auto [p, q] = jacobi_pair(side, round, i);
    turns[i] = jacobi_turn(g[packed_place(p, p)], g[packed_place(p, q)], g[packed_place(q, q)]);
    turn_own(turns[i], g[packed_place(p, p)], g[packed_place(p, q)], g[packed_place(q, q)]);
  }
  for (uint32_t i = 0; i < half; ++i) {
    const auto [p, q] = jacobi_pair(side, round, i);
    for (uint32_t j = i + 1; j < half; ++j) {
      const auto [u, v] = jacobi_pair(side, round, j);
      turn_block(turns[i], turns[j], g[packed_place(p, u)], g[packed_place(p, v)],
                 g[packed_place(q, u)], g[packed_place(q, v)]);
    }
  }
}

std::vector<double> eigenvalues(std::vector<double> g, uint32_t side) {
  std::vector<JacobiTurn> turns(side / 2);
  for (uint32_t sweep = 0; sweep < kJacobiSweepsMax && !is_diagonal(g, side); ++sweep) {
    for (uint32_t round = 0; round + 1 < side; ++round) turn_round(g, side, round, turns);
  }
  std::vector<double> values(side);
  for (uint32_t i = 0; i < side; ++i) {
    const double value = g[packed_place(i, i)];
    values[i] = value > 0.0 ? value : 0.0;
  }
  std::sort(values.begin(), values.end(), std::greater<>());
  return values;
}

}  // namespace

float truncated_entropy(std::span<float> rows, uint32_t dim, uint32_t values) {
  THINKV_CHECK(dim > 1 && rows.size() % dim == 0);
  const auto n = static_cast<uint32_t>(rows.size() / dim);
  if (n < 2) return 0.0f;
  centre_and_scale(rows, n, dim);
  const uint32_t side = std::min(n, dim);
  const std::vector<double> s = eigenvalues(gram(rows, n, dim, side), even_side(side));
  return entropy_of_values(s.data(), static_cast<uint32_t>(s.size()), dim, values);
}

}  // namespace thinkv::policy
