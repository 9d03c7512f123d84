#include "tests/support/device_twin.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <vector>

namespace thinkv::testing {
namespace {

std::vector<PlacedPage> host_placement(const kernels::Lane& lane) {
  std::vector<PlacedPage> pages;
  lane.pages().for_each([&](uint32_t, const kernels::PageDescriptor& d) {
    PlacedPage page{
        static_cast<Format>(d.format), d.live, d.filled, d.first_position, d.last_position, {}};
    for (uint64_t left = d.live; left != 0; left &= left - 1) {
      page.positions.push_back(lane.position(d, static_cast<uint32_t>(std::countr_zero(left))));
    }
    pages.push_back(page);
  });
  return pages;
}

// What a token becomes in a format, by the reference codec in slot 0 of a page of our own.
void recode_token(LaneToken& token, Format format) {
  alignas(64) std::byte page[page_bytes(256)];
  const uint8_t slot = 0;
  const uint32_t position = 0;
  const auto dim = static_cast<uint32_t>(token.k.size());
  kernels::reference().encode({.page = page,
                               .format = format,
                               .head_dim = dim,
                               .slots = {&slot, 1},
                               .k = token.k.data(),
                               .v = token.v.data(),
                               .positions = &position});
  const uint32_t score = token.score;
  token = decode_slot(page, format, dim, 0);
  token.score = score;
}

uint32_t mixed(uint32_t planted, uint32_t lane, uint32_t position) {
  return position * 2654435761u ^ lane * 40503u ^ planted * 97u;
}
uint16_t planted_score(uint32_t planted, uint32_t lane, uint32_t position) {
  return fp16_from_float(static_cast<float>(mixed(planted, lane, position) >> 20) / 512.0f);
}
// Few values, so that sums of them are often the same, and every eighth token a heavy hitter.
float planted_probability(uint32_t planted, uint32_t lane, uint32_t position) {
  const float light = static_cast<float>(mixed(planted, lane, position) >> 24 & 15u) / 7.0f;
  return mixed(0, lane, position) >> 29 == 0 ? light + 200.0f : light;
}

// NaN, so that what reads the number of a slot that is not live shows.
void poison_dead_slots(uint64_t live, unsigned char* row, uint32_t width) {
  for (uint32_t slot = 0; slot < kSlotsPerPageMax; ++slot) {
    if (((live >> slot) & 1u) == 0) std::memset(row + size_t{slot} * width, 0xFF, width);
  }
}

// The number of a slot on the host, as its bits.
uint32_t host_score(const kernels::SequenceState& state, const kernels::Lane& lane,
                    const kernels::PageDescriptor& d, uint32_t slot) {
  return state.store.sums ? std::bit_cast<uint32_t>(lane.sums(d)[slot]) : lane.scores(d)[slot];
}
// What the flush that is due makes of it.
uint32_t decayed_score(const kernels::SequenceState& state, uint32_t score) {
  if (!state.store.sums) {
    return fp16_from_float(fp16_to_float(static_cast<uint16_t>(score)) *
                           state.policy().score_decay);
  }
  return std::bit_cast<uint32_t>(std::bit_cast<float>(score) * state.flush_decay());
}

// The descriptors of a lane as its list has them: format by format, else in the table's order.
std::vector<uint32_t> listed_order(const DeviceReader& reader, const cuda::DeviceLane& lane) {
  std::vector<uint32_t> order(lane.pages);
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    const auto rank = [&](uint32_t i) {
      return cuda::list_rank(static_cast<Format>(reader.descriptor(lane, i).format));
    };
    return rank(a) < rank(b);
  });
  return order;
}

}  // namespace

void TwinBatch::fill_wild(ElementRows& rows, uint64_t first, uint64_t count) {
  constexpr float kSpecial[] = {0.0f,   -0.0f,    1e30f,
                                -1e30f, 65519.0f, std::numeric_limits<float>::infinity(),
                                6e-8f,  1e-40f,   std::numeric_limits<float>::quiet_NaN()};
  const uint32_t dim = options_.geometry.head_dim;
  for (uint64_t i = first; i < first + count; i += dim) {
    const uint32_t kind = below(6);
    const float scale = std::exp2(static_cast<float>(below(40)) - 24.0f);
    for (uint32_t d = 0; d < dim; ++d) {
      float value = normal_(random_) * (kind == 5 ? 1.0f : scale);
      if (kind == 0) value = 0.0f;
      if (kind == 1) value = scale;
      if (kind == 2 && below(16) == 0) value = kSpecial[below(std::size(kSpecial))];
      if (kind == 3 && below(32) == 0) value *= 64.0f;
      rows.set(i + d, value);
    }
  }
}

// As device tokens are after the flush that the host has still to do.
LaneTokens TwinBatch::host_tokens(const Twin& t, uint32_t lane_index) const {
  const kernels::SequenceState& state = t.state();
  const kernels::Lane lane = state.lane(lane_index);
  const kernels::LaneHeader& header = lane.header();
  const uint32_t dim = state.geometry.head_dim;
  const bool due = header.buffer_count == kernels::kBufferTokens;
  const kernels::FlushFormats formats = state.flush_formats(lane_index / state.geometry.kv_heads);
  LaneTokens tokens;
  lane.pages().for_each([&](uint32_t, const kernels::PageDescriptor& d) {
    for (uint64_t left = d.live; left != 0; left &= left - 1) {
      const auto slot = static_cast<uint32_t>(std::countr_zero(left));
      LaneToken token =
          decode_slot(state.pages.address(d.page), static_cast<Format>(d.format), dim, slot);
      if (state.store.scored) {
        token.score = host_score(state, lane, d, slot);
        if (due) token.score = decayed_score(state, token.score);
      }
      tokens[lane.position(d, slot)] = std::move(token);
    }
  });
  for (uint32_t i = 0; i < header.buffer_count; ++i) {
    const void* page = state.pages.address(header.buffer_page[i / kernels::kBufferPageSlots]);
    const uint32_t slot = i % kernels::kBufferPageSlots;
    const uint32_t position = slot_position(page, state.store.wide, dim, slot);
    LaneToken token = decode_slot(page, state.store.wide, dim, slot);
    token.buffered = !due;
    if (state.store.scored) {
      token.score = state.store.sums ? std::bit_cast<uint32_t>(lane.rank().buffer_sum[i])
                                     : header.buffer_score[i];
    }
    if (due) recode_token(token, position < formats.sink_tokens ? formats.sink : formats.thought);
    tokens[position] = std::move(token);
  }
  return tokens;
}

// The same scores on both sides, whatever attention would have made of them: sums grow where the
// step measures, as emission makes them.
void TwinBatch::plant_scores() {
  ++planted_;
  for (uint32_t row = 0; row < options_.capacity; ++row) {
    const Twin* t = twins_[row].get();
    if (t == nullptr || !t->state().store.scored) continue;
    const bool sums = t->state().store.sums;
    const uint8_t wanted = !t->state().emitting ? 0 : sums ? cuda::kEmitSums : cuda::kEmitScores;
    for (uint32_t layer = 0; layer < options_.geometry.layers; ++layer) {
      const uint8_t emit = pool_.emit()[uint64_t{layer} * options_.capacity + row];
      expect((emit & (cuda::kEmitSums | cuda::kEmitScores)) == wanted, "emission flags");
    }
    if (sums && wanted == 0) continue;
    for (uint32_t lane = 0; lane < options_.geometry.lanes(); ++lane) plant_in_lane(*t, lane, sums);
  }
}

void TwinBatch::plant_in_lane(const Twin& t, uint32_t index, bool sums) {
  const auto plant = [&](void* row, uint32_t slot, uint32_t position) {
    if (sums) {
      static_cast<float*>(row)[slot] += planted_probability(planted_, index, position);
    } else {
      static_cast<uint16_t*>(row)[slot] = planted_score(planted_, index, position);
    }
  };
  const kernels::Lane lane = t.state().lane(index);
  lane.pages().for_each([&](uint32_t, const kernels::PageDescriptor& d) {
    void* row = sums ? static_cast<void*>(lane.sums(d)) : lane.scores(d);
    for (uint64_t left = d.live; left != 0; left &= left - 1) {
      const auto slot = static_cast<uint32_t>(std::countr_zero(left));
      plant(row, slot, lane.position(d, slot));
    }
  });
  const uint32_t buffered = lane.header().buffer_count, next = t.host->tokens() + 1;
  for (uint32_t i = 0; i < buffered; ++i) plant(lane.buffer_scores(), i, next - buffered + i);
  const DeviceReader reader(pool_, t.root);
  cuda::DeviceLane& l = reader.lane(index);
  for (uint32_t i = 0; i < l.pages; ++i) {
    const cuda::DeviceDescriptor& d = reader.descriptor(l, i);
    poison_dead_slots(d.live, reader.scores(l, i), reader.header().score_bytes);
    for (uint64_t left = d.live; left != 0; left &= left - 1) {
      const auto slot = static_cast<uint32_t>(std::countr_zero(left));
      plant(reader.scores(l, i), slot,
            slot_position(pool_.address(d.page), static_cast<Format>(d.format),
                          options_.geometry.head_dim, slot));
    }
  }
  for (uint32_t i = 0; i < l.buffer_count; ++i) {
    plant(l.buffer_sum, i, next - l.buffer_count + i);
  }
}

// The list of a layer names the live slots of every lane, and the scores beside them.
void TwinBatch::check_list(uint32_t layer) {
  const ModelGeometry& g = options_.geometry;
  const uint32_t* begin = pool_.lane_begin().data() + uint64_t{layer} * (pool_.rows() + 1);
  const uint64_t list = uint64_t{layer} * pool_.options().list_pages;
  expect(begin[0] == 0, "the list starts at 0");
  for (uint32_t row = 0; row < pool_.rows(); ++row) {
    const Twin* t = twins_[row / g.kv_heads].get();
    if (t == nullptr) {
      expect(begin[row + 1] == begin[row], "a row without a sequence has pages");
      continue;
    }
    const DeviceReader reader(pool_, t->root);
    const cuda::DeviceLane& lane = reader.lane(layer * g.kv_heads + row % g.kv_heads);
    const uint32_t buffers = (lane.buffer_count + 7) / 8;
    const uint32_t coded = stream_entries(reader, layer * g.kv_heads + row % g.kv_heads);
    const uint64_t first = list + begin[row] + coded;
    const uint32_t working = (pool_.fetched(layer, row) + 7) / 8;
    expect(begin[row + 1] - begin[row] == coded + lane.pages + buffers + working,
           "pages of a lane in the list");
    for (uint32_t i = 0; i < working; ++i) {
      const uint64_t at = first + lane.pages + buffers + i;
      const auto page = reinterpret_cast<uint64_t>(pool_.working_page(row, i));
      const uint32_t left = pool_.fetched(layer, row) - 8 * i;
      const cuda::PageView& entry = pool_.list()[at];
      expect(entry.tagged == (page | static_cast<uint64_t>(reader.wide())) &&
                 entry.live == (left >= 8 ? 0xFFu : (1u << left) - 1) &&
                 pool_.score_rows()[at] == nullptr,
             "a working page in the list");
    }
    expect(pool_.positions()[row / g.kv_heads] == t->host->tokens(), "position of the step");
    const std::vector<uint32_t> order = listed_order(reader, lane);
    for (uint32_t i = 0; i < lane.pages + buffers; ++i) {
      const bool buffer = i >= lane.pages;
      const uint32_t b = i - lane.pages;
      const cuda::DeviceDescriptor* d = buffer ? nullptr : &reader.descriptor(lane, order[i]);
      const uint64_t page =
          reinterpret_cast<uint64_t>(pool_.address(buffer ? lane.buffer_page[b] : d->page));
      const uint64_t format = buffer ? static_cast<uint64_t>(reader.wide()) : d->format;
      const uint32_t left = lane.buffer_count - 8 * b;
      const uint64_t live = !buffer ? d->live : left >= 8 ? 0xFFu : (1u << left) - 1;
      const cuda::PageView& entry = pool_.list()[first + i];
      expect(entry.tagged == (page | format) && entry.live == live, "an entry of the list");
      const uint32_t width = reader.header().score_bytes;
      const auto* in_buffer = reinterpret_cast<const unsigned char*>(lane.buffer_sum);
      const void* scores = buffer ? in_buffer + 8 * b * width : reader.scores(lane, order[i]);
      const void* listed = pool_.score_rows()[first + i];
      expect(listed == (width != 0 ? scores : nullptr), "a row of scores in the list");
    }
  }
}

void TwinBatch::check_progress() {
  const cuda::Progress& progress = pool_.progress();
  uint64_t live = 0;
  uint32_t pages_max = 0;
  for (const auto& t : twins_) {
    if (!t) continue;
    live += t->host->stats().live_slots;
    pages_max = std::max(pages_max, lane_pages_max(*t));
  }
  ++steps_;
  expect(progress.steps == steps_, "progress.steps");
  expect(progress.live_slots == live, "progress.live_slots");
  expect(progress.lane_pages_max == pages_max, "progress.lane_pages_max");
  expect(progress.used_total == pool_.lease().used_total && progress.faults == 0, "progress");
}

void TwinBatch::compare_lane(const Twin& t, const DeviceReader& reader, uint32_t index) {
  const std::string where =
      "lane " + std::to_string(index) + " at token " + std::to_string(t.host->tokens()) + ": ";
  std::string twice;
  const LaneTokens expected = host_tokens(t, index), found = reader.tokens(index, twice);
  expect(twice.empty(), where + twice);
  if (expected != found) {
    for (const auto& [position, token] : expected) {
      const auto it = found.find(position);
      if (it != found.end() && it->second == token) continue;
      expect(false, where + "position " + std::to_string(position) +
                        (it == found.end() ? " is missing" : " differs"));
      break;
    }
    expect(expected.size() == found.size(), where + "number of live tokens");
  }
  compare_stream(t, reader, index, where);
  const kernels::Lane lane = t.state().lane(index);
  expect(lane.header().live_prompt == reader.lane(index).live_prompt, where + "live_prompt");
  compare_rank_lane(t, reader, index);
  if (!t.same_places || t.host_flush_is_due()) return;
  expect(host_placement(lane) == reader.placement(index), where + "places");
}

void TwinBatch::give_queries(Twin& t, uint32_t layer, const cuda::Prompt& prompt) {
  const ModelGeometry& g = options_.geometry;
  ElementRows q(options_.element, uint64_t{prompt.queries} * g.q_heads * g.head_dim);
  fill(q, 0, q.host.size());
  THINKV_CHECK(t.host->prefill_queries(layer, q.host.data(), prompt.queries).has_value());
  pool_.supply(0);
  run(cuda::launch_prefill_queries(pool_.view(), t.root, t.host->policy(), layer, q.device(),
                                   options_.element, prompt, nullptr));
}

// What rules keep of a lane beside its tokens.
void TwinBatch::compare_rank_lane(const Twin& t, const DeviceReader& reader, uint32_t index) {
  if (t.host->policy().evict != EvictRule::kRank) return;
  const kernels::RankLane& host = t.state().lane(index).rank();
  const cuda::DeviceLane& lane = reader.lane(index);
  const std::string where = "lane " + std::to_string(index) + ": ";
  expect(host.mask == lane.mask, where + "mask");
  expect(host.mask_tokens == lane.mask_tokens, where + "mask_tokens");
  const bool both_none = std::isnan(host.head_signal) && std::isnan(lane.head_signal);
  expect(both_none || host.head_signal == lane.head_signal, where + "head_signal");
  expect(host.channels_chosen == lane.channels_chosen, where + "channels_chosen");
  expect(std::memcmp(host.channels, lane.channels, sizeof lane.channels) == 0, where + "channels");
}

void TwinBatch::compare_numbers(const Twin& t) {
  DeviceVector<cuda::SequenceNumbers> out(1);
  run(cuda::launch_numbers(pool_.view(), t.root, out.data(), nullptr));
  const cuda::SequenceNumbers& n = out[0];
  const kernels::SequenceStats s = t.host->stats();
  expect(n.tokens == s.tokens && n.prompt_tokens == s.prompt_tokens, "tokens");
  expect(n.live_slots == s.live_slots && n.live_tokens_max == s.live_tokens_max, "live numbers");
  expect(n.evicted_slots == s.evicted_slots, "evicted_slots");
  expect(n.recoded_slots == s.recoded_slots && n.recoded_bytes == s.recoded_bytes, "recoded");
  const DeviceReader reader(pool_, t.root);
  expect(reader.header().tier_tokens == t.state().header->tier_tokens, "tier_tokens");
  expect(n.steps == s.steps && n.refreshes == s.refreshes, "steps and refreshes");
  expect(n.demotions == s.demotions && n.merges == s.merges, "demotions and merges");
  expect(n.over_budget_steps == s.over_budget_steps, "over_budget_steps");
  expect(n.budget_tokens == s.budget_tokens, "budget_tokens");
  expect(n.gathered_bytes == s.gathered_bytes, "gathered_bytes");
  expect(n.lane_pages_max == lane_pages_max(t), "lane_pages_max");
  for (uint32_t i = 0; i < kThoughtCount; ++i) expect(n.segments[i] == s.segments[i], "segments");
  if (t.same_places && !t.host_flush_is_due()) {
    expect(n.reused_slots == s.reused_slots, "reused_slots");
  }
}

void TwinBatch::copy(uint32_t row) {
  const Twin& t = *twins_[row];
  const DeviceReader source(pool_, t.root);
  const uint32_t pages = source.header().data_pages + source.header().metadata_pages - 1;
  const uint32_t root = pool_.take();
  pool_.supply(pages);
  run(cuda::launch_copy(pool_.view(), t.root, root, nullptr));
  expect(pool_.lease().count == 0, "a copy takes what the sequence holds");
  const DeviceReader made(pool_, root);
  std::set<uint32_t> owned;
  std::string wrong;
  source.check(owned, wrong);
  made.check(owned, wrong);
  for (uint32_t lane = 0; lane < options_.geometry.lanes(); ++lane) {
    expect(made.tokens(lane, wrong) == source.tokens(lane, wrong), "a copy differs");
  }
  expect(wrong.empty(), "a copy: " + wrong);
  run(cuda::launch_close(pool_.view(), root, nullptr));
  expect(pool_.lease().count == pages + 1, "a closed copy gives all back");
}

void TwinBatch::compare() {
  std::set<uint32_t> owned;
  for (const auto& t : twins_) {
    if (!t) continue;
    const DeviceReader reader(pool_, t->root);
    std::string structure;
    reader.check(owned, structure);
    expect(structure.empty(), structure);
    for (uint32_t lane = 0; lane < options_.geometry.lanes(); ++lane)
      compare_lane(*t, reader, lane);
    compare_numbers(*t);
  }
  expect(pool_.lease().used_total == owned.size(), "used_total is what sequences hold");
  expect(pool_.free_pages() + owned.size() == pool_.total_pages(), "a page was lost");
}

}  // namespace thinkv::testing
