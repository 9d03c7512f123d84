// page_image.h: pages of random codes in host memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/attention.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::gputest {

// A page in an image, wherever that is copied to.
struct ImagePage {
  uint64_t live = 0;
  uint64_t index = 0;
  Format format = Format::kNone;
  [[nodiscard]] cuda::PageView view(const void* image, uint32_t head_dim) const {
    const uint64_t address = reinterpret_cast<uint64_t>(image) + index * page_bytes(head_dim);
    return {live, address | static_cast<uint64_t>(format)};
  }
};

// Random pages: random codes everywhere, sane scales in live slots, NaN patterns in all else. Of a
// block all slots were written, and only what lies behind its positions is NaN.
class PageImage {
 public:
  PageImage(uint32_t head_dim, uint64_t seed) : head_dim_(head_dim), rng_(seed) {}

  // positions: of the page's slots, from `position` on.
  ImagePage add(Format format, uint64_t live, uint32_t position) {
    if (is_block(format)) return add_block(format, live, position);
    const PageLayout& layout = page_layout(format, head_dim_);
    std::vector<uint8_t> page(page_bytes(head_dim_), 0xFF);
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      const bool alive = ((live >> slot) & 1) != 0;
      for (const bool is_k : {true, false}) {
        fill_codes(page, is_k ? layout.k : layout.v, slot, alive, format);
        fill_scales(page, layout, slot, is_k, alive);
      }
      const uint32_t at = position + slot;
      if (alive) std::memcpy(&page[layout.position_offset + slot * kPositionBytes], &at, 4);
    }
    bytes_.insert(bytes_.end(), page.begin(), page.end());
    return {live, count_++, format};
  }
  [[nodiscard]] const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  ImagePage add_block(Format format, uint64_t live, uint32_t position) {
    const BlockLayout layout = block_layout(format, head_dim_);
    std::vector<uint8_t> page(page_bytes(head_dim_), 0xFF);
    const auto put = [&](uint32_t at, uint16_t half) { std::memcpy(&page[at], &half, 2); };
    const auto value = [&](uint32_t at, float x) {
      put(at, format == Format::kThinkBf16 ? bf16_from_float(x) : fp16_from_float(x));
    };
    for (uint32_t at = 0; at < layout.position_offset; ++at) {
      page[at] = static_cast<uint8_t>(rng_());  // codes
    }
    if (is_think(format)) {
      for (uint32_t at = 0; at < layout.channel_offset; at += 2) value(at, normal_(rng_));
      fill_channels(&page[layout.channel_offset]);
    } else {
      fill_block_scales(page, layout);
    }
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      const uint32_t at = position + slot;
      std::memcpy(&page[layout.position_offset + slot * kPositionBytes], &at, 4);
    }
    bytes_.insert(bytes_.end(), page.begin(), page.end());
    return {live, count_++, format};
  }
  // think_channels(head_dim) bits of a mask.
  void fill_channels(uint8_t* mask) {
    std::memset(mask, 0, head_dim_ / 8);
    for (uint32_t left = think_channels(head_dim_); left > 0;) {
      const auto dim = static_cast<uint32_t>(rng_() % head_dim_);
      const auto bit = static_cast<uint8_t>(1u << dim % 8);
      if ((mask[dim / 8] & bit) != 0) continue;
      mask[dim / 8] = static_cast<uint8_t>(mask[dim / 8] | bit);
      --left;
    }
  }
  // Scales of one layer; those of the other layer of a pair stay random bits, NaN among them.
  void fill_block_scales(std::vector<uint8_t>& page, const BlockLayout& layout) {
    const float width = 3.0f / static_cast<float>((1u << layout.bits) - 1);
    const auto put = [&](uint32_t at, float x) {
      const uint16_t half = fp16_from_float(x);
      std::memcpy(&page[at], &half, 2);
    };
    for (uint32_t dim = 0; dim < head_dim_; ++dim) {
      put(layout.k_zero_offset + 2 * dim, -1.5f + normal_(rng_));
      put(layout.k_scale_offset + 2 * dim, width * (0.5f + std::abs(normal_(rng_))));
    }
    for (uint32_t i = 0; i < layout.slots * layout.v_groups(); ++i) {
      put(layout.v_scale_offset + 4 * i, -1.5f + 0.2f * normal_(rng_));
      put(layout.v_scale_offset + 4 * i + 2, width * (0.5f + std::abs(normal_(rng_))));
    }
  }

  void fill_codes(std::vector<uint8_t>& page, const CodeSection& section, uint32_t slot, bool alive,
                  Format format) {
    const uint32_t mask = (1u << section.bits) - 1;
    for (uint32_t dim = 0; dim < head_dim_; ++dim) {
      const CodeSite site = section.site(slot, dim);
      if (section.bits == 16) {
        const float x = normal_(rng_);
        const uint16_t value = !alive                    ? uint16_t{0x7FC1}  // NaN in both
                               : format == Format::kBf16 ? bf16_from_float(x)
                                                         : fp16_from_float(x);
        std::memcpy(&page[site.byte], &value, 2);
        continue;
      }
      uint32_t code = static_cast<uint32_t>(rng_()) & mask;
      if (format == Format::kTernary && alive) code %= 3;
      page[site.byte] =
          static_cast<uint8_t>((page[site.byte] & ~(mask << site.shift)) | (code << site.shift));
    }
  }
  void fill_scales(std::vector<uint8_t>& page, const PageLayout& layout, uint32_t slot, bool is_k,
                   bool alive) {
    const VectorCoding coding = is_k ? format_info(layout.format).k : format_info(layout.format).v;
    const uint32_t bytes = coding.scale_bytes(head_dim_);
    uint8_t* at = &page[(is_k ? layout.k_scale_offset : layout.v_scale_offset) + slot * bytes];
    const float unit = coding.coding == Coding::kE2m1      ? 0.4f
                       : coding.coding == Coding::kTernary ? 1.2f
                                                           : std::ldexp(1.0f, 1 - coding.bits);
    const auto scale = [&] { return (0.5f + 0.5f * std::abs(normal_(rng_))) * unit; };
    if (coding.vector_scaled()) {
      const uint16_t value = alive ? fp16_from_float(scale()) : uint16_t{0x7E01};
      std::memcpy(at, &value, 2);
    } else {
      for (uint32_t i = 0; i < bytes; ++i) at[i] = alive ? e4m3_from_float(scale()) : uint8_t{0x7F};
    }
  }

  uint32_t head_dim_;
  std::mt19937_64 rng_;
  std::normal_distribution<float> normal_{0.0f, 1.0f};
  std::vector<uint8_t> bytes_;
  uint64_t count_ = 0;
};

}  // namespace thinkv::gputest
