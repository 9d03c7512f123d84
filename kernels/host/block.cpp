// Encoding of block pages: the affine rule of kernels/codec_rule.h over vectors of eight, and keys
// of fewer channels.
#include <algorithm>
#include <cstring>

#include "kernels/codec_rule.h"
#include "kernels/host/host_set.h"
#include "kernels/host/vec.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/small_float.h"

#include "kernels/host/isa_begin.inc"

namespace {

constexpr uint32_t kDimMax = 256;

// Low ends and widths of groups, one of them in each lane or the same in all.
struct Ranges {
  F8 low;
  F8 width;
};

THINKV_LANE_INLINE float levels_of(uint32_t bits) {
  return static_cast<float>((1u << bits) - 1);
}

THINKV_LANE_INLINE F8 codes_of(F8 x, const Ranges& range, uint32_t bits) {
  const F8 levels = splat(levels_of(bits));
  const F8 inverse = select(range.width < splat(kRangeMin), splat(0.0f), levels / range.width);
  return floor(min((x - range.low) * inverse + 0.5f, levels + 0.5f));
}

uint16_t saturated_half(float x) {
  return fp16_from_float(std::min(std::max(x, -kFp16Max), kFp16Max));
}

void put_half(std::byte* at, uint16_t half) {
  std::memcpy(at, &half, sizeof(half));
}

void put_scale(std::byte* zero, std::byte* scale, float low, float width, uint32_t bits,
               float eta) {
  put_half(zero, saturated_half(low + eta * width));
  put_half(scale, saturated_half((1.0f - 2.0f * eta) * width / levels_of(bits)));
}

// Eight codes into the `bits` bytes that hold them.
THINKV_LANE_INLINE void put_codes(std::byte* at, F8 codes, uint32_t bits) {
  const I8 whole = truncate(codes);
  uint32_t word = 0;
  for (uint32_t i = 0; i < kLanes; ++i) word |= static_cast<uint32_t>(whole[i]) << (bits * i);
  std::memcpy(at, &word, bits);
}

// Of eight channels of K from `dim` on, over the tokens of the block.
Ranges channel_ranges(const BlockLayout& layout, const float* k, uint32_t dim) {
  F8 low = finite(load(k + dim)), high = low;
  for (uint32_t slot = 1; slot < layout.slots; ++slot) {
    const F8 x = finite(load(k + size_t{slot} * layout.head_dim + dim));
    low = min(low, x);
    high = max(high, x);
  }
  return {low, high - low + 0.0f};  // never -0
}

// Of one group of a token's V, in every lane.
Ranges run_range(const float* v, uint32_t values) {
  F8 low = finite(load(v)), high = low;
  for (uint32_t d = kLanes; d < values; d += kLanes) {
    low = min(low, finite(load(v + d)));
    high = max(high, finite(load(v + d)));
  }
  const float least = -largest(splat(0.0f) - low);
  return {splat(least), splat(largest(high) - least + 0.0f)};
}

// Scales of one layer's view, and its codes where `codes`.
void put_keys(std::byte* page, const BlockLayout& layout, const float* k, float eta, bool codes) {
  for (uint32_t dim = 0; dim < layout.head_dim; dim += kLanes) {
    const Ranges range = channel_ranges(layout, k, dim);
    for (uint32_t i = 0; i < kLanes; ++i) {
      put_scale(page + layout.k_zero_offset + 2 * (dim + i),
                page + layout.k_scale_offset + 2 * (dim + i), range.low[i], range.width[i],
                layout.bits, eta);
    }
    if (!codes) continue;
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      const F8 x = finite(load(k + size_t{slot} * layout.head_dim + dim));
      put_codes(page + layout.k_offset + slot * layout.k_row_bytes() + dim * layout.bits / 8,
                codes_of(x, range, layout.bits), layout.bits);
    }
  }
}

void put_values(std::byte* page, const BlockLayout& layout, const float* v, float eta, bool codes) {
  std::byte* scales = page + layout.v_scale_offset;
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    const float* const row = v + size_t{slot} * layout.head_dim;
    std::byte* const out = page + layout.v_offset + slot * layout.v_row_bytes();
    for (uint32_t first = 0; first < layout.head_dim; first += layout.v_group, scales += 4) {
      const Ranges range = run_range(row + first, layout.v_group);
      put_scale(scales, scales + 2, range.low[0], range.width[0], layout.bits, eta);
      if (!codes) continue;
      for (uint32_t d = first; d < first + layout.v_group; d += kLanes) {
        put_codes(out + d * layout.bits / 8, codes_of(finite(load(row + d)), range, layout.bits),
                  layout.bits);
      }
    }
  }
}

void put_think(const BlockParams& p, const BlockLayout& layout) {
  std::memcpy(p.page + layout.channel_offset, p.channels, layout.head_dim / 8);
  uint32_t channels[kDimMax], count = 0;
  for (uint32_t d = 0; d < layout.head_dim; ++d) {
    if (((p.channels[d / 64] >> (d % 64)) & 1u) != 0) channels[count++] = d;
  }
  THINKV_CHECK(count == layout.key_dims);
  const auto half_of = layout.format == Format::kThink ? fp16_from_float : bf16_from_float;
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    const size_t from = size_t{slot} * layout.head_dim;
    std::byte* const k = p.page + layout.k_offset + slot * layout.k_row_bytes();
    std::byte* const v = p.page + layout.v_offset + slot * layout.v_row_bytes();
    for (uint32_t i = 0; i < count; ++i) put_half(k + 2 * i, half_of(p.k[from + channels[i]]));
    for (uint32_t d = 0; d < layout.head_dim; ++d) put_half(v + 2 * d, half_of(p.v[from + d]));
  }
}

}  // namespace

void encode_block(const BlockParams& p) {
  THINKV_CHECK(head_dim_supported(p.head_dim) && is_block(p.format));
  const BlockLayout layout = block_layout(p.format, p.head_dim);
  std::memcpy(p.page + layout.position_offset, p.positions, size_t{layout.slots} * kPositionBytes);
  if (is_think(p.format)) return put_think(p, layout);
  put_keys(p.page, layout, p.k, p.eta, true);
  put_values(p.page, layout, p.v, p.eta, true);
  if (!is_pair(p.format)) return;
  const BlockLayout second = block_layout(second_of(p.format), p.head_dim);
  put_keys(p.page, second, p.second_k, p.eta, false);
  put_values(p.page, second, p.second_v, p.eta, false);
}

#include "kernels/host/isa_end.inc"
