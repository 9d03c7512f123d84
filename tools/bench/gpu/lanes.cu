// lanes.cu: lanes of random valid pages on the device, and our attention over them, for ctypes.
//
// A case holds `copies` of its pages, so that launches over different copies read more than L2
// holds. Pages lie in random order; where live < 1 slots are dead at random. Every call returns
// null or a cudaError_t, and thinkv_bench_error() says what happened. Threads: one.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "thinkv/internal/page_format.h"
#include "tools/bench/gpu/lane_pages.cuh"

namespace thinkv::bench {
namespace {

std::string last_error;

// Device memory that is freed with its owner.
struct Memory {
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { (void)cudaFree(data); }
  [[nodiscard]] bool reserve(uint64_t bytes) {
    const cudaError_t error = cudaMalloc(&data, bytes + 256);
    if (error != cudaSuccess) last_error = cudaGetErrorString(error);
    return error == cudaSuccess;
  }
  template <class T>
  [[nodiscard]] bool put(const std::vector<T>& host) {
    if (!reserve(host.size() * sizeof(T))) return false;
    return cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice) ==
           cudaSuccess;
  }
  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data);
  }
  void* data = nullptr;
};

class Lanes {
 public:
  explicit Lanes(const ThinkvBenchCase& c) : copies_(c.copies) {
    params_.lanes = c.batch * c.kv_heads;
    params_.group = c.group;
    params_.kv_heads = c.kv_heads;
    params_.head_dim = c.head_dim;
    params_.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    params_.q_element = params_.out_element = cuda::Element::kBf16;
    params_.rotate = true;
  }

  [[nodiscard]] bool make(const ThinkvBenchCase& c) {
    std::mt19937_64 rng(c.seed);
    const HostLanes host = make_host(c, rng);
    pages_ = host.pages.size();
    live_bytes_ = host.live_bytes;
    touched_bytes_ = host.touched_bytes;
    std::vector<uint32_t> order(pages_);
    for (uint32_t i = 0; i < pages_; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    return begin_.put(host.begin) && fill(c, host, order) && views(c, host, order) && scratch(c) &&
           (c.emit == 0 || emission(c));
  }

  [[nodiscard]] cudaError_t launch(uint32_t copy, const void* q, void* out, float* lse,
                                   cudaStream_t stream) const {
    cuda::AttendParams p = params_;
    p.pages = views_.as<cuda::PageView>() + (copy % copies_) * pages_;
    p.lane_begin = begin_.as<uint32_t>();
    p.q = q;
    p.out = out;
    p.lse = lse;
    return cuda::launch_attend(p, shape_, stream);
  }

  void bytes(uint64_t out[4]) const {
    out[0] = live_bytes_;
    out[1] = touched_bytes_;
    out[2] = pages_ * page_bytes(params_.head_dim);
    out[3] = pages_;
  }

 private:
  [[nodiscard]] bool fill(const ThinkvBenchCase& c, const HostLanes& host,
                          const std::vector<uint32_t>& order) {
    std::vector<uint8_t> formats(pages_);
    for (size_t i = 0; i < pages_; ++i) {
      formats[order[i]] = static_cast<uint8_t>(host.pages[i].format);
      if (format_info(host.pages[i].format).v.bits == 2) ++two_bit_pages_;
    }
    std::vector<FillLayout> layouts(kFormatCount);
    for (uint32_t f = 1; f < kFormatCount; ++f) {
      layouts[f] = fill_layout(static_cast<Format>(f), c.head_dim);
    }
    Memory formats_device, layouts_device;
    const uint32_t bytes = page_bytes(c.head_dim);
    if (!formats_device.put(formats) || !layouts_device.put(layouts) ||
        !pool_.reserve(copies_ * pages_ * bytes)) {
      return false;
    }
    fill_pages<<<static_cast<uint32_t>(copies_ * pages_), 256>>>(
        pool_.as<uint16_t>(), formats_device.as<uint8_t>(), pages_, bytes / 2,
        layouts_device.as<FillLayout>(), c.seed);
    return done(cudaDeviceSynchronize());
  }

  [[nodiscard]] bool views(const ThinkvBenchCase& c, const HostLanes& host,
                           const std::vector<uint32_t>& order) {
    std::vector<cuda::PageView> views(copies_ * pages_);
    const auto base = reinterpret_cast<uint64_t>(pool_.data);
    for (uint64_t copy = 0; copy < copies_; ++copy) {
      for (size_t i = 0; i < pages_; ++i) {
        const uint64_t at = base + (copy * pages_ + order[i]) * page_bytes(c.head_dim);
        views[copy * pages_ + i] = {host.pages[i].live,
                                    at | static_cast<uint64_t>(host.pages[i].format)};
      }
    }
    return views_.put(views);
  }

  [[nodiscard]] bool scratch(const ThinkvBenchCase& c) {
    int device = 0, processors = 0;
    if (!done(cudaGetDevice(&device)) ||
        !done(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))) {
      return false;
    }
    shape_ = cuda::attend_shape(static_cast<uint32_t>(processors), params_.lanes, c.head_dim,
                                2 * two_bit_pages_ > pages_);
    const uint64_t floats = cuda::attend_part_floats(shape_, params_.lanes, c.group, c.head_dim);
    if (!parts_.reserve(floats * sizeof(float))) return false;
    params_.parts = parts_.as<float>();
    return done(cudaMemset(parts_.data, 0, floats * sizeof(float)));
  }

  [[nodiscard]] bool emission(const ThinkvBenchCase& c) {
    const uint64_t scores = pages_ * kSlotsPerPageMax;
    std::vector<uint16_t*> rows(pages_);
    if (!scores_.reserve(scores * 2) || !done(cudaMemset(scores_.data, 0, scores * 2))) {
      return false;
    }
    for (size_t i = 0; i < pages_; ++i) rows[i] = scores_.as<uint16_t>() + i * kSlotsPerPageMax;
    const std::vector<uint8_t> flags(c.batch, static_cast<uint8_t>(c.emit));
    if (!rows_.put(rows) || !flags_.put(flags) ||
        !sparsity_.reserve(params_.lanes * sizeof(cuda::LaneSparsity)) ||
        !emit_scratch_.reserve(cuda::emit_scratch_bytes(pages_, c.group))) {
      return false;
    }
    params_.emit = flags_.as<uint8_t>();
    params_.score_rows = rows_.as<uint16_t*>();
    params_.sparsity = sparsity_.as<cuda::LaneSparsity>();
    params_.emit_scratch = emit_scratch_.data;
    return true;
  }

  static bool done(cudaError_t error) {
    if (error != cudaSuccess) last_error = cudaGetErrorString(error);
    return error == cudaSuccess;
  }

  cuda::AttendParams params_{};
  cuda::AttendShape shape_{};
  uint64_t copies_, pages_ = 0, two_bit_pages_ = 0, live_bytes_ = 0, touched_bytes_ = 0;
  Memory pool_, views_, begin_, parts_, scores_, rows_, flags_, sparsity_, emit_scratch_;
};

}  // namespace
}  // namespace thinkv::bench

extern "C" {

const char* thinkv_bench_error() {
  return thinkv::bench::last_error.c_str();
}

void* thinkv_bench_lanes_make(const ThinkvBenchCase* c) {
  auto lanes = std::make_unique<thinkv::bench::Lanes>(*c);
  return lanes->make(*c) ? lanes.release() : nullptr;
}

int thinkv_bench_lanes_launch(void* lanes, uint32_t copy, const void* q, void* out, float* lse,
                              cudaStream_t stream) {
  const cudaError_t error =
      static_cast<thinkv::bench::Lanes*>(lanes)->launch(copy, q, out, lse, stream);
  if (error != cudaSuccess) thinkv::bench::last_error = cudaGetErrorString(error);
  return error;
}

// out: live bytes, touched bytes, held bytes of one copy, pages of one copy
void thinkv_bench_lanes_bytes(void* lanes, uint64_t* out) {
  static_cast<thinkv::bench::Lanes*>(lanes)->bytes(out);
}

void thinkv_bench_lanes_free(void* lanes) {
  delete static_cast<thinkv::bench::Lanes*>(lanes);
}

}  // extern "C"
