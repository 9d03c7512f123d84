// rank_fixture.h: sequences under shipped or written rank policies, and brute-force attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "daemon/ops/policy_file.h"
#include "tests/support/sequence_fixture.h"

namespace thinkv::testing {

inline std::string policy_folder() {
  const char* root = std::getenv("THINKV_SOURCE_DIR");
  return std::string(root == nullptr ? "." : root) + "/config/policies";
}

// A policy as shipped; a budget of 0 is its own.
inline PolicyParams shipped_policy(const std::string& name, uint32_t budget = 0) {
  ops::Diagnostics problems(name);
  const auto policy = ops::load_policy(policy_folder() + "/" + name + ".yaml", &problems);
  EXPECT_TRUE(policy.has_value()) << problems.text();
  PolicyParams params = policy ? policy->params : PolicyParams{};
  if (budget != 0) params.budget_tokens = budget;
  return params;
}

// The policies that the rules of rank_rule.h make up.
inline const std::vector<std::string>& rank_policies() {
  static const std::vector<std::string> names = {
      "streaming-llm", "h2o",     "snapkv", "pyramidkv", "r-kv",    "random",
      "dbudgetkv",     "kvcrush", "uncomp", "diffkv",    "fastgen", "quantized-pruning",
      "kivi",          "xquant",  "think",  "thinkv"};
  return names;
}

// A sequence and the tokens that go into it. Rows of a layer: k, v [tokens, kv_heads, dim], q
// [tokens, q_heads, dim].
struct RankWorld {
  RankWorld(const ModelGeometry& g, const PolicyParams& p, uint64_t shuffle_seed = 0,
            const kernels::KernelSet& kernels = kernels::host())
      : geometry(g),
        pool({.head_dim = g.head_dim, .capacity = 16384, .shuffle_seed = shuffle_seed}),
        source(pool),
        tokens(g, 5),
        sequence(std::move(kernels::Sequence::create(source, kernels, g, p)).value()) {}

  // Every layer the same prompt; queries are given where there are any ([count, q_heads, dim]).
  void prefill(const std::vector<float>& k, const std::vector<float>& v,
               const std::vector<float>& q = {}) {
    const size_t row = size_t{geometry.kv_heads} * geometry.head_dim;
    const auto count = static_cast<uint32_t>(k.size() / row);
    const auto queries = static_cast<uint32_t>(q.size() / (geometry.head_dim * geometry.q_heads));
    for (uint32_t layer = 0; layer < geometry.layers; ++layer) {
      ASSERT_TRUE(sequence.prefill(layer, k.data(), v.data(), count).has_value());
      if (queries == 0) continue;
      ASSERT_TRUE(sequence.prefill_queries(layer, q.data(), queries).has_value());
    }
    ASSERT_TRUE(sequence.prefill_end().has_value());
  }
  // Random rows, of which every third key is looked at by all queries and the others hardly.
  void prefill_random(uint32_t count, uint32_t queries) {
    const size_t dim = geometry.head_dim;
    auto k = tokens.kv(count);
    const auto v = tokens.kv(count);
    auto q = tokens.rows(queries, geometry.q_heads);
    for (size_t i = 0; i < k.size() / dim; ++i) {
      k[i * dim] = i / geometry.kv_heads % 3 == 0 ? 3.0f : -3.0f;
    }
    for (size_t i = 0; i < q.size(); i += dim) q[i] = std::sqrt(static_cast<float>(dim));
    prefill(k, v, q);
  }
  void run(uint32_t steps) {
    std::vector<float> out;
    for (uint32_t i = 0; i < steps; ++i) {
      const Status done = step(sequence, tokens, &out);
      ASSERT_TRUE(done.has_value()) << done.error().what;
    }
  }
  [[nodiscard]] std::vector<uint32_t> positions(uint32_t lane = 0) const {
    std::vector<uint32_t> found;
    for (const auto& [position, token] : read_lane(sequence, lane)) found.push_back(position);
    return found;
  }
  [[nodiscard]] bool holds(uint32_t lane, uint32_t position) const {
    return read_lane(sequence, lane).count(position) != 0;
  }

  ModelGeometry geometry;
  VectorPool pool;
  VectorPageSource source;
  TokenSource tokens;
  kernels::Sequence sequence;
};

// The mean over the query heads of the softmax of one kv head's tokens. q [group, dim] unrotated,
// keys decoded from pages of a policy without rotation.
inline std::map<uint32_t, double> attention_over(const std::map<uint32_t, StoredToken>& tokens,
                                                 const float* q, uint32_t group, uint32_t dim) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  std::map<uint32_t, double> mean;
  for (uint32_t head = 0; head < group; ++head) {
    std::map<uint32_t, double> weight;
    double sum = 0.0;
    for (const auto& [position, token] : tokens) {
      double dot = 0.0;
      for (uint32_t d = 0; d < dim; ++d) dot += double{q[head * dim + d]} * double{token.k[d]};
      sum += weight[position] = std::exp(dot * scale);
    }
    for (const auto& [position, w] : weight) mean[position] += w / sum / group;
  }
  return mean;
}

}  // namespace thinkv::testing
