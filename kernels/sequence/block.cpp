#include "kernels/sequence/block.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/policy/channels.h"
#include "kernels/sequence/rank.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

// The tokens of one block in one lane, ascending by position.
struct TokenBlock {
  std::span<const SlotRow> rows;
  float* k;  // [rows, head_dim]
  float* v;
  std::array<uint32_t, kSlotsPerPageMax> positions;
  std::array<std::byte, size_t{kSlotsPerPageMax} * sizeof(float)> scores;
};

void load_rows(const SequenceState& state, const Lane& lane, TokenBlock& block) {
  lane.decode(block.rows, block.k, block.v);
  const uint32_t width = state.store.score_bytes();
  for (size_t i = 0; i < block.rows.size(); ++i) {
    const SlotRow& row = block.rows[i];
    block.positions[i] = row.position;
    if (!state.store.scored) continue;
    std::memcpy(block.scores.data() + i * width, lane.score_of(lane.pages()[row.page], row.slot),
                width);
  }
}

// The rows of another lane that hold the same positions, to work.first_rows. Requires: it holds
// them all.
void find_same_rows(RankWork& work, const Lane& lane) {
  const std::vector<SlotRow>& rows = work.block_rows;
  std::vector<SlotRow>& all = work.lane_rows;
  all.resize(lane.header().live);
  all.resize(lane.gather(rows.front().position, rows.back().position + 1, all));
  work.first_rows.clear();
  for (const SlotRow& row : rows) {
    const auto at =
        std::lower_bound(all.begin(), all.end(), row.position,
                         [](const SlotRow& a, uint32_t where) { return a.position < where; });
    THINKV_CHECK(at != all.end() && at->position == row.position);
    work.first_rows.push_back(*at);
  }
}

// Keys of fewer channels: chosen at the lane's first block, by all its tokens in pages.
const uint64_t* channels_of(SequenceState& state, uint32_t lane, const RankHead& head) {
  RankLane& rank = state.lane(lane).rank();
  if (rank.channels_chosen != 0) return rank.channels;
  const size_t dim = state.geometry.head_dim;
  decode_head_keys(state, lane, head, dim);
  std::vector<float> keys(dim, 0.0f);
  policy::add_energy({state.rank.keys.data(), head.rows.size() * dim}, keys);
  std::span<const float> queries;
  if (!state.rank.query_energy.empty()) {
    queries = {state.rank.query_energy.data() + lane * dim, dim};
  }
  policy::choose_channels(keys, queries, think_channels(state.geometry.head_dim),
                          {rank.channels, dim / 64});
  rank.channels_chosen = 1;
  return rank.channels;
}

float eta_of(const PolicyParams& policy, Format format) {
  const uint32_t bits = format_info(format).k.bits;
  return bits <= 2 ? policy.block_eta[bits - 1] : 0.0f;
}

// Rows that go into blocks, ascending by position, as many as fill whole ones: to work.block_rows.
void choose_rows(RankWork& work, Format format, const Lane& lane, const RankHead& head) {
  work.block_rows.clear();
  for (uint32_t i = 0; i < head.size(); ++i) {
    if (head.fate[i] != kRecode) continue;
    const PageDescriptor& page = lane.pages()[head.rows[i].page];
    const bool there = page.format == static_cast<uint8_t>(format);
    // What two layers share stays as it is.
    if (there && (is_second(format) || !is_sparse_block(lane, page))) continue;
    work.block_rows.push_back(head.rows[i]);
  }
  const size_t slots = lane.slots_of(format);
  work.block_rows.resize(work.block_rows.size() / slots * slots);
}

void drop_rows(RankWork& work, Lane& lane, std::span<const SlotRow> rows) {
  work.chosen.assign(lane.pages().size(), 0);
  for (const SlotRow& row : rows) work.chosen[row.page] |= uint64_t{1} << row.slot;
  for (uint32_t page = 0; page < work.chosen.size(); ++page) {
    if (work.chosen[page] != 0) lane.drop(page, work.chosen[page]);
  }
}

// One new page of `block`; of a pair, `first` has the same tokens of the layer before.
void write_block(SequenceState& state, Format format, const TokenBlock& block,
                 const TokenBlock* first, const uint64_t* channels, Lane& lane) {
  const TokenBlock& codes = first != nullptr ? *first : block;
  const uint32_t page = state.pages.take().raw();
  state.header->data_pages += 1;
  state.kernels.encode_block({.page = state.pages.address(page),
                              .format = first != nullptr ? first_of(format) : format,
                              .head_dim = state.geometry.head_dim,
                              .k = codes.k,
                              .v = codes.v,
                              .positions = block.positions.data(),
                              .eta = eta_of(state.policy(), format),
                              .second_k = first != nullptr ? block.k : nullptr,
                              .second_v = first != nullptr ? block.v : nullptr,
                              .channels = channels});
  lane.adopt_block(format, page, block.scores.data());
}

}  // namespace

void recode_blocks(SequenceState& state, Format format, uint32_t lane_index, const RankHead& head) {
  RankWork& work = state.rank;
  Lane lane = state.lane(lane_index);
  choose_rows(work, format, lane, head);
  if (work.block_rows.empty()) return;
  const uint32_t slots = page_layout(format, state.geometry.head_dim).slots;
  const auto count = static_cast<uint32_t>(work.block_rows.size());
  const bool pair = is_second(format);
  Lane first = state.lane(pair ? lane_index - state.geometry.kv_heads : lane_index);
  const size_t values = size_t{slots} * state.geometry.head_dim;
  if (pair) {
    find_same_rows(work, first);
    first.grow_for(count / slots);
    work.first_values.resize(2 * values);
  }
  const uint64_t* const channels =
      is_think(format) ? channels_of(state, lane_index, head) : nullptr;
  lane.grow_for(count / slots);
  TokenBlock block{}, before{};
  block.k = state.k_rows.data();
  block.v = state.v_rows.data();
  before.k = work.first_values.data();
  before.v = before.k + values;
  for (uint32_t at = 0; at < count; at += slots) {
    block.rows = std::span<const SlotRow>(work.block_rows).subspan(at, slots);
    load_rows(state, lane, block);
    if (pair) {
      before.rows = std::span<const SlotRow>(work.first_rows).subspan(at, slots);
      load_rows(state, first, before);
    }
    write_block(state, format, block, pair ? &before : nullptr, channels, lane);
    if (pair)
      first.adopt_block(first_of(format), lane.pages()[lane.pages().size() - 1].page,
                        before.scores.data());
  }
  drop_rows(work, lane, work.block_rows);
  if (pair) {
    drop_rows(work, first, work.first_rows);
    first.sweep();
  }
  const uint64_t recoded = uint64_t{count} * (pair ? 2 : 1);
  state.header->counters.recoded_slots += recoded;
  state.header->counters.recoded_bytes +=
      recoded * page_layout(format, state.geometry.head_dim).slot_payload_bytes() / (pair ? 2 : 1);
}

}  // namespace thinkv::kernels
