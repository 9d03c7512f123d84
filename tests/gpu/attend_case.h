// attend_case.h: one launch of decode attention on random lanes, against the oracle in double.
//
// The memory that the launch works on is a template parameter: the GPU's (attend_gpu.cu) or, for
// the emulated kernels, the host's (tests/unit/cuda_attend_test.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/kernels.h"
#include "kernels/sequence/scores.h"
#include "tests/gpu/page_image.h"

namespace thinkv::gputest {

using cuda::Element;

struct AttendCase {
  uint32_t head_dim = 128, group = 4, kv_heads = 1;
  std::vector<Format> formats = {Format::kK4V4};
  std::vector<uint32_t> lengths = {64};  // slots of each lane; a multiple of kv_heads lanes
  double live = 1.0;
  Element q_element = Element::kF16, out_element = Element::kF32;
  bool rotate = false, lse = true;
  uint32_t window = 0, sinks = 0;
  uint8_t emit = 0;  // of every other sequence
  kernels::GqaReduce reduce = kernels::GqaReduce::kMeanProbability;
  cuda::AttendShape shape{132, 16};

  [[nodiscard]] uint32_t lanes() const { return static_cast<uint32_t>(lengths.size()); }
  // 16-bit words of a slot's number: 2 for sums.
  [[nodiscard]] size_t score_halves() const { return (emit & cuda::kEmitSums) != 0 ? 2 : 1; }
  [[nodiscard]] bool emits(uint32_t lane) const { return emit != 0 && lane / kv_heads % 2 == 0; }
  [[nodiscard]] bool has(Format format) const {
    return std::find(formats.begin(), formats.end(), format) != formats.end();
  }
  [[nodiscard]] bool has_blocks() const {
    return std::any_of(formats.begin(), formats.end(), is_block);
  }
  // bf16 keys: q is rounded to 8 bits for them.
  [[nodiscard]] bool has_bf16() const { return has(Format::kBf16) || has(Format::kThinkBf16); }
  [[nodiscard]] std::string describe() const {
    std::string text =
        "head_dim " + std::to_string(head_dim) + " group " + std::to_string(group) + " formats";
    for (const Format f : formats) text += " " + std::string(format_info(f).name);
    text += " live " + std::to_string(live) + " q " + std::to_string(static_cast<int>(q_element)) +
            " out " + std::to_string(static_cast<int>(out_element)) + (rotate ? " rotated" : "") +
            " window " + std::to_string(window) + " emit " + std::to_string(emit) + " reduce " +
            std::to_string(static_cast<int>(reduce)) + " ctas " + std::to_string(shape.ctas) +
            " x " + std::to_string(shape.warps);
    return text;
  }
};

[[nodiscard]] inline float element_value(Element element, const uint8_t* at) {
  uint32_t raw = 0;
  std::memcpy(&raw, at, element_bytes(element));
  if (element == Element::kF32) return std::bit_cast<float>(raw);
  return element == Element::kF16 ? fp16_to_float(static_cast<uint16_t>(raw))
                                  : bf16_to_float(static_cast<uint16_t>(raw));
}

struct AttendInput {
  AttendInput(const AttendCase& c, uint64_t seed) : image(c.head_dim, seed) {
    std::mt19937_64 rng(seed + 1);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    for (const uint32_t length : c.lengths) {
      for (uint32_t done = 0; done < length;) {
        const Format format = c.formats[rng() % c.formats.size()];
        const uint32_t slots = std::min(length - done, page_layout(format, c.head_dim).slots);
        uint64_t mask = 0;
        for (uint32_t i = 0; i < slots; ++i) mask |= uint64_t{uniform(rng) < c.live} << i;
        pages.push_back(image.add(format, mask, done));
        done += slots;
      }
      lane_begin.push_back(static_cast<uint32_t>(pages.size()));
    }
    for (uint32_t sequence = 0; sequence * c.kv_heads < c.lanes(); ++sequence) {
      query_position.push_back(c.lengths[sequence * c.kv_heads]);
      emit.push_back(c.emits(sequence * c.kv_heads) ? c.emit : uint8_t{0});
    }
    std::normal_distribution<float> normal(0.0f, 1.0f);
    q.resize(uint64_t{c.lanes()} * c.group * c.head_dim * element_bytes(c.q_element));
    for (size_t i = 0; i < q.size(); i += element_bytes(c.q_element)) {
      const float x = normal(rng);
      const uint32_t raw = c.q_element == Element::kF32   ? std::bit_cast<uint32_t>(x)
                           : c.q_element == Element::kF16 ? fp16_from_float(x)
                                                          : bf16_from_float(x);
      std::memcpy(&q[i], &raw, element_bytes(c.q_element));
    }
    scores.resize(pages.size() * kSlotsPerPageMax * c.score_halves());
    for (size_t i = 0; i < pages.size() * kSlotsPerPageMax; ++i) {
      const auto x = static_cast<float>(uniform(rng));
      const uint16_t half = fp16_from_float(x);
      if (c.score_halves() == 2) std::memcpy(&scores[2 * i], &x, sizeof x);
      if (c.score_halves() == 1) scores[i] = half;
    }
  }
  PageImage image;
  std::vector<ImagePage> pages;
  std::vector<uint32_t> lane_begin = {0}, query_position;
  std::vector<uint8_t> emit, q;
  std::vector<uint16_t> scores;  // [pages][64] fp16 before the step, or fp32 in halves
};

struct AttendOutput {
  std::vector<uint8_t> out;
  std::vector<float> lse;
  std::vector<uint16_t> scores;
  std::vector<cuda::LaneSparsity> sparsity;
};

[[nodiscard]] inline float sum_at(const std::vector<uint16_t>& scores, size_t at) {
  float sum = 0.0f;
  std::memcpy(&sum, &scores[at], sizeof sum);
  return sum;
}

[[nodiscard]] inline float softmax_scale(uint32_t head_dim) {
  return 1.0f / std::sqrt(static_cast<float>(head_dim));
}

// Array<T>: Array(vector), data, host(). All outputs and scratch start as 0xFF bytes.
template <template <class> class Array, class Finish>
AttendOutput run_case(const AttendCase& c, const AttendInput& in, const Finish& finish) {
  const uint32_t rows = c.lanes() * c.group;
  const Array<uint8_t> image(in.image.bytes());
  std::vector<cuda::PageView> views;
  std::vector<uint16_t*> score_rows;
  const Array<uint16_t> scores(in.scores);
  for (const ImagePage& page : in.pages) {
    score_rows.push_back(scores.data + score_rows.size() * kSlotsPerPageMax * c.score_halves());
    views.push_back(page.view(image.data, c.head_dim));
  }
  const Array<cuda::PageView> pages(views);
  const Array<uint32_t> begins(in.lane_begin), query_position(in.query_position);
  const Array<uint8_t> q(in.q), emit(in.emit);
  const Array<uint16_t*> rows_of_scores(score_rows);
  const Array<uint8_t> out(
      std::vector<uint8_t>(uint64_t{rows} * c.head_dim * element_bytes(c.out_element), 0xFF));
  const Array<float> lse(std::vector<float>(rows, std::nanf("")));
  const Array<cuda::LaneSparsity> sparsity(std::vector<cuda::LaneSparsity>(c.lanes(), {77, 77}));
  const Array<float> parts(std::vector<float>(
      cuda::attend_part_floats(c.shape, c.lanes(), c.group, c.head_dim), std::nanf("")));
  const Array<uint8_t> scratch(
      std::vector<uint8_t>(cuda::emit_scratch_bytes(in.pages.size(), c.group), 0xFF));
  const cuda::AttendParams p{.pages = pages.data,
                             .lane_begin = begins.data,
                             .q = q.data,
                             .out = out.data,
                             .lse = c.lse ? lse.data : nullptr,
                             .parts = parts.data,
                             .lanes = c.lanes(),
                             .group = c.group,
                             .kv_heads = c.kv_heads,
                             .head_dim = c.head_dim,
                             .softmax_scale = softmax_scale(c.head_dim),
                             .q_element = c.q_element,
                             .out_element = c.out_element,
                             .rotate = c.rotate,
                             .blocks = c.has_blocks(),
                             .window = c.window,
                             .sinks = c.sinks,
                             .query_position = query_position.data,
                             .emit = c.emit != 0 ? emit.data : nullptr,
                             .score_rows = rows_of_scores.data,
                             .sparsity = sparsity.data,
                             .emit_scratch = scratch.data,
                             .score_reduce = static_cast<uint8_t>(c.reduce)};
  finish(cuda::launch_attend(p, c.shape, nullptr));
  return {out.host(), lse.host(), scores.host(), sparsity.host()};
}

// What the oracle says of one lane.
struct LaneAnswer {
  std::vector<float> out, lse, probabilities;
  kernels::SparsityCount sparsity, fewest, most;  // with the bound moved a little down and up
  double value_rms = 1.0;
};

[[nodiscard]] inline double value_rms(const AttendCase& c,
                                      std::span<const kernels::PageView> pages) {
  double energy = 0.0;
  uint64_t count = 0;
  for (const kernels::PageView& page : pages) {
    std::vector<uint8_t> slots;
    for (uint8_t slot = 0; slot < 64; ++slot) {
      if (((page.live >> slot) & 1) != 0) slots.push_back(slot);
    }
    std::vector<float> v(slots.size() * c.head_dim);
    kernels::reference().decode({.page = page.bytes,
                                 .format = page.format,
                                 .head_dim = c.head_dim,
                                 .slots = slots,
                                 .k = nullptr,
                                 .v = v.data()});
    for (const float x : v) energy += double{x} * double{x};
    count += v.size();
  }
  return count == 0 ? 1.0 : std::sqrt(energy / static_cast<double>(count));
}

[[nodiscard]] inline LaneAnswer ask_oracle(const AttendCase& c, const AttendInput& in,
                                           uint32_t lane) {
  std::vector<kernels::PageView> pages;
  const auto* image = reinterpret_cast<const std::byte*>(in.image.bytes().data());
  for (uint32_t i = in.lane_begin[lane]; i < in.lane_begin[lane + 1]; ++i) {
    const ImagePage& page = in.pages[i];
    pages.push_back({image + page.index * page_bytes(c.head_dim), page.live, page.format});
  }
  std::vector<float> q(size_t{c.group} * c.head_dim);
  for (size_t i = 0; i < q.size(); ++i) {
    const size_t at = (size_t{lane} * q.size() + i) * element_bytes(c.q_element);
    q[i] = element_value(c.q_element, &in.q[at]);
  }
  if (c.rotate) kernels::reference().rotate(q.data(), c.group, c.head_dim);
  LaneAnswer answer{.out = std::vector<float>(q.size()),
                    .lse = std::vector<float>(c.group),
                    .probabilities = std::vector<float>(pages.size() * kSlotsPerPageMax),
                    .sparsity = {},
                    .fewest = {},
                    .most = {}};
  kernels::AttendParams params{.pages = pages,
                               .head_dim = c.head_dim,
                               .group = c.group,
                               .q = q.data(),
                               .softmax_scale = softmax_scale(c.head_dim),
                               .out = answer.out.data(),
                               .lse = answer.lse.data(),
                               .window = c.window,
                               .sinks = c.sinks,
                               .query_position = in.query_position[lane / c.kv_heads],
                               .sparsity = &answer.sparsity,
                               .probabilities = answer.probabilities.data(),
                               .reduce = c.reduce};
  kernels::reference().attend(params);
  if (c.emits(lane)) {
    for (const bool up : {false, true}) {
      params.near_zero = up ? 0.0102f : 0.0098f;
      params.sparsity = up ? &answer.most : &answer.fewest;
      kernels::reference().attend(params);
    }
  }
  if (c.rotate) kernels::reference().rotate_back(answer.out.data(), c.group, c.head_dim);
  answer.value_rms = value_rms(c, pages);
  return answer;
}

// The largest errors, as shares of their bounds.
struct Worst {
  double value = 0.0, cosine = 0.0, lse = 0.0, score = 0.0, sparsity = 0.0;
  [[nodiscard]] bool ok() const {
    return value < 1.0 && cosine < 1.0 && lse < 1.0 && score < 1.0 && sparsity < 1.0;
  }
  static void raise(double& worst, double error) {
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
};

// Bounds: 1e-3 rms(V) + 2/128 |o|, cosine distance 5e-6, log-sum-exp 1e-4 where q is exact in the
// kernel (not rotated, and fp16 or smaller); where the kernel rounds q, what that costs: 2^-11 of a
// logit's standard deviation, or 2^-8 where the page is bf16. Keys of blocks are rounded as well:
// twice that, in the log-sum-exp and in what moved probabilities make of the output.
struct Bounds {
  explicit Bounds(const AttendCase& c) {
    const bool exact = !c.rotate && c.q_element != Element::kF32 &&
                       (c.q_element == Element::kBf16 || !c.has_bf16()) && !c.has_blocks();
    const bool bf16 = c.has_bf16();
    value = exact ? 1.0 : bf16 ? 6.0 : c.has_blocks() ? 4.0 : 2.0;
    cosine = (exact && !bf16 ? 5e-6
              : bf16         ? 1e-4
                             : 2e-5) +
             (c.out_element == Element::kBf16 ? 8e-6 : 0);
    lse = exact ? 1e-4 : bf16 ? 1.2e-2 : c.has_blocks() ? 3e-3 : 1.5e-3;
  }
  double value, cosine, lse;
};

// What emission made of a lane's scores, or of its sums.
inline void compare_scores(const AttendCase& c, const AttendInput& in, const AttendOutput& got,
                           uint32_t lane, const LaneAnswer& want, Worst& worst) {
  const Bounds bounds(c);
  const bool scores = c.emits(lane) && (c.emit & (cuda::kEmitScores | cuda::kEmitSums)) != 0;
  const uint32_t first = in.lane_begin[lane] * kSlotsPerPageMax;
  for (uint32_t i = 0; i < want.probabilities.size(); ++i) {
    const ImagePage& page = in.pages[(first + i) / kSlotsPerPageMax];
    const bool touched = scores && ((page.live >> (i % kSlotsPerPageMax)) & 1) != 0;
    const bool sums = c.score_halves() == 2;
    const size_t at = size_t{first + i} * c.score_halves(), bytes = 2 * c.score_halves();
    if (!touched) {
      if (std::memcmp(&in.scores[at], &got.scores[at], bytes) != 0) worst.score = INFINITY;
      continue;
    }
    const double probability = double{want.probabilities[i]};
    const double expected =
        sums ? double{sum_at(in.scores, at)} + probability
             : double{fp16_to_float(kernels::add_score(in.scores[at], want.probabilities[i]))};
    const float after = sums ? sum_at(got.scores, at) : fp16_to_float(got.scores[at]);
    const double step = sums ? 0x1p-22 : 0x1p-10;  // of what the number can hold
    const double bound = step * std::max(1.0, expected) + (bounds.lse + 6e-3) * probability;
    Worst::raise(worst.score, std::abs(double{after} - expected) / bound);
  }
}

inline void compare_lane(const AttendCase& c, const AttendInput& in, const AttendOutput& got,
                         uint32_t lane, Worst& worst) {
  const LaneAnswer want = ask_oracle(c, in, lane);
  const Bounds bounds(c);
  for (uint32_t h = 0; h < c.group; ++h) {
    const size_t row = size_t{lane} * c.group + h;
    double dot = 0.0, gg = 0.0, ww = 0.0;
    for (uint32_t d = 0; d < c.head_dim; ++d) {
      const size_t at = (row * c.head_dim + d) * element_bytes(c.out_element);
      const double g = double{element_value(c.out_element, &got.out[at])};
      const double w = double{want.out[size_t{h} * c.head_dim + d]};
      const double bound = 1e-3 * want.value_rms + 2.0 / 128 * std::abs(w);
      Worst::raise(worst.value, std::abs(g - w) / bound / bounds.value);
      dot += g * w, gg += g * g, ww += w * w;
    }
    const double lse = double{want.lse[h]};
    if (std::isinf(lse)) {
      if ((c.lse && got.lse[row] != want.lse[h]) || gg != 0.0) worst.lse = INFINITY;
      continue;
    }
    Worst::raise(worst.cosine, (1.0 - dot / std::sqrt(gg * ww)) / bounds.cosine);
    if (c.lse) Worst::raise(worst.lse, std::abs(double{got.lse[row]} - lse) / bounds.lse);
  }
  const cuda::LaneSparsity sparsity = got.sparsity[lane];
  if (c.emits(lane) && (c.emit & cuda::kEmitSparsity) != 0) {
    if (sparsity.live != want.sparsity.live || sparsity.near_zero < want.fewest.near_zero ||
        sparsity.near_zero > want.most.near_zero) {
      worst.sparsity = INFINITY;
    }
  } else if (sparsity.live != 77 || sparsity.near_zero != 77) {
    worst.sparsity = INFINITY;  // written where nobody asked
  }
  compare_scores(c, in, got, lane, want, worst);
}

[[nodiscard]] inline Worst compare(const AttendCase& c, const AttendInput& in,
                                   const AttendOutput& got) {
  Worst worst;
  for (uint32_t lane = 0; lane < c.lanes(); ++lane) compare_lane(c, in, got, lane, worst);
  return worst;
}

}  // namespace thinkv::gputest
