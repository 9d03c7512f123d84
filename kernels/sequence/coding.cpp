#include "kernels/sequence/coding.h"

#include <algorithm>
#include <array>

#include "kernels/sequence/prompt.h"
#include "kernels/sequence/sequence_state.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {
namespace {

static_assert(kStreamBlockTokens == kBlockTokens && kBlockTokens <= kSlotsPerPageMax);

constexpr Error kDamaged =
    make_error(ErrorCode::kInternal, "a stream of the sequence is damaged: close the sequence");

using TableOfCodes = SharedVector<LayerCodes>;

bool made(const LayerCodes& codes) {
  return codes.key[0] != 0;
}
bool valid(const LayerCodes& codes) {
  return code_lengths_valid(codes.key) && code_lengths_valid(codes.value);
}

Stream stream_of(const SequenceState& state, uint32_t lane) {
  StreamLane* header = stream_header(state.store, *state.lanes[lane]);
  THINKV_CHECK(header != nullptr);
  return {state.store, *header};
}

// Codes `count` blocks of every lane of the layer into pending; load(head, block) puts the rows of
// one into state.k_rows and v_rows.
template <class Load>
void code_layer(SequenceState& state, uint32_t layer, uint32_t count, Load load) {
  CodingWork& work = state.coding;
  const EntropyParams& entropy = state.policy().entropy;
  const uint32_t dim = state.geometry.head_dim;
  const uint32_t heads = state.geometry.kv_heads;
  work.blocks.resize(std::max<size_t>(work.blocks.size(), size_t{heads} * count));
  BlockCounts counts;
  for (uint32_t i = 0; i < heads * count; ++i) {
    load(i / count, i % count);
    quantise_block(state.k_rows.data(), state.v_rows.data(), dim,
                   {entropy.key_step, entropy.value_step}, work.blocks[i]);
    count_codes(work.blocks[i], counts);
  }
  LayerCodes& codes = work.codes[layer];
  if (!work.decoders[layer])
    codes = {make_code_lengths(counts.key), make_code_lengths(counts.value)};
  const BlockEncoders encoders{HuffmanEncoder(codes.key), HuffmanEncoder(codes.value)};
  for (uint32_t head = 0; head < heads; ++head) {
    PendingBlocks& pending = work.pending[state.lane_index(layer, head)];
    pending.bytes.resize(count);
    pending.sizes.resize(count);
    pending.raw.resize(count);
    for (uint32_t b = 0; b < count; ++b) {
      const BlockCodes& block = work.blocks[size_t{head} * count + b];
      if (!block.representable) load(head, b);
      const BlockRows rows{state.k_rows.data(), state.v_rows.data(), dim, state.store.wide};
      pending.raw[b] = encode_block(block, rows, encoders, pending.bytes[b]) ? 1 : 0;
      pending.sizes[b] = static_cast<uint32_t>(pending.bytes[b].size());
    }
  }
}

// The 64 tokens from `first` on, from the pages of a lane. Result: false where one is not there.
bool load_from_pages(SequenceState& state, uint32_t lane_index, uint32_t first) {
  const Lane lane = state.lane(lane_index);
  std::array<SlotRow, kBlockTokens> rows;
  if (lane.gather(first, first + kBlockTokens, rows) != kBlockTokens) return false;
  lane.decode(rows, state.k_rows.data(), state.v_rows.data());
  return true;
}

// The slots of the 64 tokens from `first` on are free; the tokens stay counted.
void drop_from_pages(SequenceState& state, uint32_t lane_index, uint32_t first) {
  Lane lane = state.lane(lane_index);
  std::array<SlotRow, kBlockTokens> rows;
  const uint32_t count = lane.gather(first, first + kBlockTokens, rows);
  THINKV_CHECK(count == kBlockTokens);
  for (const SlotRow& row : rows) lane.drop(row.page, uint64_t{1} << row.slot);
  lane.sweep();
}

}  // namespace

bool load_coding(SequenceState& state) {
  CodingWork& work = state.coding;
  work.decoders.assign(state.geometry.layers, std::nullopt);
  work.codes.assign(state.geometry.layers, {});
  work.pending.assign(state.geometry.lanes(), {});
  const TableOfCodes table(state.header->codebooks, state.heap);
  if (table.size() != state.geometry.layers) return false;
  for (uint32_t lane = 0; lane < state.lanes.size(); ++lane) {
    const LayerCodes& codes = table[lane / state.geometry.kv_heads];
    const Stream stream = stream_of(state, lane);
    if (!stream.fits_together() || (stream.blocks().size() > 0 && !made(codes))) return false;
  }
  for (uint32_t layer = 0; layer < state.geometry.layers; ++layer) {
    const LayerCodes codes = table[layer];
    if (!made(codes)) continue;
    if (!valid(codes)) return false;
    work.codes[layer] = codes;
    work.decoders[layer].emplace(
        BlockDecoders{HuffmanDecoder(codes.key), HuffmanDecoder(codes.value)});
  }
  return true;
}

void keep_codebooks(SequenceState& state, uint32_t layer) {
  CodingWork& work = state.coding;
  if (work.decoders[layer]) return;
  const LayerCodes& codes = work.codes[layer];
  TableOfCodes(state.header->codebooks, state.heap)[layer] = codes;
  work.decoders[layer].emplace(
      BlockDecoders{HuffmanDecoder(codes.key), HuffmanDecoder(codes.value)});
}

void code_prompt(SequenceState& state, uint32_t layer, const PromptRows& rows, uint32_t tokens) {
  code_layer(state, layer, tokens / kBlockTokens, [&](uint32_t head, uint32_t block) {
    load_prompt(state, rows, state.lane_index(layer, head), block * kBlockTokens, kBlockTokens,
                state.k_rows.data(), state.v_rows.data());
  });
}

void write_pending(SequenceState& state, uint32_t lane) {
  PendingBlocks& pending = state.coding.pending[lane];
  Stream stream = stream_of(state, lane);
  stream.grow_for(pending.sizes);
  for (size_t b = 0; b < pending.bytes.size(); ++b) {
    stream.append(pending.raw[b] != 0, pending.bytes[b]);
  }
  state.lanes[lane]->live += static_cast<uint32_t>(pending.bytes.size()) * kBlockTokens;
  pending = {};
}

Status code_step(SequenceState& state) {
  const uint32_t first = stream_of(state, 0).header().end_position;
  state.coding.due = coded_tokens(state.policy().entropy, state.header->tokens + 1) > first;
  if (!state.coding.due) return {};
  bool complete = true;
  for (uint32_t layer = 0; layer < state.geometry.layers; ++layer) {
    code_layer(state, layer, 1, [&](uint32_t head, uint32_t) {
      complete = load_from_pages(state, state.lane_index(layer, head), first) && complete;
    });
  }
  if (!complete) return kDamaged;
  return {};
}

bool add_coding_need(const SequenceState& state, uint32_t lane, uint32_t& data_pages,
                     MetaNeed& need) {
  return stream_of(state, lane).add_need(state.coding.pending[lane].sizes, data_pages, need);
}

void finish_coding_step(SequenceState& state) {
  if (!state.coding.due) return;
  const uint32_t first = stream_of(state, 0).header().end_position;
  SequenceCounters& counters = state.header->counters;
  for (uint32_t layer = 0; layer < state.geometry.layers; ++layer) {
    keep_codebooks(state, layer);
    for (uint32_t head = 0; head < state.geometry.kv_heads; ++head) {
      const uint32_t lane = state.lane_index(layer, head);
      counters.recoded_slots += kBlockTokens;
      counters.recoded_bytes += state.coding.pending[lane].sizes.front();
      drop_from_pages(state, lane, first);
      write_pending(state, lane);
    }
  }
  state.coding.due = false;
}

Status add_stream_views(const SequenceState& state, uint32_t lane, AttendScratch& scratch) {
  const Stream stream = stream_of(state, lane);
  const uint32_t count = stream.blocks().size();
  if (count == 0) return {};
  const uint32_t dim = state.geometry.head_dim;
  const std::optional<BlockDecoders>& decoders =
      state.coding.decoders[lane / state.geometry.kv_heads];
  if (!decoders) return kDamaged;
  scratch.staging.start(state.store.wide, dim, count * kBlockTokens);
  scratch.k_rows.resize(size_t{kBlockTokens} * dim);
  scratch.v_rows.resize(size_t{kBlockTokens} * dim);
  const BlockOutput out{scratch.k_rows.data(), scratch.v_rows.data(), dim, state.store.wide};
  std::array<uint32_t, kBlockTokens> positions;
  for (uint32_t b = 0; b < count; ++b) {
    const StreamBlock block = stream.blocks()[b];
    bool ok = stream.read(b, scratch.coded);
    ok = ok && (block.raw != 0 ? decode_raw_block(scratch.coded, out)
                               : decode_block(scratch.coded, *decoders, scratch.codes, out));
    if (!ok) return kDamaged;
    for (uint32_t i = 0; i < kBlockTokens; ++i) positions[i] = block.first_position + i;
    scratch.staging.write(state.kernels, out.k, out.v, positions.data(), kBlockTokens,
                          scratch.views);
  }
  return {};
}

Result<uint64_t> evict_blocks(SequenceState& state, std::span<const uint32_t> positions) {
  std::vector<uint32_t> wanted(positions.begin(), positions.end());
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  const uint32_t tokens = state.header->tokens;
  const uint32_t newest = tokens > kBufferTokens ? tokens - kBufferTokens : 0;
  wanted.erase(std::lower_bound(wanted.begin(), wanted.end(), newest), wanted.end());
  // The lanes have the same blocks, because all their tokens come and go together.
  const Stream first = stream_of(state, 0);
  if (!wanted.empty() && wanted.back() >= first.header().end_position) {
    return make_error(ErrorCode::kUnsupported,
                      "under a policy with entropy only tokens in whole coded blocks can go");
  }
  std::vector<uint32_t> blocks;
  for (uint32_t b = 0; b < first.blocks().size(); ++b) {
    const uint32_t begin = first.blocks()[b].first_position;
    const auto from = std::lower_bound(wanted.begin(), wanted.end(), begin);
    const auto to = std::lower_bound(from, wanted.end(), begin + kBlockTokens);
    if (from == to) continue;
    if (to - from != kBlockTokens) {
      return make_error(ErrorCode::kUnsupported,
                        "a token of an entropy-coded block cannot be evicted alone: name all 64");
    }
    blocks.push_back(b);
  }
  for (uint32_t lane = 0; lane < state.lanes.size(); ++lane) {
    Stream stream = stream_of(state, lane);
    LaneHeader& header = *state.lanes[lane];
    for (size_t i = blocks.size(); i-- > 0;) {
      const uint32_t begin = stream.blocks()[blocks[i]].first_position;
      const uint32_t prompt = state.header->prompt_tokens;
      header.live -= kBlockTokens;
      header.live_prompt -= begin >= prompt ? 0 : std::min(prompt - begin, kBlockTokens);
      stream.remove(blocks[i]);
    }
  }
  const uint64_t evicted = uint64_t{blocks.size()} * kBlockTokens * state.lanes.size();
  state.header->counters.evicted_slots += evicted;
  return evicted;
}

}  // namespace thinkv::kernels
