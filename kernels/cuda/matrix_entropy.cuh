// matrix_entropy.cuh: the truncated entropy of a head's rows by one block
// (kernels/policy/matrix_entropy.h has the steps, matrix_entropy.cpp their order).
//
// Rows come 128 channels at a time into shared memory, beside the packed Gram matrix; of wider rows
// each slice is read twice, for the lengths and for the matrix.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_steps.cuh"
#include "kernels/cuda/lane.cuh"
#include "kernels/policy/matrix_entropy.h"

namespace thinkv::cuda {

inline constexpr uint32_t kEntropyThreads = 256;

// Static shared memory.
struct EntropyShared {
  double numbers[policy::kEntropyRowsMax];  // of rows
  double values[policy::kEntropyRowsMax];
  policy::JacobiTurn turns[policy::kEntropyRowsMax / 2];
  policy::JacobiPair pairs[policy::kEntropyRowsMax / 2];
  uint32_t done;
};

namespace entropy_detail {

using Steps = DeviceSteps64;

inline constexpr uint32_t kRowsMax = policy::kEntropyRowsMax;
template <int kDim>
inline constexpr uint32_t kSlice = kDim < 128 ? kDim : 128;  // channels
template <int kDim>
inline constexpr uint32_t kStride = kSlice<kDim> + 1;
template <int kDim>
inline constexpr uint32_t kGramPlaces = kSlice<kDim>*(kSlice<kDim> + 1) / 2;

// Dynamic shared memory.
template <int kDim>
struct EntropySpace {
  double* gram;  // packed
  float* rows;   // [n, kStride]
  [[nodiscard]] static __device__ __forceinline__ EntropySpace at(unsigned char* memory) {
    auto* gram = reinterpret_cast<double*>(memory);
    return {gram, reinterpret_cast<float*>(gram + kGramPlaces<kDim>)};
  }
};

// One slice of the rows, centred by channel. load(x, row): eight threads get a row, as load_row().
template <int kDim, class Load>
__device__ inline void load_slice(const EntropySpace<kDim>& space, uint32_t n, uint32_t slice,
                                  const Load& load) {
  constexpr uint32_t kWidth = kSlice<kDim>, kRow = kStride<kDim>;
  for (uint32_t row = threadIdx.x / 8; row < kRowsMax; row += kEntropyThreads / 8) {
    float x[kDim / 8] = {};
    if (row < n) load(x, row);
#pragma unroll
    for (uint32_t i = 0; i < kDim / 8; ++i) {
      const uint32_t channel = threadIdx.x % 8 + 8 * i - slice * kWidth;
      if (row < n && channel < kWidth) space.rows[row * kRow + channel] = x[i];
    }
  }
  __syncthreads();
  if (threadIdx.x < kWidth) {
    float* const column = space.rows + threadIdx.x;
    double sum = 0.0;
    for (uint32_t i = 0; i < n; ++i) sum = Steps::add(sum, static_cast<double>(column[i * kRow]));
    const auto mean = static_cast<float>(Steps::div(sum, static_cast<double>(n)));
    for (uint32_t i = 0; i < n; ++i) column[i * kRow] = exact_sub(column[i * kRow], mean);
  }
  __syncthreads();
}

// shared.numbers: what makes each row one of length 1. With one slice the rows are in place then.
template <int kDim, class Load>
__device__ inline void find_factors(const EntropySpace<kDim>& space, EntropyShared& shared,
                                    uint32_t n, const Load& load) {
  double square = 0.0;
  for (uint32_t slice = 0; slice < kDim / kSlice<kDim>; ++slice) {
    load_slice<kDim>(space, n, slice, load);
    const float* row = space.rows + threadIdx.x * kStride<kDim>;
    for (uint32_t c = 0; c < kSlice<kDim> && threadIdx.x < n; ++c) {
      const auto x = static_cast<double>(row[c]);
      square = Steps::add(square, Steps::mul(x, x));
    }
    __syncthreads();
  }
  if (threadIdx.x < n) {
    shared.numbers[threadIdx.x] = square > 0.0 ? Steps::div(1.0, Steps::sqrt(square)) : 0.0;
  }
  __syncthreads();
}

template <int kDim>
__device__ inline void scale_rows(const EntropySpace<kDim>& space, const EntropyShared& shared,
                                  uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n * kSlice<kDim>; i += kEntropyThreads) {
    const uint32_t row = i / kSlice<kDim>;
    float& x = space.rows[row * kStride<kDim> + i % kSlice<kDim>];
    x = static_cast<float>(Steps::mul(static_cast<double>(x), shared.numbers[row]));
  }
  __syncthreads();
}

// Adds a slice to the Gram matrix; a warp a row of it.
template <int kDim>
__device__ inline void add_to_gram(const EntropySpace<kDim>& space, uint32_t n, uint32_t side) {
  constexpr uint32_t kRow = kStride<kDim>;
  const bool by_rows = side == n;
  const uint32_t across = by_rows ? kRow : 1, along = by_rows ? 1 : kRow;
  const uint32_t terms = by_rows ? kSlice<kDim> : n;
  for (uint32_t a = threadIdx.x / 32; a < side; a += kEntropyThreads / 32) {
    for (uint32_t b = threadIdx.x % 32; b <= a; b += 32) {
      const float* x = space.rows + a * across;
      const float* y = space.rows + b * across;
      double sum = space.gram[policy::packed_place(a, b)];
      for (uint32_t k = 0; k < terms; ++k) {
        const auto one = static_cast<double>(x[k * along]);
        sum = Steps::add(sum, Steps::mul(one, static_cast<double>(y[k * along])));
      }
      space.gram[policy::packed_place(a, b)] = sum;
    }
  }
  __syncthreads();
}

template <int kDim, class Load>
__device__ inline void make_gram(const EntropySpace<kDim>& space, EntropyShared& shared, uint32_t n,
                                 uint32_t side, const Load& load) {
  for (uint32_t i = threadIdx.x; i < kGramPlaces<kDim>; i += kEntropyThreads) space.gram[i] = 0.0;
  find_factors<kDim>(space, shared, n, load);
  constexpr uint32_t kSlices = kDim / kSlice<kDim>;
  for (uint32_t slice = 0; slice < kSlices; ++slice) {
    if (kSlices > 1) load_slice<kDim>(space, n, slice, load);
    scale_rows<kDim>(space, shared, n);
    add_to_gram<kDim>(space, n, side);
  }
}

// Result: the same for all threads.
[[nodiscard]] __device__ inline bool is_diagonal(const double* gram, EntropyShared& shared,
                                                 uint32_t side) {
  if (threadIdx.x < side) {
    double of_row = 0.0;
    for (uint32_t b = 0; b < threadIdx.x; ++b) {
      const double x = gram[policy::packed_place(threadIdx.x, b)];
      of_row = Steps::add(of_row, Steps::mul(x, x));
    }
    shared.numbers[threadIdx.x] = of_row;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double off = 0.0, diagonal = 0.0;
    for (uint32_t a = 0; a < side; ++a) {
      const double x = gram[policy::packed_place(a, a)];
      off = Steps::add(off, shared.numbers[a]);
      diagonal = Steps::add(diagonal, Steps::mul(x, x));
    }
    shared.done = off <= Steps::mul(policy::kJacobiRest, diagonal) ? 1 : 0;
  }
  __syncthreads();
  return shared.done != 0;
}

// One round of rotations: those of the pairs, then all blocks between two pairs, a warp a pair.
__device__ inline void turn_round(double* gram, EntropyShared& shared, uint32_t side,
                                  uint32_t round) {
  const uint32_t half = side / 2;
  if (threadIdx.x < half) {
    const policy::JacobiPair own = policy::jacobi_pair(side, round, threadIdx.x);
    double& pp = gram[policy::packed_place(own.p, own.p)];
    double& pq = gram[policy::packed_place(own.p, own.q)];
    double& qq = gram[policy::packed_place(own.q, own.q)];
    const policy::JacobiTurn turn = policy::jacobi_turn<Steps>(pp, pq, qq);
    policy::turn_own<Steps>(turn, pp, pq, qq);
    shared.pairs[threadIdx.x] = own;
    shared.turns[threadIdx.x] = turn;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x / 32; i < half; i += kEntropyThreads / 32) {
    const policy::JacobiPair rows = shared.pairs[i];
    const policy::JacobiTurn turn = shared.turns[i];
    for (uint32_t j = i + 1 + threadIdx.x % 32; j < half; j += 32) {
      const policy::JacobiPair columns = shared.pairs[j];
      policy::turn_block<Steps>(turn, shared.turns[j],
                                gram[policy::packed_place(rows.p, columns.p)],
                                gram[policy::packed_place(rows.p, columns.q)],
                                gram[policy::packed_place(rows.q, columns.p)],
                                gram[policy::packed_place(rows.q, columns.q)]);
    }
  }
  __syncthreads();
}

// shared.values: the eigenvalues, the largest first.
__device__ inline void sort_values(const double* gram, EntropyShared& shared, uint32_t side) {
  double value = 0.0;
  if (threadIdx.x < side) {
    const double x = gram[policy::packed_place(threadIdx.x, threadIdx.x)];
    value = x > 0.0 ? x : 0.0;
    shared.numbers[threadIdx.x] = value;
  }
  __syncthreads();
  if (threadIdx.x < side) {
    uint32_t above = 0;
    for (uint32_t i = 0; i < side; ++i) {
      const double other = shared.numbers[i];
      above += other > value || (other == value && i < threadIdx.x) ? 1u : 0u;
    }
    shared.values[above] = value;
  }
  __syncthreads();
}

}  // namespace entropy_detail

template <int kDim>
inline constexpr uint32_t kEntropyBytes =
    entropy_detail::kGramPlaces<kDim>* static_cast<uint32_t>(sizeof(double)) +
    policy::kEntropyRowsMax* entropy_detail::kStride<kDim>* static_cast<uint32_t>(sizeof(float));
static_assert(kEntropyBytes<256> <= 150 * 1024, "163 KiB of an A100 less what is static");

// policy::truncated_entropy of n rows, in dynamic shared memory. load(x, row): eight neighbouring
// threads get a row [kDim], thread l the channels l + 8 i. Result: thread 0's alone. Requires:
// n <= kEntropyRowsMax, a block of kEntropyThreads.
template <int kDim, class Load>
[[nodiscard]] __device__ inline float truncated_entropy(EntropyShared& shared, uint32_t n,
                                                        const Load& load) {
  if (n < 2) return 0.0f;
  const auto space = entropy_detail::EntropySpace<kDim>::at(dynamic_shared());
  const uint32_t side = min(n, static_cast<uint32_t>(kDim)), even = policy::even_side(side);
  entropy_detail::make_gram<kDim>(space, shared, n, side, load);
  for (uint32_t sweep = 0; sweep < policy::kJacobiSweepsMax; ++sweep) {
    if (entropy_detail::is_diagonal(space.gram, shared, even)) break;
    for (uint32_t round = 0; round + 1 < even; ++round) {
      entropy_detail::turn_round(space.gram, shared, even, round);
    }
  }
  entropy_detail::sort_values(space.gram, shared, even);
  if (threadIdx.x != 0) return 0.0f;
  return policy::entropy_of_values<DeviceSteps64>(shared.values, even, kDim,
                                                  policy::kEntropyValues);
}

}  // namespace thinkv::cuda
