// refresh_twins.h: sequences that run on the host and on the emulated device at once, and what must
// be the same of both after every step.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "tests/support/refresh_world.h"

namespace thinkv::testing {

// Rows of a device batch, each with its host twin; a row without a policy has no sequence.
class Twins {
 public:
  using Rows = std::vector<std::optional<PolicyParams>>;

  Twins(const ModelGeometry& g, const Rows& rows, uint64_t seed)
      : batch(g, static_cast<uint32_t>(rows.size()), kPoolPages),
        pool_({.head_dim = g.head_dim, .capacity = kPoolPages}),
        tokens_(g, seed) {
    planted = {};
    planted.percent.fill(50);
    for (uint32_t row = 0; row < rows.size(); ++row) {
      sources_.push_back(std::make_unique<VectorPageSource>(pool_));
      hosts_.emplace_back();
      if (!rows[row]) continue;
      hosts_[row].emplace(std::move(
          kernels::Sequence::create(*sources_[row], planted_kernels(), g, *rows[row]).value()));
      batch.open(row, *rows[row], rows[row]->budget_tokens);
    }
  }
  // One sequence, in the second of three rows.
  Twins(const ModelGeometry& g, const PolicyParams& policy, uint64_t seed)
      : Twins(g, Rows{std::nullopt, policy, std::nullopt}, seed) {}

  [[nodiscard]] kernels::Sequence& host(uint32_t row = 1) { return *hosts_[row]; }
  [[nodiscard]] cuda::DeviceSequence& device(uint32_t row = 1) const {
    return *batch.sequence(row);
  }

  // Before the first step.
  void prefill(uint32_t row, uint32_t tokens) {
    for (uint32_t layer = 0; layer < batch.view.geometry.layers; ++layer) {
      const std::vector<float> k = tokens_.kv(tokens), v = tokens_.kv(tokens);
      ASSERT_TRUE(host(row).prefill(layer, k.data(), v.data(), tokens).has_value());
      ASSERT_EQ(cuda::launch_prefill(batch.view, batch.roots[row], layer, k.data(), v.data(),
                                     cuda::Element::kF32, tokens, nullptr),
                cudaSuccess);
    }
    ASSERT_TRUE(host(row).prefill_end().has_value());
    ASSERT_EQ(cuda::launch_prefill_end(batch.view, batch.roots[row], host(row).policy(), {tokens},
                                       nullptr),
              cudaSuccess);
  }

  void step() {
    const ModelGeometry& g = batch.view.geometry;
    ++planted.step;
    ASSERT_EQ(cuda::launch_begin(batch.view, nullptr), cudaSuccess);
    for (auto& host : hosts_) ASSERT_TRUE(!host || host->begin_step().has_value());
    const auto rows = static_cast<uint32_t>(hosts_.size());
    for (uint32_t layer = 0; layer < g.layers; ++layer) {
      const std::vector<float> k = tokens_.kv(rows), v = tokens_.kv(rows);
      for (uint32_t row = 0; row < rows; ++row) {
        if (hosts_[row]) run_layer(row, layer, k, v);
      }
      ASSERT_EQ(
          cuda::launch_append(batch.view, layer, k.data(), v.data(), cuda::Element::kF32, nullptr),
          cudaSuccess);
    }
    for (uint32_t row = 0; row < rows; ++row) {
      if (!hosts_[row]) continue;
      plant_on_device(batch, row);
      ASSERT_TRUE(hosts_[row]->end_step().has_value());
    }
    ASSERT_EQ(cuda::launch_end(batch.view, nullptr), cudaSuccess);
  }

  void expect_same() {
    uint64_t held = 0;
    for (uint32_t row = 0; row < hosts_.size(); ++row) {
      if (!hosts_[row]) continue;
      SCOPED_TRACE(::testing::Message() << "row " << row);
      expect_same_segments(row);
      expect_same_counters(row);
      expect_same_lanes(row);
      held += device(row).data_pages + device(row).metadata_pages;
    }
    ASSERT_EQ(batch.lease.faults, 0u);
    ASSERT_EQ(batch.lease.count + held, batch.lease.capacity) << "a page is held or free";
  }

  // Steps, and a comparison after each.
  void run(uint32_t steps) {
    for (uint32_t i = 0; i < steps && !::testing::Test::HasFatalFailure(); ++i) {
      SCOPED_TRACE(::testing::Message() << "step " << planted.step + 1);
      step();
      if (!::testing::Test::HasFatalFailure()) expect_same();
    }
  }

  void expect_same_segments(uint32_t row) {
    const kernels::SegmentTable table = host(row).state()->segments();
    const std::vector<policy::Segment> segments = batch.segments(row);
    ASSERT_EQ(segments.size(), table.size());
    for (uint32_t i = 0; i < table.size(); ++i) {
      const policy::Segment &mine = segments[i], &theirs = table[i];
      ASSERT_EQ(mine.start, theirs.start) << i;
      ASSERT_EQ(mine.end, theirs.end) << i;
      ASSERT_EQ(mine.label, theirs.label) << i;
      ASSERT_EQ(mine.level, theirs.level) << i;
      ASSERT_EQ(mine.merged, theirs.merged) << i;
    }
  }

  // Live counts and, where the host's buffer is not full, pages slot by slot: the device flushes a
  // full buffer one step earlier.
  void expect_same_lanes(uint32_t row) {
    const kernels::SequenceState& state = *host(row).state();
    for (uint32_t i = 0; i < state.geometry.lanes(); ++i) {
      const kernels::LaneHeader& header = state.lane(i).header();
      ASSERT_EQ(batch.lane(row, i).lane->live, header.live) << "lane " << i;
      if (header.buffer_count == kernels::kBufferTokens) continue;
      ASSERT_EQ(pages_of(batch, row, i), pages_of(host(row), i)) << "lane " << i;
    }
  }

  cuda::LaneView lane(uint32_t index, uint32_t row = 1) const { return batch.lane(row, index); }

  DeviceBatch batch;

 private:
  static constexpr uint32_t kPoolPages = 16384;

  void run_layer(uint32_t row, uint32_t layer, const std::vector<float>& k,
                 const std::vector<float>& v) {
    const ModelGeometry& g = batch.view.geometry;
    const size_t at = size_t{row} * g.kv_heads * g.head_dim;
    planted.row = row;
    planted.lane = layer * g.kv_heads;
    out_.resize(size_t{g.q_heads} * g.head_dim);
    query_.resize(out_.size(), 0.0f);
    ASSERT_TRUE(hosts_[row]->append(layer, k.data() + at, v.data() + at).has_value());
    ASSERT_TRUE(hosts_[row]->attend(layer, query_.data(), out_.data(), nullptr).has_value());
  }

  void expect_same_counters(uint32_t row) {
    const cuda::DeviceCounters& mine = device(row).counters;
    const kernels::SequenceCounters& theirs = host(row).state()->header->counters;
    ASSERT_EQ(device(row).tokens, host(row).tokens());
    ASSERT_EQ(device(row).generated_live, host(row).state()->generated_live());
    ASSERT_EQ(device(row).waiting, 0u);
    ASSERT_EQ(mine.steps, theirs.steps);
    ASSERT_EQ(mine.demotions, theirs.demotions);
    ASSERT_EQ(mine.merges, theirs.merges);
    ASSERT_EQ(mine.over_budget_steps, theirs.over_budget_steps);
    ASSERT_EQ(mine.refreshes, theirs.refreshes);
    ASSERT_EQ(mine.evicted_slots, theirs.evicted_slots);
    for (uint32_t i = 0; i < kThoughtCount; ++i) ASSERT_EQ(mine.segments[i], theirs.segments[i]);
  }

  VectorPool pool_;
  std::vector<std::unique_ptr<VectorPageSource>> sources_;
  std::vector<std::optional<kernels::Sequence>> hosts_;
  TokenSource tokens_;
  std::vector<float> query_, out_;
};

// Segments of `tau` tokens that step down by halves to `last`.
inline PolicyParams halving_policy(uint32_t tau, uint32_t last, uint32_t budget) {
  PolicyParams p = tbe_policy(budget);
  p.segment_tokens = tau;
  p.schedule_length = 0;
  for (uint32_t target = tau / 2; target >= last; target /= 2) {
    p.schedule[p.schedule_length++] = static_cast<uint16_t>(target);
  }
  return p;
}

inline void label_by_layers(PolicyParams& p, std::initializer_list<uint16_t> layers) {
  p.label_layer_count = 0;
  for (const uint16_t layer : layers) p.label_layers[p.label_layer_count++] = layer;
  p.thresholds[0] = 0.25f;
  p.thresholds[1] = 0.75f;
}

}  // namespace thinkv::testing
