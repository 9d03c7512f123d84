// coded_block.cuh: 64 tokens of a lane to the bytes of a coded block
// (kernels/stream/coded_block.h), by one block of threads: quantise, count or measure, write.
//
// Everything is in shared memory; where the rows come from is the caller's: a Source has
// load<kIsK>(x, token), called by the eight threads of a vector (codec.cuh) and whole warps.
#pragma once

#include "kernels/cuda/codec.cuh"
#include "kernels/cuda/coded_codebook.cuh"
#include "kernels/stream/block_rule.h"

namespace thinkv::cuda {

inline constexpr uint32_t kCodingThreads = 256;
static_assert(kCodingThreads == kSymbolCount);
inline constexpr uint32_t kAllRuns = 2 * kernels::kBlockRuns;
inline constexpr uint32_t kRunParts = kCodingThreads / kAllRuns;  // threads of a run

// Of one block of threads: dynamic shared memory. A row is one word longer than a vector, so that
// neither a column nor neighbouring rows lie in one bank.
template <int kDim>
struct CodingShared {
  static constexpr uint32_t kRow = kDim + 1;
  union {
    float rows[kBlockTokens * kRow];
    uint32_t out[kBlockTokens * kDim];  // as long as a raw block
  };
  uint8_t codes[2][kBlockTokens * kDim];
  kernels::UnitScale k_scales[kDim];
  kernels::UnitScale v_scales[kBlockTokens];
  uint32_t run_bytes[kAllRuns];
};
template <int kDim>
[[nodiscard]] __device__ __forceinline__ CodingShared<kDim>& coding_shared() {
  return *reinterpret_cast<CodingShared<kDim>*>(dynamic_shared());
}

struct StepShares {
  float key;
  float value;
};

namespace coded_detail {

inline constexpr float kLargest = std::numeric_limits<float>::max();

// The least and the greatest of some values, and whether all are finite.
struct Range {
  float low = kLargest;
  float high = -kLargest;
  bool finite = true;
  __device__ __forceinline__ void take(float x) {
    finite = finite && x >= -kLargest && x <= kLargest;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
};

template <int kDim, bool kIsK, class Source>
__device__ __forceinline__ void stage_rows(CodingShared<kDim>& shared, const Source& source) {
  for (uint32_t base = 0; base < kBlockTokens; base += kCodingThreads / 8) {
    const uint32_t token = base + threadIdx.x / 8;
    float x[kDim / 8];
    source.template load<kIsK>(x, token);
    float* row = shared.rows + token * CodingShared<kDim>::kRow + threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) row[8 * i] = x[i];
  }
  __syncthreads();
}

// A channel a thread. Result: whether the thread's has a scale.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ bool scale_channels(CodingShared<kDim>& shared,
                                                             float share) {
  if (threadIdx.x >= kDim) return true;
  Range range;
  for (uint32_t t = 0; t < kBlockTokens; ++t) {
    range.take(shared.rows[t * CodingShared<kDim>::kRow + threadIdx.x]);
  }
  return range.finite &&
         kernels::scale_unit(range.low, range.high, share, &shared.k_scales[threadIdx.x]);
}
// A token four threads.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ bool scale_tokens(CodingShared<kDim>& shared,
                                                           float share) {
  static_assert(4 * kBlockTokens == kCodingThreads);
  const uint32_t token = threadIdx.x / 4;
  Range range;
  for (uint32_t c = threadIdx.x % 4; c < kDim; c += 4) {
    range.take(shared.rows[token * CodingShared<kDim>::kRow + c]);
  }
  for (uint32_t x = 1; x < 4; x *= 2) {
    const float low = __shfl_xor_sync(kAllLanes, range.low, x);
    const float high = __shfl_xor_sync(kAllLanes, range.high, x);
    range.low = low < range.low ? low : range.low;
    range.high = high > range.high ? high : range.high;
  }
  if (!range.finite) return false;  // then the answer is no, whatever the others find
  kernels::UnitScale scale;
  const bool good = kernels::scale_unit(range.low, range.high, share, &scale);
  if (threadIdx.x % 4 == 0) shared.v_scales[token] = scale;
  return good;
}

// Result, for all threads: whether every value has a code.
template <int kDim, bool kIsK, class Source>
[[nodiscard]] __device__ __forceinline__ bool quantise_side(CodingShared<kDim>& shared,
                                                            const Source& source, float share) {
  __syncthreads();  // what lies where the rows go was read
  stage_rows<kDim, kIsK>(shared, source);
  const bool scaled =
      kIsK ? scale_channels<kDim>(shared, share) : scale_tokens<kDim>(shared, share);
  if (__syncthreads_or(scaled ? 0 : 1) != 0) return false;
  bool good = true;
  for (uint32_t i = threadIdx.x; i < kBlockTokens * kDim; i += kCodingThreads) {
    const uint32_t token = i / kDim, channel = i % kDim;
    const int64_t code =
        kernels::unit_code(shared.rows[token * CodingShared<kDim>::kRow + channel],
                           kIsK ? shared.k_scales[channel] : shared.v_scales[token]);
    good = good && code >= 0 && code <= 255;
    shared.codes[kIsK ? 0 : 1][i] = static_cast<uint8_t>(code);
  }
  return __syncthreads_or(good ? 0 : 1) == 0;
}

}  // namespace coded_detail

// Result, for all threads: false where the rows have no codes, and the block will be raw.
template <int kDim, class Source>
[[nodiscard]] __device__ __forceinline__ bool quantise_block(CodingShared<kDim>& shared,
                                                             const Source& source,
                                                             StepShares shares) {
  return coded_detail::quantise_side<kDim, true>(shared, source, shares.key) &&
         coded_detail::quantise_side<kDim, false>(shared, source, shares.value);
}

// Adds the block's codes to counts [2][kSymbolCount] in shared memory.
template <int kDim>
__device__ __forceinline__ void count_codes(const CodingShared<kDim>& shared,
                                            uint32_t (&counts)[2][kSymbolCount]) {
  for (uint32_t i = threadIdx.x; i < 2 * kBlockTokens * kDim; i += kCodingThreads) {
    const uint32_t side = i / (kBlockTokens * kDim);
    atomicAdd(&counts[side][shared.codes[side][i % (kBlockTokens * kDim)]], 1u);
  }
}

// Both codes of a layer, to write with.
struct LayerTables {
  CodeShape shape;
  WriteTable of[2];
};
// From the stream of the layer's first lane. Whole block. Result, for all threads: success.
[[nodiscard]] __device__ inline bool load_tables(LayerTables& tables, const StreamView& first) {
  for (uint32_t side = 0; side < 2; ++side) {
    if (!load_code(tables.shape, first.stream->codes[side])) {
      if (threadIdx.x == 0) raise_fault(first.lane.batch->lease, kBadMetadata);
      return false;
    }
    make_write_table(tables.shape, tables.of[side]);
  }
  return true;
}

// What one thread writes: a part of a run.
struct CodePart {
  const uint8_t* codes;
  uint32_t count;
  const WriteTable* table;
  uint32_t run;
  uint32_t before;  // bits of the run's earlier parts
};

// Result: the thread's part; the bytes of every run are in shared.run_bytes. Whole block.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ CodePart measure_runs(CodingShared<kDim>& shared,
                                                               const LayerTables& tables) {
  constexpr uint32_t kRun = kernels::kRunTokens * kDim, kPart = kRun / kRunParts;
  const uint32_t run = threadIdx.x / kRunParts, part = threadIdx.x % kRunParts;
  const uint32_t side = run / kernels::kBlockRuns;
  const uint8_t* codes = shared.codes[side] + run % kernels::kBlockRuns * kRun + part * kPart;
  uint32_t bits = 0;
  for (uint32_t i = 0; i < kPart; ++i) bits += tables.of[side].of[codes[i]] >> 16;
  uint32_t sum = bits;
  for (uint32_t x = 1; x < kRunParts; x *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, sum, x);
    if (part >= x) sum += left;
  }
  if (part == kRunParts - 1) shared.run_bytes[run] = (sum + 7) / 8;
  __syncthreads();
  return {codes, kPart, &tables.of[side], run, sum - bits};
}
// Bytes before a run, of kAllRuns those of the whole block. Requires: measure_runs().
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint32_t bytes_before(const CodingShared<kDim>& shared,
                                                               uint32_t run) {
  uint32_t bytes = kernels::block_head_bytes(kDim);
  for (uint32_t r = 0; r < run; ++r) bytes += shared.run_bytes[r];
  return bytes;
}

namespace coded_detail {

// The bytes of a word in the order of its bits, highest first.
[[nodiscard]] __device__ __forceinline__ uint32_t swap_bytes(uint32_t word) {
  return word >> 24 | (word >> 8 & 0xFF00u) | (word << 8 & 0xFF'0000u) | word << 24;
}

// The part's codes at bit `at` of zeroed words; neighbours share words.
__device__ __forceinline__ void put_codes(uint32_t* words, uint32_t at, const CodePart& part) {
  uint32_t* to = words + at / 32;
  uint32_t filled = at % 32, word = 0;
  for (uint32_t i = 0; i < part.count; ++i) {
    const uint32_t entry = part.table->of[part.codes[i]];
    const uint32_t bits = entry >> 16, code = entry & 0xFFFFu;
    filled += bits;
    if (filled < 32) {
      word |= code << (32 - filled);
      continue;
    }
    filled -= 32;
    atomicOr(to, swap_bytes(word | code >> filled));
    ++to;
    word = filled == 0 ? 0 : code << (32 - filled);
  }
  if (word != 0) atomicOr(to, swap_bytes(word));
}

template <int kDim>
__device__ __forceinline__ void put_head(CodingShared<kDim>& shared) {
  auto* halves = reinterpret_cast<uint16_t*>(shared.out);
  const uint32_t thread = threadIdx.x;
  if (thread < kAllRuns) halves[thread] = static_cast<uint16_t>(shared.run_bytes[thread]);
  halves += kAllRuns;
  if (thread < kDim) {
    halves[thread] = shared.k_scales[thread].step;
    halves[kDim + thread] = static_cast<uint16_t>(shared.k_scales[thread].zero);
  }
  halves += 2 * kDim;
  if (thread < kBlockTokens) {
    halves[thread] = shared.v_scales[thread].step;
    halves[kBlockTokens + thread] = static_cast<uint16_t>(shared.v_scales[thread].zero);
  }
}

template <int kDim, bool kIsK, class Source>
__device__ __forceinline__ void put_raw_side(CodingShared<kDim>& shared, const Source& source,
                                             bool bf16) {
  auto* halves = reinterpret_cast<uint16_t*>(shared.out) + (kIsK ? 0 : kBlockTokens * kDim);
  for (uint32_t base = 0; base < kBlockTokens; base += kCodingThreads / 8) {
    const uint32_t token = base + threadIdx.x / 8;
    float x[kDim / 8];
    source.template load<kIsK>(x, token);
    uint32_t raw[kDim / 8];
    to_16_bits(raw, x, bf16);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      halves[token * kDim + threadIdx.x % 8 + 8 * i] = static_cast<uint16_t>(raw[i]);
    }
  }
}

}  // namespace coded_detail

// The bytes of the block to shared.out, up to a whole unit filled with zeros. Whole block.
template <int kDim>
__device__ __forceinline__ void encode_block(CodingShared<kDim>& shared, const CodePart& part) {
  const uint32_t words = units_of(bytes_before(shared, kAllRuns)) * kStreamUnitBytes / 4;
  for (uint32_t i = threadIdx.x; i < words; i += kCodingThreads) shared.out[i] = 0;
  __syncthreads();
  coded_detail::put_head(shared);
  coded_detail::put_codes(shared.out, 8 * bytes_before(shared, part.run) + part.before, part);
  __syncthreads();
}
// The rows themselves, in the model's 16-bit type.
template <int kDim, class Source>
__device__ __forceinline__ void encode_raw_block(CodingShared<kDim>& shared, const Source& source,
                                                 Format wide) {
  __syncthreads();
  coded_detail::put_raw_side<kDim, true>(shared, source, wide == Format::kBf16);
  coded_detail::put_raw_side<kDim, false>(shared, source, wide == Format::kBf16);
  __syncthreads();
}

// shared.out to the stream's pages. Whole block. Requires: they are there.
template <int kDim>
__device__ __forceinline__ void store_block(const CodingShared<kDim>& shared, const StreamView& s,
                                            uint32_t unit, uint32_t bytes) {
  const uint32_t units = units_of(bytes);
  for (uint32_t i = threadIdx.x; i < units; i += kCodingThreads) {
    const uint64_t at = (uint64_t{unit} + i) * kStreamUnitBytes;
    unsigned char* page = stream_page(s, static_cast<uint32_t>(at / s.page));
    if (page == nullptr) continue;
    *reinterpret_cast<uint4*>(page + at % s.page) = make_uint4(
        shared.out[4 * i], shared.out[4 * i + 1], shared.out[4 * i + 2], shared.out[4 * i + 3]);
  }
}

}  // namespace thinkv::cuda
