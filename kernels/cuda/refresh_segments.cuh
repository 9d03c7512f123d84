// refresh_segments.cuh: the segment table of a sequence in the hands of one warp, and what the
// budget does to it (refresh.h).
//
// All 32 threads hold the same numbers and go the same way; thread 0 writes what is one number,
// after a __syncwarp() where the others may still read it, and the threads share out the segments
// where a step looks at all of them.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/refresh.h"
#include "kernels/policy/segments.h"

namespace thinkv::cuda {

// The table of policy/segments.h. Requires: pages_are_good().
struct DeviceSegments {
  const BatchView* batch;
  DeviceSequence* sequence;

  [[nodiscard]] __device__ uint32_t size() const { return sequence->segments; }
  [[nodiscard]] __device__ policy::Segment& operator[](uint32_t index) const {
    return *segment_at(*batch, sequence, index);
  }
};

namespace decide_detail {

inline constexpr uint32_t kNoSegment = 0xFFFF'FFFFu;

// A sequence in the hands of its warp.
struct Decision {
  const BatchView* batch;
  DeviceSequence* sequence;
  DeviceSegments table;
  Demotion* list;
  uint32_t listed;
  uint32_t room;       // of the list
  uint32_t generated;  // DeviceSequence.generated_live
};

[[nodiscard]] __device__ __forceinline__ bool first_thread() {
  return threadIdx.x % 32 == 0;
}
[[nodiscard]] __device__ __forceinline__ uint32_t below_me(uint32_t ballot) {
  return static_cast<uint32_t>(__popc(ballot & ((1u << threadIdx.x % 32) - 1)));
}
[[nodiscard]] __device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
  for (uint32_t x = 16; x > 0; x /= 2) value += __shfl_xor_sync(kAllLanes, value, x);
  return value;
}
[[nodiscard]] __device__ __forceinline__ uint32_t warp_least(uint32_t value) {
  for (uint32_t x = 16; x > 0; x /= 2) value = min(value, __shfl_xor_sync(kAllLanes, value, x));
  return value;
}

// Every page of the segment table and the work page can be followed.
[[nodiscard]] __device__ inline bool pages_are_good(const BatchView& view,
                                                    DeviceSequence* sequence) {
  const uint32_t per_page = segments_per_page(view.geometry.head_dim);
  bool good = page_at(view, sequence->work_page) != nullptr &&
              sequence->segments <= sequence->segment_pages * per_page &&
              sequence->policy.schedule_length <= kScheduleMax &&
              sequence->policy.label_layer_count <= kLabelLayersMax;
  for (uint32_t i = threadIdx.x % 32; i < sequence->segment_pages; i += 32) {
    good = page_at(view, sequence->segment_page[i]) != nullptr && good;
  }
  good = __all_sync(kAllLanes, good) != 0;
  if (!good) raise_fault(view.lease, kBadMetadata);
  return good;
}

// policy::next_demotion with the segments shared out over the warp.
[[nodiscard]] __device__ inline uint32_t next_demotion(const Decision& d) {
  const PolicyParams& p = d.sequence->policy;
  uint32_t best = kNoSegment;  // importance << 16 | index
  for (uint32_t i = threadIdx.x % 32; i < d.table.size(); i += 32) {
    const policy::Segment segment = d.table[i];
    if (!policy::can_demote(segment, p)) continue;
    const uint32_t rank = p.order == DemoteOrder::kOldest
                              ? 0
                              : policy::importance(static_cast<Thought>(segment.label));
    best = min(best, rank << 16 | i);
  }
  best = warp_least(best);
  return best == kNoSegment ? kNoSegment : best & 0xFFFFu;
}
static_assert(kSegmentPagesMax * segments_per_page(256) <= 0x1'0000);

// Lists the reduction of `segment` to `target` tokens and counts what it frees.
__device__ __forceinline__ void list_reduction(Decision& d, const policy::Segment& segment,
                                               uint32_t target) {
  if (segment.live <= target) return;  // in every lane
  if (first_thread()) {
    d.list[d.listed] = {
        .start = segment.start, .end = segment.end, .target = target, .reserved = 0};
  }
  d.listed += 1;
  d.generated -= min(segment.live - target, d.generated);
}

__device__ inline void demote(Decision& d, uint32_t index) {
  policy::Segment segment = d.table[index];
  const uint32_t target = policy::demotion_target(segment, d.sequence->policy);
  list_reduction(d, segment, target);
  segment.level = static_cast<uint8_t>(segment.level + 1);
  segment.live = min(segment.live, target);
  __syncwarp();  // all have read it
  if (first_thread()) {
    d.table[index] = segment;
    d.sequence->counters.demotions += 1;
  }
  __syncwarp();
}

// Closes the gap that segment 0 leaves after `joined` took its place and that of segment 1.
__device__ inline void join_oldest(Decision& d, const policy::Segment& joined) {
  const uint32_t size = d.table.size();
  const uint32_t waited = d.table[0].waiting + d.table[1].waiting;
  __syncwarp();
  if (first_thread()) {
    d.table[0] = joined;
    d.sequence->waiting -= min(waited, d.sequence->waiting);
    d.sequence->counters.merges += 1;
  }
  for (uint32_t base = 1; base + 1 < size; base += 32) {
    const uint32_t to = base + threadIdx.x % 32;
    policy::Segment moved{};
    if (to + 1 < size) moved = d.table[to + 1];
    __syncwarp();
    if (to + 1 < size) d.table[to] = moved;
    __syncwarp();
  }
  if (first_thread()) d.sequence->segments = size - 1;
  __syncwarp();
}

[[nodiscard]] __device__ __forceinline__ policy::Segment joined_oldest(const Decision& d) {
  policy::Segment joined = policy::merge(d.table[0], d.table[1], d.sequence->policy);
  joined.waiting = 0;  // it is at the last level
  return joined;
}

// The floor rule. Result: false where it does not apply.
[[nodiscard]] __device__ inline bool merge_oldest(Decision& d) {
  const PolicyParams& p = d.sequence->policy;
  if (d.table.size() < 2 || !policy::can_merge(d.table[0], d.table[1], p)) return false;
  policy::Segment joined = joined_oldest(d);
  if (joined.live > refresh_rows(p)) return false;  // made by make_room(): too many for a block
  const uint32_t target = p.schedule[p.schedule_length - 1];
  list_reduction(d, joined, target);
  joined.live = min(joined.live, target);
  join_oldest(d, joined);
  return true;
}

__device__ inline void enforce_budget(Decision& d) {
  const DeviceSequence& s = *d.sequence;
  const uint32_t budget = s.policy.evict == EvictRule::kTbe ? s.budget_tokens : 0;
  if (budget == 0) return;
  while (d.generated > budget && d.listed < d.room) {
    const uint32_t next = next_demotion(d);
    if (next != kNoSegment) {
      demote(d, next);
    } else if (!merge_oldest(d)) {
      if (first_thread()) d.sequence->counters.over_budget_steps += 1;
      return;
    }
  }
}

}  // namespace decide_detail

}  // namespace thinkv::cuda
