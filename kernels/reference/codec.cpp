// The oracle of all codecs: kernels/codec_rule.h written down plainly, one code at a time through
// CodeSection::site.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <span>

#include "thinkv/internal/check.h"
#include "thinkv/internal/small_float.h"

#include "kernels/codec_rule.h"
#include "kernels/reference/reference.h"

namespace thinkv::kernels::ref {
namespace {

constexpr uint32_t kDimMax = 256;

// One vector as it lies in a page, before it is placed.
struct CodedVector {
  std::array<uint16_t, kDimMax> codes{};
  std::array<uint8_t, kDimMax / kScaleGroup> scales{};  // fp16 (2 bytes) or e4m3 each
};

float inverse(float scale) {
  return scale == 0.0f ? 0.0f : 1.0f / scale;
}

float abs_max(std::span<const float> x) {
  float largest = 0.0f;
  for (const float value : x) largest = std::max(largest, std::fabs(value));
  return largest;
}

uint16_t uniform_code(float x, float inv, uint32_t bits) {
  const float half = static_cast<float>(1u << (bits - 1));
  const float step = std::clamp(std::floor(x * inv), -half, half - 1.0f);
  return static_cast<uint16_t>(step + half);
}

// The fold of codec_rule.h. Consumes `v`.
float fold(std::span<float> v) {
  for (size_t h = v.size() / 2; h >= 1; h /= 2) {
    for (size_t i = 0; i < h; ++i) v[i] += v[i + h];
  }
  return v[0];
}

uint16_t fp16_scale(float scale) {
  return fp16_from_float(std::min(scale, kFp16Max));
}

// Codes at one clipping factor and their least-squares scale.
struct Clipping {
  std::array<uint16_t, kDimMax> codes{};
  uint16_t scale = 0;
  float error = 0.0f;
};

Clipping clip_at(std::span<const float> x, uint32_t bits, float start) {
  Clipping clipping;
  const float start_scale = fp16_to_float(fp16_scale(start));
  const float inv = inverse(start_scale);
  std::array<float, kDimMax> c{}, xc{}, cc{};
  for (size_t i = 0; i < x.size(); ++i) {
    clipping.codes[i] = uniform_code(x[i], inv, bits);
    c[i] = static_cast<float>(clipping.codes[i]) - uniform_bias(bits);
    xc[i] = x[i] * c[i];
    cc[i] = c[i] * c[i];
  }
  const float refit = fold({xc.data(), x.size()}) / fold({cc.data(), x.size()});
  clipping.scale = start_scale == 0.0f ? uint16_t{0} : fp16_scale(refit);
  std::array<float, kDimMax> errors{};
  for (size_t i = 0; i < x.size(); ++i) {
    const float difference = x[i] - c[i] * fp16_to_float(clipping.scale);
    errors[i] = difference * difference;
  }
  clipping.error = fold({errors.data(), x.size()});
  return clipping;
}

Clipping best_clipping(std::span<const float> x, uint32_t bits) {
  const float widest = abs_max(x) / uniform_bias(bits);
  Clipping best = clip_at(x, bits, widest * kClipFactors[0]);
  for (const float factor : std::span(kClipFactors).subspan(1)) {
    const Clipping next = clip_at(x, bits, widest * factor);
    if (next.error < best.error) best = next;
  }
  return best;
}

float root_mean_square(std::span<const float> x) {
  std::array<float, kDimMax> squares{};
  for (size_t i = 0; i < x.size(); ++i) squares[i] = x[i] * x[i];
  return std::sqrt(fold({squares.data(), x.size()}) / static_cast<float>(x.size()));
}

void encode_uniform(std::span<const float> x, uint32_t bits, CodedVector& out) {
  uint16_t scale = 0;
  if (bits == 4) {
    const Clipping best = best_clipping(x, bits);
    out.codes = best.codes;
    scale = best.scale;
  } else {
    scale = bits == 2 ? fp16_scale(kRmsFactor * root_mean_square(x))
                      : fp16_scale(abs_max(x) / uniform_bias(bits));
    const float inv = inverse(fp16_to_float(scale));
    for (size_t i = 0; i < x.size(); ++i) out.codes[i] = uniform_code(x[i], inv, bits);
  }
  std::memcpy(out.scales.data(), &scale, sizeof(scale));
}

uint8_t ternary_scale(std::span<const float> x) {
  std::array<float, kScaleGroup> sorted{};
  for (uint32_t i = 0; i < kScaleGroup; ++i) sorted[i] = std::fabs(x[i]);
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  float sum = 0.0f;
  float best_gain = 0.0f;
  float best_scale = 0.0f;
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

uint16_t ternary_code(float x, float scale) {
  if (scale == 0.0f || std::fabs(x) <= scale * 0.5f) return kTernaryZero;
  return x > 0.0f ? kTernaryZero + 1 : kTernaryZero - 1;
}

void encode_groups(std::span<const float> x, Coding coding, CodedVector& out) {
  for (size_t first = 0; first < x.size(); first += kScaleGroup) {
    const std::span<const float> group = x.subspan(first, kScaleGroup);
    const uint8_t scale_code =
        coding == Coding::kE2m1 ? e4m3_from_float(abs_max(group) / kE2m1Max) : ternary_scale(group);
    out.scales[first / kScaleGroup] = scale_code;
    const float scale = e4m3_to_float(scale_code);
    const float inv = inverse(scale);
    for (uint32_t i = 0; i < kScaleGroup; ++i) {
      out.codes[first + i] =
          coding == Coding::kE2m1 ? e2m1_from_float(group[i] * inv) : ternary_code(group[i], scale);
    }
  }
}

CodedVector encode_vector(const float* input, uint32_t head_dim, VectorCoding coding) {
  CodedVector out;
  if (coding.bits == 16) {
    for (uint32_t i = 0; i < head_dim; ++i) {
      out.codes[i] =
          coding.coding == Coding::kHalf ? fp16_from_float(input[i]) : bf16_from_float(input[i]);
    }
    return out;
  }
  std::array<float, kDimMax> finite{};
  std::transform(input, input + head_dim, finite.begin(), finite_input);
  const std::span<const float> x(finite.data(), head_dim);
  if (coding.coding == Coding::kUniform) {
    encode_uniform(x, coding.bits, out);
  } else {
    encode_groups(x, coding.coding, out);
  }
  return out;
}

void put_code(std::byte* page, CodeSite site, uint32_t bits, uint16_t code) {
  if (bits == 16) {
    std::memcpy(page + site.byte, &code, sizeof(code));
    return;
  }
  const uint32_t mask = ((1u << bits) - 1) << site.shift;
  const uint32_t old = std::to_integer<uint32_t>(page[site.byte]);
  page[site.byte] = static_cast<std::byte>((old & ~mask) | (uint32_t{code} << site.shift));
}

uint16_t get_code(const std::byte* page, CodeSite site, uint32_t bits) {
  if (bits == 16) {
    uint16_t code = 0;
    std::memcpy(&code, page + site.byte, sizeof(code));
    return code;
  }
  const uint32_t byte = std::to_integer<uint32_t>(page[site.byte]);
  return static_cast<uint16_t>((byte >> site.shift) & ((1u << bits) - 1));
}

// One side of a page: where its codes and scales lie and what they mean.
struct Side {
  const CodeSection& section;
  VectorCoding coding;
  uint32_t scale_offset;
  [[nodiscard]] uint32_t scale_bytes() const { return coding.scale_bytes(section.head_dim); }
};

void put_vector(std::byte* page, const Side& side, uint32_t slot, const float* x) {
  const CodedVector coded = encode_vector(x, side.section.head_dim, side.coding);
  for (uint32_t dim = 0; dim < side.section.head_dim; ++dim) {
    put_code(page, side.section.site(slot, dim), side.coding.bits, coded.codes[dim]);
  }
  std::memcpy(page + side.scale_offset + slot * side.scale_bytes(), coded.scales.data(),
              side.scale_bytes());
}

float decode_value(uint16_t code, const std::byte* scales, uint32_t dim, VectorCoding coding) {
  if (coding.coding == Coding::kHalf) return fp16_to_float(code);
  if (coding.coding == Coding::kBfloat) return bf16_to_float(code);
  if (coding.coding == Coding::kUniform) {
    uint16_t scale = 0;
    std::memcpy(&scale, scales, sizeof(scale));
    return (static_cast<float>(code) - uniform_bias(coding.bits)) * fp16_to_float(scale);
  }
  const float scale = e4m3_to_float(std::to_integer<uint8_t>(scales[dim / kScaleGroup]));
  if (coding.coding == Coding::kE2m1) return e2m1_to_float(static_cast<uint8_t>(code)) * scale;
  return (static_cast<float>(code) - static_cast<float>(kTernaryZero)) * scale;
}

void get_vector(const std::byte* page, const Side& side, uint32_t slot, float* out) {
  const std::byte* const scales = page + side.scale_offset + slot * side.scale_bytes();
  for (uint32_t dim = 0; dim < side.section.head_dim; ++dim) {
    const uint16_t code = get_code(page, side.section.site(slot, dim), side.coding.bits);
    out[dim] = decode_value(code, scales, dim, side.coding);
  }
}

void decode_block(const DecodeParams& params) {
  const BlockLayout layout = block_layout(params.format, params.head_dim);
  for (size_t row = 0; row < params.slots.size(); ++row) {
    const uint32_t slot = params.slots[row];
    THINKV_CHECK(slot < layout.slots);
    const size_t at = row * params.head_dim;
    if (params.k != nullptr) decode_block_row(params.page, layout, slot, true, params.k + at);
    if (params.v != nullptr) decode_block_row(params.page, layout, slot, false, params.v + at);
  }
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
    put_vector(params.page, {layout.k, info.k, layout.k_scale_offset}, slot, params.k + at);
    put_vector(params.page, {layout.v, info.v, layout.v_scale_offset}, slot, params.v + at);
    std::memcpy(params.page + layout.position_offset + slot * kPositionBytes,
                &params.positions[row], kPositionBytes);
  }
}

void decode(const DecodeParams& params) {
  THINKV_CHECK(head_dim_supported(params.head_dim) && params.format != Format::kNone);
  if (is_block(params.format)) return decode_block(params);
  const PageLayout& layout = page_layout(params.format, params.head_dim);
  const FormatInfo& info = format_info(params.format);
  for (size_t row = 0; row < params.slots.size(); ++row) {
    const uint32_t slot = params.slots[row];
    THINKV_CHECK(slot < layout.slots);
    const size_t at = row * params.head_dim;
    if (params.k != nullptr) {
      get_vector(params.page, {layout.k, info.k, layout.k_scale_offset}, slot, params.k + at);
    }
    if (params.v != nullptr) {
      get_vector(params.page, {layout.v, info.v, layout.v_scale_offset}, slot, params.v + at);
    }
  }
}

}  // namespace thinkv::kernels::ref
