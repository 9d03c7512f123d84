// sequence_gpu.cu: the sequences of a GPU against the host's, and what a step's kernels cost.
//
//   check   the same tokens on both sides, compared after every step (tests/support/device_twin.h)
//   small   a short check, for compute-sanitizer; tiny: a shorter one
//   rank    the shipped rank policies and 100 rules drawn by chance (THINKV_SEED)
//   blocks  the same of policies that recode to blocks of tokens
//   bench   microseconds of begin, append, flush and prefill; one line each
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/cuda/step.cuh"
#include "tests/support/device_twin.h"
#include "tests/support/rank_twin.h"
#include "tests/support/seed.h"

namespace thinkv::gputest {
namespace {

using cuda::Element;
using testing::geometry_of;
using testing::plain_policy;
using testing::TwinBatch;

constexpr Format kFormatsToTest[] = {Format::kF16,   Format::kK8V8,   Format::kK8V4,
                                     Format::kK4V4,  Format::kK4V2,   Format::kK2V2,
                                     Format::kNvfp4, Format::kTernary};

bool good(TwinBatch& batch, const char* what) {
  batch.compare();
  if (batch.wrong().empty()) return true;
  std::printf("%s: %s\n", what, batch.wrong().substr(0, 600).c_str());
  return false;
}

bool steps(TwinBatch& batch, uint32_t count, const char* what) {
  for (uint32_t i = 0; i < count; ++i) {
    batch.step();
    if (i % 5 == 0 && !good(batch, what)) return false;
  }
  return good(batch, what);
}

// Two sequences of one format, evicted and recoded on the way.
bool check_format(Format format, uint32_t dim, ValueType type, Element element, bool rotate) {
  char what[80];
  std::snprintf(what, sizeof what, "format %u, head_dim %u, type %u, element %u, rotate %d",
                static_cast<uint32_t>(format), dim, static_cast<uint32_t>(type),
                static_cast<uint32_t>(element), rotate);
  TwinBatch batch({.geometry = geometry_of(2, 2, dim, type),
                   .element = element,
                   .capacity = 3,
                   .extent_pages = 256,
                   .wild = !rotate});
  PolicyParams policy = plain_policy(format);
  policy.rotate = rotate ? 1 : 0;
  // Without NaN: machines differ in what one is less a number.
  policy.centre = rotate && (dim / 64 + static_cast<uint32_t>(format)) % 2 == 0 ? 1 : 0;
  policy.sink_tokens = 5;
  policy.sink_format = Format::kF16;
  batch.open(2, policy);
  batch.prefill(2, 37);
  batch.open(0, policy);
  if (!steps(batch, 35, what)) return false;
  batch.evict(2, {0, 3, 4, 9, 11, 12, 13, 30, 31, 40, 41});
  if (!good(batch, what)) return false;
  if (!steps(batch, 20, what)) return false;
  batch.recode(2, 2, 60, format == Format::kK2V2 ? Format::kK4V4 : Format::kK2V2);
  if (!good(batch, what) || !steps(batch, 20, what)) return false;
  batch.close(0);
  batch.close(2);
  return good(batch, what);
}

int check(bool small, uint32_t cases_max) {
  uint32_t failed = 0, cases = 0;
  for (const uint32_t dim : kHeadDims) {
    for (const Format format : kFormatsToTest) {
      if (small && dim != 128 && format != Format::kK4V2) continue;
      for (const bool rotate : {false, true}) {
        if (small && rotate != (static_cast<uint32_t>(format) % 2 == 0)) continue;
        if (cases == cases_max) continue;
        const auto type = static_cast<ValueType>(cases % 2);
        const auto element = static_cast<Element>(cases % 3);
        failed += check_format(format, dim, type, element, rotate) ? 0 : 1;
        ++cases;
      }
    }
  }
  std::printf("%u cases, %u failed\n", cases, failed);
  return failed == 0 ? 0 : 1;
}

// Rank policies, as shipped and drawn by chance. All of them run, so that one failure does not hide
// the others.
class Judge {
 public:
  void operator()(const std::string& what, const std::string& wrong) {
    if (wrong.empty()) return;
    std::printf("%s: %s\n", what.c_str(), wrong.substr(0, 600).c_str());
    ++failed_;
  }
  // Calls run(policy, head_dim) for a shipped policy in every width.
  template <class Run>
  void widths(const char* name, uint32_t budget, const Run& run) {
    const auto policy = testing::shipped_params(name, budget);
    if (!policy) return (*this)(name, "the policy cannot be read (THINKV_SOURCE_DIR)");
    for (const uint32_t dim : kHeadDims) (*this)(name, run(*policy, dim));
  }
  [[nodiscard]] int exit_code() const {
    std::printf("%u failed\n", failed_);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  uint32_t failed_ = 0;
};

int check_rank() {
  Judge judge;
  testing::RankTally tally;
  for (const char* name : testing::kRankPolicies) {
    judge.widths(name, 64, [&](const PolicyParams& policy, uint32_t dim) {
      return testing::run_rank_policy(policy, dim, tally);
    });
  }
  const uint64_t seed = testing::seed_from_environment(20251129);
  for (uint64_t i = 0; i < 100; ++i) {
    judge("seed " + std::to_string(seed + i), testing::run_drawn_rules(seed + i, tally));
  }
  tally.print("rank rules");
  return judge.exit_code();
}

int check_blocks() {
  Judge judge;
  testing::RankTally tally;
  for (const char* name : testing::kBlockPolicies) {
    judge.widths(name, 24, [&](const PolicyParams& policy, uint32_t dim) {
      ModelGeometry geometry = geometry_of(5, 2, dim);
      if (dim == 128) geometry.value_type = ValueType::kBf16;
      return testing::run_block_policy(policy, geometry, tally);
    });
    judge.widths(name, 24, [&](const PolicyParams& policy, uint32_t) {
      return testing::run_long_prompt(policy, cuda::kRankRowsFew + 200, 4);
    });
  }
  const uint64_t seed = testing::seed_from_environment(20260107);
  for (uint64_t i = 0; i < 60; ++i) {
    judge("seed " + std::to_string(seed + i), testing::run_drawn_rules(seed + i, tally, true));
  }
  tally.print("rules with blocks");
  return judge.exit_code();
}

// ---- timing ----

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
void fill_lease(Bench& b, uint64_t pages, uint64_t extent_pages) {
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

Bench make_bench(const ModelGeometry& g, uint32_t capacity, uint32_t tokens, bool scored) {
  Bench b;
  b.policy = plain_policy(Format::kK4V4);
  if (scored) {
    b.policy.evict = EvictRule::kTbe;
    b.policy.select = SelectRule::kAttention;
    b.policy.schedule_length = 1;
    b.policy.schedule[0] = 64;
  }
  b.policy.segment_tokens = 1024;
  const uint64_t rows = uint64_t{capacity} * g.kv_heads;
  const uint64_t each = 1 + cuda::open_pages(g, b.policy) +
                        uint64_t{g.layers} * cuda::prefill_pages(g, b.policy, tokens) +
                        3 * g.lanes();
  const uint64_t pages = each * capacity;
  const uint64_t extent_pages = 1 << 18;
  const auto extents = static_cast<uint32_t>((pages + extent_pages - 1) / extent_pages);
  b.view.pool = {
      reinterpret_cast<uint64_t>(device_array<unsigned char>(pages * page_bytes(g.head_dim))),
      extent_pages * page_bytes(g.head_dim), extents};
  b.view.geometry = g;
  b.view.capacity = capacity;
  b.view.pages_max = static_cast<uint32_t>(rows * (tokens / 16 + 8));
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

double microseconds(cudaStream_t stream, const std::function<cudaError_t()>& launch) {
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
double graph_us(const Bench& b, const std::function<void()>& record) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  THINKV_CHECK(cudaStreamBeginCapture(b.stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  record();
  THINKV_CHECK(cudaStreamEndCapture(b.stream, &graph) == cudaSuccess);
  THINKV_CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
  THINKV_CHECK(cudaGraphLaunch(exec, b.stream) == cudaSuccess);
  return microseconds(b.stream, [&] { return cudaGraphLaunch(exec, b.stream); });
}

void bench(uint32_t capacity, uint32_t layers, uint32_t tokens, bool scored) {
  const ModelGeometry g = geometry_of(layers, 8, 128, ValueType::kBf16);
  const Bench b = make_bench(g, capacity, tokens, scored);
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
    must(cuda::launch_prefill_end(b.view, root, tokens, b.stream));
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

int run(int argc, char** argv) {
  const char* mode = argc > 1 ? argv[1] : "check";
  if (std::strcmp(mode, "check") == 0) return check(false, ~0u);
  if (std::strcmp(mode, "small") == 0) return check(true, ~0u);
  if (std::strcmp(mode, "tiny") == 0) return check(true, 3);
  if (std::strcmp(mode, "rank") == 0) return check_rank();
  if (std::strcmp(mode, "blocks") == 0) return check_blocks();
  bench(32, 32, 1024, false);
  bench(32, 32, 1024, true);
  bench(128, 32, 1024, false);
  bench(1024, 8, 512, false);
  bench(1, 32, 32768, false);
  return 0;
}

}  // namespace
}  // namespace thinkv::gputest

int main(int argc, char** argv) {
  return thinkv::gputest::run(argc, argv);
}
