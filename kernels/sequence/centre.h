// centre.h: the centres of a sequence's lanes (kernels/policy/centre.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sequence/shared_vector.h"

namespace thinkv::kernels {

// 64 channels of one lane, fp16. A lane has head_dim / 64 of them.
struct CentrePiece {
  uint16_t channels[64];
};
static_assert(sizeof(CentrePiece) == 2 * kGranuleBytes);
using CentreTable = SharedVector<CentrePiece>;

// The centres in the sequence's metadata, and as floats in this process.
class Centres {
 public:
  [[nodiscard]] static uint32_t pieces(uint32_t lanes, uint32_t head_dim) {
    return lanes * (head_dim / 64);
  }
  // Zeros. Requires: the pages of `pieces` elements promised.
  void create(CentreTable table, uint32_t lanes, uint32_t head_dim);
  // Result: false where the table is not that of so many lanes.
  [[nodiscard]] bool load(CentreTable table, uint32_t lanes, uint32_t head_dim);
  // A new centre of a lane: mean [head_dim], rotated where keys are. Requires: no token in it.
  void set(CentreTable table, uint32_t lane, std::span<const float> mean);
  // Takes the lane's centre off `count` keys [count, head_dim]. Nothing without create or load.
  void take_off(uint32_t lane, float* k, uint32_t count) const;
  // [head_dim]; none without create or load.
  [[nodiscard]] std::span<const float> of(uint32_t lane) const {
    if (floats_.empty()) return {};
    return std::span(floats_).subspan(size_t{lane} * head_dim_, head_dim_);
  }
  // What the scores of a query lack, before they are scaled: q . c. q [head_dim], as keys are kept.
  [[nodiscard]] float missing(uint32_t lane, const float* q) const;

 private:
  [[nodiscard]] float* row(uint32_t lane) { return floats_.data() + size_t{lane} * head_dim_; }

  uint32_t head_dim_ = 0;
  std::vector<float> floats_;  // [lanes, head_dim]
};

}  // namespace thinkv::kernels
