// sequence_format.h: where every byte of a sequence's metadata lies.
//
// A sequence is a tree of pool pages that starts at its root page:
//
//   root page = meta page: [ MetaPageHeader | SequenceHeader | blocks ... ]
//     SequenceHeader.lanes    -> LaneHeader [layers x kv_heads], lane = layer * kv_heads + kv head
//     SequenceHeader.segments -> policy::Segment [], oldest first, the last one is open
//   LaneHeader.pages          -> PageDescriptor [], in no order
//     PageDescriptor.page     -> K/V page (page_format.h). A page of a pair format is in two lanes:
//                                the second layer's owns it, and both hold the same slots live
//     PageDescriptor.score_*  -> attention by slot, where the policy keeps it: fp16 [slots] decayed
//                                (TBE) or fp32 [slots] sums (rank rules)
//   LaneHeader.buffer_page    -> two 16-bit K/V pages of 8 slots: the newest tokens
//   LaneHeader.rank           -> RankLane, where the policy has rank rules
//     SequenceHeader.classes  -> u8 by position, where its rules read token classes
//   LaneHeader.stream         -> StreamLane, where the policy has entropy-coded streams
//     StreamLane.pages        -> page ids, in the order of the stream's bytes
//     StreamLane.blocks       -> StreamBlock [], by position
//     SequenceHeader.codebooks -> LayerCodes, by layer
//     SequenceHeader.centres   -> CentrePiece, by lane, where the policy centres keys
//
// A meta page is cut into granules of 64 bytes; granule 0 is its header, the others are handed out
// as blocks of neighbouring granules. A vector (VectorHeader) is one block of 2^n granules; where
// that is no longer enough it is a directory block of page ids (2^n granules, u32 each) whose
// pages are tables from their first byte to their last whole element.
// Little-endian, no pointers: page ids and offsets only. Reserved bytes are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/policy/segments.h"
#include "kernels/stream/block_rule.h"
#include "kernels/stream/huffman.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/internal/units.h"

namespace thinkv::kernels {

inline constexpr uint32_t kSequenceMagic = 0x53564B54;  // "TKVS"
inline constexpr uint32_t kMetaPageMagic = 0x4D564B54;  // "TKVM"
inline constexpr uint32_t kSequenceLayoutVersion = 3;
inline constexpr uint32_t kGranuleBytes = 64;
inline constexpr uint32_t kBufferPages = 2;
inline constexpr uint32_t kBufferPageSlots = 8;

struct BlockRef {
  uint32_t page;     // PageId::raw; kNoneRaw: no block
  uint32_t granule;  // 1 ..
};

struct MetaPageHeader {
  uint32_t magic;
  uint32_t next;           // PageId::raw of the next meta page, or none
  uint32_t used_granules;  // this header included
  uint32_t total_pages;    // root page only: meta and table pages of the whole sequence
  uint64_t used[3];        // bit g: granule g is taken
  uint8_t reserved[24];
};
static_assert(sizeof(MetaPageHeader) == kGranuleBytes);
static_assert(page_bytes(256) / kGranuleBytes <= 64 * 3);

struct VectorHeader {
  BlockRef block;
  uint32_t size;      // elements
  uint32_t capacity;  // elements; above one block's worth the block is a directory
};
static_assert(sizeof(VectorHeader) == 16);

struct PageDescriptor {
  uint64_t live;        // bit s: slot s holds a token that attention sees
  uint32_t page;        // PageId::raw
  uint32_t score_page;  // BlockRef of the scores; kNoneRaw where the policy has none
  uint8_t format;       // Format
  uint8_t score_granule;
  uint8_t filled;  // slots ever written are 0 .. filled - 1
  uint8_t reserved0;
  uint32_t first_position;  // bounds of the positions of live slots; may be wider than needed
  uint32_t last_position;
  uint32_t reserved1;
};
static_assert(sizeof(PageDescriptor) == 32 && offsetof(PageDescriptor, format) == 16);
static_assert(offsetof(PageDescriptor, first_position) == 20);
static_assert(page_bytes(256) / kGranuleBytes <= 256, "score_granule is 8 bits");

struct LaneHeader {
  VectorHeader pages;                  // PageDescriptor
  uint32_t buffer_page[kBufferPages];  // PageId::raw; none before the first token
  uint32_t live;                       // slots that attention sees, buffer included
  uint32_t live_prompt;                // of them, tokens of the prompt
  uint32_t free_slots[kFormatCount];   // in this lane's pages of that format: all not live
  uint16_t buffer_score[16];           // fp16
  uint8_t buffer_count;                // tokens in the buffer, 0..16
  uint8_t reserved0[3];
  BlockRef rank;    // RankLane; kNoneRaw: the policy has no rank rules
  BlockRef stream;  // StreamLane; kNoneRaw: the policy has no streams
  uint8_t reserved1[4];
};
static_assert(sizeof(LaneHeader) == 128 && offsetof(LaneHeader, buffer_score) == 72);
static_assert(offsetof(LaneHeader, buffer_count) == 104);

// What rank rules keep of a lane beside its pages.
struct RankLane {
  float buffer_sum[16];      // of the tokens in the buffer
  float head_signal;         // of the prompt's queries: truncated entropy
  uint32_t mask;             // kFirstFit: the mask that was chosen; kMaskFull before
  uint32_t mask_tokens;      // kFirstFit: tokens outside the mask's classes that stay
  uint32_t channels_chosen;  // 0 or 1: `channels` holds what keys in think pages keep
  uint64_t channels[4];      // bits [head_dim], never changed
  uint8_t reserved[16];
};
static_assert(sizeof(RankLane) == 2 * kGranuleBytes);
inline constexpr uint32_t kRankLaneGranules = sizeof(RankLane) / kGranuleBytes;

// The entropy-coded part of a lane: bytes that are only ever added at the end.
struct StreamLane {
  VectorHeader pages;     // PageId::raw; kNoneRaw where no block is left in a page
  VectorHeader blocks;    // StreamBlock
  uint32_t end_unit;      // the next block begins here
  uint32_t end_position;  // all tokens before it are in blocks, or gone with one
  uint8_t reserved[24];
};
static_assert(sizeof(StreamLane) == kGranuleBytes);
inline constexpr uint32_t kStreamLaneGranules = sizeof(StreamLane) / kGranuleBytes;

// Codebooks of a layer, made of its first blocks; a length of 0 at symbol 0: not made yet.
struct LayerCodes {
  CodeLengths key;
  CodeLengths value;
};
static_assert(sizeof(LayerCodes) == 512);

struct SequenceCounters {
  uint64_t evicted_slots;
  uint64_t reused_slots;
  uint64_t recoded_slots;
  uint64_t recoded_bytes;
  uint64_t demotions;
  uint64_t merges;
  uint64_t over_budget_steps;
  uint64_t refreshes;
  uint64_t steps;
  uint64_t segments[kThoughtCount];
};

struct SequenceHeader {
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
  uint32_t budget_tokens;   // TBE: 0 is none; rank rules: kBudgetNone is none
  uint32_t trace_sparsity;  // 0 or 1
  uint64_t data_pages;      // K/V pages, buffers included
  uint32_t prompt_queries;  // of each layer that were given
  uint32_t window_queries;  // of kWindow: queries since the slots were set to 0
  VectorHeader lanes;
  VectorHeader segments;
  SequenceCounters counters;
  PolicyParams policy;
  VectorHeader classes;     // u8, by position; shorter than the sequence: the others are 0
  uint32_t waiting;         // 1: rules of the prompt's end wait for queries
  uint32_t tier_tokens;     // of each sparse lane in the host tier: gone with the process
  VectorHeader codebooks;   // LayerCodes, by layer; empty: the policy has no streams
  uint64_t gathered_bytes;  // codes and scales that moved where the prompt was cut
  VectorHeader centres;     // CentrePiece, by lane; empty: the policy does not centre keys
};
static_assert(offsetof(SequenceHeader, lanes) == 64);
static_assert(offsetof(SequenceHeader, counters) == 96);
static_assert(offsetof(SequenceHeader, policy) == 192);
static_assert(sizeof(SequenceHeader) == 768 && sizeof(SequenceHeader) % kGranuleBytes == 0);
inline constexpr uint32_t kSequenceHeaderGranules = sizeof(SequenceHeader) / kGranuleBytes;
inline constexpr uint32_t kSequenceHeaderGranule = 1;  // first block of the root page

static_assert(std::is_trivially_copyable_v<PageDescriptor> &&
              std::is_trivially_copyable_v<LaneHeader> &&
              std::is_trivially_copyable_v<SequenceHeader>);

}  // namespace thinkv::kernels
