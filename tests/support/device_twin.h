// device_twin.h: the same sequence on the host (the oracle) and on the device, token for token.
//
// A TwinBatch drives a batch of sequences on both sides and compares them after every call. Before
// each call the lease holds exactly what the host-side bounds of sequence.h promise to be enough.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "kernels/policy/coded_tokens.h"
#include "kernels/sequence/sequence.h"
#include "kernels/sequence/sequence_state.h"
#include "tests/support/device_lanes.h"
#include "tests/support/device_pool.h"
#include "tests/support/device_tier.h"
#include "tests/support/shapes.h"
#include "tests/support/vector_page_source.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::testing {

// Rows of an engine's tensor, and the same numbers as the host takes them.
class ElementRows {
 public:
  ElementRows(cuda::Element element, uint64_t count)
      : element_(element), host(count), device_(count * cuda::element_bytes(element)) {}
  void set(uint64_t i, float value) {
    if (element_ == cuda::Element::kF32) {
      host[i] = value;
      std::memcpy(device_.data() + 4 * i, &value, 4);
      return;
    }
    const bool half = element_ == cuda::Element::kF16;
    const uint16_t raw = half ? fp16_from_float(value) : bf16_from_float(value);
    host[i] = half ? fp16_to_float(raw) : bf16_to_float(raw);
    std::memcpy(device_.data() + 2 * i, &raw, 2);
  }
  [[nodiscard]] const void* device() const { return device_.data(); }

 private:
  cuda::Element element_;

 public:
  std::vector<float> host;

 private:
  DeviceVector<unsigned char> device_;  // all ones where nothing was set: NaN
};

// One sequence on both sides.
struct Twin {
  Twin(VectorPool& host_pool, uint32_t device_root) : source(host_pool), root(device_root) {}
  VectorPageSource source;
  std::optional<kernels::Sequence> host;
  uint32_t root;
  uint32_t generated = 0;
  uint32_t settled_from = 0;  // of cuda::StepSequence
  uint32_t prompt_queries = 0;
  uint32_t classes_end = 0;  // positions below it have a place for their class
  // False once something was evicted or recoded while the host still held a full buffer, which the
  // device had flushed: tokens are the same, places are not.
  bool same_places = true;
  std::unique_ptr<DeviceTier> tier;  // of a policy with a tier, from the prompt on

  [[nodiscard]] const kernels::SequenceState& state() const { return *host->state(); }
  [[nodiscard]] bool host_flush_is_due() const {
    return state().lanes[0]->buffer_count == kernels::kBufferTokens;
  }
};

class TwinBatch {
 public:
  struct Options {
    ModelGeometry geometry;
    cuda::Element element = cuda::Element::kF32;
    uint32_t capacity = 1;
    uint32_t extent_pages = 512;
    uint64_t seed = 1;
    uint32_t rank_tokens = 0;   // of the longest lane that rank rules see
    uint32_t rank_dims = 0;     // of keys that they choose medoids by
    bool plant_scores = false;  // what attention would have added, on both sides
    bool wild = false;          // vectors of zeros, outliers, tiny and huge numbers, NaN
    uint32_t tier_rows = 0;     // as DevicePool's; not 0: every step attends, and is compared
    uint32_t tier_fetch = 0;
    bool streams = false;  // policies may have entropy
    bool attends = false;  // every sixteenth step attends too
  };
  explicit TwinBatch(const Options& o)
      : options_(o),
        pool_({.geometry = o.geometry,
               .capacity = o.capacity,
               .extents = 3,
               .extent_pages = o.extent_pages,
               .list_pages = 3 * o.extent_pages,
               .seed = o.seed,
               .rank_tokens = o.rank_tokens,
               .rank_dims = o.rank_dims,
               .tier_rows = o.tier_rows,
               .tier_fetch = o.tier_fetch,
               .streams = o.streams}),
        host_pool_({.head_dim = o.geometry.head_dim,
                    .capacity = 3 * o.extent_pages,
                    .shuffle_seed = o.seed | 1}),
        twins_(o.capacity),
        random_(o.seed) {}

  [[nodiscard]] Twin* twin(uint32_t row) const { return twins_[row].get(); }
  [[nodiscard]] DevicePool& pool() { return pool_; }
  [[nodiscard]] const std::string& wrong() const { return wrong_; }
  [[nodiscard]] const ModelGeometry& geometry() const { return options_.geometry; }

  void open(uint32_t row, const PolicyParams& policy, bool trace_sparsity = false) {
    auto& twin = twins_[row];
    twin = std::make_unique<Twin>(host_pool_, pool_.take());
    std::memset(pool_.address(twin->root), 0xFF, page_bytes(options_.geometry.head_dim));
    auto made = kernels::Sequence::create(twin->source, kernels::host(), options_.geometry, policy,
                                          {.trace_sparsity = trace_sparsity});
    THINKV_CHECK(made.has_value());
    twin->host.emplace(std::move(made).value());
    pool_.supply(cuda::open_pages(options_.geometry, policy));
    run(cuda::launch_open(pool_.view(), twin->root, policy, policy.budget_tokens, trace_sparsity,
                          nullptr));
    expect(pool_.lease().count == 0, "open_pages() is exact");
    pool_.root(row) = twin->root;
  }

  // Ends the prompt with as many of each layer's newest queries; 0: none are given.
  void prefill(uint32_t row, uint32_t tokens, uint32_t queries = 0) {
    Twin& t = *twins_[row];
    const ModelGeometry& g = options_.geometry;
    for (uint32_t layer = 0; layer < g.layers; ++layer) {
      ElementRows k(options_.element, uint64_t{tokens} * g.kv_heads * g.head_dim);
      ElementRows v(options_.element, k.host.size());
      fill(k, 0, k.host.size());
      fill(v, 0, v.host.size());
      THINKV_CHECK(t.host->prefill(layer, k.host.data(), v.host.data(), tokens).has_value());
      pool_.supply(cuda::prefill_pages(g, t.host->policy(), layer, tokens));
      if (t.host->policy().entropy.on()) {
        run(cuda::launch_code_prompt(pool_.view(), t.root, layer, k.device(), v.device(),
                                     options_.element, tokens, nullptr));
      }
      run(cuda::launch_prefill(pool_.view(), t.root, layer, k.device(), v.device(),
                               options_.element, tokens, nullptr));
      if (queries > 0) give_queries(t, layer, {.tokens = tokens, .queries = queries});
      put_into_tier(t, layer, k, v, tokens);
    }
    t.prompt_queries = queries;
    if (t.tier && t.tier->any()) pool_.tier(row) = &t.tier->sequence();
    THINKV_CHECK(t.host->prefill_end().has_value());
    const PolicyParams& policy = t.host->policy();
    const cuda::Prompt prompt{.tokens = tokens, .queries = queries};
    pool_.supply(cuda::prefill_end_pages(g, policy, policy.budget_tokens, prompt));
    run(cuda::launch_prefill_end(pool_.view(), t.root, policy, prompt, nullptr));
  }

  // Classes of the tokens from position `first` on.
  void classes(uint32_t row, uint32_t first, const std::vector<uint8_t>& bits) {
    Twin& t = *twins_[row];
    const ModelGeometry& g = options_.geometry;
    THINKV_CHECK(t.host->token_classes(first, bits).has_value());
    if (bits.empty() || !policy::reads_classes(t.host->policy())) return;
    const auto end = static_cast<uint32_t>(first + bits.size());
    DeviceVector<uint8_t> list(bits.size());
    std::copy(bits.begin(), bits.end(), list.data());
    const uint32_t held = cuda::class_pages(g, t.classes_end);
    t.classes_end = std::max(t.classes_end, end);
    pool_.supply(cuda::class_pages(g, t.classes_end) - held);
    run(cuda::launch_classes(pool_.view(), t.root, first, list.data(),
                             static_cast<uint32_t>(bits.size()), nullptr));
    expect(pool_.lease().count == 0, "class_pages() is exact");
  }

  // One token for every sequence.
  void step() {
    const ModelGeometry& g = options_.geometry;
    supply_step();
    for (auto& twin : twins_) {
      if (twin) THINKV_CHECK(twin->host->begin_step().has_value());
    }
    run(cuda::launch_begin(pool_.view(), nullptr));
    const uint64_t row_size = uint64_t{g.kv_heads} * g.head_dim;
    for (uint32_t layer = 0; layer < g.layers; ++layer) {
      ElementRows k(options_.element, options_.capacity * row_size);
      ElementRows v(options_.element, options_.capacity * row_size);
      for (uint32_t row = 0; row < options_.capacity; ++row) {
        if (!twins_[row]) continue;
        fill(k, row * row_size, row_size);
        fill(v, row * row_size, row_size);
        THINKV_CHECK(
            twins_[row]
                ->host
                ->append(layer, k.host.data() + row * row_size, v.host.data() + row * row_size)
                .has_value());
      }
      run(cuda::launch_append(pool_.view(), layer, k.device(), v.device(), options_.element,
                              nullptr));
      check_list(layer);
      if (options_.tier_rows != 0) attend_layer(layer);
      if (options_.streams) {
        run(cuda::launch_read_streams(pool_.view(), layer, nullptr));
        check_streams(layer);
      }
      if (options_.attends && steps_ % 16 == 0) attend(layer);
    }
    if (options_.plant_scores) plant_scores();
    for (auto& twin : twins_) {
      if (!twin) continue;
      THINKV_CHECK(twin->host->end_step().has_value());
      twin->generated += 1;
    }
    run(cuda::launch_end(pool_.view(), nullptr));
    check_progress();
  }

  void evict(uint32_t row, std::vector<uint32_t> positions) {
    Twin& t = *twins_[row];
    THINKV_CHECK(t.host->evict(positions).has_value());
    const uint32_t tokens = t.host->tokens();
    std::sort(positions.begin(), positions.end());
    std::erase_if(positions, [&](uint32_t p) { return p + kernels::kBufferTokens >= tokens; });
    t.same_places = t.same_places && !t.host_flush_is_due();
    if (positions.empty()) return;
    DeviceVector<uint32_t> list(positions.size());
    std::copy(positions.begin(), positions.end(), list.data());
    pool_.supply(0);
    run(cuda::launch_evict(pool_.view(), t.root, list.data(),
                           static_cast<uint32_t>(positions.size()), nullptr));
  }

  // All but the newest `keep`; on the host, which has no such call, an eviction of the others.
  void trim(uint32_t row, uint32_t keep) {
    Twin& t = *twins_[row];
    const uint32_t tokens = t.host->tokens();
    std::vector<uint32_t> old;
    for (uint32_t i = 0; i + keep < tokens; ++i) old.push_back(i);
    THINKV_CHECK(t.host->evict(old).has_value());
    t.same_places = t.same_places && !t.host_flush_is_due();
    pool_.supply(0);
    run(cuda::launch_trim(pool_.view(), t.root, keep, nullptr));
  }

  // Positions first .. end - 1. While the host's buffer waits for its flush, not those in it.
  void recode(uint32_t row, uint32_t first, uint32_t end, Format format) {
    Twin& t = *twins_[row];
    if (t.host_flush_is_due()) {
      end = std::min(end, t.host->tokens() - kernels::kBufferTokens);
      t.same_places = false;
    }
    if (first >= end) return;
    THINKV_CHECK(t.host->quantize(first, end - 1, format).has_value());
    t.settled_from = t.generated + 1;
    pool_.supply(std::min<uint32_t>(
        cuda::recode_pages(options_.geometry, t.host->policy(), lane_pages_max(t), format),
        static_cast<uint32_t>(pool_.free_pages())));
    run(cuda::launch_recode(pool_.view(), t.root, first, end, format, nullptr));
  }

  void close(uint32_t row) {
    pool_.supply(0);
    run(cuda::launch_close(pool_.view(), twins_[row]->root, nullptr));
    pool_.root(row) = PageId::kNoneRaw;
    pool_.tier(row) = nullptr;
    twins_[row].reset();
  }

  // A copy of the sequence on the device has its tokens, and no page of it; then it is closed.
  void copy(uint32_t row);

  // Everything that both sides have, compared.
  void compare();
  // Of streams, compared so far.
  [[nodiscard]] uint64_t raw_blocks() const { return raw_blocks_; }
  [[nodiscard]] uint64_t coded_blocks() const { return coded_blocks_; }

  // What the steps of sequences with a tier did, so that a test of nothing shows.
  [[nodiscard]] uint64_t fetched_rows() const { return fetched_rows_; }
  [[nodiscard]] uint64_t hints() const { return hints_; }

  [[nodiscard]] uint32_t below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }
  [[nodiscard]] std::mt19937_64& random() { return random_; }

 private:
  void run(cudaError_t error) {
    expect(error == cudaSuccess, "a launch failed");
    device_wait();
    expect(pool_.lease().faults == 0, "a fault was raised");
  }
  void expect(bool good, const std::string& what) {
    if (!good && wrong_.size() < 4000) wrong_ += what + "; ";
  }
  void fill(ElementRows& rows, uint64_t first, uint64_t count) {
    if (options_.wild) return fill_wild(rows, first, count);
    for (uint64_t i = first; i < first + count; ++i) rows.set(i, normal_(random_));
  }
  void give_queries(Twin& t, uint32_t layer, const cuda::Prompt& prompt);
  void fill_wild(ElementRows& rows, uint64_t first, uint64_t count);
  [[nodiscard]] uint32_t lane_pages_max(const Twin& t) const {
    const DeviceReader reader(pool_, t.root);
    uint32_t most = 0;
    for (uint32_t i = 0; i < options_.geometry.lanes(); ++i) {
      most = std::max(most, reader.lane(i).pages);
    }
    return most;
  }
  void supply_step() {
    uint32_t pages = 0;
    for (const auto& t : twins_) {
      if (!t) continue;
      const PolicyParams& policy = t->host->policy();
      pages += cuda::step_pages(options_.geometry, policy,
                                {.prompt = t->host->tokens() - t->generated,
                                 .generated = t->generated,
                                 .lane_pages_max = lane_pages_max(*t),
                                 .budget = policy.budget_tokens,
                                 .settled_from = t->settled_from,
                                 .prompt_queries = t->prompt_queries});
    }
    pool_.supply(pages);
  }
  void plant_scores();
  void plant_in_lane(const Twin& t, uint32_t lane, bool sums);
  void check_list(uint32_t layer);
  [[nodiscard]] static uint32_t stream_entries(const DeviceReader& reader, uint32_t lane);
  // Blocks in the list's pages, as the host decodes them.
  void check_streams(uint32_t layer);
  void compare_stream(const Twin& t, const DeviceReader& reader, uint32_t lane,
                      const std::string& where);
  // Attention over the layer, against the oracle on the pages that the list names.
  void attend(uint32_t layer);
  struct RowAnswer {
    std::vector<float> out;
    std::vector<float> lse;
  };
  [[nodiscard]] RowAnswer ask_oracle(uint32_t layer, uint32_t row, const float* q,
                                     bool rotate) const;
  void compare_answer(const RowAnswer& wanted, const float* out, const float* lse);
  void check_progress();
  void compare_lane(const Twin& t, const DeviceReader& reader, uint32_t lane);
  void compare_numbers(const Twin& t);
  void compare_rank_lane(const Twin& t, const DeviceReader& reader, uint32_t lane);
  void put_into_tier(Twin& t, uint32_t layer, const ElementRows& k, const ElementRows& v,
                     uint32_t tokens);
  [[nodiscard]] cuda::TierQuery query_of(const ElementRows& q, uint32_t layer, uint32_t first_lane,
                                         uint32_t lanes) const;
  void choose_ahead(uint32_t layer, ElementRows& chosen_by);
  void attend_layer(uint32_t layer);
  void check_fetched(const Twin& t, uint32_t layer, uint32_t row, const float* query);
  void compare_attention(uint32_t layer, const ElementRows& q);
  [[nodiscard]] LaneTokens host_tokens(const Twin& t, uint32_t lane) const;

  Options options_;
  DevicePool pool_;
  VectorPool host_pool_;
  std::vector<std::unique_ptr<Twin>> twins_;
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  std::string wrong_;
  uint32_t planted_ = 0;
  uint64_t steps_ = 0;
  uint64_t fetched_rows_ = 0;
  uint64_t hints_ = 0;
  uint64_t raw_blocks_ = 0, coded_blocks_ = 0;  // compared so far
};

}  // namespace thinkv::testing
