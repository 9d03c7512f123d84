// coded_codebook.cuh: code lengths of counts, and the tables to write and to read with, made by a
// whole block of threads. The steps are those of kernels/stream/huffman_rule.h.
#pragma once

#include "kernels/cuda/coded_lane.cuh"
#include "kernels/stream/huffman_rule.h"

namespace thinkv::cuda {

using kernels::kCodeBitsMax;
using kernels::kSymbolCount;

// Of one side while its code is made: shared memory.
struct CodeMaking {
  kernels::CodeTree tree;
  uint64_t counts[kSymbolCount];
  uint32_t longest;
};

// Lengths of a code for symbols counted so; `lengths` [kSymbolCount]. Requires: kSymbolCount
// threads; all call it.
__device__ inline void make_lengths(CodeMaking& making, uint32_t counted, uint8_t* lengths) {
  const uint32_t symbol = threadIdx.x;
  uint64_t count = counted > 1 ? counted : 1;
  for (;;) {
    __syncthreads();  // nobody reads what is about to change
    making.counts[symbol] = count;
    __syncthreads();
    uint32_t rank = 0;
    for (uint32_t other = 0; other < kSymbolCount; ++other) {
      const uint64_t its = making.counts[other];
      rank += its < count || (its == count && other < symbol) ? 1u : 0u;
    }
    making.tree.weight[rank] = count;
    __syncthreads();
    if (symbol == 0) making.longest = kernels::grow_code_tree(making.tree);
    __syncthreads();
    // Ends: halved often enough all counts are equal, and every code has 8 bits.
    if (making.longest <= kCodeBitsMax) {
      lengths[symbol] = making.tree.depth[rank];
      return;
    }
    count = kernels::halved_count(count);
  }
}

// How many symbols have each length, and where their codes begin.
struct CodeShape {
  uint32_t symbols[kCodeBitsMax + 1];
  kernels::CodeStarts starts;
  uint8_t lengths[kSymbolCount];
};

// Copies code lengths out of the pool and judges the copy. Whole block. Result: false where they
// are no code. Requires: at least kCodeBitsMax + 1 threads.
[[nodiscard]] __device__ inline bool load_code(CodeShape& shape, const uint8_t* lengths) {
  if (threadIdx.x <= kCodeBitsMax) shape.symbols[threadIdx.x] = 0;
  __syncthreads();
  bool good = true;
  for (uint32_t symbol = threadIdx.x; symbol < kSymbolCount; symbol += blockDim.x) {
    const uint32_t bits = lengths[symbol];
    good = good && bits - 1 < kCodeBitsMax;
    shape.lengths[symbol] = static_cast<uint8_t>(bits);
    if (bits <= kCodeBitsMax) atomicAdd(&shape.symbols[bits], 1u);
  }
  if (__syncthreads_or(good ? 0 : 1) != 0) return false;
  if (threadIdx.x == 0) shape.starts = kernels::code_starts(shape.symbols);
  __syncthreads();
  return kernels::code_complete(shape.symbols);
}

// How many symbols before this one have a code as long. Requires: shape is loaded.
[[nodiscard]] __device__ __forceinline__ uint32_t place_in_length(const CodeShape& shape,
                                                                  uint32_t symbol) {
  const uint32_t bits = shape.lengths[symbol];
  uint32_t place = 0;
  for (uint32_t other = 0; other < symbol; ++other) place += shape.lengths[other] == bits ? 1u : 0u;
  return place;
}

// To write with. bits << 16 | code
struct WriteTable {
  uint32_t of[kSymbolCount];
};
// Whole block. Requires: shape is loaded.
__device__ inline void make_write_table(const CodeShape& shape, WriteTable& table) {
  for (uint32_t symbol = threadIdx.x; symbol < kSymbolCount; symbol += blockDim.x) {
    const uint32_t bits = shape.lengths[symbol];
    table.of[symbol] = bits << 16 | (shape.starts.code[bits] + place_in_length(shape, symbol));
  }
  __syncthreads();
}

// To read with. Codes up to kFastBits take one look.
inline constexpr uint32_t kFastBits = 10;
struct ReadTable {
  uint16_t fast[1u << kFastBits];    // bits << 8 | symbol; 0: a longer code
  uint32_t limit[kCodeBitsMax + 1];  // codes of n bits, to the left of 15 bits, are below limit[n]
  uint32_t first[kCodeBitsMax + 1];  // index in `order` of a code of n bits, less it
  uint8_t order[kSymbolCount];       // symbols in the order of their codes
};

// The code at the left end of 15 bits, from `bits` bits on: bits << 8 | symbol. Any `top`.
[[nodiscard]] __device__ __forceinline__ uint32_t find_code(const ReadTable& table, uint32_t top,
                                                            uint32_t bits) {
  while (bits < kCodeBitsMax && top >= table.limit[bits]) ++bits;
  const uint32_t code = top >> (kCodeBitsMax - bits);
  return bits << 8 | table.order[(table.first[bits] + code) % kSymbolCount];
}

// Whole block. Requires: shape is loaded; more than kCodeBitsMax threads.
__device__ inline void make_read_table(const CodeShape& shape, ReadTable& table) {
  if (threadIdx.x <= kCodeBitsMax) {
    const uint32_t bits = threadIdx.x;
    table.limit[bits] =
        bits == 0 ? 0 : (shape.starts.code[bits] + shape.symbols[bits]) << (kCodeBitsMax - bits);
    table.first[bits] = shape.starts.before[bits] - shape.starts.code[bits];
  }
  for (uint32_t symbol = threadIdx.x; symbol < kSymbolCount; symbol += blockDim.x) {
    const uint32_t at = shape.starts.before[shape.lengths[symbol]] + place_in_length(shape, symbol);
    table.order[at % kSymbolCount] = static_cast<uint8_t>(symbol);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < 1u << kFastBits; i += blockDim.x) {
    const uint32_t found = find_code(table, i << (kCodeBitsMax - kFastBits), 1);
    table.fast[i] = static_cast<uint16_t>(found >> 8 <= kFastBits ? found : 0);
  }
  __syncthreads();
}

}  // namespace thinkv::cuda
