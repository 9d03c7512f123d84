#include "thinkv/internal/check.h"
#include "thinkv/internal/rotation.h"

#include "kernels/reference/reference.h"

namespace thinkv::kernels::ref {
namespace {

void hadamard(float* x, uint32_t head_dim) {
  for (uint32_t h = 1; h < head_dim; h *= 2) {
    for (uint32_t i = 0; i < head_dim; ++i) {
      if ((i & h) != 0) continue;
      const float a = x[i];
      const float b = x[i + h];
      x[i] = a + b;
      x[i + h] = a - b;
    }
  }
  for (uint32_t i = 0; i < head_dim; ++i) x[i] *= rotation_norm(head_dim);
}

void negate_by_sign(float* x, uint32_t head_dim) {
  for (uint32_t i = 0; i < head_dim; ++i) {
    if (rotation_negates(i)) x[i] = -x[i];
  }
}

}  // namespace

void rotate(float* x, uint32_t rows, uint32_t head_dim) {
  THINKV_CHECK(head_dim_supported(head_dim));
  for (uint32_t row = 0; row < rows; ++row) {
    float* const vector = x + size_t{row} * head_dim;
    negate_by_sign(vector, head_dim);
    hadamard(vector, head_dim);
  }
}

void rotate_back(float* y, uint32_t rows, uint32_t head_dim) {
  THINKV_CHECK(head_dim_supported(head_dim));
  for (uint32_t row = 0; row < rows; ++row) {
    float* const vector = y + size_t{row} * head_dim;
    hadamard(vector, head_dim);
    negate_by_sign(vector, head_dim);
  }
}

}  // namespace thinkv::kernels::ref
