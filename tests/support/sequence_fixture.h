// sequence_fixture.h: small geometries, policies and random tokens for tests of Sequence.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/sequence/sequence.h"
#include "kernels/sequence/sequence_state.h"
#include "tests/support/shapes.h"
#include "tests/support/vector_page_source.h"

namespace thinkv::testing {

struct GeometryShape {
  uint32_t layers = 1;
  uint32_t kv_heads = 1;
  uint32_t group = 1;
  uint32_t head_dim = 64;
};

inline ModelGeometry geometry_of(const GeometryShape& shape) {
  return {.layers = shape.layers,
          .q_heads = shape.kv_heads * shape.group,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim};
}

// Schedule 64, 32, 16, 8, 4 on segments of 128 (the paper's).
inline PolicyParams tbe_policy(uint32_t budget) {
  PolicyParams p = plain_policy(Format::kK4V4);
  p.evict = EvictRule::kTbe;
  p.schedule_length = 5;
  for (uint32_t i = 0; i < 5; ++i) p.schedule[i] = static_cast<uint16_t>(64u >> i);
  p.budget_tokens = budget;
  return p;
}

// Gaussian keys, values and queries for a whole step; the same seed gives the same tokens.
class TokenSource {
 public:
  TokenSource(const ModelGeometry& geometry, uint64_t seed) : geometry_(geometry), random_(seed) {}

  std::vector<float> rows(uint32_t tokens, uint32_t heads) {
    std::vector<float> x(size_t{tokens} * heads * geometry_.head_dim);
    for (float& value : x) value = normal_(random_);
    return x;
  }
  std::vector<float> kv(uint32_t tokens = 1) { return rows(tokens, geometry_.kv_heads); }
  std::vector<float> q() { return rows(1, geometry_.q_heads); }

 private:
  ModelGeometry geometry_;
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
};

// One token through every layer; attention where `out` is not null ([layers, q_heads, head_dim]).
inline Status step(kernels::Sequence& sequence, TokenSource& tokens,
                   std::vector<float>* out = nullptr) {
  THINKV_TRY(sequence.begin_step());
  const ModelGeometry& g = sequence.geometry();
  const size_t row = size_t{g.q_heads} * g.head_dim;
  if (out != nullptr) out->assign(g.layers * row, -1.0f);
  for (uint32_t layer = 0; layer < g.layers; ++layer) {
    const std::vector<float> k = tokens.kv(), v = tokens.kv();
    THINKV_TRY(sequence.append(layer, k.data(), v.data()));
    if (out == nullptr) continue;
    const std::vector<float> q = tokens.q();
    THINKV_TRY(sequence.attend(layer, q.data(), out->data() + layer * row, nullptr));
  }
  return sequence.end_step();
}

inline Status prefill(kernels::Sequence& sequence, TokenSource& tokens, uint32_t count) {
  for (uint32_t layer = 0; layer < sequence.geometry().layers; ++layer) {
    const std::vector<float> k = tokens.kv(count), v = tokens.kv(count);
    THINKV_TRY(sequence.prefill(layer, k.data(), v.data(), count));
  }
  return sequence.prefill_end();
}

// What a lane holds, read from its pages.
struct StoredToken {
  Format format;
  bool buffered;
  std::vector<float> k;  // decoded, rotated
  std::vector<float> v;
  friend bool operator==(const StoredToken&, const StoredToken&) = default;
};

inline StoredToken read_slot(const kernels::SequenceState& state, uint32_t raw, Format format,
                             uint32_t slot, bool buffered) {
  const uint32_t dim = state.geometry.head_dim;
  StoredToken token{format, buffered, std::vector<float>(dim), std::vector<float>(dim)};
  const auto index = static_cast<uint8_t>(slot);
  kernels::reference().decode({.page = state.pages.address(raw),
                               .format = format,
                               .head_dim = dim,
                               .slots = {&index, 1},
                               .k = token.k.data(),
                               .v = token.v.data()});
  return token;
}

// Every live token of a lane by position; a position that is there twice fails the test.
inline std::map<uint32_t, StoredToken> read_lane(const kernels::Sequence& sequence,
                                                 uint32_t lane_index) {
  const kernels::SequenceState& state = *sequence.state();
  const kernels::Lane lane = state.lane(lane_index);
  std::map<uint32_t, StoredToken> tokens;
  const auto put = [&](uint32_t position, StoredToken token) {
    EXPECT_TRUE(tokens.emplace(position, std::move(token)).second) << "twice: " << position;
  };
  lane.pages().for_each([&](uint32_t, const kernels::PageDescriptor& page) {
    for (uint32_t slot = 0; slot < kSlotsPerPageMax; ++slot) {
      if (((page.live >> slot) & 1u) == 0) continue;
      put(lane.position(page, slot),
          read_slot(state, page.page, static_cast<Format>(page.format), slot, false));
    }
  });
  const PageLayout& wide = page_layout(state.store.wide, state.geometry.head_dim);
  for (uint32_t i = 0; i < lane.header().buffer_count; ++i) {
    const uint32_t raw = lane.header().buffer_page[i / kernels::kBufferPageSlots];
    uint32_t position = 0;
    std::memcpy(&position,
                state.pages.address(raw) + wide.position_offset +
                    (i % kernels::kBufferPageSlots) * kPositionBytes,
                sizeof position);
    put(position, read_slot(state, raw, state.store.wide, i % kernels::kBufferPageSlots, true));
  }
  return tokens;
}

inline uint64_t buffer_pages(const kernels::LaneHeader& lane) {
  uint64_t pages = 0;
  for (const uint32_t page : lane.buffer_page) pages += page != PageId::kNoneRaw ? 1 : 0;
  return pages;
}

// The next layer's lane of the same head has the page of a pair too, with the same tokens live.
inline bool holds_second_view(const kernels::SequenceState& state, uint32_t lane_index,
                              const kernels::PageDescriptor& first) {
  bool found = false;
  const kernels::Lane partner = state.lane(lane_index + state.geometry.kv_heads);
  partner.pages().for_each([&](uint32_t, const kernels::PageDescriptor& page) {
    found =
        found || (page.page == first.page && page.live == first.live &&
                  static_cast<Format>(page.format) == second_of(static_cast<Format>(first.format)));
  });
  return found;
}

// What must hold between any two calls. `owned` collects page ids over sequences of one pool.
inline void check_invariants(const kernels::Sequence& sequence, std::set<uint32_t>& owned) {
  const kernels::SequenceState& state = *sequence.state();
  uint64_t data_pages = 0;
  for (uint32_t i = 0; i < state.lanes.size(); ++i) {
    const kernels::Lane lane = state.lane(i);
    const kernels::LaneHeader& header = lane.header();
    uint32_t free_slots[kFormatCount] = {};
    uint32_t live = header.buffer_count;
    uint32_t of_partner = 0;
    lane.pages().for_each([&](uint32_t, const kernels::PageDescriptor& page) {
      const uint32_t slots = lane.layout(page).slots;
      const auto in_page = static_cast<uint32_t>(std::popcount(page.live));
      if (is_pair(static_cast<Format>(page.format))) {
        EXPECT_TRUE(holds_second_view(state, i, page));
        ++of_partner;
      } else {
        EXPECT_TRUE(owned.insert(page.page).second) << "a page with two owners";
      }
      EXPECT_GT(in_page, 0u) << "an empty page was kept";
      EXPECT_LE(page.filled, slots);
      EXPECT_EQ(page.live & ~kernels::low_slots(page.filled), 0u);
      if (!is_block(static_cast<Format>(page.format))) {
        free_slots[page.format] += slots - in_page;
      }
      live += in_page;
    });
    uint64_t stream_pages = 0;
    if (auto* stream = kernels::stream_header(state.store, header); stream != nullptr) {
      const kernels::Stream blocks(state.store, *stream);
      EXPECT_TRUE(blocks.fits_together());
      live += blocks.blocks().size() * kernels::kBlockTokens;
      kernels::SharedVector<uint32_t>(stream->pages, *state.store.heap)
          .for_each([&](uint32_t, uint32_t page) {
            if (page == PageId::kNoneRaw) return;
            EXPECT_TRUE(owned.insert(page).second) << "a page with two owners";
            ++stream_pages;
          });
    }
    for (uint32_t f = 0; f < kFormatCount; ++f) EXPECT_EQ(header.free_slots[f], free_slots[f]);
    EXPECT_EQ(header.live, live);
    EXPECT_LE(header.live_prompt, header.live);
    for (const uint32_t page : header.buffer_page) {
      EXPECT_TRUE(page == PageId::kNoneRaw || owned.insert(page).second);
    }
    data_pages += lane.pages().size() - of_partner + buffer_pages(header) + stream_pages;
  }
  EXPECT_EQ(state.header->data_pages, data_pages);
}
inline void check_invariants(const kernels::Sequence& sequence) {
  std::set<uint32_t> owned;
  check_invariants(sequence, owned);
}

}  // namespace thinkv::testing
