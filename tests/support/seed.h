// seed.h: the seed of a random test, printed so that a failure can be played again.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace thinkv::testing {

// How often a random test does something: under the address sanitizer, where it takes up to ten
// times as long, a quarter.
[[nodiscard]] constexpr uint32_t random_rounds(uint32_t rounds) {
#if defined(__SANITIZE_ADDRESS__)
  return rounds / 4;
#else
  return rounds;
#endif
}

inline uint64_t seed_from_environment(uint64_t otherwise) {
  const char* text = std::getenv("THINKV_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 0) : otherwise;
  std::printf("seed %llu (replay: THINKV_SEED=%llu)\n", static_cast<unsigned long long>(seed),
              static_cast<unsigned long long>(seed));
  return seed;
}

}  // namespace thinkv::testing
