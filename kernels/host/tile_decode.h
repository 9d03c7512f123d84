// tile_decode.h: the codes of one tile of slots as fp32 rows in natural order of dims.
//
// Rows hold code minus bias (uniform, ternary), the e2m1 value, or the value itself (16 bits);
// scales are the caller's, who may fold them into a score instead. The unpacking follows the words
// of page_format.h: a small transposition brings part j of neighbouring lanes' words side by side,
// which is eight consecutive dims; one shift and one mask then give the codes of one slot.
// Rows of slots that are not wanted are left alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/codec_rule.h"
#include "kernels/host/block_decode.h"
#include "kernels/host/vec.h"
#include "kernels/kernels.h"
#include "thinkv/internal/small_float.h"

#include "kernels/host/isa_begin.inc"

inline constexpr uint32_t kTileSlotsMax = 16;
inline constexpr uint32_t kHeadDimMax = 256;

// Fp32 rows of one tile. Only rows that were asked for hold anything.
struct TileRows {
  alignas(32) float row[kTileSlotsMax][kHeadDimMax];
};

THINKV_LANE_INLINE uint32_t load_word(const std::byte* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

#if THINKV_HOST_AVX2
THINKV_LANE_INLINE U8 spread(__m128 v) {
  const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return reinterpret_cast<U8>(
      _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_castps_si128(v)), twice));
}
#endif

// parts[j] = {part j of word 0, 0, 1, 1, 2, 2, 3, 3}; the four words are adjacent.
template <uint32_t kParts>
THINKV_LANE_INLINE void load_four(const std::byte* p, U8* parts) {
#if THINKV_HOST_AVX2
  const float* const from = reinterpret_cast<const float*>(p);
  if constexpr (kParts == 4) {
    __m128 w0 = _mm_loadu_ps(from), w1 = _mm_loadu_ps(from + 4);
    __m128 w2 = _mm_loadu_ps(from + 8), w3 = _mm_loadu_ps(from + 12);
    _MM_TRANSPOSE4_PS(w0, w1, w2, w3);
    parts[0] = spread(w0);
    parts[1] = spread(w1);
    parts[2] = spread(w2);
    parts[3] = spread(w3);
  } else {
    const __m128 w01 = _mm_loadu_ps(from), w23 = _mm_loadu_ps(from + 4);
    parts[0] = spread(_mm_shuffle_ps(w01, w23, 0x88));
    parts[1] = spread(_mm_shuffle_ps(w01, w23, 0xDD));
  }
#else
  for (uint32_t j = 0; j < kParts; ++j) {
    const uint32_t a = load_word(p + 4 * j), b = load_word(p + 4 * (kParts + j));
    const uint32_t c = load_word(p + 4 * (2 * kParts + j)), d = load_word(p + 4 * (3 * kParts + j));
    parts[j] = U8{a, a, b, b, c, c, d, d};
  }
#endif
}

// parts[j] = part j of words 0 .. 7, which are `stride` bytes apart.
template <uint32_t kParts>
THINKV_LANE_INLINE void load_eight(const std::byte* p, size_t stride, U8* parts) {
#if THINKV_HOST_AVX2
  if constexpr (kParts == 4) {
    __m256 v[4];
    for (uint32_t i = 0; i < 4; ++i) {
      v[i] = _mm256_insertf128_ps(
          _mm256_castps128_ps256(_mm_loadu_ps(reinterpret_cast<const float*>(p + i * stride))),
          _mm_loadu_ps(reinterpret_cast<const float*>(p + (i + 4) * stride)), 1);
    }
    const __m256d lo01 = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
    const __m256d hi01 = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
    const __m256d lo23 = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
    const __m256d hi23 = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
    parts[0] = reinterpret_cast<U8>(_mm256_unpacklo_pd(lo01, lo23));
    parts[1] = reinterpret_cast<U8>(_mm256_unpackhi_pd(lo01, lo23));
    parts[2] = reinterpret_cast<U8>(_mm256_unpacklo_pd(hi01, hi23));
    parts[3] = reinterpret_cast<U8>(_mm256_unpackhi_pd(hi01, hi23));
    return;
  }
#endif
  for (uint32_t j = 0; j < kParts; ++j) {
    const std::byte* const at = p + 4 * j;
    parts[j] = U8{load_word(at),
                  load_word(at + stride),
                  load_word(at + 2 * stride),
                  load_word(at + 3 * stride),
                  load_word(at + 4 * stride),
                  load_word(at + 5 * stride),
                  load_word(at + 6 * stride),
                  load_word(at + 7 * stride)};
  }
}

// e2m1: the eight magnitudes by index, then the sign.
THINKV_LANE_INLINE F8 e2m1_values(U8 codes) {
  F8 magnitude;
#if THINKV_HOST_AVX2
  const __m256 table = _mm256_loadu_ps(kE2m1Magnitudes);
  magnitude =
      reinterpret_cast<F8>(_mm256_permutevar8x32_ps(table, reinterpret_cast<__m256i>(codes & 7u)));
#else
  for (uint32_t i = 0; i < kLanes; ++i) magnitude[i] = kE2m1Magnitudes[codes[i] & 7u];
#endif
  return as_float(bits_of(magnitude) | ((codes & 8u) << 28));
}

template <Coding kCoding, uint32_t kBits>
THINKV_LANE_INLINE F8 code_values(U8 codes) {
  if constexpr (kCoding == Coding::kHalf) return halves_to_float(codes);
  if constexpr (kCoding == Coding::kBfloat) return as_float(codes << 16);
  if constexpr (kCoding == Coding::kE2m1) return e2m1_values(codes);
  if constexpr (kCoding == Coding::kTernary) return small_to_float(codes) - float{kTernaryZero};
  return small_to_float(codes) - uniform_bias(kBits);
}

template <Coding kCoding, uint32_t kBits, uint32_t kParts>
void decode_k_tile(const std::byte* page, const CodeSection& s, uint32_t tile, uint32_t wanted,
                   TileRows& out) {
  constexpr bool kWide = kBits == 16;
  constexpr uint32_t kPerByte = kWide ? 1 : 8 / kBits;
  constexpr uint32_t kSlots = kWide ? 1 : 2;  // in a word
  constexpr uint32_t kMask = kWide ? 0xFFFFu : (1u << (kBits & 15u)) - 1;
  const U8 column_shift = {0, 16, 0, 16, 0, 16, 0, 16};
  const uint32_t rows = s.tile_rows(tile), blocks = s.blocks(), block_dims = s.block_dims;
  const std::byte* word = page + s.tile_offset(tile);
  for (uint32_t block = 0; block < blocks; ++block) {
    for (uint32_t g = 0; g < rows; ++g, word += 16 * kParts) {
      const uint32_t here = (wanted >> (kSlots * g)) & ((1u << kSlots) - 1);
      if (here == 0) continue;
      U8 parts[kParts];
      load_four<kParts>(word, parts);
      for (uint32_t slot = 0; slot < kSlots; ++slot) {
        if (((here >> slot) & 1u) == 0) continue;
        float* const row = out.row[kSlots * g + slot] + block * block_dims;
        for (uint32_t j = 0; j < kParts; ++j) {
          for (uint32_t n = 0; n < kPerByte; ++n) {
            const U8 codes = (parts[j] >> (column_shift + 8 * slot + kBits * n)) & kMask;
            store(row + 16 * (kPerByte * (j / 2) + n) + 8 * (j % 2),
                  code_values<kCoding, kBits>(codes));
          }
        }
      }
    }
  }
}

template <Coding kCoding, uint32_t kBits, uint32_t kParts>
void decode_v_tile(const std::byte* page, const CodeSection& s, uint32_t tile, uint32_t wanted,
                   TileRows& out) {
  constexpr bool kWide = kBits == 16;
  constexpr uint32_t kPerByte = kWide ? 1 : 8 / kBits;
  constexpr uint32_t kSlots = kWide ? 2 : 4;  // in a word
  constexpr uint32_t kSlotBits = kWide ? 16 : 8;
  constexpr uint32_t kMask = kWide ? 0xFFFFu : (1u << (kBits & 15u)) - 1;
  const uint32_t columns = s.tile_rows(tile), blocks = s.blocks(), block_dims = s.block_dims;
  const std::byte* const words = page + s.tile_offset(tile);
  const size_t stride = size_t{columns} * 4 * kParts;
  for (uint32_t block = 0; block < blocks; ++block) {
    for (uint32_t c = 0; c < columns; ++c) {
      const uint32_t here = (wanted >> (kSlots * c)) & ((1u << kSlots) - 1);
      if (here == 0) continue;
      U8 parts[kParts];
      load_eight<kParts>(words + 8 * block * stride + c * 4 * kParts, stride, parts);
      for (uint32_t slot = 0; slot < kSlots; ++slot) {
        if (((here >> slot) & 1u) == 0) continue;
        float* const row = out.row[kSlots * c + slot] + block * block_dims;
        for (uint32_t j = 0; j < kParts; ++j) {
          for (uint32_t n = 0; n < kPerByte; ++n) {
            const U8 codes = (parts[j] >> (kSlotBits * slot + kBits * n)) & kMask;
            store(row + 8 * (kPerByte * j + n), code_values<kCoding, kBits>(codes));
          }
        }
      }
    }
  }
}

using TileDecoder = void (*)(const std::byte* page, const CodeSection& section, uint32_t tile,
                             uint32_t wanted, TileRows& out);

template <Coding kCoding, uint32_t kBits>
TileDecoder tile_decoder_of(const CodeSection& section) {
  // Words of 8 bytes occur where head_dim 64 is smaller than a block of 2-bit codes.
  if constexpr (kBits == 2) {
    if (section.word_bytes == 8) {
      return section.is_k ? decode_k_tile<kCoding, kBits, 2> : decode_v_tile<kCoding, kBits, 2>;
    }
  }
  return section.is_k ? decode_k_tile<kCoding, kBits, 4> : decode_v_tile<kCoding, kBits, 4>;
}

inline TileDecoder tile_decoder(const CodeSection& section, Coding coding) {
  switch (coding) {
    case Coding::kHalf:
      return tile_decoder_of<Coding::kHalf, 16>(section);
    case Coding::kBfloat:
      return tile_decoder_of<Coding::kBfloat, 16>(section);
    case Coding::kE2m1:
      return tile_decoder_of<Coding::kE2m1, 4>(section);
    case Coding::kTernary:
      return tile_decoder_of<Coding::kTernary, 2>(section);
    case Coding::kAffine:  // of block formats only
    case Coding::kUniform:
      break;
  }
  if (section.bits == 8) return tile_decoder_of<Coding::kUniform, 8>(section);
  if (section.bits == 4) return tile_decoder_of<Coding::kUniform, 4>(section);
  return tile_decoder_of<Coding::kUniform, 2>(section);
}

// One side (K or V) of a page, ready to be decoded tile by tile.
struct PageSide {
  const std::byte* page;
  const CodeSection* section;
  VectorCoding coding;
  uint32_t scale_offset;
  TileDecoder decoder;  // null: a block format
  BlockLayout block{};

  PageSide(const std::byte* bytes, const PageLayout& layout, bool k_side)
      : page(bytes),
        section(k_side ? &layout.k : &layout.v),
        coding(k_side ? format_info(layout.format).k : format_info(layout.format).v),
        scale_offset(k_side ? layout.k_scale_offset : layout.v_scale_offset),
        decoder(is_block(layout.format) ? nullptr : tile_decoder(*section, coding.coding)) {
    if (decoder == nullptr) block = block_layout(layout.format, layout.head_dim);
  }

  void decode(uint32_t tile, uint32_t wanted, TileRows& out) const {
    if (decoder != nullptr) return decoder(page, *section, tile, wanted, out);
    for (; wanted != 0; wanted &= wanted - 1) {
      const auto in_tile = static_cast<uint32_t>(__builtin_ctz(wanted));
      decode_block_row(page, block, tile * section->tile_slots + in_tile, section->is_k,
                       out.row[in_tile]);
    }
  }

  // The scale of a vector_scaled() coding.
  [[nodiscard]] float vector_scale(uint32_t slot) const {
    uint16_t half;
    std::memcpy(&half, page + scale_offset + 2 * slot, sizeof(half));
    return fp16_to_float(half);
  }

  // Multiplies a row of a group_scaled() coding by its scales.
  void apply_group_scales(uint32_t slot, float* row) const {
    const uint32_t groups = section->head_dim / kScaleGroup;
    const std::byte* const scales = page + scale_offset + slot * groups;
    for (uint32_t group = 0; group < groups; ++group) {
      const F8 scale = splat(e4m3_to_float(std::to_integer<uint8_t>(scales[group])));
      float* const at = row + group * kScaleGroup;
      store(at, load(at) * scale);
      store(at + kLanes, load(at + kLanes) * scale);
    }
  }
};

#include "kernels/host/isa_end.inc"
