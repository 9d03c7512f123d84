// page_image.h: pages of random codes in host memory, and what their slots hold.
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

using cuda::DevicePage;

// Random pages: random codes everywhere, sane scales in live slots, NaN patterns in all else.
class PageImage {
 public:
  PageImage(uint32_t head_dim, uint64_t seed) : head_dim_(head_dim), rng_(seed) {}

  // Result: the index of the new page.
  uint32_t add(Format format, uint64_t live) {
    const PageLayout& layout = page_layout(format, head_dim_);
    std::vector<uint8_t> page(page_bytes(head_dim_), 0xFF);
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      const bool alive = (live >> slot) & 1;
      for (const bool is_k : {true, false}) fill(page, layout, slot, is_k, alive);
    }
    bytes_.insert(bytes_.end(), page.begin(), page.end());
    return count_++;
  }

  // Codes, scale or values of one slot; NaN patterns where it is dead (codes cannot be NaN).
  void fill(std::vector<uint8_t>& page, const PageLayout& layout, uint32_t slot, bool is_k,
            bool alive) {
    const CodeSection& section = is_k ? layout.k : layout.v;
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const uint32_t mask = (1u << section.bits) - 1;
    for (uint32_t dim = 0; dim < head_dim_; ++dim) {
      const CodeSite site = section.site(slot, dim);
      if (section.bits == 16) {
        const uint16_t value = alive ? fp16_from_float(normal(rng_)) : uint16_t{0x7E01};
        std::memcpy(&page[site.byte], &value, 2);
        continue;
      }
      const uint32_t code = static_cast<uint32_t>(rng_()) & mask;
      page[site.byte] =
          static_cast<uint8_t>((page[site.byte] & ~(mask << site.shift)) | (code << site.shift));
    }
    if (section.bits == 16) return;
    const float unit = 1.0f / static_cast<float>(1u << (section.bits - 1));
    const uint16_t scale =
        alive ? fp16_from_float((0.5f + 0.5f * std::abs(normal(rng_))) * unit) : uint16_t{0x7E01};
    std::memcpy(&page[(is_k ? layout.k_scale_offset : layout.v_scale_offset) + 2 * slot], &scale,
                2);
  }

  // out: [head_dim]
  void decode(const DevicePage& d, uint32_t slot, bool is_k, std::vector<double>& out) const {
    const PageLayout& layout = page_layout(d.format, head_dim_);
    const CodeSection& section = is_k ? layout.k : layout.v;
    const uint8_t* page = &bytes_[size_t{d.page} * page_bytes(head_dim_)];
    for (uint32_t dim = 0; dim < head_dim_; ++dim) {
      const CodeSite site = section.site(slot, dim);
      if (section.bits == 16) {
        uint16_t value;
        std::memcpy(&value, page + site.byte, 2);
        out[dim] = fp16_to_float(value);
        continue;
      }
      uint16_t scale;
      std::memcpy(&scale, page + (is_k ? layout.k_scale_offset : layout.v_scale_offset) + 2 * slot,
                  2);
      const uint32_t mask = (1u << section.bits) - 1;
      const uint32_t code = (page[site.byte] >> site.shift) & mask;
      out[dim] = (code - 0.5 * mask) * fp16_to_float(scale);
    }
  }
  [[nodiscard]] const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  uint32_t head_dim_;
  std::mt19937_64 rng_;
  std::vector<uint8_t> bytes_;
  uint32_t count_ = 0;
};

}  // namespace thinkv::gputest
