// attend_bench.cu: microseconds of one layer's decode attention on this GPU.
//
// CUDA graphs over copies of the pool that rotate (more than L2 in all), random page order, median
// of 20 replays. "live_bytes" counts codes and scales of the live tokens; its rate is a share of a
// streaming read measured in the same run. One JSON object a line.
//   --quick       the shapes that the goals name
//   --resources   registers, local and shared memory of the kernels that these shapes launch
//   --one FORMAT  batch 64 x 4096 of one format, a few plain launches: for a profiler
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention_launch.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/page_image.h"

namespace thinkv::gputest {
namespace {

using cuda::AttendParams;
using Launch = std::function<void(cudaStream_t)>;

constexpr uint64_t kRotatedBytes = uint64_t{300} << 20;  // H200: 50 MB of L2

__global__ void stream_read(const uint4* data, size_t n, uint32_t* sink) {
  uint32_t x = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += stride) {
    const uint4 v = __ldcs(data + i);
    x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (x == 0x12345678u) *sink = x;  // keeps the loads
}

// Median time of one launch, in microseconds; the launches of `rounds` rounds are one graph.
double median_us(const std::vector<Launch>& launches, int rounds) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  CUDA_OK(cudaStreamCreate(&stream));
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int r = 0; r < rounds; ++r) {
    for (const Launch& launch : launches) launch(stream);
  }
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  std::vector<double> times;
  for (int i = 0; i < 25; ++i) {
    CUDA_OK(cudaEventRecord(begin, stream));
    CUDA_OK(cudaGraphLaunch(exec, stream));
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaEventSynchronize(end));
    float ms = 0.0f;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 5) times.push_back(ms * 1e3 / (rounds * static_cast<double>(launches.size())));
  }
  CUDA_OK(cudaGraphExecDestroy(exec));
  CUDA_OK(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double stream_gb_s() {
  const size_t bytes = size_t{4} << 30;
  DeviceArray<uint4> data(bytes / 16);
  DeviceArray<uint32_t> sink(1);
  CUDA_OK(cudaMemset(data.data, 1, bytes));
  const Launch launch = [&](cudaStream_t s) {
    stream_read<<<132 * 16, 512, 0, s>>>(data.data, bytes / 16, sink.data);
  };
  return static_cast<double>(bytes) / median_us({launch}, 3) * 1e-3;
}

struct Case {
  uint32_t q_heads, kv_heads, head_dim, batch, tokens;
  std::vector<Format> formats;  // of the pages, in turn
  double live = 1.0;
  uint8_t emit = 0;
  bool rotate = true;
  uint32_t warps = 0;  // 0: attend_shape()

  [[nodiscard]] uint32_t lanes() const { return kv_heads * batch; }
  [[nodiscard]] uint32_t group() const { return q_heads / kv_heads; }
  [[nodiscard]] cuda::AttendShape shape(uint32_t multiprocessors) const {
    const auto twos = std::count_if(formats.begin(), formats.end(),
                                    [](Format f) { return format_info(f).v.bits == 2; });
    const bool two_bits = 2 * static_cast<size_t>(twos) > formats.size();
    cuda::AttendShape s = cuda::attend_shape(multiprocessors, lanes(), head_dim, two_bits);
    if (warps != 0) s.warps = warps;
    return s;
  }
};

// The pages of all lanes, each of `c.tokens` slots: in random order, a lane's last page partly
// filled. live_bytes: codes and scales of the live slots.
struct Pages {
  Pages(const Case& c) {
    std::mt19937_64 rng(5);
    for (uint32_t lane = 0; lane < c.lanes(); ++lane) {
      uint32_t turn = 0;
      for (uint32_t done = 0; done < c.tokens; ++turn) {
        const Format format = c.formats[turn % c.formats.size()];
        const PageLayout& layout = page_layout(format, c.head_dim);
        const uint32_t slots = std::min(layout.slots, c.tokens - done);
        const uint64_t mask = slots == 64 ? ~uint64_t{0} : (uint64_t{1} << slots) - 1;
        list.push_back({c.live < 1.0 ? mask & rng() : mask, list.size(), format});
        live_bytes += static_cast<double>(slots) * layout.slot_payload_bytes();
        done += slots;
      }
      lane_begin.push_back(static_cast<uint32_t>(list.size()));
    }
    std::vector<uint64_t> order(list.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    for (size_t i = 0; i < order.size(); ++i) list[i].index = order[i];
  }
  std::vector<ImagePage> list;
  std::vector<uint32_t> lane_begin = {0};
  double live_bytes = 0.0;
};

using Bytes = DeviceArray<uint8_t>;

// Copies of the pool: pages of each format again and again, where the list wants them.
std::vector<std::unique_ptr<Bytes>> make_pools(const Case& c, const Pages& pages) {
  constexpr uint32_t kDifferent = 64;
  PageImage image(c.head_dim, 3);
  for (const Format format : c.formats) {
    const uint64_t full = page_layout(format, c.head_dim).full_mask();
    for (uint32_t i = 0; i < kDifferent; ++i) (void)image.add(format, full, 0);
  }
  const uint64_t page = page_bytes(c.head_dim);
  std::vector<uint8_t> host(pages.list.size() * page);
  for (size_t i = 0; i < pages.list.size(); ++i) {
    const auto found = std::find(c.formats.begin(), c.formats.end(), pages.list[i].format);
    const uint64_t from = (found - c.formats.begin()) * kDifferent + i % kDifferent;
    std::memcpy(&host[pages.list[i].index * page], &image.bytes()[from * page], page);
  }
  std::vector<std::unique_ptr<Bytes>> pools;
  const uint64_t copies = std::clamp<uint64_t>(kRotatedBytes / host.size() + 1, 1, 64);
  for (uint64_t i = 0; i < copies; ++i) pools.push_back(std::make_unique<Bytes>(host));
  return pools;
}

// Everything that the launches of a case work on.
struct Bench {
  Bench(const Case& c, uint32_t multiprocessors)
      : shape(c.shape(multiprocessors)),
        pages(c),
        pools(make_pools(c, pages)),
        lane_begin(pages.lane_begin),
        q(random_q(c)),
        out(size_t{c.lanes()} * c.q_heads / c.kv_heads * c.head_dim),
        lse(size_t{c.lanes()} * c.group()),
        parts(cuda::attend_part_floats(shape, c.lanes(), c.group(), c.head_dim)),
        emit(std::vector<uint8_t>(c.batch, c.emit)),
        scores(std::vector<uint16_t>(c.emit != 0 ? pages.list.size() * 64 : 0, 0)),
        sparsity(c.lanes()),
        scratch(c.emit != 0 ? cuda::emit_scratch_bytes(pages.list.size(), c.group()) : 0) {
    std::vector<uint16_t*> rows;
    for (size_t i = 0; i < pages.list.size(); ++i) rows.push_back(scores.data + 64 * i);
    score_rows = std::make_unique<DeviceArray<uint16_t*>>(rows);
    for (const auto& pool : pools) {
      std::vector<cuda::PageView> list;
      for (const ImagePage& page : pages.list) list.push_back(page.view(pool->data, c.head_dim));
      views.push_back(std::make_unique<DeviceArray<cuda::PageView>>(list));
      launches.push_back([p = params(c), s = shape](cudaStream_t stream) {
        CUDA_OK(cuda::launch_attend(p, s, stream));
      });
    }
  }
  [[nodiscard]] static std::vector<uint16_t> random_q(const Case& c) {
    std::mt19937_64 rng(9);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<uint16_t> values(size_t{c.lanes()} * c.group() * c.head_dim);
    for (uint16_t& value : values) value = bf16_from_float(normal(rng));
    return values;
  }
  [[nodiscard]] AttendParams params(const Case& c) const {
    return {.pages = views.back()->data,
            .lane_begin = lane_begin.data,
            .q = q.data,
            .out = out.data,
            .lse = lse.data,
            .parts = parts.data,
            .lanes = c.lanes(),
            .group = c.group(),
            .kv_heads = c.kv_heads,
            .head_dim = c.head_dim,
            .softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
            .q_element = cuda::Element::kBf16,
            .out_element = cuda::Element::kBf16,
            .rotate = c.rotate,
            .blocks = std::any_of(c.formats.begin(), c.formats.end(), is_block),
            .emit = c.emit != 0 ? emit.data : nullptr,
            .score_rows = score_rows->data,
            .sparsity = sparsity.data,
            .emit_scratch = scratch.data};
  }
  cuda::AttendShape shape;
  Pages pages;
  std::vector<std::unique_ptr<Bytes>> pools;
  DeviceArray<uint32_t> lane_begin;
  DeviceArray<uint16_t> q, out;
  DeviceArray<float> lse, parts;
  DeviceArray<uint8_t> emit;
  DeviceArray<uint16_t> scores;
  DeviceArray<cuda::LaneSparsity> sparsity;
  DeviceArray<uint8_t> scratch;
  std::unique_ptr<DeviceArray<uint16_t*>> score_rows;
  std::vector<std::unique_ptr<DeviceArray<cuda::PageView>>> views;
  std::vector<Launch> launches;
};

void bench(const Case& c, double stream) {
  const Bench b(c, 132);
  const double us =
      median_us(b.launches, std::max<int>(1, 20 / static_cast<int>(b.launches.size())));
  std::string formats;
  for (const Format f : c.formats) {
    formats += (formats.empty() ? "" : "+") + std::string(format_info(f).name);
  }
  std::printf(
      "{\"kernel\": \"thinkv-%s\", \"q_heads\": %u, \"kv_heads\": %u, \"head_dim\": %u, "
      "\"batch\": %u, \"live_tokens\": %u, \"live_fraction\": %.2f, \"emit\": %u, \"warps\": %u, "
      "\"us\": %.1f, \"live_bytes\": %.0f, \"stream_fraction\": %.3f}\n",
      formats.c_str(), c.q_heads, c.kv_heads, c.head_dim, c.batch, c.tokens, c.live, c.emit,
      b.shape.warps, us, b.pages.live_bytes, b.pages.live_bytes / us * 1e-3 / stream);
  std::fflush(stdout);
}

std::vector<Case> goal_cases() {
  const std::vector<Format> k4v4 = {Format::kK4V4}, k2v2 = {Format::kK2V2};
  return {{32, 8, 128, 128, 4096, k4v4},
          {32, 8, 128, 128, 4096, {Format::kK4V2}},
          {32, 8, 128, 128, 4096, k2v2},
          {32, 8, 128, 128, 4096, {Format::kBf16}},
          {32, 8, 128, 32, 4096, k4v4},
          {32, 8, 128, 256, 1024, k4v4},
          {32, 8, 128, 32, 1024, k4v4},
          {32, 8, 128, 1, 32768, k4v4},
          {28, 4, 128, 128, 4096, k4v4},
          {12, 2, 128, 128, 4096, k4v4},
          {32, 8, 128, 128, 4096, {Format::kK4V4, Format::kK4V2, Format::kK2V2}},
          {32, 8, 128, 128, 4096, k4v4, 0.5},
          {32, 8, 128, 128, 4096, k4v4, 1.0, cuda::kEmitScores},
          {32, 8, 128, 128, 4096, k4v4, 1.0, cuda::kEmitScores | cuda::kEmitSparsity}};
}

std::vector<Case> other_cases() {
  std::vector<Case> cases;
  for (uint32_t f = 1; f < kAllFormatCount; ++f) {
    const std::vector<Format> one = {static_cast<Format>(f)};
    for (const uint32_t batch : {32u, 8u}) cases.push_back({32, 8, 128, batch, 4096, one});
    cases.push_back({64, 8, 64, 64, 4096, one});
    cases.push_back({16, 8, 256, 32, 4096, one});
  }
  const std::vector<Format> k4v4 = {Format::kK4V4};
  cases.push_back({32, 32, 128, 32, 4096, k4v4});
  cases.push_back({64, 8, 128, 64, 4096, k4v4});
  cases.push_back({128, 8, 128, 64, 4096, k4v4});
  cases.push_back({32, 8, 128, 8, 1024, k4v4});
  cases.push_back({32, 8, 128, 1, 131072, k4v4});
  return cases;
}

void print_resources() {
  for (const auto visit : {cuda::visit_attend_64, cuda::visit_attend_128, cuda::visit_attend_256}) {
    visit([](const cuda::AttendKernel& kernel) {
      cudaFuncAttributes a{};
      CUDA_OK(cudaFuncGetAttributes(&a, kernel.function));
      std::printf(
          "{\"head_dim\": %u, \"heads\": %u, \"warps\": %u, \"stages\": %u, \"variant\": \"%s\", "
          "\"registers\": %d, \"local_bytes\": %zu, \"static_shared_bytes\": %zu}\n",
          kernel.head_dim, kernel.heads, kernel.warps, kernel.stages, kernel.variant, a.numRegs,
          a.localSizeBytes, a.sharedSizeBytes);
    });
  }
}

}  // namespace
}  // namespace thinkv::gputest

int main(int argc, char** argv) {
  namespace gputest = thinkv::gputest;
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--resources") {
    gputest::print_resources();
    return 0;
  }
  if (mode == "--one" && argc > 2) {
    const auto format = thinkv::format_from_name(argv[2]);
    if (!format) return 2;
    const gputest::Bench b({32, 8, 128, 64, 4096, {*format}}, 132);
    for (const gputest::Launch& launch : b.launches) launch(nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    return 0;
  }
  const double stream = gputest::stream_gb_s();
  std::printf("{\"kernel\": \"stream-read\", \"gb_s\": %.0f}\n", stream);
  for (const gputest::Case& c : gputest::goal_cases()) gputest::bench(c, stream);
  if (mode == "--quick") return 0;
  for (const gputest::Case& c : gputest::other_cases()) gputest::bench(c, stream);
}
