#include "kernels/sequence/survivors.h"

#include <algorithm>
#include <numeric>

#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// The smallest fp16: a token that was never attended still weighs something.
constexpr float kWeightFloor = 0x1p-24f;

void keep_best(const SurvivorParams& p) {
  std::iota(p.scratch.begin(), p.scratch.end(), 0u);
  std::sort(p.scratch.begin(), p.scratch.end(), [&](uint32_t a, uint32_t b) {
    return p.scores[a] != p.scores[b] ? p.scores[a] > p.scores[b] : a > b;
  });
  std::fill(p.keep.begin(), p.keep.end(), uint8_t{0});
  for (uint32_t i = 0; i < p.target; ++i) p.keep[p.scratch[i]] = 1;
}

void keep_newest(const SurvivorParams& p) {
  const size_t dropped = p.keep.size() - p.target;
  std::fill_n(p.keep.begin(), dropped, uint8_t{0});
  std::fill(p.keep.begin() + static_cast<std::ptrdiff_t>(dropped), p.keep.end(), uint8_t{1});
}

}  // namespace

void select_survivors(const KernelSet& kernels, const SurvivorParams& p) {
  THINKV_CHECK(p.target >= 1 && p.target <= p.keep.size());
  if (p.rule == SelectRule::kAttention) return keep_best(p);
  if (p.rule == SelectRule::kRecent) return keep_newest(p);
  const bool weighted = p.rule == SelectRule::kWeightedMedoids;
  if (weighted) {
    for (float& score : p.scores) score = std::max(score, kWeightFloor);
  }
  kernels.medoids({.keys = p.keys,
                   .weights = weighted ? p.scores.data() : nullptr,
                   .n = static_cast<uint32_t>(p.keep.size()),
                   .dim = p.dim,
                   .target = p.target,
                   .iterations = p.iterations,
                   .keep = p.keep.data()});
}

}  // namespace thinkv::kernels
