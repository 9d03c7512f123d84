#include "kernels/sequence/buffer.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/sequence/scores.h"
#include "kernels/sequence/sequence.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

static_assert(kBufferTokens == kBufferPages * kBufferPageSlots);
static_assert(page_layout(Format::kF16, 64).slots == kBufferPageSlots);

constexpr std::array<uint8_t, kBufferPageSlots> kAllSlots = {0, 1, 2, 3, 4, 5, 6, 7};

// `count` buffered tokens as at most two runs of one format each.
struct FlushRuns {
  uint32_t sinks;
  uint32_t others;
  bool promote;
};

FlushRuns split(const Lane& lane, Format wide, const FlushFormats& formats, uint32_t count,
                uint32_t end) {
  const uint32_t first = end - count;
  FlushRuns runs{};
  if (formats.sink != formats.thought && first < formats.sink_tokens) {
    runs.sinks = std::min(count, formats.sink_tokens - first);
  }
  runs.others = count - runs.sinks;
  const Format whole = runs.others == 0 ? formats.sink : formats.thought;
  const bool mixed = runs.sinks > 0 && runs.others > 0;
  runs.promote = count > 0 && !mixed && whole == wide &&
                 lane.header().free_slots[static_cast<size_t>(wide)] == 0;
  return runs;
}

uint32_t buffer_pages_for(uint32_t count) {
  return (count + kBufferPageSlots - 1) / kBufferPageSlots;
}

uint32_t buffer_position(const LaneStore& store, const LaneHeader& header, uint32_t i) {
  const std::byte* page = store.pages->address(header.buffer_page[i / kBufferPageSlots]);
  uint32_t position = 0;
  std::memcpy(&position,
              page + page_layout(store.wide, store.head_dim).position_offset +
                  (i % kBufferPageSlots) * kPositionBytes,
              sizeof position);
  return position;
}

void promote(const LaneStore& store, Lane& lane, uint32_t count) {
  LaneHeader& header = lane.header();
  lane.grow_for(buffer_pages_for(count));
  for (uint32_t b = 0; b < buffer_pages_for(count); ++b) {
    const uint32_t first = b * kBufferPageSlots;
    const void* scores = nullptr;
    if (store.scored) scores = lane.buffer_scores() + size_t{first} * store.score_bytes();
    lane.adopt_page(header.buffer_page[b], std::min(count - first, kBufferPageSlots), scores);
    header.buffer_page[b] = PageId::kNoneRaw;
  }
}

void decode_buffer(const LaneStore& store, const LaneHeader& header, const FlushScratch& scratch) {
  for (uint32_t b = 0; b < buffer_pages_for(header.buffer_count); ++b) {
    const uint32_t first = b * kBufferPageSlots;
    const uint32_t count = std::min(header.buffer_count - first, kBufferPageSlots);
    store.kernels->decode({.page = store.pages->address(header.buffer_page[b]),
                           .format = store.wide,
                           .head_dim = store.head_dim,
                           .slots = {kAllSlots.data(), count},
                           .k = scratch.k + size_t{first} * store.head_dim,
                           .v = scratch.v + size_t{first} * store.head_dim});
  }
}

uint32_t requantise(const LaneStore& store, Lane& lane, const FlushFormats& formats,
                    const FlushRuns& runs, const FlushScratch& scratch) {
  LaneHeader& header = lane.header();
  decode_buffer(store, header, scratch);
  std::array<uint32_t, kBufferTokens> positions{};
  for (uint32_t i = 0; i < header.buffer_count; ++i) {
    positions[i] = buffer_position(store, header, i);
  }
  lane.grow_for(lane.new_pages(formats.sink, runs.sinks) +
                lane.new_pages(formats.thought, runs.others));
  uint32_t reused = 0;
  for (uint32_t part = 0; part < 2; ++part) {
    const uint32_t from = part == 0 ? 0 : runs.sinks;
    const size_t row = size_t{from} * store.head_dim;
    const void* scores = nullptr;
    if (store.scored) scores = lane.buffer_scores() + size_t{from} * store.score_bytes();
    const TokenRows rows{.k = scratch.k + row,
                         .v = scratch.v + row,
                         .positions = positions.data() + from,
                         .scores = scores,
                         .count = part == 0 ? runs.sinks : runs.others};
    if (rows.count > 0) reused += lane.write(part == 0 ? formats.sink : formats.thought, rows);
  }
  return reused;
}

}  // namespace

bool append_needs_page(const LaneHeader& header, uint32_t count) {
  return header.buffer_page[count / kBufferPageSlots] == PageId::kNoneRaw;
}

FlushNeed add_flush_need(const LaneStore& store, LaneHeader& header, const FlushFormats& formats,
                         uint32_t count, uint32_t end, uint32_t& data_pages, MetaNeed& need) {
  const Lane lane(store, header);
  const FlushRuns runs = split(lane, store.wide, formats, count, end);
  if (runs.promote) return {lane.add_need(store.wide, buffer_pages_for(count), need), true};
  const uint32_t sinks = lane.new_pages(formats.sink, runs.sinks);
  const uint32_t others = lane.new_pages(formats.thought, runs.others);
  data_pages += sinks + others;
  if (sinks == 0) return {lane.add_need(formats.thought, others, need), false};
  // The table grows once for both runs, so they are one need; scores as for the larger page.
  const Format larger = page_layout(formats.sink, store.head_dim).slots >
                                page_layout(formats.thought, store.head_dim).slots
                            ? formats.sink
                            : formats.thought;
  return {lane.add_need(larger, sinks + others, need), false};
}

void append_to_buffer(const LaneStore& store, LaneHeader& header, const float* k, const float* v,
                      uint32_t position) {
  THINKV_CHECK(header.buffer_count < kBufferTokens);
  uint32_t& page = header.buffer_page[header.buffer_count / kBufferPageSlots];
  if (page == PageId::kNoneRaw) {
    page = store.pages->take().raw();
    *store.data_pages += 1;
  }
  const uint8_t slot = header.buffer_count % kBufferPageSlots;
  store.kernels->encode({.page = store.pages->address(page),
                         .format = store.wide,
                         .head_dim = store.head_dim,
                         .slots = {&slot, 1},
                         .k = k,
                         .v = v,
                         .positions = &position});
  if (store.scored) {
    const uint32_t width = store.score_bytes();
    std::memset(Lane(store, header).buffer_scores() + size_t{header.buffer_count} * width, 0,
                width);
  }
  header.buffer_count = static_cast<uint8_t>(header.buffer_count + 1);
  header.live += 1;
}

void pop_buffer(LaneHeader& header) {
  THINKV_CHECK(header.buffer_count > 0);
  header.buffer_count = static_cast<uint8_t>(header.buffer_count - 1);
  header.live -= 1;
}

uint32_t flush_buffer(const LaneStore& store, LaneHeader& header, const FlushFormats& formats,
                      float score_decay, const FlushScratch& scratch) {
  const uint32_t count = header.buffer_count;
  if (count == 0) return 0;
  Lane lane(store, header);
  const uint32_t end = buffer_position(store, header, count - 1) + 1;
  const FlushRuns runs = split(lane, store.wide, formats, count, end);
  if (store.scored && store.sums) scale_sums(lane, score_decay);
  if (store.scored && !store.sums) decay_scores(lane, score_decay);
  uint32_t reused = 0;
  if (runs.promote) {
    promote(store, lane, count);
  } else {
    reused = requantise(store, lane, formats, runs, scratch);
  }
  // The tokens were counted when they came; they have moved, not doubled.
  header.live -= count;
  header.buffer_count = 0;
  return reused;
}

}  // namespace thinkv::kernels
