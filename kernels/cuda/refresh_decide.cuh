// refresh_decide.cuh: what the end of a step decides for one sequence, by one warp (refresh.h): the
// order of kernels/sequence/refresh.cpp. How a warp works: refresh_segments.cuh.
#pragma once

#include <cstdint>

#include "kernels/cuda/refresh_segments.cuh"

namespace thinkv::cuda {
namespace decide_detail {

// ---- the transition ----

// Every closed segment steps down once more.
__device__ inline void demote_everything(Decision& d) {
  const PolicyParams& p = d.sequence->policy;
  uint32_t ordered = 0;
  for (uint32_t i = threadIdx.x % 32; i < d.table.size(); i += 32) {
    policy::Segment& segment = d.table[i];
    if (!policy::can_demote(segment, p) || segment.level + segment.waiting >= p.schedule_length) {
      continue;
    }
    segment.waiting = static_cast<uint8_t>(segment.waiting + 1);
    ++ordered;
  }
  ordered = warp_sum(ordered);
  if (first_thread()) d.sequence->waiting += ordered;
  __syncwarp();
}

// One level for each of segments base .. base + 31 that has an order waiting and finds room in the
// list. Result: how many stepped down.
[[nodiscard]] __device__ inline uint32_t step_down(Decision& d, uint32_t base) {
  const PolicyParams& p = d.sequence->policy;
  const uint32_t mine = base + threadIdx.x % 32;
  const bool in_table = mine < d.table.size();
  policy::Segment segment = in_table ? d.table[mine] : policy::Segment{};
  const bool waits = in_table && segment.waiting > 0 && policy::can_demote(segment, p);
  const uint32_t target = waits ? policy::demotion_target(segment, p) : 0;
  const bool lists = waits && segment.live > target;
  const uint32_t at = d.listed + below_me(__ballot_sync(kAllLanes, lists));
  const bool goes = waits && (!lists || at < d.room);
  if (goes && lists) {
    d.list[at] = {.start = segment.start, .end = segment.end, .target = target, .reserved = 0};
  }
  const uint32_t freed = warp_sum(goes && lists ? segment.live - target : 0);
  if (goes) {
    segment.level = static_cast<uint8_t>(segment.level + 1);
    segment.waiting = static_cast<uint8_t>(segment.waiting - 1);
    segment.live = min(segment.live, target);
    d.table[mine] = segment;
  }
  d.listed += static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, goes && lists)));
  d.generated -= min(freed, d.generated);
  return static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, goes)));
}

// What transitions ordered, as far as the list has room.
__device__ inline void step_down_all(Decision& d) {
  uint32_t left = d.sequence->waiting;
  const uint32_t before = left;
  for (uint32_t base = 0; base < d.table.size() && left > 0; base += 32) {
    for (uint32_t done = 1; done > 0 && left > 0;) {
      done = step_down(d, base);
      left -= min(done, left);
      __syncwarp();
    }
    if (d.listed == d.room) break;
  }
  __syncwarp();
  if (first_thread()) {
    d.sequence->waiting = d.listed == d.room ? left : 0;
    d.sequence->counters.demotions += before - left;
  }
  __syncwarp();
}

// ---- the label and the next segment ----

// The mean over kv heads of the near-zero share; NaN where it was not measured in this step.
[[nodiscard]] __device__ inline float layer_sparsity(const BatchView& view, uint32_t row,
                                                     uint32_t layer) {
  const uint32_t heads = view.geometry.kv_heads;
  const float unknown = __uint_as_float(0x7FC0'0000u);
  if (layer >= view.geometry.layers ||
      (view.emit[layer * view.capacity + row] & kEmitSparsity) == 0) {
    return unknown;
  }
  const LaneSparsity* counts = view.sparsity + (uint64_t{layer} * view.capacity + row) * heads;
  float sum = 0.0f;
  for (uint32_t head = 0; head < heads; ++head) {
    if (counts[head].live == 0) return unknown;
    sum = exact_add(sum, exact_div(static_cast<float>(counts[head].near_zero),
                                   static_cast<float>(counts[head].live)));
  }
  return exact_div(sum, static_cast<float>(heads));
}

// The mean over the label layers, a thread a layer, added in their order.
[[nodiscard]] __device__ inline float label_sparsity(const Decision& d, uint32_t row) {
  const PolicyParams& p = d.sequence->policy;
  const uint32_t count = p.label_layer_count, thread = threadIdx.x % 32;
  const float mine = thread < count ? layer_sparsity(*d.batch, row, p.label_layers[thread]) : 0.0f;
  float sum = 0.0f;
  for (uint32_t i = 0; i < count; ++i) {
    sum = exact_add(sum, __shfl_sync(kAllLanes, mine, i));
  }
  return exact_div(sum, static_cast<float>(max(count, 1u)));
}

// Room for one more segment: a new page, or the place of the second oldest. Result: success.
[[nodiscard]] __device__ inline bool make_room(Decision& d) {
  const DeviceSequence& s = *d.sequence;
  if (s.segments < s.segment_pages * segments_per_page(d.batch->geometry.head_dim)) return true;
  uint32_t raw = PageId::kNoneRaw;
  if (s.segment_pages < kSegmentPagesMax && first_thread()) raw = take_page(d.batch->lease);
  raw = __shfl_sync(kAllLanes, raw, 0);
  if (raw != PageId::kNoneRaw) {
    if (first_thread()) {
      d.sequence->segment_page[s.segment_pages] = raw;
      d.sequence->segment_pages += 1;
      atomicAdd(&d.sequence->metadata_pages, 1u);
    }
    __syncwarp();
    return true;
  }
  if (s.segments < 3) return false;  // a table of this size is bad metadata
  join_oldest(d, joined_oldest(d));
  return true;
}

__device__ inline void close_segment(Decision& d, uint32_t row) {
  DeviceSequence& s = *d.sequence;
  const PolicyParams& p = s.policy;
  const Thought label = policy::label_of(label_sparsity(d, row), p);
  if (first_thread()) {
    policy::Segment& open = d.table[s.segments - 1];
    open.end = s.tokens;
    open.live = s.tokens - open.start;
  }
  __syncwarp();
  if (policy::demotes_everything(label, p)) {
    demote_everything(d);
    step_down_all(d);
  }
  const bool room = make_room(d);
  __syncwarp();  // all have read how many segments there are
  if (!room) return;
  if (first_thread()) {
    const uint32_t last = s.segments;
    s.segments = last + 1;
    d.table[last] = {.start = s.tokens,
                     .end = policy::kOpenEnd,
                     .label = static_cast<uint8_t>(label),
                     .level = 0,
                     .merged = 0,
                     .waiting = 0,
                     .live = 0};
    s.counters.refreshes += 1;
  }
  __syncwarp();
}

}  // namespace decide_detail

// By one warp, for the sequence in row `row` of the batch. Result: whether it has demotions listed.
[[nodiscard]] __device__ inline bool decide(const BatchView& view, DeviceSequence* sequence,
                                            uint32_t row) {
  DeviceSequence& s = *sequence;
  const uint32_t generated = s.generated_live + 1;  // the token of this step
  const uint32_t budget = s.policy.evict == EvictRule::kTbe ? s.budget_tokens : 0;
  const bool due = s.closing != 0 || s.waiting != 0 || (budget != 0 && generated > budget);
  __syncwarp();
  if (!due || !decide_detail::pages_are_good(view, sequence)) {
    if (decide_detail::first_thread()) {
      s.generated_live = generated;
      s.demotions = 0;
    }
    return false;
  }
  decide_detail::Decision d{.batch = &view,
                            .sequence = sequence,
                            .table = {&view, sequence},
                            .list = reinterpret_cast<Demotion*>(page_at(view, s.work_page)),
                            .listed = 0,
                            .room = demotions_per_page(view.geometry.head_dim),
                            .generated = generated};
  if (s.waiting != 0) decide_detail::step_down_all(d);
  decide_detail::enforce_budget(d);
  if (s.closing != 0) decide_detail::close_segment(d, row);
  if (decide_detail::first_thread()) {
    s.generated_live = d.generated;
    s.demotions = d.listed;
  }
  return d.listed > 0;
}

}  // namespace thinkv::cuda
