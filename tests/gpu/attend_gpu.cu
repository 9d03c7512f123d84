// attend_gpu.cu: the CUDA decode attention against the oracle.
//
// Formats and mixtures, groups 1 to 16, lengths 0 to 128K, live fractions, windows, emission,
// element types, rotation; dead slots, spare bytes, outputs and scratch hold NaN patterns. Bounds
// in attend_case.h. Prints a line a case; exit status 1 if one fails. With an argument: every
// argument-th case only.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <future>
#include <utility>
#include <vector>

#include "tests/gpu/attend_case.h"
#include "tests/gpu/device_array.h"

namespace thinkv::gputest {
namespace {

std::vector<std::vector<Format>> format_sets() {
  std::vector<std::vector<Format>> sets;
  for (uint32_t f = 1; f < kAllFormatCount; ++f) sets.push_back({static_cast<Format>(f)});
  sets.push_back({Format::kF16, Format::kK4V4, Format::kK4V2, Format::kK2V2, Format::kK8V4});
  sets.push_back({Format::kBf16, Format::kK4V4, Format::kNvfp4, Format::kTernary, Format::kK8V8});
  sets.push_back({Format::kF16, Format::kKivi4, Format::kK4V4, Format::kPair2, Format::kThink});
  return sets;
}

const std::vector<uint32_t> kLengths = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 700, 4096, 0};

cuda::AttendShape shape_for(const AttendCase& c) {
  return cuda::attend_shape(132, c.lanes(), c.head_dim, c.lanes() % 2 == 0);
}

std::vector<AttendCase> all_cases() {
  std::vector<AttendCase> cases;
  const std::vector<uint32_t> groups = {1, 2, 4, 5, 7, 8, 16, 9};
  size_t turn = 0;
  for (const uint32_t head_dim : {64u, 128u, 256u}) {
    for (const auto& formats : format_sets()) {
      for (const double live : {1.0, 0.5, 0.99, 0.01, 0.0}) {
        AttendCase c{.head_dim = head_dim, .formats = formats, .lengths = kLengths, .live = live};
        c.group = groups[turn++ % groups.size()];
        c.kv_heads = 2;
        c.q_element = static_cast<Element>(turn % 3);
        c.out_element = static_cast<Element>(turn / 3 % 3);
        c.rotate = turn % 2 == 0;
        c.lse = turn % 5 != 0;
        cases.push_back(c);
        if (live == 0.01) continue;
        c.window = turn % 2 == 0 ? 300 : 0;
        c.sinks = 4;
        c.emit = static_cast<uint8_t>(1 + turn % 3);
        c.reduce = static_cast<kernels::GqaReduce>(turn / 2 % 3);
        cases.push_back(c);
      }
    }
  }
  cases.push_back({.group = 4, .lengths = {131072, 1, 40, 33}});
  cases.push_back({.group = 4, .formats = {Format::kF16}, .lengths = {9000, 1, 40, 9000}});
  cases.push_back({.group = 1, .lengths = std::vector<uint32_t>(2000, 40)});
  cases.push_back({.group = 4, .lengths = std::vector<uint32_t>(64, 1000), .rotate = true});
  for (AttendCase& c : cases) c.shape = shape_for(c);
  return cases;
}

bool check(const AttendCase& c, const AttendInput& in) {
  const AttendOutput got = run_case<DeviceArray>(c, in, [](cudaError_t error) {
    CUDA_OK(error);
    CUDA_OK(cudaDeviceSynchronize());
  });
  const Worst worst = compare(c, in, got);
  std::printf("%s %s: of the bounds: value %.3f cosine %.3f lse %.3f score %.3f sparsity %.0f\n",
              worst.ok() ? "ok  " : "FAIL", c.describe().c_str(), worst.value, worst.cosine,
              worst.lse, worst.score, worst.sparsity);
  return worst.ok();
}

int check_all(size_t every) {
  const std::vector<AttendCase> cases = all_cases();
  size_t run = 0, failed = 0;
  std::vector<std::future<bool>> pending;
  for (size_t i = 0; i < cases.size(); i += every) {
    pending.push_back(std::async(
        std::launch::async, [&cases, i] { return check(cases[i], AttendInput(cases[i], i + 1)); }));
    if (pending.size() < 16 && i + every < cases.size()) continue;
    for (auto& one : pending) failed += one.get() ? 0 : 1;
    run += pending.size();
    pending.clear();
  }
  std::printf("%zu passed, %zu failed\n", run - failed, failed);
  return failed != 0;
}

}  // namespace
}  // namespace thinkv::gputest

int main(int argc, char** argv) {
  return thinkv::gputest::check_all(argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1);
}
