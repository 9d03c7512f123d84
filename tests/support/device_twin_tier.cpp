// The steps of sequences with a tier on both sides: the rows that are chosen, the working pages
// that hold them, and attention over everything.
#include <algorithm>
#include <cmath>

#include "tests/support/device_twin.h"

namespace thinkv::testing {
namespace {

constexpr uint32_t kSlots = cuda::kBufferPageSlots;

// The bound of tests/gpu/attend_case.h where the kernel rounds q.
double attention_bound(const ModelGeometry& geometry, float wanted) {
  const double times = geometry.value_type == ValueType::kBf16 ? 6.0 : 2.0;
  return times * (1e-3 + 2.0 / 128 * std::abs(double{wanted}));
}

}  // namespace

void TwinBatch::put_into_tier(Twin& t, uint32_t layer, const ElementRows& k, const ElementRows& v,
                              uint32_t tokens) {
  const PolicyParams& policy = t.host->policy();
  if (!policy.tier.on()) return;
  if (!t.tier) t.tier = std::make_unique<DeviceTier>(options_.geometry, policy, tokens);
  run(t.tier->put(layer, k.device(), v.device(), options_.element));
}

cuda::TierQuery TwinBatch::query_of(const ElementRows& q, uint32_t layer, uint32_t first_lane,
                                    uint32_t lanes) const {
  return {.q = q.device(),
          .element = options_.element,
          .layer = layer,
          .first_lane = first_lane,
          .lanes = lanes};
}

// What the rows of the step are chosen by in a layer: of some sequences a guess, made ahead.
void TwinBatch::choose_ahead(uint32_t layer, ElementRows& chosen_by) {
  const ModelGeometry& g = options_.geometry;
  const uint64_t values = uint64_t{g.q_heads} * g.head_dim;
  for (uint32_t row = 0; row < options_.capacity; ++row) {
    Twin* t = twins_[row].get();
    if (t == nullptr || !t->host->policy().tier.on() || below(3) != 0) continue;
    ElementRows guess(options_.element, values);
    fill(guess, 0, values);
    THINKV_CHECK(t->host->prefetch(layer, guess.host.data()).has_value());
    run(cuda::launch_tier_choose(pool_.view(), query_of(guess, layer, row * g.kv_heads, g.kv_heads),
                                 nullptr));
    std::copy(guess.host.begin(), guess.host.end(), chosen_by.host.begin() + row * values);
    ++hints_;
  }
}

// One layer of a step: both sides attend with the same query.
void TwinBatch::attend_layer(uint32_t layer) {
  const ModelGeometry& g = options_.geometry;
  const uint64_t values = uint64_t{g.q_heads} * g.head_dim;
  ElementRows q(options_.element, options_.capacity * values);
  fill(q, 0, q.host.size());
  ElementRows chosen_by(cuda::Element::kF32, q.host.size());
  chosen_by.host = q.host;
  choose_ahead(layer, chosen_by);
  run(cuda::launch_tier_fetch(pool_.view(), query_of(q, layer, 0, pool_.rows()), nullptr));
  for (uint32_t row = 0; row < options_.capacity; ++row) {
    if (!twins_[row]) continue;
    for (uint32_t head = 0; head < g.kv_heads; ++head) {
      const uint64_t at = row * values + uint64_t{head} * g.group() * g.head_dim;
      check_fetched(*twins_[row], layer, row * g.kv_heads + head, chosen_by.host.data() + at);
    }
  }
  // Of numbers that are wild there is no bound that says something.
  if (!options_.wild) compare_attention(layer, q);
}

// The same rows as the host's, in pages that hold what the host's tier holds.
void TwinBatch::check_fetched(const Twin& t, uint32_t layer, uint32_t row, const float* query) {
  const ModelGeometry& g = options_.geometry;
  const kernels::SequenceState& state = t.state();
  const uint32_t head = row % g.kv_heads;
  if (state.tier.empty()) return;
  const kernels::TierLane& tier = state.tier[state.lane_index(layer, head)];
  if (tier.tokens() == 0) return;
  std::vector<float> rotated(query, query + size_t{g.group()} * g.head_dim);
  if (state.policy().rotate != 0) state.kernels.rotate(rotated.data(), g.group(), g.head_dim);
  kernels::TierScratch scratch;
  tier.choose(state.policy().tier, rotated.data(), g.group(), scratch);
  const std::vector<uint32_t>& wanted = scratch.rows;
  const cuda::BatchView view = pool_.view();
  const cuda::TierMemory& memory = *view.tier_memory;
  const uint64_t lane_of_all = uint64_t{layer} * pool_.rows() + row;
  const uint32_t* picks = memory.picks + lane_of_all * (1 + memory.picks_max) + 1;
  const std::string where = "layer " + std::to_string(layer) + " row " + std::to_string(row);
  if (!std::equal(wanted.begin(), wanted.end(), picks)) return expect(false, where + ": the rows");
  fetched_rows_ += wanted.size();
  std::vector<float> k(g.head_dim), v(g.head_dim);
  const uint32_t fetched = pool_.fetched(layer, row);
  expect(fetched == wanted.size(), where + ": tokens in working pages");
  for (uint32_t i = 0; i < fetched; ++i) {
    const unsigned char* page = pool_.working_page(row, i / kSlots);
    LaneToken token = decode_slot(page, state.store.wide, g.head_dim, i % kSlots);
    tier.read(wanted[i], k.data(), v.data());
    const LaneToken given{state.store.wide, false, 0, k, v};
    const uint32_t position = slot_position(page, state.store.wide, g.head_dim, i % kSlots);
    if (token == given && position == tier.first() + wanted[i]) continue;
    return expect(false, where + ": a fetched row");
  }
}

void TwinBatch::compare_attention(uint32_t layer, const ElementRows& q) {
  const ModelGeometry& g = options_.geometry;
  const cuda::BatchView view = pool_.view();
  const uint32_t lanes = pool_.rows();
  cuda::AttendShape shape = cuda::attend_shape(4, lanes, g.head_dim, false);
  const uint64_t values = uint64_t{g.q_heads} * g.head_dim;
  DeviceVector<float> out(options_.capacity * values);
  DeviceVector<float> parts(cuda::attend_part_floats(shape, lanes, g.group(), g.head_dim));
  const Twin* first = nullptr;
  for (const auto& t : twins_) first = first == nullptr ? t.get() : first;
  if (first == nullptr) return;
  cuda::AttendParams p{};
  p.pages = view.pages + uint64_t{layer} * view.pages_max;
  p.lane_begin = view.lane_begin + uint64_t{layer} * (lanes + 1);
  p.q = q.device();
  p.out = out.data();
  p.parts = parts.data();
  p.lanes = lanes;
  p.group = g.group();
  p.kv_heads = g.kv_heads;
  p.head_dim = g.head_dim;
  p.softmax_scale = softmax_scale_of(g);
  p.q_element = options_.element;
  p.out_element = cuda::Element::kF32;
  p.rotate = first->host->policy().rotate != 0;
  run(cuda::launch_attend(p, shape, nullptr));
  std::vector<float> wanted(values);
  for (uint32_t row = 0; row < options_.capacity; ++row) {
    if (!twins_[row]) continue;
    THINKV_CHECK(twins_[row]
                     ->host->attend(layer, q.host.data() + row * values, wanted.data(), nullptr)
                     .has_value());
    for (uint64_t i = 0; i < values; ++i) {
      const double error = std::abs(double{out[row * values + i]} - double{wanted[i]});
      if (error <= attention_bound(g, wanted[i])) continue;
      return expect(false, "attention of layer " + std::to_string(layer) + ", row " +
                               std::to_string(row) + ": " + std::to_string(error));
    }
  }
}

}  // namespace thinkv::testing
