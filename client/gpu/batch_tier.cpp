// batch_tier.cpp: what a batch does for sequences that have rows in a host tier.
#include "client/gpu/batch.h"

namespace thinkv::client {

Status GpuBatch::use_tier(const GpuSequence& sequence) {
  const GpuTier* const tier = sequence.tier();
  if (tier == nullptr) return {};
  if (view_.tiers == nullptr && launched_) {
    return make_error(ErrorCode::kInvalidArgument,
                      "this batch's steps were launched without reading a host tier, which this "
                      "sequence's policy has: open another batch for it");
  }
  if (!tier_memory_.is_open()) THINKV_TRY(tier_memory_.open(*engine_, options_.capacity));
  THINKV_TRY(tier_memory_.make_room(*engine_, *tier));
  tier_memory_.show(view_);
  return {};
}

Status GpuBatch::prefetch(uint32_t row, uint32_t layer, const void* q, cuda::Element element) {
  THINKV_TRY(require_layer(layer));
  if (rows_[row] == nullptr || rows_[row]->tier() == nullptr) return {};
  const uint32_t heads = engine_->geometry().kv_heads;
  const cuda::ContextScope context(engine_->gpu());
  return GpuEngine::launched(engine_->kernels().tier_choose(
                                 view_, {q, element, layer, row * heads, heads}, engine_->stream()),
                             "tier_choose");
}

// Chooses and copies the rows that the layer attends. Requires: the context is current.
Status GpuBatch::fetch(uint32_t layer, const Attend& io) {
  if (view_.tiers == nullptr) return {};
  return GpuEngine::launched(engine_->kernels().tier_fetch(
                                 view_, {io.q, io.q_element, layer, 0, lanes_}, engine_->stream()),
                             "tier_fetch");
}

}  // namespace thinkv::client
