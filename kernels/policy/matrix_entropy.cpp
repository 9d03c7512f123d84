#include "kernels/policy/matrix_entropy.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "thinkv/internal/check.h"

namespace thinkv::policy {
namespace {

constexpr uint32_t kSweepsMax = 30;

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

// Of the smaller side: rows by rows where there are fewer rows than channels.
std::vector<double> gram(std::span<const float> rows, uint32_t n, uint32_t dim, uint32_t side) {
  std::vector<double> g(size_t{side} * side);
  const bool by_rows = side == n;
  for (uint32_t a = 0; a < side; ++a) {
    for (uint32_t b = 0; b <= a; ++b) {
      double sum = 0.0;
      for (uint32_t k = 0; k < (by_rows ? dim : n); ++k) {
        const size_t x = by_rows ? size_t{a} * dim + k : size_t{k} * dim + a;
        const size_t y = by_rows ? size_t{b} * dim + k : size_t{k} * dim + b;
        sum += double{rows[x]} * double{rows[y]};
      }
      g[size_t{a} * side + b] = g[size_t{b} * side + a] = sum;
    }
  }
  return g;
}

// One rotation that makes g[p][q] zero.
void rotate_pair(std::span<double> g, uint32_t side, uint32_t p, uint32_t q) {
  const double off = g[size_t{p} * side + q];
  if (off == 0.0) return;
  const double theta = (g[size_t{q} * side + q] - g[size_t{p} * side + p]) / (2.0 * off);
  const double t = (theta >= 0.0 ? 1.0 : -1.0) / (std::abs(theta) + std::hypot(theta, 1.0));
  const double c = 1.0 / std::hypot(t, 1.0);
  const double s = t * c;
  for (uint32_t k = 0; k < side; ++k) {
    double& a = g[size_t{k} * side + p];
    double& b = g[size_t{k} * side + q];
    const double x = a, y = b;
    a = c * x - s * y;
    b = s * x + c * y;
  }
  for (uint32_t k = 0; k < side; ++k) {
    double& a = g[size_t{p} * side + k];
    double& b = g[size_t{q} * side + k];
    const double x = a, y = b;
    a = c * x - s * y;
    b = s * x + c * y;
  }
}

std::vector<double> eigenvalues(std::vector<double> g, uint32_t side) {
  for (uint32_t sweep = 0; sweep < kSweepsMax; ++sweep) {
    double off = 0.0, diagonal = 0.0;
    for (uint32_t p = 0; p < side; ++p) {
      diagonal += g[size_t{p} * side + p] * g[size_t{p} * side + p];
      for (uint32_t q = p + 1; q < side; ++q)
        off += g[size_t{p} * side + q] * g[size_t{p} * side + q];
    }
    if (off <= 1e-20 * diagonal) break;
    for (uint32_t p = 0; p < side; ++p) {
      for (uint32_t q = p + 1; q < side; ++q) rotate_pair(g, side, p, q);
    }
  }
  std::vector<double> values(side);
  for (uint32_t i = 0; i < side; ++i) values[i] = std::max(g[size_t{i} * side + i], 0.0);
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
  const std::vector<double> s = eigenvalues(gram(rows, n, dim, side), side);
  double trace = 0.0;
  for (const double value : s) trace += value;
  if (!(trace > 0.0)) return 0.0f;  // all rows alike, or not numbers
  double entropy = 0.0;
  for (uint32_t i = 0; i < std::min(values, side); ++i) {
    const double share = s[i] / trace;
    if (share > 0.0) entropy -= share * std::log(share);
  }
  return static_cast<float>(entropy / std::log(static_cast<double>(dim)));
}

}  // namespace thinkv::policy
