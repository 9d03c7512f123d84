// exact_steps.h: fp64 numbers in steps that are rounded once each, and a logarithm made of them:
// the same bits on the host and on a GPU (see exact_exp.h, which is its fp32 sister).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace thinkv::policy {

// Built without contraction (the host's sources are).
struct PlainSteps64 {
  static constexpr double add(double a, double b) { return a + b; }
  static constexpr double mul(double a, double b) { return a * b; }
  static constexpr double div(double a, double b) { return a / b; }
  static double sqrt(double a) { return std::sqrt(a); }
  static constexpr uint64_t to_bits(double a) { return std::bit_cast<uint64_t>(a); }
  static constexpr double from_bits(uint64_t a) { return std::bit_cast<double>(a); }
};

// The natural logarithm, within 4e-16 of the exact one, relative to it or to 1, whichever is more.
// Requires: x > 0 and finite.
template <class Steps = PlainSteps64>
[[nodiscard]] constexpr double exact_log(double x) {
  // x = m 2^e with sqrt(1/2) <= m < sqrt(2): then ln m = 2 atanh(z) with |z| < 0.172.
  int32_t e = 0;
  if (x < 0x1p-1022) {
    x = Steps::mul(x, 0x1p54);
    e = -54;
  }
  const uint64_t bits = Steps::to_bits(x);
  e += static_cast<int32_t>(bits >> 52) - 1023;
  double m = Steps::from_bits((bits & 0x000F'FFFF'FFFF'FFFFu) | uint64_t{1023} << 52);
  if (m >= 1.4142135623730951) {
    m = Steps::mul(m, 0.5);
    e += 1;
  }
  const double z = Steps::div(Steps::add(m, -1.0), Steps::add(m, 1.0));
  const double square = Steps::mul(z, z);
  // z^n / n for odd n up to 21: the next one is below 1e-18.
  double sum = 1.0 / 21.0;
  constexpr double kTerms[] = {1.0 / 19.0, 1.0 / 17.0, 1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0,
                               1.0 / 9.0,  1.0 / 7.0,  1.0 / 5.0,  1.0 / 3.0,  1.0};
  for (const double term : kTerms) sum = Steps::add(Steps::mul(sum, square), term);
  const double of_m = Steps::mul(Steps::mul(2.0, z), sum);
  return Steps::add(of_m, Steps::mul(static_cast<double>(e), 0.6931471805599453));
}

}  // namespace thinkv::policy
