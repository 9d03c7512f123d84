// Encoding: kernels/codec_rule.h over vectors of eight, then the codes are packed byte by byte into
// the order of page_format.h. A byte never holds codes of two slots, so nothing is read back.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "kernels/codec_rule.h"
#include "kernels/host/host_set.h"
#include "kernels/host/vec.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/small_float.h"

#include "kernels/host/isa_begin.inc"

namespace {

constexpr uint32_t kDimMax = 256;
constexpr uint32_t kVectorsMax = kDimMax / kLanes;

// The values of one vector while it is coded, and the result.
struct Work {
  uint32_t vectors;
  F8 x[kVectorsMax];
  alignas(32) uint8_t codes[kDimMax];
  uint8_t scales[kDimMax / kScaleGroup];
};

// The fold of codec_rule.h. Consumes v.
THINKV_LANE_INLINE float fold_all(F8* v, uint32_t vectors) {
  for (uint32_t h = vectors / 2; h >= 1; h /= 2) {
    for (uint32_t i = 0; i < h; ++i) v[i] += v[i + h];
  }
  return fold(v[0]);
}

THINKV_LANE_INLINE float abs_max(const F8* x, uint32_t vectors) {
  F8 top = splat(0.0f);
  for (uint32_t i = 0; i < vectors; ++i) top = max(top, abs(x[i]));
  return largest(top);
}

THINKV_LANE_INLINE void put_codes(uint8_t* out, F8 codes) {
  const I8 whole = truncate(codes);
  for (uint32_t i = 0; i < kLanes; ++i) out[i] = static_cast<uint8_t>(whole[i]);
}

// code - 2^(b-1), still in fp32.
THINKV_LANE_INLINE F8 uniform_step(F8 x, F8 inv, float half) {
  // Clamped before the floor: the floor is monotone, and the clamp keeps it in int32.
  const F8 t = min(max(x * inv, splat(-half)), splat(half - 0.5f));
  return floor(t);
}

float inverse(float scale) {
  return scale == 0.0f ? 0.0f : 1.0f / scale;
}

uint16_t fp16_scale(float scale) {
  return fp16_from_float(std::min(scale, kFp16Max));
}

// One clipping factor of the 4-bit rule.
struct Clipping {
  F8 steps[kVectorsMax];  // code - 2^(b-1)
  uint16_t scale;
  float error;
};

void clip_at(const Work& work, float start, Clipping& out) {
  const float start_scale = fp16_to_float(fp16_scale(start));
  const F8 inv = splat(inverse(start_scale));
  F8 xc[kVectorsMax] = {}, cc[kVectorsMax] = {};
  for (uint32_t i = 0; i < work.vectors; ++i) {
    out.steps[i] = uniform_step(work.x[i], inv, 8.0f);
    const F8 c = out.steps[i] + 0.5f;
    xc[i] = work.x[i] * c;
    cc[i] = c * c;
  }
  const float refit = fold_all(xc, work.vectors) / fold_all(cc, work.vectors);
  out.scale = start_scale == 0.0f ? uint16_t{0} : fp16_scale(refit);
  const F8 scale = splat(fp16_to_float(out.scale));
  for (uint32_t i = 0; i < work.vectors; ++i) {
    const F8 difference = work.x[i] - (out.steps[i] + 0.5f) * scale;
    xc[i] = difference * difference;
  }
  out.error = fold_all(xc, work.vectors);
}

uint16_t encode_clipped(Work& work) {
  const float widest = abs_max(work.x, work.vectors) / uniform_bias(4);
  Clipping tries[2];
  Clipping* best = &tries[0];
  Clipping* next = &tries[1];
  clip_at(work, widest * kClipFactors[0], *best);
  for (uint32_t f = 1; f < std::size(kClipFactors); ++f) {
    clip_at(work, widest * kClipFactors[f], *next);
    if (next->error < best->error) std::swap(best, next);
  }
  for (uint32_t i = 0; i < work.vectors; ++i) {
    put_codes(work.codes + i * kLanes, best->steps[i] + 8.0f);
  }
  return best->scale;
}

uint16_t rms_scale(const Work& work) {
  F8 squares[kVectorsMax] = {};
  for (uint32_t i = 0; i < work.vectors; ++i) squares[i] = work.x[i] * work.x[i];
  const float mean = fold_all(squares, work.vectors) / static_cast<float>(work.vectors * kLanes);
  return fp16_scale(kRmsFactor * std::sqrt(mean));
}

void encode_uniform(Work& work, uint32_t bits) {
  uint16_t scale = 0;
  if (bits == 4) {
    scale = encode_clipped(work);
  } else {
    scale = bits == 2 ? rms_scale(work)
                      : fp16_scale(abs_max(work.x, work.vectors) / uniform_bias(bits));
    const F8 inv = splat(inverse(fp16_to_float(scale)));
    const float half = static_cast<float>(1u << (bits - 1));
    for (uint32_t i = 0; i < work.vectors; ++i) {
      put_codes(work.codes + i * kLanes, uniform_step(work.x[i], inv, half) + half);
    }
  }
  std::memcpy(work.scales, &scale, sizeof(scale));
}

// Codes of e2m1_from_float, by counting the thresholds passed: ties go to the even code.
THINKV_LANE_INLINE U8 e2m1_codes(F8 x) {
  const F8 m = abs(x);
  const I8 passed = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                    (m >= 3.5f) + (m > 5.0f);
  return reinterpret_cast<U8>(-passed) | ((bits_of(x) >> 28) & 8u);
}

void encode_e2m1_group(Work& work, uint32_t group) {
  const F8* const x = work.x + 2 * group;
  const uint8_t scale_code = e4m3_from_float(abs_max(x, 2) / kE2m1Max);
  work.scales[group] = scale_code;
  const F8 inv = splat(inverse(e4m3_to_float(scale_code)));
  for (uint32_t half = 0; half < 2; ++half) {
    const U8 codes = e2m1_codes(x[half] * inv);
    uint8_t* const out = work.codes + group * kScaleGroup + half * kLanes;
    for (uint32_t i = 0; i < kLanes; ++i) out[i] = static_cast<uint8_t>(codes[i]);
  }
}

// Descending insertion sort: sixteen values, and the order of equal ones does not matter.
void sort_descending(float* v) {
  for (uint32_t i = 1; i < kScaleGroup; ++i) {
    const float value = v[i];
    uint32_t at = i;
    for (; at > 0 && v[at - 1] < value; --at) v[at] = v[at - 1];
    v[at] = value;
  }
}

uint8_t ternary_scale(const F8* x) {
  float sorted[kScaleGroup];
  store(sorted, abs(x[0]));
  store(sorted + kLanes, abs(x[1]));
  sort_descending(sorted);
  float sum = 0.0f, best_gain = 0.0f, best_scale = 0.0f;
  for (uint32_t i = 0; i < kScaleGroup; ++i) {
    sum += sorted[i];
    const float count = static_cast<float>(i + 1);
    const float gain = sum * sum / count;
    if (gain > best_gain) {
      best_gain = gain;
      best_scale = sum / count;
    }
  }
  return e4m3_from_float(best_scale);
}

void encode_ternary_group(Work& work, uint32_t group) {
  const F8* const x = work.x + 2 * group;
  work.scales[group] = ternary_scale(x);
  const float scale = e4m3_to_float(work.scales[group]);
  const float bound = scale == 0.0f ? 2.0f * kFiniteMax : scale * 0.5f;
  for (uint32_t half = 0; half < 2; ++half) {
    const I8 codes = kTernaryZero - (x[half] > bound) + (x[half] < -bound);
    uint8_t* const out = work.codes + group * kScaleGroup + half * kLanes;
    for (uint32_t i = 0; i < kLanes; ++i) out[i] = static_cast<uint8_t>(codes[i]);
  }
}

void code_vector(const float* input, uint32_t head_dim, VectorCoding coding, Work& work) {
  work.vectors = head_dim / kLanes;
  for (uint32_t i = 0; i < work.vectors; ++i) work.x[i] = finite(load(input + i * kLanes));
  if (coding.coding == Coding::kUniform) {
    encode_uniform(work, coding.bits);
    return;
  }
  for (uint32_t group = 0; group < head_dim / kScaleGroup; ++group) {
    if (coding.coding == Coding::kE2m1) {
      encode_e2m1_group(work, group);
    } else {
      encode_ternary_group(work, group);
    }
  }
}

template <uint32_t kBits>
void place_k(std::byte* page, const CodeSection& s, uint32_t slot, const uint8_t* codes) {
  constexpr uint32_t kPerByte = 8 / kBits;
  const uint32_t tile = slot / s.tile_slots, in_tile = slot % s.tile_slots;
  const uint32_t parts = s.word_bytes / 4, rows = s.tile_rows(tile);
  for (uint32_t block = 0; block < s.blocks(); ++block) {
    std::byte* const row =
        page + s.tile_offset(tile) + (block * rows + in_tile / 2) * 4 * s.word_bytes + in_tile % 2;
    for (uint32_t c = 0; c < 4; ++c) {
      for (uint32_t j = 0; j < parts; ++j) {
        const uint8_t* const from =
            codes + block * s.block_dims + 16 * kPerByte * (j / 2) + 8 * (j % 2) + 2 * c;
        uint32_t even = 0, odd = 0;
        for (uint32_t n = 0; n < kPerByte; ++n) {
          even |= static_cast<uint32_t>(from[16 * n]) << (kBits * n);
          odd |= static_cast<uint32_t>(from[16 * n + 1]) << (kBits * n);
        }
        row[c * s.word_bytes + 4 * j] = static_cast<std::byte>(even);
        row[c * s.word_bytes + 4 * j + 2] = static_cast<std::byte>(odd);
      }
    }
  }
}

template <uint32_t kBits>
void place_v(std::byte* page, const CodeSection& s, uint32_t slot, const uint8_t* codes) {
  constexpr uint32_t kPerByte = 8 / kBits;
  const uint32_t tile = slot / s.tile_slots, in_tile = slot % s.tile_slots;
  const uint32_t parts = s.word_bytes / 4, columns = s.tile_rows(tile);
  for (uint32_t block = 0; block < s.blocks(); ++block) {
    for (uint32_t g = 0; g < 8; ++g) {
      std::byte* const word = page + s.tile_offset(tile) +
                              ((block * 8 + g) * columns + in_tile / 4) * s.word_bytes +
                              in_tile % 4;
      for (uint32_t j = 0; j < parts; ++j) {
        const uint8_t* const from = codes + block * s.block_dims + 8 * kPerByte * j + g;
        uint32_t byte = 0;
        for (uint32_t n = 0; n < kPerByte; ++n) {
          byte |= static_cast<uint32_t>(from[8 * n]) << (kBits * n);
        }
        word[4 * j] = static_cast<std::byte>(byte);
      }
    }
  }
}

void round_halves(const float* x, uint32_t head_dim, Coding coding, uint16_t* out) {
  for (uint32_t d = 0; d < head_dim; d += kLanes) {
#if THINKV_HOST_AVX2
    const __m256 v = _mm256_loadu_ps(x + d);
    // The hardware keeps the payload of a NaN, which the rule does not: those go one by one.
    const bool numbers = _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_ORD_Q)) == 0xFF;
    if (coding == Coding::kHalf && numbers) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d),
                       _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
      continue;
    }
#endif
    for (uint32_t i = d; i < d + kLanes; ++i) {
      out[i] = coding == Coding::kHalf ? fp16_from_float(x[i]) : bf16_from_float(x[i]);
    }
  }
}

// 32 dims of a slot are 64 bytes of K together, and of V a pair's place in each of 8 rows.
template <bool kIsK>
void place_halves(std::byte* page, const CodeSection& s, uint32_t slot, const uint16_t* codes) {
  constexpr uint32_t kRowBytes = 16;
  const uint32_t tile = slot / s.tile_slots, in_tile = slot % s.tile_slots;
  const uint32_t rows = s.tile_rows(tile);
  std::byte* const words = page + s.tile_offset(tile);
  for (uint32_t block = 0; block < s.head_dim / 32; ++block) {
    std::byte* const at =
        kIsK ? words + (block * rows + in_tile) * 4 * kRowBytes
             : words + (block * 8 * rows + in_tile / 2) * kRowBytes + 2 * (in_tile % 2);
    for (uint32_t part = 0; part < 4; ++part) {
      for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t row = kIsK ? i / 2 * kRowBytes + 2 * (i % 2) : i * rows * kRowBytes;
        std::memcpy(at + row + 4 * part, &codes[block * 32 + part * 8 + i], sizeof(uint16_t));
      }
    }
  }
}

void put_vector(std::byte* page, const CodeSection& s, VectorCoding coding, uint32_t scale_offset,
                uint32_t slot, const float* x) {
  if (coding.bits == 16) {
    uint16_t halves[kDimMax];
    round_halves(x, s.head_dim, coding.coding, halves);
    return s.is_k ? place_halves<true>(page, s, slot, halves)
                  : place_halves<false>(page, s, slot, halves);
  }
  Work work;
  code_vector(x, s.head_dim, coding, work);
  const auto place = coding.bits == 8   ? (s.is_k ? place_k<8> : place_v<8>)
                     : coding.bits == 4 ? (s.is_k ? place_k<4> : place_v<4>)
                                        : (s.is_k ? place_k<2> : place_v<2>);
  place(page, s, slot, work.codes);
  const uint32_t scale_bytes = coding.scale_bytes(s.head_dim);
  std::memcpy(page + scale_offset + slot * scale_bytes, work.scales, scale_bytes);
}

}  // namespace

void encode(const EncodeParams& params) {
  THINKV_CHECK(head_dim_supported(params.head_dim) && params.format != Format::kNone);
  THINKV_CHECK(!is_block(params.format));
  const PageLayout& layout = page_layout(params.format, params.head_dim);
  const FormatInfo& info = format_info(params.format);
  for (size_t row = 0; row < params.slots.size(); ++row) {
    const uint32_t slot = params.slots[row];
    THINKV_CHECK(slot < layout.slots);
    const size_t at = row * params.head_dim;
    put_vector(params.page, layout.k, info.k, layout.k_scale_offset, slot, params.k + at);
    put_vector(params.page, layout.v, info.v, layout.v_scale_offset, slot, params.v + at);
    std::memcpy(params.page + layout.position_offset + slot * kPositionBytes,
                &params.positions[row], kPositionBytes);
  }
}

#include "kernels/host/isa_end.inc"
