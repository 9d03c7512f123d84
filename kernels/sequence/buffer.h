// buffer.h: the newest tokens of a lane, 16 bits, in two pages of 8 slots.
//
// The buffer is flushed whole: when it is full and the next token comes, and when a segment
// closes. So the newest 1..16 tokens of a step, its own included, are exact. Each token leaves in
// the format of its class; where that is 16 bits and no slot is free, the buffer's pages
// themselves become pages of the table and nothing is copied.
#pragma once

#include <cstdint>

#include "kernels/sequence/lane.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::kernels {

// The two formats that one flush can meet: the first tokens of a sequence and all others.
struct FlushFormats {
  Format sink;
  Format thought;
  uint32_t sink_tokens;  // positions below it are sinks
};

// Working memory of a flush.
struct FlushScratch {
  float* k;  // [16, head_dim]
  float* v;
};

struct FlushNeed {
  bool fits;      // false beyond the size of a lane table
  bool promotes;  // the buffer's pages leave it
};
// Adds the data pages for a flush of `count` buffered tokens, the last at position end - 1, to
// `data_pages`, and what their metadata takes to `need`.
[[nodiscard]] FlushNeed add_flush_need(const LaneStore& store, LaneHeader& header,
                                       const FlushFormats& formats, uint32_t count, uint32_t end,
                                       uint32_t& data_pages, MetaNeed& need);

// One token, rotated where the policy rotates. Requires: less than 16 in the buffer, a promised
// page where its slot has none.
void append_to_buffer(const LaneStore& store, LaneHeader& header, const float* k, const float* v,
                      uint32_t position);
// True where append_to_buffer takes a page with `count` tokens in the buffer.
[[nodiscard]] bool append_needs_page(const LaneHeader& header, uint32_t count);
// Takes the newest token away again.
void pop_buffer(LaneHeader& header);

// Result: how many tokens went into evicted slots. Requires: add_flush_need() pages promised.
uint32_t flush_buffer(const LaneStore& store, LaneHeader& header, const FlushFormats& formats,
                      float score_decay, const FlushScratch& scratch);

}  // namespace thinkv::kernels
