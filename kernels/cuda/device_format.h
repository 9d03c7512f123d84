// device_format.h: where every byte of a device sequence's metadata lies.
//
// A sequence is a tree of pool pages of its model's page class, as on the host (sequence_format.h),
// but flat, so that thousands of warps can work on it without an allocator:
//
//   root page   [ DeviceSequence | lane_page ids (u32) ... ]
//     lane_page[l / lanes_per_page]    -> pages of DeviceLane, lane l = layer * kv_heads + kv head
//     segment_page[s / segments_per_page] -> pages of policy::Segment, oldest first, last one open
//     work_page                        -> Demotion list of the step in progress; while a prompt
//                                         is coded, counts of codes
//     class_directory                  -> ids of pages of token classes, a byte a position
//   DeviceLane.table[i / descriptors]  -> table pages: DeviceDescriptor [descriptors], then, where
//                                         the policy keeps them, fp16 scores (TBE) or fp32 sums
//                                         (rank rules) [descriptors][64]
//   DeviceDescriptor.page              -> K/V page (page_format.h)
//   DeviceLane.buffer_page             -> two 16-bit K/V pages of 8 slots: the newest tokens
//   DeviceLane.stream_page             -> DeviceStream, where the policy has entropy-coded streams
//     DeviceStream.block_page[b / stream_blocks_per_page] -> pages of StreamBlock, by position
//     DeviceStream.list_page[i / stream_ids_per_page]     -> pages of ids of the K/V pages that
//                                         hold the stream's bytes, in their order
//     DeviceStream.codes                 codebooks of a layer, in the lane of its first kv head
//
// An address is pool.base + extent * extent_bytes + index * page_bytes (sequence.h). A page id is
// checked against the window before it is followed (LeaseFault::kBadMetadata): another process of
// the same tenant may have written it. Little-endian, no pointers; reserved bytes are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/policy/rank_select.h"
#include "kernels/policy/rank_trigger.h"
#include "kernels/policy/segments.h"
#include "kernels/stream/block_rule.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::cuda {

inline constexpr uint32_t kDeviceSequenceMagic = 0x44564B53;  // "SKVD"
inline constexpr uint32_t kDeviceLayoutVersion = 8;
inline constexpr uint32_t kTablePagesMax = 96;
inline constexpr uint32_t kSegmentPagesMax = 32;
inline constexpr uint32_t kBufferPageSlots = 8;
inline constexpr uint32_t kRankBudgetNone = 0xFFFF'FFFFu;  // kernels::kBudgetNone

// 32 bytes; the first half is what attention's list is made from.
struct DeviceDescriptor {
  uint64_t live;  // bit s: slot s holds a token that attention sees
  uint32_t page;  // PageId::raw
  uint8_t format;
  uint8_t filled;  // slots ever written are 0 .. filled - 1
  uint16_t reserved0;
  uint32_t first_position;  // bounds of the positions of live slots; may be wider than needed
  uint32_t last_position;
  uint64_t marks;  // bit s of slot s: working memory of one rule, 0 between steps
};
static_assert(sizeof(DeviceDescriptor) == 32);

struct DeviceLane {
  uint32_t pages;  // descriptors in use: 0 .. pages - 1 of the table, in no order
  uint32_t live;   // slots that attention sees, buffer included
  uint32_t live_prompt;
  uint32_t buffer_count;  // tokens in the buffer, 0..16
  uint32_t buffer_page[2];
  uint32_t table_pages;               // ids in use of `table`
  uint32_t free_slots[kFormatCount];  // in this lane's pages of that format: all not live
  union {                             // of the tokens in the buffer
    uint16_t buffer_score[16];        // fp16
    float buffer_sum[16];             // where DeviceSequence.score_bytes is 4
  };
  // Ids of pages that rank rules emptied in the step in progress: in the descriptors behind those
  // in use. The lane's next new page is the first of them; what is left goes at the step's end.
  uint16_t pending;
  uint8_t mask;             // kFirstFit: the mask that was chosen
  uint8_t channels_chosen;  // 0 or 1: `channels` holds what keys in think pages keep
  uint32_t mask_tokens;     // kFirstFit: tokens outside the mask's classes that stay
  uint32_t stream_page;     // PageId::kNoneRaw: the policy has no streams
  uint32_t channels[8];     // bits [head_dim], never changed
  float head_signal;        // of the prompt's queries or keys: truncated entropy; NaN: none
  uint32_t reserved1[3];
  uint32_t table[kTablePagesMax];
};
static_assert(sizeof(DeviceLane) == 28 + 40 + 64 + 12 + 32 + 16 + 4 * kTablePagesMax);
static_assert(sizeof(DeviceLane) % 16 == 0);
static_assert(offsetof(DeviceLane, buffer_score) % 4 == 0, "scores are read and written in pairs");

inline constexpr uint32_t kStreamBlockPagesMax = 128;
inline constexpr uint32_t kStreamListPagesMax = 256;

// The entropy-coded part of a lane, as StreamLane of the host, and the codebooks of its layer.
struct DeviceStream {
  uint32_t blocks;
  uint32_t pages;         // ids in the list: kNoneRaw where no block is left in a page
  uint32_t end_unit;      // the next block begins here
  uint32_t end_position;  // all tokens before it are in blocks, or gone with one
  uint32_t block_pages;   // ids in use of `block_page`
  uint32_t list_pages;    // ids in use of `list_page`
  uint32_t reserved0[2];
  uint8_t codes[2][kernels::kSymbolCount];  // code lengths of keys and values; 0: not made yet
  uint32_t block_page[kStreamBlockPagesMax];
  uint32_t list_page[kStreamListPagesMax];
};
static_assert(sizeof(DeviceStream) == 32 + 512 + 4 * (kStreamBlockPagesMax + kStreamListPagesMax));
static_assert(sizeof(DeviceStream) <= page_bytes(64));

// One step down of a segment, or of two that were merged, for every lane.
struct Demotion {
  uint32_t start;
  uint32_t end;
  uint32_t target;  // tokens that stay
  uint32_t reserved;
};
static_assert(sizeof(Demotion) == 16);

struct DeviceCounters {
  uint64_t evicted_slots;  // atomics of lanes
  uint64_t reused_slots;   // atomics of lanes
  uint64_t recoded_slots;  // atomics of lanes
  uint64_t recoded_bytes;
  uint64_t demotions;
  uint64_t merges;
  uint64_t over_budget_steps;
  uint64_t refreshes;
  uint64_t steps;
  uint64_t segments[kThoughtCount];
};

struct DeviceSequence {
  uint32_t magic;
  uint32_t version;
  // Geometry, as in ModelGeometry.
  uint32_t layers;
  uint32_t q_heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t value_type;
  float softmax_scale;
  uint32_t tokens;  // positions so far
  uint32_t prompt_tokens;
  uint32_t budget_tokens;   // 0: none; of rank rules kRankBudgetNone: none
  uint32_t trace_sparsity;  // 0 or 1
  uint32_t score_bytes;     // of a slot in table pages: 0, 2 (fp16 scores) or 4 (fp32 sums)
  uint32_t lane_pages;      // ids in use
  uint32_t segments;        // in use
  uint32_t segment_pages;   // ids in use
  uint32_t work_page;
  uint32_t demotions;        // of this step, in the work page
  uint32_t closing;          // this step completes the open segment
  uint32_t emitting;         // this step accumulates scores
  uint32_t flushing;         // buffers are flushed at the end of this step
  uint32_t data_pages;       // K/V pages, buffers included; atomics of lanes
  uint32_t metadata_pages;   // all others, this one included; atomics of lanes
  float layer_sparsity_sum;  // of the label layers in the step in progress
  uint32_t generated_live;   // tokens of the open segment + Segment.live of all others (refresh.h)
  uint32_t waiting;          // Segment.waiting of all segments: demotions for the next steps
  uint32_t rank_step;        // RankStep bits: what rank rules do at the end of this step
  uint32_t over_budget;      // a lane of this step holds more than its budget; set once
  uint32_t prompt_queries;   // of each layer that were given
  uint32_t window_queries;   // of kWindow: queries since the slots were set to 0
  uint32_t query_wait;       // 1: rules of the prompt's end wait for queries
  uint32_t tier_tokens;      // of each sparse lane in a tier of the client's process
  DeviceCounters counters;
  PolicyParams policy;
  uint32_t segment_page[kSegmentPagesMax];
  uint64_t gathered_bytes;   // moved where the prompt was cut; atomics of lanes
  uint32_t class_directory;  // a page id, where class_pages is not 0
  uint32_t class_pages;      // ids in use of it
  uint8_t reserved1[16];
};
static_assert(sizeof(DeviceSequence) ==
              128 + 96 + sizeof(PolicyParams) + 4 * kSegmentPagesMax + 32);
static_assert(offsetof(DeviceSequence, counters) == 128);
static_assert(offsetof(DeviceSequence, policy) == 224);

static_assert(std::is_trivially_copyable_v<DeviceLane> &&
              std::is_trivially_copyable_v<DeviceSequence>);

// DeviceSequence.rank_step.
enum RankStep : uint32_t {
  kRankRules = (1u << kRulesMax) - 1,  // bit r: rule r fires
  kRankWaiting = 1u << 4,              // policy::Moment.waiting
  kRankCompacts = 1u << 5,             // the prompt was cut: its tokens are moved together
  kRankClears = 1u << 6,               // a window begins: sums start from 0
  kRankFlushesFirst = 1u << 7,         // buffers are flushed before the rules
};

// What a slot's number takes in table pages: 2 where the policy selects segments' tokens by decayed
// attention, 4 where rank rules read attention, else 0.
[[nodiscard]] constexpr uint32_t score_bytes(const PolicyParams& policy) {
  if (policy::keeps_sums(policy)) return sizeof(float);
  const bool scored =
      policy.evict == EvictRule::kTbe &&
      (policy.select == SelectRule::kWeightedMedoids || policy.select == SelectRule::kAttention);
  return scored ? sizeof(uint16_t) : 0;
}
[[nodiscard]] constexpr bool keeps_scores(const PolicyParams& policy) {
  return score_bytes(policy) != 0;
}

// How many of each fit a page.
[[nodiscard]] constexpr uint32_t lanes_per_page(uint32_t head_dim) {
  return page_bytes(head_dim) / static_cast<uint32_t>(sizeof(DeviceLane));
}
[[nodiscard]] constexpr uint32_t lane_pages_max(uint32_t head_dim) {
  return (page_bytes(head_dim) - static_cast<uint32_t>(sizeof(DeviceSequence))) /
         static_cast<uint32_t>(sizeof(uint32_t));
}
[[nodiscard]] constexpr uint32_t segments_per_page(uint32_t head_dim) {
  return page_bytes(head_dim) / static_cast<uint32_t>(sizeof(policy::Segment));
}
[[nodiscard]] constexpr uint32_t demotions_per_page(uint32_t head_dim) {
  return page_bytes(head_dim) / static_cast<uint32_t>(sizeof(Demotion));
}
[[nodiscard]] constexpr uint32_t class_pages_max(uint32_t head_dim) {
  return page_bytes(head_dim) / static_cast<uint32_t>(sizeof(uint32_t));
}
// score_bytes: of a slot.
[[nodiscard]] constexpr uint32_t descriptors_per_page(uint32_t head_dim, uint32_t score_bytes) {
  return page_bytes(head_dim) /
         (static_cast<uint32_t>(sizeof(DeviceDescriptor)) + kSlotsPerPageMax * score_bytes);
}
[[nodiscard]] constexpr uint32_t stream_blocks_per_page(uint32_t head_dim) {
  return page_bytes(head_dim) / static_cast<uint32_t>(sizeof(kernels::StreamBlock));
}
[[nodiscard]] constexpr uint32_t stream_ids_per_page(uint32_t head_dim) {
  return page_bytes(head_dim) / static_cast<uint32_t>(sizeof(uint32_t));
}
// Tokens in blocks that a lane can ever have had: ids of blocks and of pages are enough for raw
// ones.
[[nodiscard]] constexpr uint32_t stream_tokens_max(uint32_t head_dim) {
  return kStreamBlockPagesMax * stream_blocks_per_page(head_dim) * kernels::kBlockTokens;
}
// Tokens of a prompt that can be coded: codes of a layer are counted in 32 bits.
[[nodiscard]] constexpr uint64_t coded_prompt_max(uint32_t kv_heads, uint32_t head_dim) {
  const uint64_t counted = 0xFFFF'FFFFu / (uint64_t{kv_heads} * head_dim);
  const uint64_t held = stream_tokens_max(head_dim);
  return counted < held ? counted : held;
}
[[nodiscard]] constexpr bool stream_pages_suffice(uint32_t head_dim) {
  const uint64_t raw = uint64_t{stream_tokens_max(head_dim)} / kernels::kBlockTokens *
                       kernels::raw_block_bytes(head_dim);
  return raw <=
         uint64_t{kStreamListPagesMax} * stream_ids_per_page(head_dim) * page_bytes(head_dim);
}
static_assert(stream_pages_suffice(64) && stream_pages_suffice(128) && stream_pages_suffice(256));
static_assert(sizeof(uint32_t) * 2 * kernels::kSymbolCount <= page_bytes(64),
              "a work page has room for the counts of a layer's codes");
static_assert(lanes_per_page(64) == 4 && lanes_per_page(128) == 8 && lanes_per_page(256) == 16);
static_assert(lane_pages_max(64) * lanes_per_page(64) >= 1400);

}  // namespace thinkv::cuda
