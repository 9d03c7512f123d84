// exact_exp.h: e to the power of x in plain fp32 steps, the same bits on the host and on a GPU.
//
// std::exp and the GPU's expf differ in the last bit, and a rule that ranks tokens must not. Each
// operation is rounded once: the host is built without contraction, a GPU passes operations that
// are never contracted. Within 2e-7 of e^x; 0 below -87, where a softmax has nothing to lose.
#pragma once

#include <bit>
#include <cstdint>

namespace thinkv::policy {

struct PlainSteps {
  static constexpr float add(float a, float b) { return a + b; }
  static constexpr float mul(float a, float b) { return a * b; }
  static constexpr float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
};

// Requires: x <= 0, or not a number.
template <class Steps = PlainSteps>
[[nodiscard]] constexpr float exact_exp(float x) {
  if (!(x >= -87.0f)) return x == x ? 0.0f : x;
  // x = r - n ln 2 with |r| <= ln 2 / 2; ln 2 in two parts, so that r is exact enough.
  const auto n = static_cast<int32_t>(Steps::add(Steps::mul(x, -1.44269504f), 0.5f));
  const auto whole = static_cast<float>(n);
  const float r = Steps::add(Steps::add(x, Steps::mul(whole, 0.693359375f)),
                             Steps::mul(whole, -2.12194440e-4f));
  constexpr float kTerms[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f,
                              0.5f,          1.0f,          1.0f};
  float sum = 1.0f / 5040.0f;
  for (const float term : kTerms) sum = Steps::add(Steps::mul(sum, r), term);
  return Steps::mul(sum, Steps::from_bits(static_cast<uint32_t>(127 - n) << 23));
}

}  // namespace thinkv::policy
