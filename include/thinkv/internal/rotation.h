// rotation.h: the randomised Hadamard rotation of K, V and q.
//
//   y = H D x / sqrt(d),   x = D H y / sqrt(d)
// H is the Walsh-Hadamard matrix in natural order, D a fixed diagonal of signs. It spreads the
// outlier channels of K over all dims, so one scale a vector is enough; q . k is unchanged when
// both are rotated, and the output of attention over rotated V is rotated back once a head.
// The signs are part of the page format: pages outlive processes.
#pragma once

#include <cstdint>

namespace thinkv {

inline constexpr uint64_t kRotationSeed = 0x7468696E6B762D31u;  // "thinkv-1"

// SplitMix64 (Steele, Lea, Flood 2014): one well-mixed word per 64 dims.
[[nodiscard]] constexpr uint64_t rotation_word(uint32_t word) {
  uint64_t z = kRotationSeed + (word + 1) * 0x9E37'79B9'7F4A'7C15u;
  z = (z ^ (z >> 30)) * 0xBF58'476D'1CE4'E5B9u;
  z = (z ^ (z >> 27)) * 0x94D0'49BB'1331'11EBu;
  return z ^ (z >> 31);
}

// True where D negates dim `dim`.
[[nodiscard]] constexpr bool rotation_negates(uint32_t dim) {
  return ((rotation_word(dim / 64) >> (dim % 64)) & 1u) != 0;
}

// 1 / sqrt(head_dim) as every implementation multiplies it in, once, after the last stage.
[[nodiscard]] constexpr float rotation_norm(uint32_t head_dim) {
  return head_dim == 64 ? 0.125f : head_dim == 128 ? 0.08838834764831845f : 0.0625f;
}

}  // namespace thinkv
