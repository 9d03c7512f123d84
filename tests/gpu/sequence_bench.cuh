// sequence_bench.cuh: what a step's kernels cost (sequence_gpu.cu).
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <optional>
#include <random>
#include <vector>

#include "kernels/cuda/due_rows.cuh"
#include "kernels/cuda/step.cuh"
#include "tests/support/device_pool.h"
#include "tests/support/rank_twin.h"
#include "tests/support/shapes.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::gputest {

using cuda::Element;
using testing::geometry_of;
using testing::plain_policy;

template <class T>
T* device_array(uint64_t count) {
  void* memory = nullptr;
  THINKV_CHECK(cudaMalloc(&memory, count * sizeof(T)) == cudaSuccess);
  THINKV_CHECK(cudaMemset(memory, 0, count * sizeof(T)) == cudaSuccess);
  return static_cast<T*>(memory);
}

// Sequences in device memory; `tokens` of prompt each.
struct Bench {
  cuda::BatchView view{};
  PolicyParams policy;
  std::vector<uint32_t> roots;
  void* k;
  cudaStream_t stream;
};

// The roots are the first pages of the pool; all others go to the lease in a random order.
inline void fill_lease(Bench& b, uint64_t pages, uint64_t extent_pages) {
  const uint32_t capacity = b.view.capacity;
  std::vector<uint32_t> ids(pages - capacity);
  for (uint64_t i = 0; i < ids.size(); ++i) {
    const uint64_t page = i + capacity;
    ids[i] = PageId(ExtentId(static_cast<uint32_t>(page / extent_pages)),
                    static_cast<uint32_t>(page % extent_pages))
                 .raw();
  }
  std::mt19937 random(1);
  std::shuffle(ids.begin(), ids.end(), random);
  uint32_t* on_device = device_array<uint32_t>(ids.size());
  THINKV_CHECK(cudaMemcpy(on_device, ids.data(), 4 * ids.size(), cudaMemcpyDefault) == cudaSuccess);
  THINKV_CHECK(cuda::launch_refill(b.view.lease, on_device, static_cast<uint32_t>(ids.size()),
                                   b.stream) == cudaSuccess);
  for (uint32_t i = 0; i < capacity; ++i) b.roots.push_back(PageId(ExtentId(0), i).raw());
  uint32_t* roots = device_array<uint32_t>(capacity);
  THINKV_CHECK(cudaMemcpy(roots, b.roots.data(), 4 * b.roots.size(), cudaMemcpyDefault) ==
               cudaSuccess);
  b.view.roots = roots;
}

inline PolicyParams bench_policy(bool scored) {
  PolicyParams policy = plain_policy(Format::kK4V4);
  if (scored) {
    policy.evict = EvictRule::kTbe;
    policy.select = SelectRule::kAttention;
    policy.schedule_length = 1;
    policy.schedule[0] = 64;
  }
  policy.segment_tokens = 1024;
  return policy;
}

// Room for lanes beyond a block, and for keys.
inline void make_rank_memory(Bench& b, const cuda::RankNeed& need) {
  uint32_t multiprocessors = 0;
  THINKV_CHECK(cuda::count_multiprocessors(multiprocessors) == cudaSuccess);
  const cuda::RankMemoryShape shape = cuda::rank_memory_shape(need, multiprocessors);
  const cuda::RankMemory memory{device_array<unsigned char>(shape.bytes), shape.room, shape.dims,
                                shape.blocks};
  auto* on_device = device_array<cuda::RankMemory>(1);
  THINKV_CHECK(cudaMemcpy(on_device, &memory, sizeof memory, cudaMemcpyDefault) == cudaSuccess);
  b.view.rank_memory = on_device;
}

// more_pages: of a sequence, beside its prompt's. page_tokens: at most, of a page in the lists.
inline Bench make_bench(const ModelGeometry& g, uint32_t capacity, uint32_t tokens,
                        const PolicyParams& policy, uint64_t more_pages,
                        uint32_t page_tokens = 16) {
  Bench b;
  b.policy = policy;
  const uint64_t rows = uint64_t{capacity} * g.kv_heads;
  const uint64_t each = 1 + cuda::open_pages(g, b.policy) +
                        uint64_t{g.layers} * cuda::prefill_pages(g, b.policy, 0, tokens) +
                        more_pages;
  const uint64_t pages = each * capacity;
  const uint64_t extent_pages = 1 << 18;
  const auto extents = static_cast<uint32_t>((pages + extent_pages - 1) / extent_pages);
  b.view.pool = {
      reinterpret_cast<uint64_t>(device_array<unsigned char>(pages * page_bytes(g.head_dim))),
      extent_pages * page_bytes(g.head_dim), extents};
  b.view.geometry = g;
  b.view.capacity = capacity;
  b.view.pages_max = static_cast<uint32_t>(rows * (tokens / page_tokens + 16));
  cuda::Lease lease{.capacity = static_cast<uint32_t>(pages),
                    .pages = device_array<uint32_t>(pages)};
  b.view.lease = device_array<cuda::Lease>(1);
  THINKV_CHECK(cudaMemcpy(b.view.lease, &lease, sizeof lease, cudaMemcpyDefault) == cudaSuccess);
  THINKV_CHECK(cudaMallocHost(&b.view.progress, sizeof(cuda::Progress)) == cudaSuccess);
  *b.view.progress = {};
  b.view.positions = device_array<uint32_t>(capacity);
  b.view.emit = device_array<uint8_t>(uint64_t{g.layers} * capacity);
  b.view.lane_begin = device_array<uint32_t>(g.layers * (rows + 1));
  b.view.sites = device_array<cuda::TokenSite>(g.layers * rows);
  b.view.pages = device_array<cuda::PageView>(uint64_t{g.layers} * b.view.pages_max);
  b.view.score_rows = device_array<uint16_t*>(uint64_t{g.layers} * b.view.pages_max);
  b.view.sparsity = device_array<cuda::LaneSparsity>(g.layers * rows);
  b.k =
      device_array<uint16_t>(std::max<uint64_t>(rows, uint64_t{tokens} * g.kv_heads) * g.head_dim);
  THINKV_CHECK(cudaStreamCreate(&b.stream) == cudaSuccess);
  fill_lease(b, pages, extent_pages);
  return b;
}

inline double microseconds(cudaStream_t stream, const std::function<cudaError_t()>& launch) {
  cudaEvent_t begin, end;
  THINKV_CHECK(cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess);
  THINKV_CHECK(cudaEventRecord(begin, stream) == cudaSuccess);
  THINKV_CHECK(launch() == cudaSuccess);
  THINKV_CHECK(cudaEventRecord(end, stream) == cudaSuccess);
  THINKV_CHECK(cudaEventSynchronize(end) == cudaSuccess);
  float ms = 0.0f;
  THINKV_CHECK(cudaEventElapsedTime(&ms, begin, end) == cudaSuccess);
  return 1000.0 * ms;
}

// A graph of begin and all appends; the difference of two graphs is the time of what they differ
// in.
inline double graph_us(const Bench& b, const std::function<void()>& record) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  THINKV_CHECK(cudaStreamBeginCapture(b.stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  record();
  THINKV_CHECK(cudaStreamEndCapture(b.stream, &graph) == cudaSuccess);
  THINKV_CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
  THINKV_CHECK(cudaGraphLaunch(exec, b.stream) == cudaSuccess);
  return microseconds(b.stream, [&] { return cudaGraphLaunch(exec, b.stream); });
}

inline void bench(uint32_t capacity, uint32_t layers, uint32_t tokens, bool scored) {
  const ModelGeometry g = geometry_of(layers, 8, 128, ValueType::kBf16);
  const Bench b = make_bench(g, capacity, tokens, bench_policy(scored), 3 * g.lanes());
  const auto must = [](cudaError_t error) { THINKV_CHECK(error == cudaSuccess); };
  double open_us = 0, prefill_us = 0;
  for (const uint32_t root : b.roots) {
    open_us = microseconds(
        b.stream, [&] { return cuda::launch_open(b.view, root, b.policy, 0, false, b.stream); });
    for (uint32_t layer = 0; layer < layers; ++layer) {
      prefill_us = microseconds(b.stream, [&] {
        return cuda::launch_prefill(b.view, root, layer, b.k, b.k, Element::kBf16, tokens,
                                    b.stream);
      });
    }
    must(cuda::launch_prefill_end(b.view, root, b.policy, {tokens}, b.stream));
  }
  std::printf("%u x %u layers x 8 heads, %u tokens%s: open %.1f us, prefill %.1f us a layer\n",
              capacity, layers, tokens, scored ? ", scored" : "", open_us, prefill_us);
  const auto append_all = [&] {
    for (uint32_t layer = 0; layer < layers; ++layer) {
      must(cuda::launch_append(b.view, layer, b.k, b.k, Element::kBf16, b.stream));
    }
  };
  const double begin_us = graph_us(b, [&] { must(cuda::launch_begin(b.view, b.stream)); });
  const double appends_us = graph_us(b, append_all);  // two tokens
  const double idle_us = graph_us(b, [&] { must(cuda::launch_end(b.view, b.stream)); });
  for (uint32_t i = 2; i < 16; ++i) append_all();
  must(cuda::launch_begin(b.view, b.stream));
  // The buffers have 16 tokens and begin() says so: one end of a step flushes them all.
  const double flush_us = microseconds(
      b.stream, [&] { return cuda::launch_flush(b.view, cuda::FlushWhen::kFull, b.stream); });
  cuda::Lease lease;
  must(cudaMemcpy(&lease, b.view.lease, sizeof lease, cudaMemcpyDefault));
  std::printf(
      "  begin %.2f us, append %.2f us a layer, end without a flush %.2f us, flush of all "
      "lanes %.2f us, faults %u\n",
      begin_us, appends_us / layers, idle_us, flush_us, lease.faults);
  // append() leaves the rest of the memory to the end of the process.
  must(cudaFree(reinterpret_cast<void*>(b.view.pool.base)));
}

// thinkv on prompts of `tokens` tokens. Attention is not run: chance stands for its sums.
inline void bench_rank(uint32_t capacity, uint32_t layers, uint32_t tokens) {
  constexpr uint32_t kBudget = 1024, kWindow = 64, kSteps = 128;
  const ModelGeometry g = geometry_of(layers, 8, 128, ValueType::kBf16);
  std::optional<PolicyParams> policy = testing::shipped_params("thinkv", kBudget);
  THINKV_CHECK(policy.has_value() && policy->score_window == kWindow);
  for (uint32_t i = 0; i < policy->rule_count; ++i) policy->rules[i].random = 1.0f;
  const uint32_t held = cuda::prefill_pages(g, *policy, 0, tokens) / g.kv_heads;
  const uint32_t of_rules =
      cuda::step_pages(g, *policy, {tokens, kWindow - 1, held + kWindow / 8, kBudget});
  Bench b = make_bench(g, capacity, tokens, *policy, of_rules + 16 * g.lanes());
  make_rank_memory(b, {.tokens = tokens + kSteps});
  const auto must = [](cudaError_t error) { THINKV_CHECK(error == cudaSuccess); };
  for (const uint32_t root : b.roots) {
    must(cuda::launch_open(b.view, root, b.policy, kBudget, false, b.stream));
    for (uint32_t layer = 0; layer < layers; ++layer) {
      must(cuda::launch_prefill(b.view, root, layer, b.k, b.k, Element::kBf16, tokens, b.stream));
    }
    must(cuda::launch_prefill_end(b.view, root, b.policy, {tokens}, b.stream));
  }
  std::vector<double> firing, idle;
  double first = 0;
  for (uint32_t step = 1; step <= kSteps; ++step) {
    must(cuda::launch_begin(b.view, b.stream));
    for (uint32_t layer = 0; layer < layers; ++layer) {
      must(cuda::launch_append(b.view, layer, b.k, b.k, Element::kBf16, b.stream));
    }
    const double us = microseconds(b.stream, [&] { return cuda::launch_end(b.view, b.stream); });
    if (step == kWindow) first = us;
    if (step > kWindow) (step % 16 == 0 ? firing : idle).push_back(us);
  }
  std::sort(firing.begin(), firing.end());
  std::sort(idle.begin(), idle.end());
  cuda::Lease lease;
  must(cudaMemcpy(&lease, b.view.lease, sizeof lease, cudaMemcpyDefault));
  std::printf(
      "thinkv, %u x %u layers x 8 heads, %u tokens: first firing %.0f us, a firing %.0f us, "
      "a step without %.1f us, pages held %llu, live %llu, faults %u\n",
      capacity, layers, tokens, first, firing[firing.size() / 2], idle[idle.size() / 2],
      static_cast<unsigned long long>(lease.used_total),
      static_cast<unsigned long long>(b.view.progress->live_slots), lease.faults);
  std::fflush(stdout);
  must(cudaFree(reinterpret_cast<void*>(b.view.pool.base)));
}

// Normal values as bf16, in device memory.
inline void fill_normal(void* values, uint64_t count) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> host(count);
  for (uint16_t& value : host) value = bf16_from_float(normal(random));
  THINKV_CHECK(cudaMemcpy(values, host.data(), 2 * count, cudaMemcpyDefault) == cudaSuccess);
}

// Opens the sequences and gives them their prompts. Result: microseconds of coding one layer.
inline double give_coded_prompts(const Bench& b, uint32_t tokens) {
  const auto must = [](cudaError_t error) { THINKV_CHECK(error == cudaSuccess); };
  double code_us = 0;
  for (const uint32_t root : b.roots) {
    must(cuda::launch_open(b.view, root, b.policy, 0, false, b.stream));
    for (uint32_t layer = 0; layer < b.view.geometry.layers; ++layer) {
      code_us = microseconds(b.stream, [&] {
        return cuda::launch_code_prompt(b.view, root, layer, b.k, b.k, Element::kBf16, tokens,
                                        b.stream);
      });
      must(cuda::launch_prefill(b.view, root, layer, b.k, b.k, Element::kBf16, tokens, b.stream));
    }
    must(cuda::launch_prefill_end(b.view, root, b.policy, {.tokens = tokens}, b.stream));
  }
  return code_us;
}

inline cuda::Lease lease_of(const Bench& b) {
  cuda::Lease lease;
  THINKV_CHECK(cudaMemcpy(&lease, b.view.lease, sizeof lease, cudaMemcpyDefault) == cudaSuccess);
  return lease;
}

// kvcomp on prompts of `tokens` tokens of normal values.
inline void bench_coded(uint32_t capacity, uint32_t layers, uint32_t tokens) {
  constexpr uint32_t kSteps = 130;
  const ModelGeometry g = geometry_of(layers, 8, 128, ValueType::kBf16);
  const std::optional<PolicyParams> policy = testing::shipped_params("kvcomp", 0);
  THINKV_CHECK(policy.has_value() && policy->entropy.on());
  Bench b = make_bench(g, capacity, tokens, *policy, 64 * g.lanes(), 4);
  b.view.stream_pages =
      device_array<unsigned char>(uint64_t{b.view.pages_max} * page_bytes(g.head_dim));
  fill_normal(b.k, uint64_t{tokens} * g.kv_heads * g.head_dim);
  const auto must = [](cudaError_t error) { THINKV_CHECK(error == cudaSuccess); };
  const double code_us = give_coded_prompts(b, tokens);
  const double bytes = static_cast<double>(lease_of(b).used_total) * page_bytes(g.head_dim);
  const double bytes_16 = static_cast<double>(g.token_bytes_f16()) * tokens * capacity;
  std::printf(
      "kvcomp, %u x %u layers x 8 heads, %u tokens: coding %.0f us a layer, %.3f of the "
      "16-bit bytes\n",
      capacity, layers, tokens, code_us, bytes / bytes_16);
  std::vector<double> due, idle, read;
  for (uint32_t step = 1; step <= kSteps; ++step) {
    must(cuda::launch_begin(b.view, b.stream));
    for (uint32_t layer = 0; layer < layers; ++layer) {
      must(cuda::launch_append(b.view, layer, b.k, b.k, Element::kBf16, b.stream));
    }
    read.push_back(
        microseconds(b.stream, [&] { return cuda::launch_read_streams(b.view, 0, b.stream); }));
    const double us = microseconds(b.stream, [&] { return cuda::launch_end(b.view, b.stream); });
    ((tokens + step) % 64 == 0 ? due : idle).push_back(us);
  }
  for (std::vector<double>* times : {&due, &idle, &read}) std::sort(times->begin(), times->end());
  std::printf(
      "  a step's end where blocks are due %.0f us, else %.1f us; reading the blocks of a "
      "layer %.1f us; faults %u\n",
      due[due.size() / 2], idle[idle.size() / 2], read[read.size() / 2], lease_of(b).faults);
  std::fflush(stdout);
  must(cudaFree(b.view.stream_pages));
  must(cudaFree(reinterpret_cast<void*>(b.view.pool.base)));
}

}  // namespace thinkv::gputest
