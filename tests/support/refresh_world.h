// refresh_world.h: a batch on the emulated device, and planted attention for both sides: what it
// would report (scores, sparsity) is a function of row, lane, position and step, so that host and
// device see the same numbers bit for bit.
#pragma once

#include <array>
#include <bit>
#include <cstdlib>
#include <memory>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/sequence.h"
#include "kernels/sequence/scores.h"
#include "tests/support/device_pool.h"
#include "tests/support/sequence_fixture.h"

namespace thinkv::testing {

// ---- what attention would say ----

struct Planted {
  uint32_t step = 0;
  uint32_t row = 0;                    // whose attention runs
  uint32_t lane = 0;                   // of the next call on the host
  std::array<uint32_t, 32> percent{};  // near-zero entries, by row
  uint32_t granularity = 64;           // few: many scores are equal
  [[nodiscard]] float probability(uint32_t of_lane, uint32_t position) const {
    const uint32_t mixed =
        (position * 2654435761u) ^ ((of_lane + 64 * row) * 40503u) ^ (step * 97u);
    return static_cast<float>((mixed >> 7) % granularity) / 1024.0f;
  }
};
inline Planted planted;  // NOLINT: kernels are plain functions

inline uint32_t position_in_page(const std::byte* page, Format format, uint32_t head_dim,
                                 uint32_t slot) {
  uint32_t position = 0;
  std::memcpy(&position,
              page + page_layout(format, head_dim).position_offset + slot * kPositionBytes,
              sizeof position);
  return position;
}

inline void planted_attend(const kernels::AttendParams& p) {
  if (p.sparsity != nullptr) *p.sparsity = {100, planted.percent[planted.row]};
  for (size_t i = 0; i < p.pages.size() && p.probabilities != nullptr; ++i) {
    for (uint32_t s = 0; s < kSlotsPerPageMax; ++s) {
      if (((p.pages[i].live >> s) & 1u) == 0) continue;
      const uint32_t position =
          position_in_page(p.pages[i].bytes, p.pages[i].format, p.head_dim, s);
      p.probabilities[i * kSlotsPerPageMax + s] = planted.probability(planted.lane, position);
    }
  }
  ++planted.lane;
}
inline const kernels::KernelSet& planted_kernels() {
  static const kernels::KernelSet set = [] {
    kernels::KernelSet s = kernels::host();
    s.attend = planted_attend;
    return s;
  }();
  return set;
}

// ---- the device ----

// A batch of rows in a pool whose free pages are all in the lease.
class DeviceBatch {
 public:
  DeviceBatch(const ModelGeometry& g, uint32_t capacity, uint32_t pool_pages)
      : pool_({.geometry = g,
               .capacity = capacity,
               .extents = (pool_pages + kExtentPages - 1) / kExtentPages,
               .extent_pages = kExtentPages}),
        view(pool_.view()),
        lease(pool_.lease()),
        roots(&pool_.root(0)) {
    pool_.supply(static_cast<uint32_t>(pool_.total_pages()));
  }

  void open(uint32_t row, const PolicyParams& policy, uint32_t budget) {
    roots[row] = lease.pages[--lease.count];
    ASSERT_EQ(cuda::launch_open(view, roots[row], policy, budget, false, nullptr), 0);
    ASSERT_NE(sequence(row), nullptr);
  }
  [[nodiscard]] cuda::DeviceSequence* sequence(uint32_t row) const {
    return cuda::sequence_at(view, roots[row]);
  }
  [[nodiscard]] cuda::LaneView lane(uint32_t row, uint32_t index) const {
    return cuda::lane_view(view, sequence(row), index);
  }
  [[nodiscard]] std::vector<policy::Segment> segments(uint32_t row) const {
    std::vector<policy::Segment> all;
    for (uint32_t i = 0; i < sequence(row)->segments; ++i) {
      all.push_back(*cuda::segment_at(view, sequence(row), i));
    }
    return all;
  }

 private:
  static constexpr uint32_t kExtentPages = 100;
  DevicePool pool_;

 public:
  const cuda::BatchView view;
  cuda::Lease& lease;
  uint32_t* const roots;
};

// What attention leaves on the device: sparsity of every lane, and scores where they are due.
inline void plant_on_device(const DeviceBatch& batch, uint32_t row) {
  const ModelGeometry& g = batch.view.geometry;
  planted.row = row;
  for (uint32_t index = 0; index < g.lanes(); ++index) {
    const uint32_t layer = index / g.kv_heads, head = index % g.kv_heads;
    batch.view.sparsity[(layer * batch.view.capacity + row) * g.kv_heads + head] = {
        100, planted.percent[row]};
    const cuda::LaneView lane = batch.lane(row, index);
    if (lane.sequence->emitting == 0) continue;
    for (uint32_t i = 0; i < lane.lane->pages; ++i) {
      cuda::DeviceDescriptor* d = cuda::descriptor_at(lane, i);
      const auto* page = reinterpret_cast<std::byte*>(cuda::page_at(batch.view, d->page));
      for (uint64_t left = d->live; left != 0; left &= left - 1) {
        const auto slot = static_cast<uint32_t>(std::countr_zero(left));
        uint16_t& score = cuda::scores_of(lane, d, i)[slot];
        score = kernels::add_score(
            score, planted.probability(index, position_in_page(page, static_cast<Format>(d->format),
                                                               g.head_dim, slot)));
      }
    }
    for (uint32_t b = 0; b < lane.lane->buffer_count; ++b) {
      uint16_t& score = lane.lane->buffer_score[b];
      const uint32_t position = lane.sequence->tokens + 1 - lane.lane->buffer_count + b;
      score = kernels::add_score(score, planted.probability(index, position));
    }
  }
}

// ---- a page as both sides describe it ----

// Format, live mask and the positions of live slots.
using PageFacts = std::tuple<uint8_t, uint64_t, std::vector<uint32_t>>;

inline PageFacts page_facts(const std::byte* page, uint8_t format, uint64_t live,
                            uint32_t head_dim) {
  std::vector<uint32_t> positions;
  for (uint64_t left = live; left != 0; left &= left - 1) {
    positions.push_back(position_in_page(page, static_cast<Format>(format), head_dim,
                                         static_cast<uint32_t>(std::countr_zero(left))));
  }
  return {format, live, positions};
}
inline std::multiset<PageFacts> pages_of(const kernels::Sequence& sequence, uint32_t lane_index) {
  const kernels::SequenceState& state = *sequence.state();
  std::multiset<PageFacts> all;
  state.lane(lane_index).pages().for_each([&](uint32_t, const kernels::PageDescriptor& d) {
    all.insert(page_facts(state.pages.address(d.page), d.format, d.live, state.geometry.head_dim));
  });
  return all;
}
inline std::multiset<PageFacts> pages_of(const DeviceBatch& batch, uint32_t row,
                                         uint32_t lane_index) {
  const cuda::LaneView lane = batch.lane(row, lane_index);
  std::multiset<PageFacts> all;
  for (uint32_t i = 0; i < lane.lane->pages; ++i) {
    const cuda::DeviceDescriptor* d = cuda::descriptor_at(lane, i);
    all.insert(page_facts(reinterpret_cast<std::byte*>(cuda::page_at(batch.view, d->page)),
                          d->format, d->live, lane.head_dim));
  }
  return all;
}

}  // namespace thinkv::testing
