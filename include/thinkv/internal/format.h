// format.h: the codings a page can hold, and what one slot costs in each.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace thinkv {

// One page holds slots of one format. Values are stored in page descriptors: never renumbered.
enum class Format : uint8_t {
  kNone = 0,
  kF16 = 1,   // IEEE half
  kBf16 = 2,  // bfloat16, same layout as kF16
  kK8V8 = 3,  // uniform codes, one fp16 scale a vector
  kK8V4 = 4,
  kK4V4 = 5,
  kK4V2 = 6,
  kK2V2 = 7,
  kNvfp4 = 8,    // e2m1 codes, one e4m3 scale per 16 values of the vector
  kTernary = 9,  // {-1, 0, 1} in 2 bits, one e4m3 scale per 16 values of the vector
};
inline constexpr uint32_t kFormatCount = 10;
inline constexpr uint32_t kScaleGroup = 16;  // values under one e4m3 scale

enum class Coding : uint8_t { kHalf, kBfloat, kUniform, kE2m1, kTernary };

// How one vector (a token's K or V of one kv head) is coded.
struct VectorCoding {
  Coding coding;
  uint8_t bits;  // a value, without scales
  [[nodiscard]] constexpr bool group_scaled() const {
    return coding == Coding::kE2m1 || coding == Coding::kTernary;
  }
  [[nodiscard]] constexpr bool vector_scaled() const { return coding == Coding::kUniform; }
  [[nodiscard]] constexpr uint32_t scale_bytes(uint32_t head_dim) const {
    return vector_scaled() ? 2 : group_scaled() ? head_dim / kScaleGroup : 0;
  }
};

struct FormatInfo {
  Format format;
  std::string_view name;
  VectorCoding k;
  VectorCoding v;
};

inline constexpr std::array<FormatInfo, kFormatCount> kFormats = {{
    {Format::kNone, "none", {Coding::kHalf, 16}, {Coding::kHalf, 16}},
    {Format::kF16, "f16", {Coding::kHalf, 16}, {Coding::kHalf, 16}},
    {Format::kBf16, "bf16", {Coding::kBfloat, 16}, {Coding::kBfloat, 16}},
    {Format::kK8V8, "k8v8", {Coding::kUniform, 8}, {Coding::kUniform, 8}},
    {Format::kK8V4, "k8v4", {Coding::kUniform, 8}, {Coding::kUniform, 4}},
    {Format::kK4V4, "k4v4", {Coding::kUniform, 4}, {Coding::kUniform, 4}},
    {Format::kK4V2, "k4v2", {Coding::kUniform, 4}, {Coding::kUniform, 2}},
    {Format::kK2V2, "k2v2", {Coding::kUniform, 2}, {Coding::kUniform, 2}},
    {Format::kNvfp4, "nvfp4", {Coding::kE2m1, 4}, {Coding::kE2m1, 4}},
    {Format::kTernary, "ternary", {Coding::kTernary, 2}, {Coding::kTernary, 2}},
}};

[[nodiscard]] constexpr bool format_valid(uint8_t raw) {
  return raw > 0 && raw < kFormatCount;
}
[[nodiscard]] constexpr const FormatInfo& format_info(Format format) {
  return kFormats[static_cast<size_t>(format)];
}
[[nodiscard]] constexpr bool is_16bit(Format format) {
  return format == Format::kF16 || format == Format::kBf16;
}
[[nodiscard]] constexpr std::optional<Format> format_from_name(std::string_view name) {
  for (const FormatInfo& info : kFormats) {
    if (info.format != Format::kNone && info.name == name) return info.format;
  }
  return std::nullopt;
}

consteval bool formats_indexed_by_value() {
  for (uint32_t i = 0; i < kFormatCount; ++i) {
    if (kFormats[i].format != static_cast<Format>(i)) return false;
  }
  return true;
}
static_assert(formats_indexed_by_value());

}  // namespace thinkv
