// attend_gpu.cu: the CUDA decode attention against fp64 on the decoded bytes.
//
// Every format and a mixture, groups, lengths 0 to 9,000 and live fractions; dead slots and spare
// bytes hold NaN patterns. Bounds: 1e-3 x rms(V) absolute, 2/128 relative, cosine distance 5e-6,
// log-sum-exp 1e-4. Prints a line a case; exit status 1 if one fails.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/device_array.h"
#include "tests/gpu/page_image.h"

namespace thinkv::gputest {
namespace {

using cuda::AttendParams;
using cuda::LaunchShape;

struct Case {
  uint32_t head_dim, group;
  std::vector<Format> formats;
  std::vector<uint32_t> lengths;  // slots of each lane
  double live;
  uint32_t warps;
};

struct Input {
  Input(const Case& c, uint64_t seed) : image(c.head_dim, seed) {
    std::mt19937_64 rng(seed + 1);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    for (const uint32_t length : c.lengths) {
      for (uint32_t left = length; left > 0;) {
        const Format format = c.formats[rng() % c.formats.size()];
        const uint32_t slots = std::min(left, page_layout(format, c.head_dim).slots);
        uint64_t live = 0;
        for (uint32_t i = 0; i < slots; ++i) live |= uint64_t{uniform(rng) < c.live} << i;
        pages.push_back({live, image.add(format, live), format, {}});
        left -= slots;
      }
      lane_begin.push_back(static_cast<uint32_t>(pages.size()));
    }
    std::normal_distribution<float> normal(0.0f, 1.0f);
    q.resize(c.lengths.size() * c.group * c.head_dim);
    for (uint16_t& value : q) value = fp16_from_float(normal(rng));
  }
  PageImage image;
  std::vector<DevicePage> pages;
  std::vector<uint32_t> lane_begin = {0};
  std::vector<uint16_t> q;
};

struct Output {
  std::vector<float> values, lse;
};

float softmax_scale(const Case& c) {
  return 1.0f / std::sqrt(static_cast<float>(c.head_dim));
}

Output run(const Case& c, const Input& in) {
  const size_t rows = c.lengths.size() * c.group;
  DeviceArray<uint8_t> bytes(in.image.bytes());
  DeviceArray<DevicePage> pages(in.pages);
  DeviceArray<uint32_t> begins(in.lane_begin);
  DeviceArray<const unsigned char*> extents(std::vector<const unsigned char*>{bytes.data});
  DeviceArray<uint16_t> q(in.q);
  DeviceArray<float> out(rows * c.head_dim), lse(rows);
  // Every output must be written.
  CUDA_OK(cudaMemset(out.data, 0xFF, rows * c.head_dim * 4));
  CUDA_OK(cudaMemset(lse.data, 0xFF, rows * 4));
  const LaunchShape shape{132, c.warps};
  DeviceArray<float> parts(cuda::part_floats(shape, c.group, c.head_dim));
  const AttendParams p{.pages = pages.data,
                       .lane_begin = begins.data,
                       .extents = extents.data,
                       .q = q.data,
                       .out = out.data,
                       .lse = lse.data,
                       .parts = parts.data,
                       .lanes = static_cast<uint32_t>(c.lengths.size()),
                       .group = c.group,
                       .scale_log2 = softmax_scale(c) * 1.4426950408889634f};
  CUDA_OK(cuda::launch_attend(p, c.head_dim, shape, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  return {out.host(), lse.host()};
}

struct Lane {
  std::vector<std::vector<double>> k, v;
  double rms = 1.0;
};

Lane decode_lane(const Case& c, const Input& in, size_t lane_index) {
  Lane lane;
  double energy = 0.0;
  std::vector<double> row(c.head_dim);
  for (uint32_t i = in.lane_begin[lane_index]; i < in.lane_begin[lane_index + 1]; ++i) {
    for (uint32_t slot = 0; slot < 64; ++slot) {
      if (!((in.pages[i].live >> slot) & 1)) continue;
      in.image.decode(in.pages[i], slot, true, row);
      lane.k.push_back(row);
      in.image.decode(in.pages[i], slot, false, row);
      lane.v.push_back(row);
      for (const double x : row) energy += x * x;
    }
  }
  if (!lane.k.empty())
    lane.rms = std::sqrt(energy / static_cast<double>(lane.k.size() * c.head_dim));
  return lane;
}

// Softmax attention of one query in fp64. Returns the log-sum-exp.
double attend_fp64(const Case& c, const Lane& lane, const uint16_t* q, std::vector<double>& out) {
  std::vector<double> score(lane.k.size());
  double top = -INFINITY, sum = 0.0;
  for (size_t t = 0; t < score.size(); ++t) {
    double dot = 0.0;
    for (uint32_t d = 0; d < c.head_dim; ++d) dot += double{fp16_to_float(q[d])} * lane.k[t][d];
    score[t] = dot * double{softmax_scale(c)};
    top = std::max(top, score[t]);
  }
  std::fill(out.begin(), out.end(), 0.0);
  for (size_t t = 0; t < score.size(); ++t) {
    const double weight = std::exp(score[t] - top);
    sum += weight;
    for (uint32_t d = 0; d < c.head_dim; ++d) out[d] += weight * lane.v[t][d];
  }
  for (double& x : out) x = sum > 0.0 ? x / sum : 0.0;
  return sum > 0.0 ? top + std::log(sum) : -INFINITY;
}

struct Worst {
  double error = 0.0;  // of the bound
  double cosine = 0.0;
  double lse = 0.0;
  void add(const float* got, float got_lse, const std::vector<double>& want, double want_lse,
           double rms) {
    double dot = 0.0, gg = 0.0, ww = 0.0;
    for (size_t d = 0; d < want.size(); ++d) {
      const double bound = 1e-3 * rms + 2.0 / 128 * std::abs(want[d]);
      const double e = std::abs(got[d] - want[d]) / bound;
      error = std::isnan(e) ? INFINITY : std::max(error, e);
      dot += got[d] * want[d];
      gg += double{got[d]} * got[d];
      ww += want[d] * want[d];
    }
    if (want_lse == -INFINITY) {
      if (got_lse != -INFINITY || gg != 0.0) lse = INFINITY;
      return;
    }
    cosine = std::max(cosine, 1.0 - dot / std::sqrt(gg * ww));
    lse = std::isnan(got_lse) ? INFINITY : std::max(lse, std::abs(got_lse - want_lse));
  }
  [[nodiscard]] bool ok() const { return error < 1.0 && cosine < 5e-6 && lse < 1e-4; }
};

bool check(const Case& c, uint64_t seed) {
  const Input in(c, seed);
  const Output got = run(c, in);
  Worst worst;
  std::vector<double> want(c.head_dim);
  for (size_t l = 0; l < c.lengths.size(); ++l) {
    const Lane lane = decode_lane(c, in, l);
    for (uint32_t h = 0; h < c.group; ++h) {
      const size_t row = l * c.group + h;
      const double lse = attend_fp64(c, lane, &in.q[row * c.head_dim], want);
      worst.add(&got.values[row * c.head_dim], got.lse[row], want, lse, lane.rms);
    }
  }
  const char* format = c.formats.size() > 1 ? "mixed" : format_info(c.formats[0]).name.data();
  std::printf(
      "%s head_dim %u group %u %-5s live %.2f warps %2u: error %.3f of the bound, "
      "cosine %.2g, lse %.2g\n",
      worst.ok() ? "ok  " : "FAIL", c.head_dim, c.group, format, c.live, c.warps, worst.error,
      worst.cosine, worst.lse);
  return worst.ok();
}

int check_all() {
  const std::vector<std::vector<Format>> sets = {
      {Format::kK4V4},
      {Format::kK4V2},
      {Format::kK2V2},
      {Format::kK8V8},
      {Format::kK8V4},
      {Format::kF16},
      {Format::kF16, Format::kK4V4, Format::kK4V2, Format::kK2V2, Format::kK8V4}};
  const std::vector<uint32_t> lengths = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 700, 4096, 9000};
  std::vector<Case> cases;
  for (const uint32_t head_dim : {64u, 128u, 256u}) {
    for (const auto& formats : sets) {
      for (const uint32_t group : {1u, 4u, 7u, 8u}) {
        for (const double live : {1.0, 0.5}) {
          cases.push_back({head_dim, group, formats, lengths, live, 8});
        }
      }
      for (const double live : {0.02, 0.0}) {
        cases.push_back({head_dim, 4, formats, lengths, live, 8});
      }
      for (const uint32_t warps : {12u, 16u}) {
        cases.push_back({head_dim, 4, formats, lengths, 0.7, warps});
      }
    }
  }
  int failed = 0;
  uint64_t seed = 1;
  for (const Case& c : cases) failed += check(c, seed++) ? 0 : 1;
  std::printf("%zu passed, %d failed\n", cases.size() - static_cast<size_t>(failed), failed);
  return failed != 0;
}

}  // namespace
}  // namespace thinkv::gputest

int main() {
  return thinkv::gputest::check_all();
}
