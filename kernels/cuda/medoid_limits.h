// medoid_limits.h: how many keys the k-means of a block takes, for the host and for the kernels.
#pragma once

#include <cstdint>

namespace thinkv::cuda {

inline constexpr uint32_t kMedoidRowsHeld = 800;        // tokens of one selection
inline constexpr uint32_t kMedoidCentresTogether = 32;  // that streamed keys meet at once

// Shared memory for keys and centres in code of architecture `code`: a block of sm_80 has 163 KiB,
// later ones 227.
[[nodiscard]] constexpr uint32_t medoid_vector_bytes(uint32_t code) {
  return (code >= 90 ? 200 : 138) * 1024;
}

// Keys and centres together, of `dims` dims: head_dim, times kv_heads for SelectGrain::kLayer.
[[nodiscard]] constexpr bool medoids_fit(uint32_t bytes, uint32_t rows, uint32_t target,
                                         uint32_t dims) {
  return uint64_t{rows + target} * dims * sizeof(float) <= bytes;
}

// What a selection whose keys do not fit has in their place: where they are (medoid_stream.cuh).
struct MedoidStreamSize {
  uint32_t rows, target, heads, iterations;
  uint32_t width;  // dims that are in shared memory at a time

  [[nodiscard]] constexpr uint64_t place_bytes() const {
    return uint64_t{rows} * heads * sizeof(uint32_t);
  }
  [[nodiscard]] constexpr uint64_t cluster_bytes() const {
    return uint64_t{rows} * iterations * sizeof(uint16_t);
  }
  // Of everything before the vectors.
  [[nodiscard]] constexpr uint64_t head_bytes() const {
    return (place_bytes() + cluster_bytes() + target + 15) / 16 * 16;
  }
  [[nodiscard]] constexpr uint64_t bytes() const {
    return head_bytes() + uint64_t{rows + kMedoidCentresTogether} * width * sizeof(float);
  }
};
inline constexpr uint32_t kMedoidWidthLeast = 32;

// The most dims at a time, of `head_dim`; 0: not even kMedoidWidthLeast fit `bytes`.
[[nodiscard]] constexpr uint32_t medoid_stream_width(MedoidStreamSize size, uint32_t head_dim,
                                                     uint64_t bytes) {
  for (size.width = head_dim; size.width >= kMedoidWidthLeast; size.width /= 2) {
    if (size.bytes() <= bytes) return size.width;
  }
  return 0;
}

}  // namespace thinkv::cuda
