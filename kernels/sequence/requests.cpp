// requests.cpp: what an engine asks for between steps: evict by position, recode a range.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <vector>

#include "kernels/sequence/sequence_state.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// Slots of `page` whose positions are in [first, end) and `wanted`.
template <class Wanted>
uint64_t slots_where(const Lane& lane, const PageDescriptor& page, uint32_t first, uint32_t end,
                     Wanted wanted) {
  if (page.last_position < first || page.first_position >= end) return 0;
  uint64_t found = 0;
  for (uint64_t left = page.live; left != 0; left &= left - 1) {
    const auto slot = static_cast<uint32_t>(std::countr_zero(left));
    const uint32_t where = lane.position(page, slot);
    if (where >= first && where < end && wanted(where)) found |= uint64_t{1} << slot;
  }
  return found;
}

// A half-open range of positions that go to another format.
struct RecodeJob {
  uint32_t first;
  uint32_t end;
  Format format;
};

uint64_t slots_to_recode(const Lane& lane, const PageDescriptor& page, const RecodeJob& job) {
  if (page.format == static_cast<uint8_t>(job.format)) return 0;
  return slots_where(lane, page, job.first, job.end, [](uint32_t) { return true; });
}

uint32_t count_recode(const Lane& lane, const RecodeJob& job) {
  uint32_t count = 0;
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    count += static_cast<uint32_t>(std::popcount(slots_to_recode(lane, page, job)));
  });
  return count;
}

uint64_t recode_lane(SequenceState& state, Lane lane, const RecodeJob& job) {
  const uint32_t count = count_recode(lane, job);
  if (count == 0) return 0;
  lane.grow_for(lane.new_pages(job.format, count));
  const uint32_t pages = lane.pages().size();  // those that come are already in the format
  for (uint32_t index = 0; index < pages; ++index) {
    const uint64_t chosen = slots_to_recode(lane, lane.pages()[index], job);
    if (chosen != 0) recode_slots(state, lane, index, chosen, job.format);
  }
  lane.sweep();
  return count;
}

}  // namespace

void recode_slots(SequenceState& state, Lane& lane, uint32_t index, uint64_t chosen,
                  Format format) {
  std::array<uint8_t, kSlotsPerPageMax> slots;
  std::array<uint32_t, kSlotsPerPageMax> positions;
  std::array<std::byte, size_t{kSlotsPerPageMax} * sizeof(float)> scores{};
  uint32_t count = 0;
  const PageDescriptor page = lane.pages()[index];  // a copy: writing adds descriptors
  for (uint64_t left = chosen; left != 0; left &= left - 1) {
    const auto slot = static_cast<uint8_t>(std::countr_zero(left));
    positions[count] = lane.position(page, slot);
    if (state.store.scored) {
      const uint32_t width = state.store.score_bytes();
      std::memcpy(scores.data() + size_t{count} * width, lane.score_of(page, slot), width);
    }
    slots[count++] = slot;
  }
  state.kernels.decode({.page = state.pages.address(page.page),
                        .format = static_cast<Format>(page.format),
                        .head_dim = state.geometry.head_dim,
                        .slots = {slots.data(), count},
                        .k = state.k_rows.data(),
                        .v = state.v_rows.data()});
  static_cast<void>(lane.write(format, {.k = state.k_rows.data(),
                                        .v = state.v_rows.data(),
                                        .positions = positions.data(),
                                        .scores = scores.data(),
                                        .count = count}));
  lane.drop(index, chosen);
}

uint64_t evict_positions(SequenceState& state, std::span<const uint32_t> positions) {
  if (state.header->tokens <= kBufferTokens) return 0;
  std::vector<uint32_t> wanted(positions.begin(), positions.end());
  std::sort(wanted.begin(), wanted.end());
  const uint32_t newest = state.header->tokens - kBufferTokens;
  wanted.erase(std::lower_bound(wanted.begin(), wanted.end(), newest), wanted.end());
  if (wanted.empty()) return 0;
  const auto is_wanted = [&](uint32_t where) {
    return std::binary_search(wanted.begin(), wanted.end(), where);
  };
  uint64_t evicted = 0;
  for (uint32_t i = 0; i < state.lanes.size(); ++i) {
    Lane lane = state.lane(i);
    uint32_t prompt = 0;
    for (uint32_t index = 0; index < lane.pages().size(); ++index) {
      const PageDescriptor& page = lane.pages()[index];
      const uint64_t slots = slots_where(lane, page, wanted.front(), wanted.back() + 1, is_wanted);
      if (slots == 0) continue;
      for (uint64_t left = slots; left != 0; left &= left - 1) {
        const auto slot = static_cast<uint32_t>(std::countr_zero(left));
        prompt += lane.position(page, slot) < state.header->prompt_tokens ? 1 : 0;
      }
      lane.drop(index, slots);
      evicted += static_cast<uint64_t>(std::popcount(slots));
    }
    lane.header().live_prompt -= prompt;
    lane.sweep();
  }
  state.header->counters.evicted_slots += evicted;
  return evicted;
}

Result<uint64_t> recode(SequenceState& state, uint32_t first, uint32_t end, Format format) {
  const RecodeJob job{.first = first, .end = end, .format = format};
  uint32_t data_pages = 0;
  MetaNeed need(state.heap.granules_per_page());
  for (uint32_t i = 0; i < state.lanes.size(); ++i) {
    const Lane lane = state.lane(i);
    const uint32_t pages = lane.new_pages(format, count_recode(lane, job));
    if (!lane.add_need(format, pages, need)) return kLaneFull;
    data_pages += pages;
  }
  THINKV_TRY(state.pages.reserve(data_pages + need.pages()));
  uint64_t slots = 0;
  for (uint32_t i = 0; i < state.lanes.size(); ++i) slots += recode_lane(state, state.lane(i), job);
  state.pages.end_reservation();
  state.header->counters.recoded_slots += slots;
  state.header->counters.recoded_bytes +=
      slots * page_layout(format, state.geometry.head_dim).slot_payload_bytes();
  return slots;
}

}  // namespace thinkv::kernels
