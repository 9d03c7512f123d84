// refresh_gpu.cu: the refresh on a GPU against the oracle, and its times. `small`: no times, for
// compute-sanitizer.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "gpu/refresh_world.cuh"
#include "kernels/kernels.h"
#include "support/medoids_kernel.cuh"

namespace thinkv::gputest {
namespace {

int failures = 0;

void check(bool good, const char* what, uint64_t where) {
  if (good) return;
  ++failures;
  std::printf("FAILED: %s (%llu)\n", what, static_cast<unsigned long long>(where));
}

// ---- the k-means alone ----

// width: dims that are in shared memory at a time; 0, all.
std::vector<uint8_t> gpu_keep(const std::vector<float>& keys, const std::vector<float>& weights,
                              uint32_t n, uint32_t dim, uint32_t target, uint32_t width) {
  const DeviceArray<float> k(keys), w(weights.empty() ? std::vector<float>{1.0f} : weights);
  const DeviceArray<uint8_t> keep(n);
  const testing::MedoidCase c{
      k.data, weights.empty() ? nullptr : w.data, n, dim, target, 4, keep.data, width};
  const cuda::LaunchSize size{1, cuda::kMedoidThreads, testing::medoid_case_bytes(c)};
  CUDA_OK(cuda::launch(testing::medoids_kernel, size, nullptr, c));
  CUDA_OK(cudaDeviceSynchronize());
  return keep.host();
}

void check_medoids(uint32_t trials) {
  std::mt19937_64 random(71);
  std::normal_distribution<float> normal;
  const uint32_t dims[] = {64, 128, 256, 33};
  for (uint32_t trial = 0; trial < trials; ++trial) {
    const uint32_t dim = dims[trial % 4], most = dim > 128 ? 100 : 140;
    const uint32_t n = 1 + static_cast<uint32_t>(random() % most);
    const uint32_t target = 1 + static_cast<uint32_t>(random() % n);
    std::vector<float> keys(size_t{n} * dim), weights;
    for (float& x : keys) x = trial % 5 == 4 ? static_cast<float>(random() % 3) : normal(random);
    if (trial % 7 == 6) keys[random() % keys.size()] = std::nanf("");
    for (uint32_t i = 0; i < n && trial % 2 == 0; ++i) {
      weights.push_back(std::fabs(normal(random)) + 0x1p-24f);
    }
    std::vector<uint8_t> expected(n);
    kernels::reference().medoids({.keys = keys.data(),
                                  .weights = weights.empty() ? nullptr : weights.data(),
                                  .n = n,
                                  .dim = dim,
                                  .target = target,
                                  .keep = expected.data()});
    const uint32_t bytes = cuda::medoid_vector_bytes(cuda::running_code());
    if (cuda::medoids_fit(bytes, n, target, cuda::medoid_stride(dim))) {
      check(gpu_keep(keys, weights, n, dim, target, 0) == expected, "medoids", trial);
    }
    check(gpu_keep(keys, weights, n, dim, target, 32) == expected, "streamed medoids", trial);
  }
}

// ---- one demotion of every lane ----

PolicyParams policy_of(SelectRule select, SelectGrain grain) {
  PolicyParams p;
  std::snprintf(p.name, sizeof p.name, "%s", "gpu");
  p.evict = EvictRule::kTbe;
  p.select = select;
  p.grain = grain;
  p.schedule_length = 5;
  for (uint32_t i = 0; i < 5; ++i) p.schedule[i] = static_cast<uint16_t>(64u >> i);
  return p;
}

// Keys and scores of the segment's tokens in the lanes first_lane .. + heads, as pages have them.
struct SegmentRows {
  std::vector<float> keys;  // [kSegment, heads * dim]
  std::vector<float> scores;
};
SegmentRows rows_of(const World& world, uint32_t first_lane, uint32_t heads) {
  struct Page {
    alignas(64) std::byte bytes[page_bytes(256)];
  };
  struct Part {
    std::byte bytes[256];  // divides every page
  };
  const uint32_t dim = world.view.geometry.head_dim;
  const std::vector<uint32_t> pages = world.own_pages();
  SegmentRows rows{std::vector<float>(size_t{kSegment} * heads * dim),
                   std::vector<float>(kSegment, 0.0f)};
  for (uint32_t i = 0; i < heads * kWorldPages; ++i) {
    const uint32_t head = i / kWorldPages, lane = first_lane + head;
    Page page{};
    for (uint32_t b = 0; b < page_bytes(dim); b += sizeof(Part)) {
      const auto part = world.read<Part>(pages[first_lane * kWorldPages + i], b);
      std::memcpy(page.bytes + b, part.bytes, sizeof part);
    }
    for (uint8_t slot = 0; slot < 32; ++slot) {
      const uint32_t row = position_in(i % kWorldPages, slot);
      float* key = &rows.keys[(size_t{row} * heads + head) * dim];
      kernels::reference().decode({page.bytes, Format::kK4V4, dim, {&slot, 1}, key, nullptr});
      rows.scores[row] += static_cast<float>(hash(lane + 77 * row) % 999);
    }
  }
  return rows;
}

// Positions that the oracle keeps of the segment's 128 tokens.
std::set<uint32_t> oracle(const World& world, const PolicyParams& p, uint32_t first_lane,
                          uint32_t heads) {
  SegmentRows rows = rows_of(world, first_lane, heads);
  const bool weighted = p.select == SelectRule::kWeightedMedoids;
  std::set<uint32_t> kept;
  if (weighted || p.select == SelectRule::kMedoids) {
    std::vector<uint8_t> keep(kSegment, 0);
    for (float& s : rows.scores) s = std::max(s, 0x1p-24f);
    kernels::reference().medoids({.keys = rows.keys.data(),
                                  .weights = weighted ? rows.scores.data() : nullptr,
                                  .n = kSegment,
                                  .dim = heads * world.view.geometry.head_dim,
                                  .target = 64,
                                  .keep = keep.data()});
    for (uint32_t i = 0; i < kSegment; ++i) {
      if (keep[i] != 0) kept.insert(i);
    }
    return kept;
  }
  std::vector<uint32_t> order(kSegment);
  for (uint32_t i = 0; i < kSegment; ++i) order[i] = kSegment - 1 - i;  // the newest first
  if (p.select == SelectRule::kAttention) {
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return rows.scores[a] > rows.scores[b]; });
  }
  kept.insert(order.begin(), order.begin() + 64);
  return kept;
}

std::set<uint32_t> kept_in(const World& world, uint32_t lane_index) {
  const uint32_t lanes = world.view.geometry.lanes(), dim = world.view.geometry.head_dim;
  const uint32_t root = world.roots()[lane_index / lanes], index = lane_index % lanes;
  const auto page =
      world.read<uint32_t>(root, sizeof(DeviceSequence) + 4 * (index / lanes_per_page(dim)));
  const auto lane = world.read<DeviceLane>(page, index % lanes_per_page(dim) * sizeof(DeviceLane));
  const std::vector<uint32_t> pages = world.own_pages();
  std::set<uint32_t> kept;
  for (uint32_t i = 0; i < lane.pages; ++i) {
    const auto d = world.read<DeviceDescriptor>(lane.table[0], i * sizeof(DeviceDescriptor));
    const uint32_t* own = &pages[size_t{lane_index} * kWorldPages];
    const auto which = static_cast<uint32_t>(std::find(own, own + kWorldPages, d.page) - own);
    for (uint32_t s = 0; s < 32; ++s) {
      if (((d.live >> s) & 1u) != 0) kept.insert(position_in(which, s));
    }
  }
  check(lane.live == 64 && kept.size() == 64, "live count", lane_index);
  return kept;
}

float median_us(World& world, uint32_t rounds) {
  cudaEvent_t start, stop;
  CUDA_OK(cudaEventCreate(&start));
  CUDA_OK(cudaEventCreate(&stop));
  std::vector<float> times;
  for (uint32_t i = 0; i < rounds; ++i) {
    world.restore();
    CUDA_OK(cudaEventRecord(start));
    CUDA_OK(launch_refresh(world.view, nullptr));
    CUDA_OK(cudaEventRecord(stop));
    CUDA_OK(cudaDeviceSynchronize());
    float ms = 0.0f;
    CUDA_OK(cudaEventElapsedTime(&ms, start, stop));
    times.push_back(ms * 1000.0f);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void demote_all(const char* name, SelectRule select, SelectGrain grain, uint32_t sequences,
                uint32_t layers, uint32_t heads, uint32_t dim, bool time) {
  const PolicyParams p = policy_of(select, grain);
  World world(sequences, layers, heads, dim, p, kSegment, true);
  CUDA_OK(launch_refresh(world.view, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  const uint32_t together = grain == SelectGrain::kLayer ? heads : 1;
  const uint32_t stride = std::max(1u, world.lanes() / together / 24) * together;
  for (uint32_t lane = 0; lane < world.lanes(); lane += stride) {
    check(kept_in(world, lane) == oracle(world, p, lane, together), name, lane);
  }
  check(world.lease().faults == 0, "faults", world.lease().faults);
  if (time) {
    std::printf("%-28s %5u lanes, head_dim %3u: %8.1f us\n", name, world.lanes(), dim,
                median_us(world, 11));
  }
}

// ---- nothing due: what every step pays ----

void time_nothing_due(uint32_t sequences, uint32_t layers, uint32_t heads) {
  PolicyParams p = policy_of(SelectRule::kAttention, SelectGrain::kKvHead);
  World world(sequences, layers, heads, 128, p, 1u << 30, false);
  constexpr uint32_t kRepeats = 64;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamCreate(&stream));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (uint32_t i = 0; i < kRepeats; ++i) CUDA_OK(launch_refresh(world.view, stream));
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, stop;
  CUDA_OK(cudaEventCreate(&start));
  CUDA_OK(cudaEventCreate(&stop));
  float best = 1e9f;
  for (uint32_t i = 0; i < 6; ++i) {
    CUDA_OK(cudaEventRecord(start, stream));
    CUDA_OK(cudaGraphLaunch(exec, stream));
    CUDA_OK(cudaEventRecord(stop, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    float ms = 0.0f;
    CUDA_OK(cudaEventElapsedTime(&ms, start, stop));
    best = std::min(best, ms * 1000.0f / kRepeats);
  }
  std::printf("nothing due, %u sequences x %u lanes: %.2f us a step\n", sequences, layers * heads,
              best);
  const auto counted = world.read<DeviceSequence>(world.roots()[0], 0);
  check(counted.generated_live == 6 * kRepeats, "tokens counted", counted.generated_live);
}

int run(bool small) {
  using enum SelectRule;
  check_medoids(small ? 8 : 400);
  const uint32_t many = small ? 1 : 16, layers = small ? 2 : 32, heads = small ? 2 : 8;
  demote_all("recent", kRecent, SelectGrain::kKvHead, many, layers, heads, 128, !small);
  demote_all("attention", kAttention, SelectGrain::kKvHead, many, layers, heads, 128, !small);
  demote_all("medoids", kMedoids, SelectGrain::kKvHead, many, layers, heads, 128, !small);
  demote_all("weighted medoids", kWeightedMedoids, SelectGrain::kKvHead, many, layers, heads, 128,
             !small);
  demote_all("attention, head_dim 64", kAttention, SelectGrain::kKvHead, many, layers, heads, 64,
             !small);
  demote_all("medoids, head_dim 64", kMedoids, SelectGrain::kKvHead, many, layers, heads, 64,
             !small);
  demote_all("medoids, head_dim 256", kMedoids, SelectGrain::kKvHead, 1, 2, 2, 256, false);
  demote_all("attention by layer", kAttention, SelectGrain::kLayer, many, layers, 4, 128, !small);
  demote_all("medoids by layer", kMedoids, SelectGrain::kLayer, many, layers, 2, 128, !small);
  demote_all("medoids by layer of 8 heads", kMedoids, SelectGrain::kLayer, small ? 1 : 32, layers,
             small ? 3 : 8, 128, !small);
  demote_all("weighted, by layer of 64", kWeightedMedoids, SelectGrain::kLayer, 1, small ? 1 : 4,
             small ? 9 : 64, 256, !small);
  if (!small) {
    time_nothing_due(1360, 32, 8);
    time_nothing_due(64, 32, 8);
  }
  std::printf(failures == 0 ? "all good\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace thinkv::gputest

int main(int count, char** arguments) {
  return thinkv::gputest::run(count > 1 && std::strcmp(arguments[1], "small") == 0);
}
