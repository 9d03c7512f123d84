// kernels_lane.h: lanes of random tokens for the attention tests.
#pragma once

#include "unit/kernels_support.h"

#include <algorithm>
#include <numeric>

namespace thinkv::kernels {

// A lane: pages in order, with live masks.
struct Lane {
  uint32_t head_dim;
  std::vector<TestPage> pages;
  std::vector<Format> formats;
  std::vector<uint64_t> live;

  [[nodiscard]] std::vector<PageView> views() const {
    std::vector<PageView> out;
    for (size_t p = 0; p < pages.size(); ++p) {
      out.push_back({pages[p].bytes(), live[p], formats[p]});
    }
    return out;
  }
  [[nodiscard]] const PageLayout& layout(size_t p) const {
    return page_layout(formats[p], head_dim);
  }
};

struct LaneSpec {
  uint32_t head_dim = 64;
  uint32_t tokens = 0;
  std::vector<Format> formats = {Format::kK4V4};  // of the pages, in turn
  uint32_t live_percent = 100;
};

// `tokens` slots filled page after page, positions counting up; of them live_percent stay live.
inline Lane make_lane(Rng& rng, const LaneSpec& spec) {
  Lane lane{.head_dim = spec.head_dim, .pages = {}, .formats = {}, .live = {}};
  uint32_t next = 0;
  while (next < spec.tokens) {
    const Format format = spec.formats[lane.pages.size() % spec.formats.size()];
    const PageLayout& layout = page_layout(format, spec.head_dim);
    const uint32_t n = std::min(layout.slots, spec.tokens - next);
    std::vector<uint8_t> slots = all_slots(layout);
    slots.resize(n);
    std::vector<uint32_t> positions(n);
    std::iota(positions.begin(), positions.end(), next);
    const std::vector<float> k = gaussian(rng, n * spec.head_dim);
    const std::vector<float> v = gaussian(rng, n * spec.head_dim);
    TestPage& page = lane.pages.emplace_back(spec.head_dim);
    reference().encode({.page = page.bytes(),
                        .format = format,
                        .head_dim = spec.head_dim,
                        .slots = slots,
                        .k = k.data(),
                        .v = v.data(),
                        .positions = positions.data()});
    uint64_t live = 0;
    for (uint32_t i = 0; i < n; ++i) {
      if (below(rng, 100) < spec.live_percent) live |= uint64_t{1} << i;
    }
    lane.formats.push_back(format);
    lane.live.push_back(live);
    next += n;
  }
  return lane;
}

}  // namespace thinkv::kernels
