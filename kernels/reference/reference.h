// reference.h: the functions of the reference set. Contracts: kernels/kernels.h.
#pragma once

#include "kernels/kernels.h"

namespace thinkv::kernels::ref {

void rotate(float* x, uint32_t rows, uint32_t head_dim);
void rotate_back(float* y, uint32_t rows, uint32_t head_dim);
void encode(const EncodeParams& params);
void decode(const DecodeParams& params);
void attend(const AttendParams& params);
void medoids(const MedoidParams& params);

}  // namespace thinkv::kernels::ref
