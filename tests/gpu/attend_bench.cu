// attend_bench.cu: microseconds of one layer's decode attention on this GPU.
//
// CUDA graphs over copies of the pool that rotate (more than L2 in all), random page order, median
// of 20 replays. "useful" counts codes and scales of the live tokens and is a share of a streaming
// read measured in the same run. One JSON object a line.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "tests/gpu/device_array.h"
#include "tests/gpu/page_image.h"

namespace thinkv::gputest {
namespace {

using cuda::AttendParams;
using cuda::LaunchShape;
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
  uint32_t kv_heads, group, head_dim, batch, tokens;
  Format format;
  double live;
  uint32_t warps;
};

// The descriptors of all lanes: pages in random order, the last page of a lane partly filled.
std::vector<DevicePage> make_pages(const Case& c, uint32_t lanes, uint32_t per_lane) {
  const PageLayout& layout = page_layout(c.format, c.head_dim);
  std::mt19937_64 rng(5);
  std::vector<DevicePage> pages(size_t{lanes} * per_lane);
  for (size_t i = 0; i < pages.size(); ++i) pages[i].page = static_cast<uint32_t>(i);
  std::shuffle(pages.begin(), pages.end(), rng);
  for (size_t i = 0; i < pages.size(); ++i) {
    const uint32_t before = static_cast<uint32_t>(i % per_lane) * layout.slots;
    const uint32_t slots = std::min(layout.slots, c.tokens - before);
    const uint64_t mask = slots == 64 ? ~uint64_t{0} : (uint64_t{1} << slots) - 1;
    pages[i].live = c.live < 1.0 ? mask & rng() : mask;
    pages[i].format = c.format;
  }
  return pages;
}

// Copies of the pool's bytes: 64 random pages again and again.
std::vector<std::unique_ptr<DeviceArray<uint8_t>>> make_pools(const Case& c, uint64_t bytes) {
  PageImage image(c.head_dim, 3);
  for (int i = 0; i < 64; ++i) {
    (void)image.add(c.format, page_layout(c.format, c.head_dim).full_mask());
  }
  std::vector<uint8_t> host(bytes);
  const uint64_t chunk = image.bytes().size();
  for (uint64_t at = 0; at < bytes; at += chunk) {
    std::memcpy(&host[at], image.bytes().data(), std::min(chunk, bytes - at));
  }
  std::vector<std::unique_ptr<DeviceArray<uint8_t>>> pools;
  const uint64_t copies = std::clamp<uint64_t>(kRotatedBytes / bytes + 1, 1, 64);
  for (uint64_t i = 0; i < copies; ++i) {
    pools.push_back(std::make_unique<DeviceArray<uint8_t>>(host));
  }
  return pools;
}

void bench(const Case& c, double stream) {
  const PageLayout& layout = page_layout(c.format, c.head_dim);
  const uint32_t lanes = c.kv_heads * c.batch;
  const uint32_t per_lane = (c.tokens + layout.slots - 1) / layout.slots;
  const auto pools = make_pools(c, uint64_t{lanes} * per_lane * page_bytes(c.head_dim));
  DeviceArray<DevicePage> pages(make_pages(c, lanes, per_lane));
  std::vector<uint32_t> begins(lanes + 1);
  for (uint32_t l = 0; l <= lanes; ++l) begins[l] = l * per_lane;
  DeviceArray<uint32_t> lane_begin(begins);
  const size_t rows = size_t{lanes} * c.group;
  DeviceArray<uint16_t> q(std::vector<uint16_t>(rows * c.head_dim, fp16_from_float(0.25f)));
  DeviceArray<float> out(rows * c.head_dim), lse(rows);
  const LaunchShape shape{132, c.warps};
  DeviceArray<float> parts(cuda::part_floats(shape, c.group, c.head_dim));
  std::vector<std::unique_ptr<DeviceArray<const unsigned char*>>> extents;
  std::vector<Launch> launches;
  for (const auto& pool : pools) {
    extents.push_back(std::make_unique<DeviceArray<const unsigned char*>>(
        std::vector<const unsigned char*>{pool->data}));
    const AttendParams p{
        .pages = pages.data,
        .lane_begin = lane_begin.data,
        .extents = extents.back()->data,
        .q = q.data,
        .out = out.data,
        .lse = lse.data,
        .parts = parts.data,
        .lanes = lanes,
        .group = c.group,
        .scale_log2 = 1.4426950408889634f / std::sqrt(static_cast<float>(c.head_dim))};
    launches.push_back([p, shape, head_dim = c.head_dim](cudaStream_t s) {
      CUDA_OK(cuda::launch_attend(p, head_dim, shape, s));
    });
  }
  const double us = median_us(launches, std::max<int>(1, 20 / static_cast<int>(launches.size())));
  const double live_bytes = static_cast<double>(c.tokens) * lanes * layout.slot_payload_bytes();
  std::printf(
      "{\"kernel\": \"thinkv-%s\", \"q_heads\": %u, \"kv_heads\": %u, \"head_dim\": %u, "
      "\"batch\": %u, \"live_tokens\": %u, \"live_fraction\": %.2f, \"warps\": %u, "
      "\"us\": %.1f, \"live_bytes\": %.0f, \"stream_fraction\": %.3f}\n",
      format_info(c.format).name.data(), c.group * c.kv_heads, c.kv_heads, c.head_dim, c.batch,
      c.tokens, c.live, c.warps, us, live_bytes, live_bytes / us * 1e-3 / stream);
}

void bench_all() {
  const double stream = stream_gb_s();
  std::printf("{\"kernel\": \"stream-read\", \"gb_s\": %.0f}\n", stream);
  for (const uint32_t warps : {8u, 12u, 16u}) {
    for (const Format format : {Format::kK4V4, Format::kK4V2, Format::kK2V2, Format::kF16}) {
      bench({8, 4, 128, 128, 4096, format, 1.0, warps}, stream);
      bench({8, 4, 128, 32, 4096, format, 1.0, warps}, stream);
      bench({8, 4, 128, 256, 1024, format, 1.0, warps}, stream);
      bench({8, 4, 128, 32, 1024, format, 1.0, warps}, stream);
      bench({8, 4, 128, 1, 32768, format, 1.0, warps}, stream);
    }
    bench({8, 4, 128, 128, 4096, Format::kK4V4, 0.5, warps}, stream);
    bench({4, 7, 128, 128, 4096, Format::kK4V4, 1.0, warps}, stream);
    bench({2, 6, 128, 128, 4096, Format::kK4V4, 1.0, warps}, stream);
  }
}

}  // namespace
}  // namespace thinkv::gputest

int main() {
  thinkv::gputest::bench_all();
}
