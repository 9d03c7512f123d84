// coded_read.cuh: two coded blocks at a time back to 16-bit pages, by one warp: a run of codes a
// thread, two tokens of every run at a time.
//
// A run holds 8 tokens of one side, which is one side of a 16-bit page. Whatever the bytes are,
// nothing outside of the block's pages is read, every loop has a fixed end, and a block that is
// none raises kBadMetadata and reads as zeros, or as codes that mean nothing.
#pragma once

#include "kernels/cuda/coded_codebook.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/stream/block_rule.h"

namespace thinkv::cuda {

inline constexpr uint32_t kPairRuns = 32;
inline constexpr uint32_t kBlockPages = kBlockTokens / kBufferPageSlots;  // in 16 bits

// Of one warp: shared memory.
template <int kDim>
struct ReadShared {
  static constexpr uint32_t kWords = kDim / 2;  // codes of two tokens
  uint64_t pages[2][block_pages_max(kDim)];     // of the stream, that each block lies in
  uint32_t scales[2][kDim + kBlockTokens];      // step | zero << 16: channels of K, tokens of V
  uint32_t codes[kPairRuns][kWords + 1];        // a word more: runs in banks of their own
};

enum class BlockKind : uint32_t { kNone, kBad, kCoded, kRaw };  // kNone: there is no such block

// One of the two blocks, as the 16 threads that are its own know it.
struct ReadBlock {
  BlockKind kind;
  uint32_t first_position;
  uint32_t bytes;
  uint32_t begin;  // byte in its first page
  uint32_t pages;
};

namespace coded_detail {

template <int kDim>
[[nodiscard]] __device__ __forceinline__ const unsigned char* block_bytes(
    const ReadShared<kDim>& shared, uint32_t half, uint32_t at) {
  constexpr uint32_t kPage = page_bytes(kDim);
  return reinterpret_cast<const unsigned char*>(shared.pages[half][at / kPage]) + at % kPage;
}
// Requires: `offset` is even and within the block.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint32_t half_at(const ReadShared<kDim>& shared,
                                                          uint32_t half, const ReadBlock& block,
                                                          uint32_t offset) {
  return *reinterpret_cast<const uint16_t*>(block_bytes(shared, half, block.begin + offset));
}

// The bits of a run, from its first byte on; zeros behind the block's pages.
template <int kDim>
class RunReader {
 public:
  __device__ __forceinline__ RunReader(const ReadShared<kDim>& shared, uint32_t half,
                                       const ReadBlock& block, uint32_t offset)
      : shared_(&shared),
        half_(half),
        end_(block.pages * page_bytes(kDim)),
        at_((block.begin + offset) & ~3u) {
    fill();
    const uint32_t skipped = (block.begin + offset) % 4 * 8;
    window_ <<= skipped;
    have_ -= skipped;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t symbol(const ReadTable& table) {
    fill();
    const auto top = static_cast<uint32_t>(window_ >> (64 - kCodeBitsMax));
    uint32_t found = table.fast[top >> (kCodeBitsMax - kFastBits)];
    if (found == 0) found = find_code(table, top, kFastBits + 1);
    const uint32_t bits = found >> 8;
    window_ <<= bits;
    have_ -= bits;
    used_ += bits;
    return found & 0xFFu;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t used_bits() const { return used_; }

 private:
  // At least 33 bits.
  __device__ __forceinline__ void fill() {
    if (have_ > 32) return;
    uint32_t word = 0;
    if (at_ < end_) {
      word = *reinterpret_cast<const uint32_t*>(block_bytes(*shared_, half_, at_));
      word = word >> 24 | (word >> 8 & 0xFF00u) | (word << 8 & 0xFF'0000u) | word << 24;
    }
    window_ |= uint64_t{word} << (32 - have_);
    have_ += 32;
    at_ += 4;
  }

  const ReadShared<kDim>* shared_;
  uint32_t half_;
  uint32_t end_;
  uint32_t at_;
  uint64_t window_ = 0;
  uint32_t have_ = 0;
  uint32_t used_ = 0;
};

// Two neighbouring values of a word of a 16-bit page.
[[nodiscard]] __device__ __forceinline__ uint32_t pack_pair(float low, float high, bool bf16) {
  return bf16 ? pack_bf16(low, high) : pack_f16(low, high);
}
[[nodiscard]] __device__ __forceinline__ float value_of(uint32_t code, uint32_t scale) {
  return kernels::dequantise(static_cast<uint8_t>(code),
                             {static_cast<uint16_t>(scale), static_cast<int16_t>(scale >> 16)});
}

// Where a word of 16 bytes lies in a side of a 16-bit page (page_format.h): `row` is the slot of K
// or the dim modulo 8 of V, `column` the column pair of K or the slot pair of V.
[[nodiscard]] __device__ __forceinline__ uint32_t word_offset(uint32_t dims32, uint32_t row,
                                                              uint32_t column) {
  return ((dims32 * 8 + row) * 4 + column) * 16;
}

// A word of K of slot `2 pair + token`, from the codes of two tokens.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint4 key_word(const uint8_t* codes,
                                                        const uint32_t* scales, uint32_t token,
                                                        uint32_t dims32, uint32_t column,
                                                        bool bf16) {
  uint32_t part[4];
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    const uint32_t dim = 32 * dims32 + 8 * j + 2 * column;
    part[j] = pack_pair(value_of(codes[token * kDim + dim], scales[dim]),
                        value_of(codes[token * kDim + dim + 1], scales[dim + 1]), bf16);
  }
  return make_uint4(part[0], part[1], part[2], part[3]);
}
// A word of V of both tokens.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint4 value_word(const uint8_t* codes,
                                                          const uint32_t* scales, uint32_t dims32,
                                                          uint32_t row, bool bf16) {
  uint32_t part[4];
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    const uint32_t dim = 32 * dims32 + 8 * j + row;
    part[j] =
        pack_pair(value_of(codes[dim], scales[0]), value_of(codes[kDim + dim], scales[1]), bf16);
  }
  return make_uint4(part[0], part[1], part[2], part[3]);
}

}  // namespace coded_detail

// What this thread's block is, and its pages and scales in shared memory. Whole warp.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ ReadBlock open_block(const StreamView& s, uint32_t index,
                                                              bool present,
                                                              ReadShared<kDim>& shared) {
  const uint32_t half = threadIdx.x % 32 / 16, place = threadIdx.x % 16;
  const StreamBlock* listed = present ? block_at(s, index) : nullptr;
  StreamBlock found{};
  if (listed != nullptr) found = *listed;
  bool good = listed != nullptr && block_good(s, found);
  const uint32_t raw = kernels::raw_block_bytes(kDim);
  good = good &&
         (found.raw != 0 ? found.bytes == raw : found.bytes >= kernels::block_head_bytes(kDim));
  const uint64_t begin = uint64_t{found.unit} * kStreamUnitBytes;
  ReadBlock block{BlockKind::kNone, found.first_position, found.bytes,
                  static_cast<uint32_t>(begin % s.page), 0};
  if (good) {
    block.pages = (block.begin + block.bytes - 1) / s.page + 1;
    if (place < block.pages) {
      const unsigned char* page = stream_page(s, static_cast<uint32_t>(begin / s.page) + place);
      shared.pages[half][place] = reinterpret_cast<uint64_t>(page);
      good = page != nullptr;
    }
  }
  const uint32_t mine = 0xFFFFu << (16 * half);
  good = (__ballot_sync(kAllLanes, good) & mine) == mine;
  __syncwarp();
  if (present) {
    block.kind = !good ? BlockKind::kBad : found.raw != 0 ? BlockKind::kRaw : BlockKind::kCoded;
  }
  return block;
}

// Scales to shared memory, and the byte at which this thread's run begins. Whole warp. `bytes`: of
// the run. The block is kBad afterwards where its runs do not fill it.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint32_t open_run(ReadBlock& block,
                                                           ReadShared<kDim>& shared,
                                                           uint32_t& bytes) {
  const uint32_t half = threadIdx.x % 32 / 16, run = threadIdx.x % 16;
  const bool coded = block.kind == BlockKind::kCoded;
  bytes = coded ? coded_detail::half_at(shared, half, block, 2 * run) : 0;
  if (coded) {
    constexpr uint32_t kHead = 2 * kPairRuns / 2;  // bytes of the runs' lengths
    for (uint32_t i = run; i < kDim + kBlockTokens; i += 16) {
      const bool of_key = i < kDim;
      const uint32_t count = of_key ? kDim : kBlockTokens;
      const uint32_t at = kHead + (of_key ? 2 * i : 4 * kDim + 2 * (i - kDim));
      shared.scales[half][i] = coded_detail::half_at(shared, half, block, at) |
                               coded_detail::half_at(shared, half, block, at + 2 * count) << 16;
    }
  }
  uint32_t sum = bytes;
  for (uint32_t x = 1; x < 16; x *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, sum, x);
    if (run >= x) sum += left;
  }
  const uint32_t all = __shfl_sync(kAllLanes, sum, 16 * half + 15);
  if (coded && kernels::block_head_bytes(kDim) + all != block.bytes) block.kind = BlockKind::kBad;
  return kernels::block_head_bytes(kDim) + sum - bytes;
}

// Tokens 2 pair and 2 pair + 1 of a run, codes in shared memory, into its page. Whole warp.
template <int kDim>
__device__ __forceinline__ void write_run(const ReadShared<kDim>& shared, uint32_t run,
                                          uint32_t pair, bool zeros, bool bf16,
                                          unsigned char* page) {
  const auto* codes = reinterpret_cast<const uint8_t*>(shared.codes[run]);
  const uint32_t half = run / 16, number = run % kernels::kBlockRuns;
  const bool of_key = run % 16 < kernels::kBlockRuns;
  const uint32_t* scales = shared.scales[half];
  const uint32_t v_offset = slot_shape(kDim, static_cast<uint32_t>(Format::kF16)).v_offset;
  for (uint32_t i = threadIdx.x % 32; i < kDim / 4; i += 32) {
    uint4 word = make_uint4(0, 0, 0, 0);
    uint32_t offset = 0;
    if (of_key) {
      const uint32_t token = i / (kDim / 8), dims32 = i % (kDim / 8) / 4, column = i % 4;
      offset = coded_detail::word_offset(dims32, 2 * pair + token, column);
      if (!zeros) {
        word = coded_detail::key_word<kDim>(codes, scales, token, dims32, column, bf16);
      }
    } else {
      const uint32_t dims32 = i / 8, row = i % 8;
      offset = v_offset + coded_detail::word_offset(dims32, row, pair);
      const uint32_t* of_tokens = scales + kDim + number * kernels::kRunTokens + 2 * pair;
      if (!zeros) word = coded_detail::value_word<kDim>(codes, of_tokens, dims32, row, bf16);
    }
    *reinterpret_cast<uint4*>(page + offset) = word;
  }
}

// A raw block, whose values are 16 bits already, into its pages. Whole warp.
template <int kDim>
__device__ __forceinline__ void write_raw(const ReadShared<kDim>& shared, uint32_t half,
                                          const ReadBlock& block, unsigned char* pages) {
  const uint32_t v_offset = slot_shape(kDim, static_cast<uint32_t>(Format::kF16)).v_offset;
  for (uint32_t i = threadIdx.x % 32; i < 2 * kBlockTokens * kDim; i += 32) {
    const bool of_key = i < kBlockTokens * kDim;
    const uint32_t token = i / kDim % kBlockTokens, dim = i % kDim;
    const uint32_t slot = token % kBufferPageSlots, row = dim % 8;
    const uint32_t at =
        of_key ? coded_detail::word_offset(dim / 32, slot, row / 2) + dim % 32 / 8 * 4 + dim % 2 * 2
               : v_offset + coded_detail::word_offset(dim / 32, row, slot / 2) + dim % 32 / 8 * 4 +
                     slot % 2 * 2;
    *reinterpret_cast<uint16_t*>(pages + token / kBufferPageSlots * page_bytes(kDim) + at) =
        static_cast<uint16_t>(coded_detail::half_at(shared, half, block, 2 * i));
  }
}

// The blocks of a pair that have codes, or are none: their runs, two tokens at a time. Whole warp.
// Result: bits that this thread read.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ uint32_t read_runs(const ReadBlock& block,
                                                            const ReadTable* tables,
                                                            uint32_t offset, bool bf16,
                                                            ReadShared<kDim>& shared,
                                                            unsigned char* pages) {
  const uint32_t thread = threadIdx.x % 32, side = thread % 16 / kernels::kBlockRuns;
  const bool decodes = block.kind == BlockKind::kCoded;
  ReadBlock source = block;
  if (!decodes) source.pages = 0;  // reads nothing
  coded_detail::RunReader<kDim> reader(shared, thread / 16, source, offset);
  for (uint32_t pair = 0; pair < kernels::kRunTokens / 2; ++pair) {
    for (uint32_t w = 0; decodes && w < ReadShared<kDim>::kWords; ++w) {
      uint32_t word = 0;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) word |= reader.symbol(tables[side]) << (8 * i);
      shared.codes[thread][w] = word;
    }
    __syncwarp();
    for (uint32_t run = 0; run < kPairRuns; ++run) {
      const auto kind =
          static_cast<BlockKind>(__shfl_sync(kAllLanes, static_cast<uint32_t>(block.kind), run));
      if (kind != BlockKind::kCoded && kind != BlockKind::kBad) continue;
      const uint32_t page = run / 16 * kBlockPages + run % kernels::kBlockRuns;
      write_run(shared, run, pair, kind == BlockKind::kBad, bf16, pages + page * page_bytes(kDim));
    }
    __syncwarp();
  }
  return reader.used_bits();
}

// What of a pair is no code: raw blocks, and the positions of all. Whole warp.
template <int kDim>
__device__ __forceinline__ void write_rest(const ReadBlock& block, const ReadShared<kDim>& shared,
                                           unsigned char* pages) {
  const uint32_t positions = slot_shape(kDim, static_cast<uint32_t>(Format::kF16)).position_offset;
  for (uint32_t half = 0; half < 2; ++half) {
    const auto kind = static_cast<BlockKind>(
        __shfl_sync(kAllLanes, static_cast<uint32_t>(block.kind), 16 * half));
    ReadBlock its = block;
    its.begin = __shfl_sync(kAllLanes, block.begin, 16 * half);
    its.first_position = __shfl_sync(kAllLanes, block.first_position, 16 * half);
    if (kind == BlockKind::kNone) continue;
    unsigned char* to = pages + half * kBlockPages * page_bytes(kDim);
    if (kind == BlockKind::kRaw) write_raw(shared, half, its, to);
    for (uint32_t i = threadIdx.x % 32; i < kBlockTokens; i += 32) {
      unsigned char* page = to + i / kBufferPageSlots * page_bytes(kDim);
      *reinterpret_cast<uint32_t*>(page + positions + i % kBufferPageSlots * kPositionBytes) =
          its.first_position + i;
    }
  }
}

// Blocks `first` and first + 1, where they are below `count`, to pages [kBlockPages] each, one
// behind the other from `pages` on. Whole warp. tables: of keys and of values; null where the
// layer's codes are damaged.
template <int kDim>
__device__ __forceinline__ void read_pair(const StreamView& s, uint32_t first, uint32_t count,
                                          const ReadTable* tables, ReadShared<kDim>& shared,
                                          unsigned char* pages) {
  const uint32_t half = threadIdx.x % 32 / 16;
  ReadBlock block = open_block(s, first + half, first + half < count, shared);
  if (tables == nullptr && block.kind == BlockKind::kCoded) block.kind = BlockKind::kBad;
  uint32_t run_bytes = 0;
  const uint32_t offset = open_run(block, shared, run_bytes);
  __syncwarp();
  const bool bf16 = wide_format(*s.lane.batch) == Format::kBf16;
  const uint32_t bits = read_runs(block, tables, offset, bf16, shared, pages);
  const bool past_end = block.kind == BlockKind::kCoded && bits > 8 * run_bytes;
  if (past_end || block.kind == BlockKind::kBad) raise_fault(s.lane.batch->lease, kBadMetadata);
  write_rest(block, shared, pages);
  __syncwarp();
}

}  // namespace thinkv::cuda
