// prompt_pages.cuh: where the tokens of a prompt lie in the pages of a lane, until its end.
//
// A prompt is written into empty lanes, so the page and slot of a token are known from its index.
// Of a sparse layer of a policy with a tier the middle is left out, as if it were not there;
// of a policy with entropy the beginning, which is in streams.
#pragma once

#include <cstdint>

#include "kernels/cuda/coded_lane.cuh"

namespace thinkv::cuda {

// A prompt as pages: sink pages first.
struct PromptPages {
  Format sink_format;
  Format other_format;
  uint32_t sinks;  // tokens
  uint32_t sink_slots;
  uint32_t other_slots;
  uint32_t sink_pages;
  uint32_t pages;   // of a lane
  uint32_t tokens;  // in them
  uint32_t gap_at;  // tokens from this one on are `gap` positions later
  uint32_t gap;
  uint32_t coded;  // of the gap, tokens in streams, which stay live

  [[nodiscard]] __device__ __forceinline__ uint32_t position(uint32_t token) const {
    return token < gap_at ? token : token + gap;
  }
};

// One page of it.
struct PromptPage {
  Format format;
  uint32_t first;  // token
  uint32_t count;
  uint32_t slots;
};

__device__ __forceinline__ PromptPages split_prompt(const BatchView& view,
                                                    const DeviceSequence* sequence, uint32_t layer,
                                                    uint32_t all) {
  const PolicyParams& p = sequence->policy;
  const bool tier = p.tier.on(), dense = tier && p.tier.dense(layer);
  const Format sink = dense ? p.tier.dense_format : p.sink_format;
  const Format other = dense ? p.tier.dense_format : p.prompt_format;
  PromptPages split{};
  if (!format_valid(static_cast<uint8_t>(sink)) || !format_valid(static_cast<uint8_t>(other))) {
    raise_fault(view.lease, kBadMetadata);
    return split;  // no pages
  }
  const uint32_t dim = view.geometry.head_dim;
  if (tier && !dense) {
    split.gap_at = p.tier.kept_first(all);
    split.gap = p.tier.tier_tokens(all);
  }
  if (p.entropy.on()) {
    split.gap_at = 0;
    split.gap = split.coded = min(policy::coded_tokens(p.entropy, all), all);
  }
  const uint32_t tokens = split.tokens = all - split.gap;
  split.sink_format = resolve_format(view, sink);
  split.other_format = resolve_format(view, other);
  split.sinks = split.sink_format == split.other_format ? 0 : min(tokens, p.sink_tokens);
  split.sink_slots = slot_shape(dim, static_cast<uint32_t>(split.sink_format)).slots;
  split.other_slots = slot_shape(dim, static_cast<uint32_t>(split.other_format)).slots;
  split.sink_pages = (split.sinks + split.sink_slots - 1) / split.sink_slots;
  split.pages =
      split.sink_pages + (tokens - split.sinks + split.other_slots - 1) / split.other_slots;
  return split;
}

__device__ __forceinline__ PromptPage prompt_page(const PromptPages& split, uint32_t index) {
  if (index < split.sink_pages) {
    const uint32_t first = index * split.sink_slots;
    return {split.sink_format, first, min(split.sinks - first, split.sink_slots), split.sink_slots};
  }
  const uint32_t first = split.sinks + (index - split.sink_pages) * split.other_slots;
  return {split.other_format, first, min(split.tokens - first, split.other_slots),
          split.other_slots};
}

// Where one token is.
struct PromptSlot {
  uint32_t page;  // index of the descriptor
  uint32_t slot;
  Format format;
};
[[nodiscard]] __device__ __forceinline__ PromptSlot prompt_slot(const PromptPages& split,
                                                                uint32_t token) {
  if (token < split.sinks) {
    return {token / split.sink_slots, token % split.sink_slots, split.sink_format};
  }
  const uint32_t other = token - split.sinks;
  return {split.sink_pages + other / split.other_slots, other % split.other_slots,
          split.other_format};
}

// A lane of a prompt that was written and not ended; lane null, with kBadMetadata raised, where it
// is not that.
[[nodiscard]] __device__ inline LaneView prompt_lane(const BatchView& view,
                                                     DeviceSequence* sequence, uint32_t index,
                                                     const PromptPages& split, uint32_t tokens) {
  LaneView lane = lane_view(view, sequence, index);
  if (lane.lane == nullptr) return lane;
  const DeviceLane& l = *lane.lane;
  if (split.pages > 0 && split.gap == 0 && l.pages == split.pages && l.live == tokens &&
      l.buffer_count == 0) {
    return lane;
  }
  raise_fault(view.lease, kBadMetadata);
  lane.lane = nullptr;
  return lane;
}

// The descriptor of a prompt's slot, or null with kBadMetadata raised. Requires: prompt_lane().
[[nodiscard]] __device__ __forceinline__ DeviceDescriptor* prompt_descriptor(
    const LaneView& lane, const PromptSlot& where) {
  DeviceDescriptor* d = descriptor_at(lane, where.page);
  if (d == nullptr || d->format == static_cast<uint8_t>(where.format)) return d;
  raise_fault(lane.batch->lease, kBadMetadata);
  return nullptr;
}

}  // namespace thinkv::cuda
