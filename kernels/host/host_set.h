// host_set.h: the fast CPU kernels, built once per instruction set from the same sources.
// Contracts: kernels/kernels.h.
#pragma once

#include "kernels/kernels.h"

#define THINKV_HOST_KERNELS                                     \
  void rotate(float* x, uint32_t rows, uint32_t head_dim);      \
  void rotate_back(float* y, uint32_t rows, uint32_t head_dim); \
  void encode(const EncodeParams& params);                      \
  void encode_block(const BlockParams& params);                 \
  void decode(const DecodeParams& params);                      \
  void attend(const AttendParams& params);                      \
  void medoids(const MedoidParams& params);

namespace thinkv::kernels::host_baseline {
THINKV_HOST_KERNELS
}
namespace thinkv::kernels::host_avx2 {
THINKV_HOST_KERNELS
}
#undef THINKV_HOST_KERNELS

namespace thinkv::kernels {
// The set that any machine can run, and the wide one: null where it was not built (not x86-64) or
// this machine lacks AVX2, FMA or F16C. host() is the best of them; tests compare all.
[[nodiscard]] const KernelSet& host_baseline_set();
[[nodiscard]] const KernelSet* host_avx2_set();
}  // namespace thinkv::kernels
