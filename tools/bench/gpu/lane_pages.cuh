// lane_pages.cuh: what the lanes of a benchmark case hold: random valid pages and their masks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/cuda/attention.h"
#include "thinkv/internal/page_format.h"

// What Python gives; lengths and counts lie in host memory.
struct ThinkvBenchCase {
  uint32_t kv_heads, group, head_dim, batch;
  uint32_t formats;  // in each lane
  uint32_t copies;
  uint32_t emit;           // EmitFlags of attention.h, for every sequence
  float live;              // share of the slots
  const uint8_t* format;   // [formats]
  const uint32_t* counts;  // [batch, formats] tokens of each format in every lane of a sequence
  uint64_t seed;
};

namespace thinkv::bench {

// Where the parts of a page of one format lie.
struct FillLayout {
  uint32_t scales, v_scales, positions, used;
  uint8_t k_bits, v_bits;
  bool vector_scaled, group_scaled, bfloat;
};

__device__ inline uint32_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>(x ^ (x >> 31));
}

// The 16 bits at byte `at` of a page.
__device__ inline uint16_t fill_half(const FillLayout& f, uint32_t at, uint32_t random) {
  if (at < f.scales) {
    if (f.k_bits == 16) {
      const float value = static_cast<float>(random & 0xFFFF) * (3.4f / 65536.0f) - 1.7f;
      return f.bfloat ? __bfloat16_as_ushort(__float2bfloat16(value))
                      : __half_as_ushort(__float2half(value));
    }
    const uint32_t both = f.group_scaled && f.k_bits == 2 ? random & (random >> 1) & 0x5555 : 0;
    return static_cast<uint16_t>(random ^ both);  // ternary has no code 3
  }
  if (at < f.positions) {
    if (f.group_scaled) return static_cast<uint16_t>(0x2828 + (random & 0x0707));  // 0.25 .. 0.5
    const uint32_t bits = at < f.v_scales ? f.k_bits : f.v_bits;
    const float unit = 1.0f / static_cast<float>(1u << (bits - 1));
    const float share = 0.5f + static_cast<float>(random & 0xFF) / 256.0f;
    return __half_as_ushort(__float2half(unit * share));
  }
  return at < f.used ? 0 : 0xFFFF;  // positions; spare bytes are poison
}

static __global__ void fill_pages(uint16_t* pool, const uint8_t* formats, uint64_t pages_of_copy,
                                  uint32_t page_halves, const FillLayout* layouts, uint64_t seed) {
  const uint64_t page = blockIdx.x;
  const FillLayout layout = layouts[formats[page % pages_of_copy]];
  uint16_t* out = pool + page * page_halves;
  for (uint32_t i = threadIdx.x; i < page_halves; i += blockDim.x) {
    out[i] = fill_half(layout, 2 * i, mix(seed + page * page_halves + i));
  }
}

inline FillLayout fill_layout(Format format, uint32_t head_dim) {
  const PageLayout& layout = page_layout(format, head_dim);
  const FormatInfo& info = format_info(format);
  return {.scales = layout.k_scale_offset,
          .v_scales = layout.v_scale_offset,
          .positions = layout.position_offset,
          .used = layout.bytes_used,
          .k_bits = info.k.bits,
          .v_bits = info.v.bits,
          .vector_scaled = info.k.vector_scaled(),
          .group_scaled = info.k.group_scaled(),
          .bfloat = info.k.coding == Coding::kBfloat};
}

struct HostPage {
  uint64_t live;
  Format format;
};

// All lanes' pages in lane order.
struct HostLanes {
  std::vector<HostPage> pages;
  std::vector<uint32_t> begin{0};
  uint64_t live_bytes = 0, touched_bytes = 0;
};

inline uint64_t random_mask(uint64_t mask, float live, std::mt19937_64& rng) {
  if (live >= 1.0f) return mask;
  std::bernoulli_distribution alive(live);
  uint64_t out = 0;
  for (uint64_t left = mask; left != 0; left &= left - 1) {
    if (alive(rng)) out |= left & (~left + 1);
  }
  return out;
}

inline void add_lane(const ThinkvBenchCase& c, const uint32_t* counts, std::mt19937_64& rng,
                     HostLanes& lanes) {
  const size_t first = lanes.pages.size();
  for (uint32_t f = 0; f < c.formats; ++f) {
    const Format format = static_cast<Format>(c.format[f]);
    const PageLayout& layout = page_layout(format, c.head_dim);
    for (uint32_t left = counts[f]; left > 0;) {
      const uint32_t slots = std::min(layout.slots, left);
      const uint64_t full = slots == 64 ? ~uint64_t{0} : (uint64_t{1} << slots) - 1;
      const HostPage page{random_mask(full, c.live, rng), format};
      const auto live = static_cast<uint64_t>(std::popcount(page.live));
      lanes.live_bytes += live * layout.slot_payload_bytes();
      lanes.touched_bytes += live == 0 ? 0 : page_bytes(c.head_dim);
      lanes.pages.push_back(page);
      left -= slots;
    }
  }
  // Tokens come in any order; the list of a step is by format (sequence_list.cu).
  const auto begin = lanes.pages.begin() + static_cast<ptrdiff_t>(first);
  std::stable_sort(begin, lanes.pages.end(), [](const HostPage& a, const HostPage& b) {
    return cuda::list_rank(a.format) < cuda::list_rank(b.format);
  });
  lanes.begin.push_back(static_cast<uint32_t>(lanes.pages.size()));
}

inline HostLanes make_host(const ThinkvBenchCase& c, std::mt19937_64& rng) {
  HostLanes lanes;
  for (uint32_t b = 0; b < c.batch; ++b) {
    for (uint32_t h = 0; h < c.kv_heads; ++h) add_lane(c, c.counts + b * c.formats, rng, lanes);
  }
  return lanes;
}

}  // namespace thinkv::bench
