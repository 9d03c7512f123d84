#include "kernels/sequence/centre.h"

#include "kernels/policy/centre.h"
#include "kernels/policy/rank_signal.h"

namespace thinkv::kernels {

void Centres::create(CentreTable table, uint32_t lanes, uint32_t head_dim) {
  const uint32_t count = pieces(lanes, head_dim);
  table.grow_for(count);
  for (uint32_t i = 0; i < count; ++i) table.push({});
  head_dim_ = head_dim;
  floats_.assign(size_t{lanes} * head_dim, 0.0f);
}

bool Centres::load(CentreTable table, uint32_t lanes, uint32_t head_dim) {
  if (table.size() != pieces(lanes, head_dim)) return false;
  head_dim_ = head_dim;
  floats_.clear();
  floats_.reserve(size_t{lanes} * head_dim);
  table.for_each([&](uint32_t, const CentrePiece& piece) {
    for (const uint16_t bits : piece.channels) floats_.push_back(fp16_to_float(bits));
  });
  return true;
}

void Centres::set(CentreTable table, uint32_t lane, std::span<const float> mean) {
  const uint32_t first = lane * (head_dim_ / 64);
  for (uint32_t d = 0; d < head_dim_; ++d) {
    const uint16_t bits = policy::centre_bits(mean[d]);
    table[first + d / 64].channels[d % 64] = bits;
    row(lane)[d] = fp16_to_float(bits);
  }
}

void Centres::take_off(uint32_t lane, float* k, uint32_t count) const {
  if (floats_.empty()) return;
  const float* const centre = floats_.data() + size_t{lane} * head_dim_;
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t d = 0; d < head_dim_; ++d) k[size_t{i} * head_dim_ + d] -= centre[d];
  }
}

float Centres::missing(uint32_t lane, const float* q) const {
  if (floats_.empty()) return 0.0f;
  return policy::dot(floats_.data() + size_t{lane} * head_dim_, q, head_dim_);
}

}  // namespace thinkv::kernels
