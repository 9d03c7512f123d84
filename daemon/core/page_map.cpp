#include "daemon/core/page_map.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "thinkv/internal/check.h"

namespace thinkv::core {
namespace {

constexpr uint32_t kWordBits = 64;
constexpr uint32_t words_for(uint32_t bits) {
  return (bits + kWordBits - 1) / kWordBits;
}
constexpr uint64_t bit(uint32_t index) {
  return uint64_t{1} << (index % kWordBits);
}

// Sets the lowest `count` bits, word by word; the rest becomes zero.
void fill_low(std::vector<uint64_t>& words, uint32_t count) {
  for (uint32_t w = 0; w < words.size(); ++w) {
    const uint32_t left = count > w * kWordBits ? count - w * kWordBits : 0;
    words[w] = left >= kWordBits ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  }
}

// Which of 64 owners equal `owner`, as a bit mask. Four 16-bit lanes at a time: a lane of
// x = owners ^ pattern is zero exactly where (x & 7fff) + 7fff | x leaves its top bit clear; the
// multiplication moves the four flags (bits 0, 16, 32, 48) to bits 48..51.
uint64_t match(const PageMap::Owner* owners, PageMap::Owner owner) {
  constexpr uint64_t kLanes = 0x0001'0001'0001'0001u;
  constexpr uint64_t kLow = 0x7FFF * kLanes;
  constexpr uint64_t kGather = (uint64_t{1} << 48) | (uint64_t{1} << 33) | (1u << 18) | (1u << 3);
  uint64_t mask = 0;
  for (uint32_t i = 0; i < kWordBits; i += 4) {
    uint64_t four = 0;
    std::memcpy(&four, owners + i, sizeof(four));
    const uint64_t x = four ^ (owner * kLanes);
    const uint64_t zero_lanes = ~(((x & kLow) + kLow) | x | kLow);
    mask |= (((zero_lanes >> 15) * kGather >> 48) & 0xF) << i;
  }
  return mask;
}
static_assert(std::endian::native == std::endian::little);

}  // namespace

PageMap::PageMap(uint32_t capacity)
    : owners_(size_t{words_for(capacity)} * kWordBits, kFree),
      free_(words_for(capacity), 0),
      summary_(words_for(words_for(capacity)), 0),
      top_(words_for(words_for(words_for(capacity))), 0) {}

void PageMap::reset(uint32_t page_count) {
  THINKV_CHECK(granted_count() == 0);
  THINKV_CHECK(page_count <= owners_.size());
  page_count_ = page_count;
  mark_all_free();
}

void PageMap::mark_all_free() {
  free_count_ = page_count_;
  fill_low(free_, page_count_);
  fill_low(summary_, words_for(page_count_));
  fill_low(top_, words_for(words_for(page_count_)));
}

uint32_t PageMap::first_free_word() const {
  for (uint32_t t = 0; t < top_.size(); ++t) {
    if (top_[t] == 0) continue;
    const uint32_t s = t * kWordBits + static_cast<uint32_t>(std::countr_zero(top_[t]));
    return s * kWordBits + static_cast<uint32_t>(std::countr_zero(summary_[s]));
  }
  THINKV_CHECK(false && "free pages are counted but none is marked");
  return 0;
}

uint32_t PageMap::take(Owner owner, std::span<uint32_t> out) {
  THINKV_CHECK(owner != kFree);
  uint32_t taken = 0;
  while (taken < out.size() && free_count_ > 0) {
    const uint32_t w = first_free_word();
    uint64_t bits = free_[w];
    while (bits != 0 && taken < out.size()) {
      const uint32_t index = w * kWordBits + static_cast<uint32_t>(std::countr_zero(bits));
      bits &= bits - 1;
      THINKV_CHECK(owners_[index] == kFree);
      owners_[index] = owner;
      out[taken++] = index;
      --free_count_;
    }
    free_[w] = bits;
    if (bits != 0) continue;
    summary_[w / kWordBits] &= ~bit(w);
    if (summary_[w / kWordBits] == 0) {
      top_[w / (kWordBits * kWordBits)] &= ~bit(w / kWordBits);
    }
  }
  return taken;
}

void PageMap::mark_free(uint32_t word, uint64_t bits) {
  THINKV_CHECK((free_[word] & bits) == 0);
  free_[word] |= bits;
  summary_[word / kWordBits] |= bit(word);
  top_[word / (kWordBits * kWordBits)] |= bit(word / kWordBits);
  free_count_ += static_cast<uint32_t>(std::popcount(bits));
}

void PageMap::give_back(uint32_t index) {
  THINKV_CHECK(index < page_count_);
  THINKV_CHECK(owners_[index] != kFree);
  owners_[index] = kFree;
  mark_free(index / kWordBits, bit(index));
}

uint32_t PageMap::reclaim(Owner owner) {
  THINKV_CHECK(owner != kFree);
  const uint32_t before = free_count_;
  for (uint32_t w = 0; w < words_for(page_count_); ++w) {
    Owner* const owners = owners_.data() + size_t{w} * kWordBits;
    uint64_t mine = match(owners, owner);
    if (mine == 0) continue;
    mark_free(w, mine);
    if (mine == ~uint64_t{0}) {
      std::fill_n(owners, kWordBits, kFree);
      continue;
    }
    for (; mine != 0; mine &= mine - 1) owners[std::countr_zero(mine)] = kFree;
  }
  return free_count_ - before;
}

void PageMap::reclaim_all() {
  std::fill_n(owners_.begin(), page_count_, kFree);
  mark_all_free();
}

const char* PageMap::check_invariants() const {
  uint32_t free = 0;
  for (uint32_t i = 0; i < owners_.size(); ++i) {
    const bool marked = (free_[i / kWordBits] & bit(i)) != 0;
    if (i >= page_count_ && (marked || owners_[i] != kFree)) return "page beyond the extent's end";
    if (i < page_count_ && marked != (owners_[i] == kFree)) return "page both free and granted";
    free += marked ? 1 : 0;
  }
  if (free != free_count_) return "count of free pages";
  for (uint32_t w = 0; w < free_.size(); ++w) {
    const bool marked = (summary_[w / kWordBits] & bit(w)) != 0;
    if (marked != (free_[w] != 0)) return "summary of free pages";
  }
  for (uint32_t s = 0; s < summary_.size(); ++s) {
    const bool marked = (top_[s / kWordBits] & bit(s)) != 0;
    if (marked != (summary_[s] != 0)) return "top summary of free pages";
  }
  return nullptr;
}

}  // namespace thinkv::core
