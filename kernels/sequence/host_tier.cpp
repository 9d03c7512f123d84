#include "kernels/sequence/host_tier.h"

#include <algorithm>
#include <cmath>

#include "kernels/policy/tier_select.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

uint16_t to_wide(float value, Format wide) {
  return wide == Format::kBf16 ? bf16_from_float(value) : fp16_from_float(value);
}
float from_wide(uint16_t bits, Format wide) {
  return wide == Format::kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

}  // namespace

void TierLane::put(Format wide, uint32_t head_dim, uint32_t first, std::span<const float> k,
                   std::span<const float> v) {
  THINKV_CHECK(k.size() == v.size() && k.size() % head_dim == 0);
  wide_ = wide;
  head_dim_ = head_dim;
  first_ = first;
  tokens_ = static_cast<uint32_t>(k.size() / head_dim);
  k_.resize(k.size());
  v_.resize(v.size());
  channels_.resize(k.size());
  key_max_.assign(head_dim, 0.0f);
  for (size_t i = 0; i < k.size(); ++i) {
    k_[i] = to_wide(k[i], wide);
    v_[i] = to_wide(v[i], wide);
    const size_t channel = i % head_dim;
    channels_[channel * tokens_ + i / head_dim] = k_[i];
    key_max_[channel] = std::max(key_max_[channel], std::fabs(from_wide(k_[i], wide)));
  }
}

void TierLane::choose(const TierParams& params, const float* q, uint32_t group,
                      TierScratch& scratch) const {
  scratch.query.resize(head_dim_);
  policy::mean_query(q, group, scratch.query);
  policy::choose_channels(scratch.query, key_max_, params.channels, scratch.channels);
  scratch.scores.assign(tokens_, 0.0f);
  for (const uint32_t channel : scratch.channels) {
    const float weight = scratch.query[channel];
    const uint16_t* const keys = channels_.data() + size_t{channel} * tokens_;
    for (uint32_t i = 0; i < tokens_; ++i) scratch.scores[i] += weight * from_wide(keys[i], wide_);
  }
  policy::choose_rows(scratch.scores, params.fetch, scratch.rows);
}

void TierLane::read(uint32_t row, float* k, float* v) const {
  THINKV_CHECK(row < tokens_);
  const size_t begin = size_t{row} * head_dim_;
  for (uint32_t c = 0; c < head_dim_; ++c) {
    k[c] = from_wide(k_[begin + c], wide_);
    v[c] = from_wide(v_[begin + c], wide_);
  }
}

}  // namespace thinkv::kernels
