// kernels_support.h: pages with known content for the kernel tests.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/host/host_set.h"
#include "kernels/kernels.h"
#include "thinkv/internal/page_format.h"

namespace thinkv::kernels {

using Rng = std::mt19937;

inline std::vector<float> gaussian(Rng& rng, size_t n, float sigma = 1.0f) {
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(n);
  for (float& value : values) value = normal(rng);
  return values;
}

inline uint32_t below(Rng& rng, uint32_t bound) {
  return std::uniform_int_distribution<uint32_t>(0, bound - 1)(rng);
}

// The sets under test beside the reference. One of them is host().
inline std::vector<const KernelSet*> fast_sets() {
  std::vector<const KernelSet*> sets = {&host_baseline_set()};
  if (host_avx2_set() != nullptr) sets.push_back(host_avx2_set());
  return sets;
}
inline std::vector<const KernelSet*> all_sets() {
  std::vector<const KernelSet*> sets = fast_sets();
  sets.insert(sets.begin(), &reference());
  return sets;
}

inline std::vector<const PageLayout*> all_layouts() {
  std::vector<const PageLayout*> layouts;
  for (const uint32_t head_dim : kHeadDims) {
    for (uint32_t f = 1; f < kFormatCount; ++f) {
      layouts.push_back(&page_layout(static_cast<Format>(f), head_dim));
    }
  }
  return layouts;
}

inline std::string describe(const PageLayout& layout) {
  return std::string(format_info(layout.format).name) + " " + std::to_string(layout.head_dim);
}

// An aligned page.
class TestPage {
 public:
  explicit TestPage(uint32_t head_dim, uint8_t fill = 0)
      : lines_((page_bytes(head_dim) + 63) / 64), size_(page_bytes(head_dim)) {
    std::memset(bytes(), fill, size_);
  }
  [[nodiscard]] std::byte* bytes() { return lines_[0].bytes; }
  [[nodiscard]] const std::byte* bytes() const { return lines_[0].bytes; }
  [[nodiscard]] uint32_t size() const { return size_; }
  [[nodiscard]] uint8_t at(uint32_t i) const { return std::to_integer<uint8_t>(bytes()[i]); }
  [[nodiscard]] bool same(const TestPage& other) const {
    return size_ == other.size_ && std::memcmp(bytes(), other.bytes(), size_) == 0;
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines_;
  uint32_t size_;
};

// All bytes that belong to one slot: codes, scales, position.
inline std::vector<uint32_t> slot_bytes(const PageLayout& layout, uint32_t slot) {
  std::vector<uint32_t> bytes;
  for (const CodeSection* section : {&layout.k, &layout.v}) {
    for (uint32_t dim = 0; dim < layout.head_dim; ++dim) {
      const CodeSite site = section->site(slot, dim);
      bytes.push_back(site.byte);
      if (section->bits == 16) bytes.push_back(site.byte + 1);
    }
  }
  const auto run = [&](uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) bytes.push_back(first + i);
  };
  const uint32_t k_scale = format_info(layout.format).k.scale_bytes(layout.head_dim);
  const uint32_t v_scale = format_info(layout.format).v.scale_bytes(layout.head_dim);
  run(layout.k_scale_offset + slot * k_scale, k_scale);
  run(layout.v_scale_offset + slot * v_scale, v_scale);
  run(layout.position_offset + slot * kPositionBytes, kPositionBytes);
  return bytes;
}

// Which slot a byte belongs to; -1: none.
inline std::vector<int> byte_owners(const PageLayout& layout) {
  std::vector<int> owner(page_bytes(layout.head_dim), -1);
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    for (const uint32_t byte : slot_bytes(layout, slot)) owner.at(byte) = static_cast<int>(slot);
  }
  return owner;
}

inline uint32_t read_code(const TestPage& page, const CodeSection& section, uint32_t slot,
                          uint32_t dim) {
  const CodeSite site = section.site(slot, dim);
  if (section.bits == 16) return page.at(site.byte) | (uint32_t{page.at(site.byte + 1)} << 8);
  return (uint32_t{page.at(site.byte)} >> site.shift) & ((1u << section.bits) - 1);
}

inline std::vector<uint8_t> all_slots(const PageLayout& layout) {
  std::vector<uint8_t> slots(layout.slots);
  for (uint32_t i = 0; i < layout.slots; ++i) slots[i] = static_cast<uint8_t>(i);
  return slots;
}

// Decoded values of one page by the reference.
struct Decoded {
  std::vector<float> k;
  std::vector<float> v;
};
inline Decoded decode_all(const KernelSet& set, const PageLayout& layout, const TestPage& page) {
  Decoded out;
  out.k.resize(size_t{layout.slots} * layout.head_dim);
  out.v.resize(out.k.size());
  const std::vector<uint8_t> slots = all_slots(layout);
  set.decode({.page = page.bytes(),
              .format = layout.format,
              .head_dim = layout.head_dim,
              .slots = slots,
              .k = out.k.data(),
              .v = out.v.data()});
  return out;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Rows that are hard for the codes: every one must give the same bytes in all sets.
inline std::vector<float> hard_row(Rng& rng, uint32_t d, uint32_t kind) {
  std::vector<float> x = gaussian(rng, d, std::ldexp(1.0f, static_cast<int>(below(rng, 40)) - 24));
  switch (kind) {
    case 0:
      break;
    case 1:
      x[below(rng, d)] *= 100.0f;
      break;
    case 2:
      std::fill(x.begin(), x.end(), 0.0f);
      break;
    case 3:
      for (float& e : x) e = std::round(e);
      break;  // ties
    case 4:
      for (float& e : x) e *= 1e-30f;
      break;  // scales underflow
    case 5:
      for (float& e : x) e *= 1e30f;
      break;  // scales saturate
    case 6:
      x[below(rng, d)] = std::nanf("1");
      break;
    case 7:
      x[below(rng, d)] = rng() % 2 ? std::numeric_limits<float>::infinity()
                                   : -std::numeric_limits<float>::infinity();
      break;
    case 8:
      std::fill(x.begin(), x.end(), std::nanf(""));
      break;
    case 9:
      std::fill(x.begin(), x.end(), x[0]);
      break;  // equal magnitudes
  }
  return x;
}

// Bit for bit; NaN by kind, because its payload is the machine's.
inline bool agree(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    if (std::isnan(x)) return std::isnan(y);
    return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y);
  });
}
inline bool all_finite(const std::vector<float>& x) {
  return std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); });
}

}  // namespace thinkv::kernels
