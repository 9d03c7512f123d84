#include "kernels/host/host_set.h"
#include "kernels/host/vec.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/rotation.h"

#include "kernels/host/isa_begin.inc"

namespace {

constexpr uint32_t kDimMax = 256;

// Bits that negate the lanes of one vector of eight dims.
THINKV_LANE_INLINE U8 sign_bits(uint32_t dim) {
  const uint64_t word = rotation_word(dim / 64) >> (dim % 64);
  const U8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return ((static_cast<uint32_t>(word & 0xFFu) >> lane) & 1u) << 31;
}

// Stages of distance 1, 2 and 4 lie inside a vector: the partner lane comes by a shuffle, and the
// upper lane of a pair is negated first, because a - b and (-b) + a round alike.
THINKV_LANE_INLINE F8 inner_stages(F8 x) {
  const U8 n = U8{} + 0x8000'0000u;
  const F8 by1 = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
  x = by1 + as_float(bits_of(x) ^ (n & U8{0, ~0u, 0, ~0u, 0, ~0u, 0, ~0u}));
  const F8 by2 = __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  x = by2 + as_float(bits_of(x) ^ (n & U8{0, 0, ~0u, ~0u, 0, 0, ~0u, ~0u}));
  const F8 by4 = __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  return by4 + as_float(bits_of(x) ^ (n & U8{0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u}));
}

template <uint32_t kDim, bool kSignsFirst>
void transform_row(float* row, const U8* signs) {
  constexpr uint32_t kVectors = kDim / kLanes;
  F8 x[kVectors];
  for (uint32_t i = 0; i < kVectors; ++i) {
    F8 v = load(row + i * kLanes);
    if (kSignsFirst) v = as_float(bits_of(v) ^ signs[i]);
    x[i] = inner_stages(v);
  }
  for (uint32_t h = 1; h < kVectors; h *= 2) {
    for (uint32_t i = 0; i < kVectors; i += 2 * h) {
      for (uint32_t j = i; j < i + h; ++j) {
        const F8 a = x[j];
        const F8 b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
  const F8 norm = splat(rotation_norm(kDim));
  for (uint32_t i = 0; i < kVectors; ++i) {
    F8 v = x[i] * norm;
    if (!kSignsFirst) v = as_float(bits_of(v) ^ signs[i]);
    store(row + i * kLanes, v);
  }
}

template <bool kSignsFirst>
void transform(float* x, uint32_t rows, uint32_t head_dim) {
  THINKV_CHECK(head_dim_supported(head_dim));
  U8 signs[kDimMax / kLanes];
  for (uint32_t d = 0; d < head_dim; d += kLanes) signs[d / kLanes] = sign_bits(d);
  for (uint32_t row = 0; row < rows; ++row) {
    float* const vector = x + size_t{row} * head_dim;
    if (head_dim == 64) {
      transform_row<64, kSignsFirst>(vector, signs);
    } else if (head_dim == 128) {
      transform_row<128, kSignsFirst>(vector, signs);
    } else {
      transform_row<256, kSignsFirst>(vector, signs);
    }
  }
}

}  // namespace

void rotate(float* x, uint32_t rows, uint32_t head_dim) {
  transform<true>(x, rows, head_dim);
}
void rotate_back(float* y, uint32_t rows, uint32_t head_dim) {
  transform<false>(y, rows, head_dim);
}

#include "kernels/host/isa_end.inc"
