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
  // Block formats (block_format.h): a page is one block of tokens that are written together.
  kKivi4 = 10,
  kKivi2 = 11,
  kKivi1 = 12,
  kPair2 = 13,  // two layers on one page of codes: as the first of them sees it
  kPair2Second = 14,
  kPair1 = 15,
  kPair1Second = 16,
  kThink = 17,  // IEEE half, keys with 5/8 of their channels
  kThinkBf16 = 18,
};
inline constexpr uint32_t kFormatCount = 10;     // those whose slots stand alone, and kNone
inline constexpr uint32_t kAllFormatCount = 19;  // block formats too
inline constexpr uint32_t kScaleGroup = 16;      // values under one e4m3 scale

// kAffine: zero point + code * scale, both shared by a group of values of a block.
enum class Coding : uint8_t { kHalf, kBfloat, kUniform, kE2m1, kTernary, kAffine };

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

inline constexpr std::array<FormatInfo, kAllFormatCount> kFormats = {{
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
    {Format::kKivi4, "kivi4", {Coding::kAffine, 4}, {Coding::kAffine, 4}},
    {Format::kKivi2, "kivi2", {Coding::kAffine, 2}, {Coding::kAffine, 2}},
    {Format::kKivi1, "kivi1", {Coding::kAffine, 1}, {Coding::kAffine, 1}},
    {Format::kPair2, "pair2", {Coding::kAffine, 2}, {Coding::kAffine, 2}},
    {Format::kPair2Second, "pair2-second", {Coding::kAffine, 2}, {Coding::kAffine, 2}},
    {Format::kPair1, "pair1", {Coding::kAffine, 1}, {Coding::kAffine, 1}},
    {Format::kPair1Second, "pair1-second", {Coding::kAffine, 1}, {Coding::kAffine, 1}},
    {Format::kThink, "think", {Coding::kHalf, 16}, {Coding::kHalf, 16}},
    {Format::kThinkBf16, "think-bf16", {Coding::kBfloat, 16}, {Coding::kBfloat, 16}},
}};

// A format whose slots stand alone.
[[nodiscard]] constexpr bool format_valid(uint8_t raw) {
  return raw > 0 && raw < kFormatCount;
}
[[nodiscard]] constexpr bool is_block(Format format) {
  return static_cast<uint8_t>(format) >= kFormatCount &&
         static_cast<uint8_t>(format) < kAllFormatCount;
}
[[nodiscard]] constexpr bool is_think(Format format) {
  return format == Format::kThink || format == Format::kThinkBf16;
}
// Any that a page can have.
[[nodiscard]] constexpr bool page_format_valid(uint8_t raw) {
  return raw > 0 && raw < kAllFormatCount;
}
// The first layer's view of a page that two layers share. The second layer's lane owns the page.
[[nodiscard]] constexpr bool is_pair(Format format) {
  return format == Format::kPair2 || format == Format::kPair1;
}
[[nodiscard]] constexpr bool is_second(Format format) {
  return format == Format::kPair2Second || format == Format::kPair1Second;
}
[[nodiscard]] constexpr Format second_of(Format pair) {
  return static_cast<Format>(static_cast<uint8_t>(pair) + 1);
}
[[nodiscard]] constexpr Format first_of(Format second) {
  return static_cast<Format>(static_cast<uint8_t>(second) - 1);
}
// What a layer without a partner takes instead of a pair's format.
[[nodiscard]] constexpr Format single_of(Format format) {
  if (format == Format::kPair2) return Format::kKivi2;
  return format == Format::kPair1 ? Format::kKivi1 : format;
}
// What a rule can recode to; the others follow from these.
[[nodiscard]] constexpr bool recode_format_valid(uint8_t raw) {
  const auto format = static_cast<Format>(raw);
  return format_valid(raw) || (format >= Format::kKivi4 && format <= Format::kPair2) ||
         format == Format::kPair1 || format == Format::kThink;
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
  for (uint32_t i = 0; i < kAllFormatCount; ++i) {
    if (kFormats[i].format != static_cast<Format>(i)) return false;
  }
  return true;
}
static_assert(formats_indexed_by_value());

}  // namespace thinkv
