// reference.h: the functions of the reference set. Contracts: kernels/kernels.h.
#pragma once

#include "kernels/kernels.h"

namespace thinkv::kernels::ref {

void rotate(float* x, uint32_t rows, uint32_t head_dim);
void rotate_back(float* y, uint32_t rows, uint32_t head_dim);
void encode(const EncodeParams& params);
void encode_block(const BlockParams& params);
void decode(const DecodeParams& params);
void attend(const AttendParams& params);
void medoids(const MedoidParams& params);

// One row of a page of a block format, K or V; decode() calls it.
void decode_block_row(const std::byte* page, const BlockLayout& layout, uint32_t slot, bool k_side,
                      float* out);

}  // namespace thinkv::kernels::ref
