// tier_bench.cuh: what a layer's choice and copy from a host tier cost, and that a graph of them
// finds what grew (sequence_gpu.cu).
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/cuda/tier.h"
#include "tests/gpu/sequence_bench.cuh"

namespace thinkv::gputest {

// `capacity` sequences whose tiers hold `tokens` tokens each, in one layer of 8 kv heads and 32
// query heads of 128 dims; tailorkv's 8 channels and 128 rows.
struct TierBench {
  static constexpr uint32_t kFetch = 128, kChannels = 8;
  ModelGeometry geometry{.layers = 1, .q_heads = 32, .kv_heads = 8, .head_dim = 128};
  cuda::BatchView view{};
  void* q = nullptr;
  std::vector<void*> pinned;
};

template <class T>
T* copied(const T& value) {
  T* const made = device_array<T>(1);
  THINKV_CHECK(cudaMemcpy(made, &value, sizeof value, cudaMemcpyDefault) == cudaSuccess);
  return made;
}

// Keys of chance, so that all rows differ; fp16 between 1 and 2 with both signs.
inline void* random_halves(uint64_t count) {
  std::vector<uint16_t> halves(count);
  uint64_t state = 88172645463325252ull;
  for (uint16_t& half : halves) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    half = static_cast<uint16_t>(0x3C00u | (state & 0x83FFu));
  }
  auto* const made = device_array<uint16_t>(count);
  THINKV_CHECK(cudaMemcpy(made, halves.data(), 2 * count, cudaMemcpyDefault) == cudaSuccess);
  return made;
}

inline cuda::TierSequence* bench_tier_of(TierBench& b, uint32_t tokens, const void* kv) {
  const ModelGeometry& g = b.geometry;
  void* rows = nullptr;
  THINKV_CHECK(cudaMallocHost(&rows, g.kv_heads * cuda::tier_row_bytes(g.head_dim, tokens)) ==
               cudaSuccess);
  b.pinned.push_back(rows);
  cuda::TierSequence tier{};
  tier.tokens = tokens;
  tier.fetch = TierBench::kFetch;
  tier.channels = TierBench::kChannels;
  tier.key_max = device_array<float>(uint64_t{g.kv_heads} * g.head_dim);
  tier.layers[0] = reinterpret_cast<uint64_t>(rows);
  THINKV_CHECK(cuda::launch_tier_put({.k = kv,
                                      .v = kv,
                                      .element = Element::kF16,
                                      .value_type = g.value_type,
                                      .kv_heads = g.kv_heads,
                                      .head_dim = g.head_dim,
                                      .first = 0,
                                      .count = tokens,
                                      .rotate = false,
                                      .rows = static_cast<unsigned char*>(rows),
                                      .key_max = tier.key_max},
                                     nullptr) == cudaSuccess);
  return copied(tier);
}

inline TierBench make_tier_bench(uint32_t capacity, uint32_t tokens) {
  TierBench b;
  const ModelGeometry& g = b.geometry;
  const uint32_t lanes = capacity * g.kv_heads, pages = TierBench::kFetch / 8;
  const void* kv = random_halves(uint64_t{tokens} * g.kv_heads * g.head_dim);
  b.q = random_halves(uint64_t{capacity} * g.q_heads * g.head_dim);
  std::vector<const cuda::TierSequence*> tiers;
  for (uint32_t i = 0; i < capacity; ++i) tiers.push_back(bench_tier_of(b, tokens, kv));
  auto* const on_device = device_array<const cuda::TierSequence*>(capacity);
  THINKV_CHECK(cudaMemcpy(on_device, tiers.data(), 8 * tiers.size(), cudaMemcpyDefault) ==
               cudaSuccess);
  b.view.geometry = g;
  b.view.capacity = capacity;
  b.view.lease = device_array<cuda::Lease>(1);
  b.view.tiers = on_device;
  b.view.working = copied(cuda::WorkingPages{
      device_array<unsigned char>(uint64_t{lanes} * pages * page_bytes(g.head_dim)), pages, 0});
  b.view.tier_memory = copied(cuda::TierMemory{
      device_array<uint32_t>(uint64_t{cuda::tier_regions(capacity, g.kv_heads)} * tokens),
      device_array<uint32_t>(uint64_t{lanes} * (1 + TierBench::kFetch)), tokens,
      TierBench::kFetch});
  return b;
}

// The rows that were chosen last.
inline std::vector<uint32_t> picks_of(const TierBench& b) {
  cuda::TierMemory memory;
  THINKV_CHECK(cudaMemcpy(&memory, b.view.tier_memory, sizeof memory, cudaMemcpyDefault) ==
               cudaSuccess);
  std::vector<uint32_t> picks(uint64_t{b.view.capacity} * b.geometry.kv_heads *
                              (1 + memory.picks_max));
  THINKV_CHECK(cudaMemcpy(picks.data(), memory.picks, 4 * picks.size(), cudaMemcpyDefault) ==
               cudaSuccess);
  return picks;
}

// Memory of its own for the same view, as when a sequence joins.
inline void move_tier_memory(const TierBench& b, uint32_t tokens) {
  const uint32_t lanes = b.view.capacity * b.geometry.kv_heads;
  const cuda::TierMemory memory{
      device_array<uint32_t>(uint64_t{cuda::tier_regions(b.view.capacity, b.geometry.kv_heads)} *
                             tokens),
      device_array<uint32_t>(uint64_t{lanes} * (1 + TierBench::kFetch)), tokens, TierBench::kFetch};
  THINKV_CHECK(cudaMemcpy(const_cast<cuda::TierMemory*>(b.view.tier_memory), &memory, sizeof memory,
                          cudaMemcpyDefault) == cudaSuccess);
}

// A graph of one layer, replayed with another query and after its memory moved, chooses what
// launches choose. Result: what is wrong, or nothing.
inline std::string check_tier_graph() {
  constexpr uint32_t kTokens = 3000;
  const TierBench b = make_tier_bench(2, kTokens);
  const cuda::TierQuery query{b.q, Element::kF16, 0, 0, 2 * b.geometry.kv_heads};
  const auto must = [](cudaError_t error) { THINKV_CHECK(error == cudaSuccess); };
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  must(cudaStreamCreate(&stream));
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  must(cuda::launch_tier_fetch(b.view, query, stream));
  must(cudaStreamEndCapture(stream, &graph));
  must(cudaGraphInstantiate(&exec, graph, 0));
  const auto replayed = [&] {
    must(cudaGraphLaunch(exec, stream));
    must(cudaStreamSynchronize(stream));
    return picks_of(b);
  };
  const std::vector<uint32_t> first = replayed();
  // Another query, of the first half of the heads: all its numbers are the same.
  must(cudaMemset(b.q, 0x3C, uint64_t{b.geometry.q_heads} * b.geometry.head_dim));
  const std::vector<uint32_t> second = replayed();
  move_tier_memory(b, 2 * kTokens);
  const std::vector<uint32_t> moved = replayed();
  must(cuda::launch_tier_fetch(b.view, query, stream));
  must(cudaStreamSynchronize(stream));
  const std::vector<uint32_t> launched = picks_of(b);
  if (first == second) return "another query chose the same rows";
  if (second != moved) return "what was moved was not found";
  return moved == launched ? "" : "a graph chose other rows than a launch";
}

// Medians of 20 launches of one layer.
inline void bench_tier(uint32_t capacity, uint32_t tokens) {
  TierBench b = make_tier_bench(capacity, tokens);
  const uint32_t lanes = capacity * b.geometry.kv_heads;
  const cuda::TierQuery query{b.q, Element::kF16, 0, 0, lanes};
  const auto ahead = [&](uint32_t sequence) {
    return cuda::launch_tier_choose(
        b.view, {b.q, Element::kF16, 0, sequence * b.geometry.kv_heads, b.geometry.kv_heads},
        nullptr);
  };
  const auto median = [](const std::function<cudaError_t()>& launch) {
    std::vector<double> times;
    for (uint32_t i = 0; i < 20; ++i) times.push_back(microseconds(nullptr, launch));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  const double both = median([&] { return cuda::launch_tier_fetch(b.view, query, nullptr); });
  for (uint32_t i = 0; i < capacity; ++i) THINKV_CHECK(ahead(i) == cudaSuccess);
  // Now that the rows are chosen ahead, only the copy is left.
  const double copy = median([&] { return cuda::launch_tier_fetch(b.view, query, nullptr); });
  cuda::Lease lease;
  THINKV_CHECK(cudaMemcpy(&lease, b.view.lease, sizeof lease, cudaMemcpyDefault) == cudaSuccess);
  const double choice = both - copy;
  const double keys = 2e-3 * TierBench::kChannels * tokens * lanes;
  const double rows = 4e-3 * TierBench::kFetch * b.geometry.head_dim * lanes;
  std::printf(
      "tailorkv, %u x 8 heads, %u tokens in the tier, one layer: %.1f us; choice %.1f us (%.1f "
      "GB/s), copy %.1f us (%.1f GB/s), faults %u\n",
      capacity, tokens, both, choice, keys / choice, copy, rows / copy, lease.faults);
  std::fflush(stdout);
  for (void* rows_of_one : b.pinned) THINKV_CHECK(cudaFreeHost(rows_of_one) == cudaSuccess);
}

}  // namespace thinkv::gputest
