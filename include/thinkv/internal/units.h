// units.h: strong integers for what must not be mixed up.
//
// An index, a count and a byte size are different kinds of number; so are the ids of things.
// They convert to integers only by value(). (clang-tidy 14 takes the 0 inside a defaulted <=> for a
// null pointer; hence the NOLINTs.)
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace thinkv {

template <class Tag, class Int>
class Strong {
 public:
  using value_type = Int;
  constexpr Strong() = default;
  constexpr explicit Strong(Int value) : value_(value) {}
  [[nodiscard]] constexpr Int value() const { return value_; }
  friend constexpr auto operator<=>(Strong, Strong) = default;  // NOLINT(modernize-use-nullptr)

 private:
  Int value_ = 0;
};

using ClientId = Strong<struct ClientIdTag, uint64_t>;      // never reused within a boot
using SequenceId = Strong<struct SequenceIdTag, uint64_t>;  // never reused within a boot
using PoolIndex = Strong<struct PoolIndexTag, uint32_t>;    // place in the list of pools
using ExtentId = Strong<struct ExtentIdTag, uint32_t>;      // within one pool
using TenantId = Strong<struct TenantIdTag, uint32_t>;
using PolicyId = Strong<struct PolicyIdTag, uint32_t>;
using ModelId = Strong<struct ModelIdTag, uint32_t>;

// A page of the pool: extent in the high 12 bits, index inside the extent in the low 20.
// 4,096 extents of at most 1,048,576 pages; the all-ones value is "no page".
class PageId {
 public:
  static constexpr uint32_t kIndexBits = 20;
  static constexpr uint32_t kIndexMask = (1u << kIndexBits) - 1;
  constexpr PageId() = default;
  constexpr explicit PageId(uint32_t raw) : raw_(raw) {}
  constexpr PageId(ExtentId extent, uint32_t index)
      : raw_((extent.value() << kIndexBits) | (index & kIndexMask)) {}
  [[nodiscard]] constexpr uint32_t raw() const { return raw_; }
  [[nodiscard]] constexpr ExtentId extent() const { return ExtentId(raw_ >> kIndexBits); }
  [[nodiscard]] constexpr uint32_t index() const { return raw_ & kIndexMask; }
  [[nodiscard]] constexpr bool valid() const { return raw_ != kNoneRaw; }
  friend constexpr auto operator<=>(PageId, PageId) = default;  // NOLINT(modernize-use-nullptr)
  static constexpr uint32_t kNoneRaw = 0xFFFF'FFFFu;

 private:
  uint32_t raw_ = kNoneRaw;
};
inline constexpr PageId kNoPage{};

}  // namespace thinkv

template <class Tag, class Int>
struct std::hash<thinkv::Strong<Tag, Int>> {
  size_t operator()(thinkv::Strong<Tag, Int> id) const noexcept {
    return std::hash<Int>{}(id.value());
  }
};
template <>
struct std::hash<thinkv::PageId> {
  size_t operator()(thinkv::PageId id) const noexcept { return std::hash<uint32_t>{}(id.raw()); }
};
