// The oracle of the block formats: the affine rule of kernels/codec_rule.h one group at a time, and
// keys of fewer channels.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "thinkv/internal/check.h"
#include "thinkv/internal/small_float.h"

#include "kernels/codec_rule.h"
#include "kernels/reference/reference.h"

namespace thinkv::kernels::ref {
namespace {

struct Range {
  float low;
  float width;
};

Range range_of(const std::vector<float>& group) {
  const auto [low, high] = std::minmax_element(group.begin(), group.end());
  return {*low, *high - *low + 0.0f};  // never -0
}

uint16_t saturated_half(float x) {
  return fp16_from_float(std::clamp(x, -kFp16Max, kFp16Max));
}

void put_half(std::byte* at, uint16_t half) {
  std::memcpy(at, &half, sizeof(half));
}
uint16_t get_half(const std::byte* at) {
  uint16_t half = 0;
  std::memcpy(&half, at, sizeof(half));
  return half;
}

void put_scale(std::byte* zero, std::byte* scale, Range range, uint32_t bits, float eta) {
  const float levels = static_cast<float>((1u << bits) - 1);
  put_half(zero, saturated_half(range.low + eta * range.width));
  put_half(scale, saturated_half((1.0f - 2.0f * eta) * range.width / levels));
}

uint32_t code_of(float x, Range range, uint32_t bits) {
  const float levels = static_cast<float>((1u << bits) - 1);
  const float inverse = range.width < kRangeMin ? 0.0f : levels / range.width;
  return static_cast<uint32_t>(std::min(std::floor((x - range.low) * inverse + 0.5f), levels));
}

void put_code(std::byte* row, uint32_t index, uint32_t bits, uint32_t code) {
  std::byte& byte = row[index * bits / 8];
  byte |= static_cast<std::byte>(code << (index * bits % 8));
}
uint32_t get_code(const std::byte* row, uint32_t index, uint32_t bits) {
  const auto byte = std::to_integer<uint32_t>(row[index * bits / 8]);
  return (byte >> (index * bits % 8)) & ((1u << bits) - 1);
}

// The values of one channel of K over the block.
std::vector<float> channel_of(const BlockLayout& layout, const float* k, uint32_t dim) {
  std::vector<float> group(layout.slots);
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    group[slot] = finite_input(k[size_t{slot} * layout.head_dim + dim]);
  }
  return group;
}

// The values of group `index` of one token's V.
std::vector<float> run_of(const BlockLayout& layout, const float* v, uint32_t slot,
                          uint32_t index) {
  std::vector<float> group(layout.v_group);
  const float* const from = v + size_t{slot} * layout.head_dim + index * layout.v_group;
  std::transform(from, from + layout.v_group, group.begin(), finite_input);
  return group;
}

void put_scales(std::byte* page, const BlockLayout& layout, const float* k, const float* v,
                float eta) {
  for (uint32_t dim = 0; dim < layout.head_dim; ++dim) {
    put_scale(page + layout.k_zero_offset + 2 * dim, page + layout.k_scale_offset + 2 * dim,
              range_of(channel_of(layout, k, dim)), layout.bits, eta);
  }
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    for (uint32_t g = 0; g < layout.v_groups(); ++g) {
      std::byte* const at = page + layout.v_scale_offset + 4 * (slot * layout.v_groups() + g);
      put_scale(at, at + 2, range_of(run_of(layout, v, slot, g)), layout.bits, eta);
    }
  }
}

void put_codes(std::byte* page, const BlockLayout& layout, const float* k, const float* v) {
  std::memset(page + layout.k_offset, 0, size_t{layout.slots} * layout.k_row_bytes());
  std::memset(page + layout.v_offset, 0, size_t{layout.slots} * layout.v_row_bytes());
  for (uint32_t dim = 0; dim < layout.head_dim; ++dim) {
    const std::vector<float> group = channel_of(layout, k, dim);
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      put_code(page + layout.k_offset + slot * layout.k_row_bytes(), dim, layout.bits,
               code_of(group[slot], range_of(group), layout.bits));
    }
  }
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    for (uint32_t g = 0; g < layout.v_groups(); ++g) {
      const std::vector<float> group = run_of(layout, v, slot, g);
      for (uint32_t i = 0; i < layout.v_group; ++i) {
        put_code(page + layout.v_offset + slot * layout.v_row_bytes(), g * layout.v_group + i,
                 layout.bits, code_of(group[i], range_of(group), layout.bits));
      }
    }
  }
}

bool has_channel(const std::byte* mask, uint32_t dim) {
  return ((std::to_integer<uint32_t>(mask[dim / 8]) >> (dim % 8)) & 1u) != 0;
}

uint16_t half_of(float x, Format format) {
  return format == Format::kThink ? fp16_from_float(x) : bf16_from_float(x);
}
float value_of(uint16_t half, Format format) {
  return format == Format::kThink ? fp16_to_float(half) : bf16_to_float(half);
}

void put_think(const BlockParams& p, const BlockLayout& layout) {
  std::byte* const mask = p.page + layout.channel_offset;
  std::memcpy(mask, p.channels, layout.head_dim / 8);
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    uint32_t kept = 0;
    for (uint32_t dim = 0; dim < layout.head_dim; ++dim) {
      const size_t from = size_t{slot} * layout.head_dim + dim;
      put_half(p.page + layout.v_offset + slot * layout.v_row_bytes() + 2 * dim,
               half_of(p.v[from], layout.format));
      if (!has_channel(mask, dim)) continue;
      THINKV_CHECK(kept < layout.key_dims);
      put_half(p.page + layout.k_offset + slot * layout.k_row_bytes() + 2 * kept++,
               half_of(p.k[from], layout.format));
    }
  }
}

void get_think_row(const std::byte* page, const BlockLayout& layout, uint32_t slot, bool k_side,
                   float* out) {
  const std::byte* const row = page + (k_side ? layout.k_offset + slot * layout.k_row_bytes()
                                              : layout.v_offset + slot * layout.v_row_bytes());
  uint32_t kept = 0;
  for (uint32_t dim = 0; dim < layout.head_dim; ++dim) {
    const bool stored = !k_side || has_channel(page + layout.channel_offset, dim);
    THINKV_CHECK(!stored || kept < layout.head_dim);
    out[dim] = stored ? value_of(get_half(row + 2 * kept++), layout.format) : 0.0f;
  }
}

}  // namespace

void encode_block(const BlockParams& p) {
  THINKV_CHECK(head_dim_supported(p.head_dim) && is_block(p.format));
  const BlockLayout layout = block_layout(p.format, p.head_dim);
  std::memcpy(p.page + layout.position_offset, p.positions, size_t{layout.slots} * kPositionBytes);
  if (is_think(p.format)) return put_think(p, layout);
  put_codes(p.page, layout, p.k, p.v);
  put_scales(p.page, layout, p.k, p.v, p.eta);
  if (!is_pair(p.format)) return;
  const BlockLayout second = block_layout(second_of(p.format), p.head_dim);
  put_scales(p.page, second, p.second_k, p.second_v, p.eta);
}

void decode_block_row(const std::byte* page, const BlockLayout& layout, uint32_t slot, bool k_side,
                      float* out) {
  if (is_think(layout.format)) return get_think_row(page, layout, slot, k_side, out);
  const std::byte* const row = page + (k_side ? layout.k_offset + slot * layout.k_row_bytes()
                                              : layout.v_offset + slot * layout.v_row_bytes());
  for (uint32_t dim = 0; dim < layout.head_dim; ++dim) {
    const std::byte* zero = page + layout.k_zero_offset + 2 * dim;
    const std::byte* scale = page + layout.k_scale_offset + 2 * dim;
    if (!k_side) {
      zero = page + layout.v_scale_offset + 4 * (slot * layout.v_groups() + dim / layout.v_group);
      scale = zero + 2;
    }
    const auto code = static_cast<float>(get_code(row, dim, layout.bits));
    out[dim] = fp16_to_float(get_half(zero)) + code * fp16_to_float(get_half(scale));
  }
}

}  // namespace thinkv::kernels::ref
