// codec_sites.cuh: where the codes of the eight threads of a vector lie (page_format.h), with all
// that the format and head_dim fix known at compile time.
//
// Thread l owns the dims l + 8 i. For K it is half `l % 2` of column pair l / 2, for V row l.
#pragma once

#include <cstdint>

#include "kernels/cuda/platform.cuh"

namespace thinkv::cuda {

// The codes of one thread, packed: registers, because every index is known at compile time.
template <int kDim, int kBits>
struct Codes {
  static constexpr int kWords = (kDim / 8 * kBits + 31) / 32;
  uint32_t words[kWords] = {};
  __device__ __forceinline__ void set(int i, uint32_t code) {
    words[i * kBits / 32] |= code << (i * kBits % 32);
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t get(int i) const {
    return (words[i * kBits / 32] >> (i * kBits % 32)) & ((1u << kBits) - 1);
  }
};

// CodeSection of page_format.h for codes of less than 16 bits.
template <int kDim, int kBits, bool kIsK>
struct SectionSites {
  static constexpr int kPerByte = 8 / kBits;
  static constexpr int kWordSlots = kIsK ? 2 : 4;
  static constexpr int kWide = 128 / (kBits * kWordSlots) * (kIsK ? 4 : 8);
  static constexpr int kBlock = kWide < kDim ? kWide : kDim;
  static constexpr int kWordBytes = 16 * kBlock / kWide;
  static constexpr int kBlocks = kDim / kBlock;
  static constexpr int kParts = kWordBytes / 4;
  static constexpr int kRowWords = kIsK ? 4 : 8;
  static constexpr int kTileRows = 16 / kWordSlots;
  static constexpr int kTileBytes = kBlocks * kTileRows * kRowWords * kWordBytes;

  uint32_t first;         // byte of block 0, part 0
  uint32_t block_stride;  // bytes

  __device__ __forceinline__ SectionSites(uint32_t slots, uint32_t slot) {
    const uint32_t tile = slot / 16, in_tile = slot % 16, left = slots - tile * 16;
    const uint32_t rows = left >= 16 ? kTileRows : (left + kWordSlots - 1) / kWordSlots;
    const uint32_t l = threadIdx.x % 8, row = in_tile / kWordSlots;
    const uint32_t word = kIsK ? row * 4 + l / 2 : l * rows + row;
    const uint32_t byte = kIsK ? 2 * (l % 2) + in_tile % 2 : in_tile % 4;
    first = tile * kTileBytes + word * kWordBytes + byte;
    block_stride = kRowWords * rows * kWordBytes;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t byte(int block, int part) const {
    return first + static_cast<uint32_t>(block) * block_stride + static_cast<uint32_t>(4 * part);
  }
  // Which of the thread's codes is the n-th of a byte.
  [[nodiscard]] static constexpr int code(int block, int part, int n) {
    return kIsK ? 2 * (block * (kBlock / 16) + part / 2 * kPerByte + n) + part % 2
                : block * (kBlock / 8) + kPerByte * part + n;
  }
};

template <int kDim, int kBits, bool kIsK>
__device__ __forceinline__ void put_codes(unsigned char* section, uint32_t slots, uint32_t slot,
                                          const Codes<kDim, kBits>& codes) {
  using Sites = SectionSites<kDim, kBits, kIsK>;
  const Sites sites(slots, slot);
#pragma unroll
  for (int block = 0; block < Sites::kBlocks; ++block) {
#pragma unroll
    for (int part = 0; part < Sites::kParts; ++part) {
      uint32_t byte = 0;
#pragma unroll
      for (int n = 0; n < Sites::kPerByte; ++n) {
        byte |= codes.get(Sites::code(block, part, n)) << (kBits * n);
      }
      section[sites.byte(block, part)] = static_cast<unsigned char>(byte);
    }
  }
}

template <int kDim, int kBits, bool kIsK>
__device__ __forceinline__ void get_codes(const unsigned char* section, uint32_t slots,
                                          uint32_t slot, Codes<kDim, kBits>& codes) {
  using Sites = SectionSites<kDim, kBits, kIsK>;
  const Sites sites(slots, slot);
#pragma unroll
  for (int block = 0; block < Sites::kBlocks; ++block) {
#pragma unroll
    for (int part = 0; part < Sites::kParts; ++part) {
      const uint32_t byte = section[sites.byte(block, part)];
#pragma unroll
      for (int n = 0; n < Sites::kPerByte; ++n) {
        codes.set(Sites::code(block, part, n), (byte >> (kBits * n)) & ((1u << kBits) - 1));
      }
    }
  }
}

// 16-bit pages: 8 slots, blocks of 32 dims; the thread's halves of a block lie in the four 32-bit
// parts of one 16-byte word.
inline constexpr uint32_t kHalvesBlockBytes = 8 * 4 * 16;

template <bool kIsK>
[[nodiscard]] __device__ __forceinline__ uint32_t halves_word(uint32_t slot) {
  const uint32_t l = threadIdx.x % 8;
  return 16 * (kIsK ? slot * 4 + l / 2 : l * 4 + slot / 2);
}
template <bool kIsK>
[[nodiscard]] __device__ __forceinline__ uint32_t halves_side(uint32_t slot) {
  return kIsK ? threadIdx.x % 2 : slot % 2;
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void put_halves(unsigned char* section, uint32_t slot,
                                           const uint32_t (&raw)[kDim / 8]) {
  unsigned char* first = section + halves_word<kIsK>(slot) + 2 * halves_side<kIsK>(slot);
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    auto* half = reinterpret_cast<uint16_t*>(first + i / 4 * kHalvesBlockBytes + i % 4 * 4);
    *half = static_cast<uint16_t>(raw[i]);
  }
}

// Two neighbours own the words of K together: by exchange each stores every other word whole. All
// threads of the warp call it.
template <int kDim>
__device__ __forceinline__ void put_k_words(unsigned char* section, uint32_t slot,
                                            const uint32_t (&raw)[kDim / 8], bool active) {
  const uint32_t odd = threadIdx.x % 2;
#pragma unroll
  for (int block = 0; block < kDim / 32; ++block) {
    const uint32_t low = raw[4 * block] | raw[4 * block + 1] << 16;
    const uint32_t high = raw[4 * block + 2] | raw[4 * block + 3] << 16;
    const uint32_t other_low = __shfl_xor_sync(0xFFFF'FFFFu, low, 1);
    const uint32_t other_high = __shfl_xor_sync(0xFFFF'FFFFu, high, 1);
    if (!active || block % 2 != static_cast<int>(odd)) continue;
    const uint32_t even_low = odd != 0 ? other_low : low, odd_low = odd != 0 ? low : other_low;
    const uint32_t even_high = odd != 0 ? other_high : high;
    const uint32_t odd_high = odd != 0 ? high : other_high;
    *reinterpret_cast<uint4*>(section + halves_word<true>(slot) + block * kHalvesBlockBytes) =
        make_uint4((even_low & 0xFFFFu) | odd_low << 16, even_low >> 16 | (odd_low & 0xFFFF'0000u),
                   (even_high & 0xFFFFu) | odd_high << 16,
                   even_high >> 16 | (odd_high & 0xFFFF'0000u));
  }
}

// The words of V that a slot shares with the one before it. Read early: they come from memory.
template <int kDim>
__device__ __forceinline__ void get_v_words(const unsigned char* section, uint32_t slot,
                                            uint4 (&words)[kDim / 32]) {
#pragma unroll
  for (int block = 0; block < kDim / 32; ++block) {
    words[block] = *reinterpret_cast<const uint4*>(section + halves_word<false>(slot) +
                                                   block * kHalvesBlockBytes);
  }
}
// V of a slot whose neighbour in the words, where it comes after it, holds nothing yet: whole words
// are written, because 2-byte stores into many sectors cost several times as much. `words`: what is
// there, of a slot that comes after its neighbour.
template <int kDim>
__device__ __forceinline__ void put_v_words_in_order(unsigned char* section, uint32_t slot,
                                                     const uint4 (&words)[kDim / 32],
                                                     const uint32_t (&raw)[kDim / 8]) {
  const bool odd = halves_side<false>(slot) != 0;
  const uint32_t keep = odd ? 0xFFFFu : 0u, shift = odd ? 16 : 0;
#pragma unroll
  for (int block = 0; block < kDim / 32; ++block) {
    const uint4 before = words[block];
    *reinterpret_cast<uint4*>(section + halves_word<false>(slot) + block * kHalvesBlockBytes) =
        make_uint4((before.x & keep) | raw[4 * block] << shift,
                   (before.y & keep) | raw[4 * block + 1] << shift,
                   (before.z & keep) | raw[4 * block + 2] << shift,
                   (before.w & keep) | raw[4 * block + 3] << shift);
  }
}

template <int kDim, bool kIsK>
__device__ __forceinline__ void get_halves(const unsigned char* section, uint32_t slot,
                                           uint32_t (&raw)[kDim / 8]) {
  const uint32_t shift = 16 * halves_side<kIsK>(slot);
#pragma unroll
  for (int block = 0; block < kDim / 32; ++block) {
    const uint4 w = *reinterpret_cast<const uint4*>(section + halves_word<kIsK>(slot) +
                                                    block * kHalvesBlockBytes);
    raw[4 * block] = (w.x >> shift) & 0xFFFFu;
    raw[4 * block + 1] = (w.y >> shift) & 0xFFFFu;
    raw[4 * block + 2] = (w.z >> shift) & 0xFFFFu;
    raw[4 * block + 3] = (w.w >> shift) & 0xFFFFu;
  }
}

}  // namespace thinkv::cuda
