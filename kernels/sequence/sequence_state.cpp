#include "kernels/sequence/sequence_state.h"

#include <algorithm>
#include <limits>

#include "kernels/policy/rank_trigger.h"
#include "kernels/sequence/survivors.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {

SequenceState::SequenceState(PageSource& source, const KernelSet& kernel_set,
                             const ModelGeometry& shape)
    : pages(source),
      heap(pages, page_bytes(shape.head_dim)),
      kernels(kernel_set),
      geometry(shape),
      softmax_scale(softmax_scale_of(shape)),
      store{.pages = &pages,
            .heap = &heap,
            .kernels = &kernels,
            .data_pages = nullptr,
            .head_dim = shape.head_dim,
            .wide = shape.value_type == ValueType::kBf16 ? Format::kBf16 : Format::kF16,
            .scored = false,
            .sums = false} {}

void SequenceState::create_root(const PolicyParams& policy, bool trace_sparsity) {
  heap.create();
  const BlockRef block = heap.allocate(kSequenceHeaderGranules);
  THINKV_CHECK(block.granule == kSequenceHeaderGranule);
  header = reinterpret_cast<SequenceHeader*>(heap.address(block));
  header->magic = kSequenceMagic;
  header->version = kSequenceLayoutVersion;
  header->layers = geometry.layers;
  header->q_heads = geometry.q_heads;
  header->kv_heads = geometry.kv_heads;
  header->head_dim = geometry.head_dim;
  header->value_type = static_cast<uint32_t>(geometry.value_type);
  header->softmax_scale = geometry.softmax_scale;
  header->trace_sparsity = trace_sparsity ? 1 : 0;
  header->policy = policy;
  SharedVector<LaneHeader>::initialise(header->lanes);
  SegmentTable::initialise(header->segments);
  ClassTable::initialise(header->classes);
  SharedVector<LayerCodes>::initialise(header->codebooks);
  CentreTable::initialise(header->centres);
}

void SequenceState::push_lanes(SharedVector<LaneHeader> table) {
  table.grow_for(geometry.lanes());
  for (uint32_t i = 0; i < geometry.lanes(); ++i) {
    LaneHeader fresh{};
    SharedVector<PageDescriptor>::initialise(fresh.pages);
    fresh.buffer_page[0] = fresh.buffer_page[1] = PageId::kNoneRaw;
    fresh.rank.page = fresh.stream.page = PageId::kNoneRaw;
    if (policy().evict == EvictRule::kRank) {
      fresh.rank = heap.allocate(kRankLaneGranules);
      auto* rank_lane = reinterpret_cast<RankLane*>(heap.address(fresh.rank));
      rank_lane->head_signal = std::numeric_limits<float>::quiet_NaN();
      rank_lane->mask = policy::kMaskFull;
    }
    if (policy().entropy.on()) {
      fresh.stream = heap.allocate(kStreamLaneGranules);
      Stream::initialise(*stream_header(store, fresh));
    }
    table.push(fresh);
  }
}

void SequenceState::push_codebooks() {
  SharedVector<LayerCodes> table(header->codebooks, heap);
  table.grow_for(geometry.layers);
  for (uint32_t i = 0; i < geometry.layers; ++i) table.push({});
}

Status SequenceState::create(const PolicyParams& policy, const SequenceOptions& options) {
  THINKV_TRY(pages.reserve(1));
  create_root(policy, options.trace_sparsity);
  SharedVector<LaneHeader> lane_table(header->lanes, heap);
  SegmentTable table = segments();
  MetaNeed need(heap.granules_per_page());
  lane_table.add_need(geometry.lanes(), need);
  table.add_need(1, need);
  if (policy.evict == EvictRule::kRank) need.add_blocks(kRankLaneGranules, geometry.lanes());
  const uint32_t pieces = Centres::pieces(geometry.lanes(), geometry.head_dim);
  if (policy.centre != 0) centre_table().add_need(pieces, need);
  if (policy.entropy.on()) {
    need.add_blocks(kStreamLaneGranules, geometry.lanes());
    SharedVector<LayerCodes>(header->codebooks, heap).add_need(geometry.layers, need);
  }
  if (const Status reserved = pages.reserve(need.pages()); !reserved) {
    heap.destroy();
    return reserved.error();
  }
  push_lanes(lane_table);
  if (policy.entropy.on()) push_codebooks();
  if (policy.centre != 0) centres.create(centre_table(), geometry.lanes(), geometry.head_dim);
  table.grow_for(1);
  table.push({.start = 0,
              .end = policy::kOpenEnd,
              .label = static_cast<uint8_t>(Thought::kReasoning),
              .level = 0,
              .merged = 0,
              .waiting = 0,
              .live = 0});
  pages.end_reservation();
  view_lanes();
  size_scratch();
  if (policy.entropy.on()) THINKV_CHECK(load_coding(*this));
  return {};
}

bool SequenceState::adopt(PageId root) {
  if (!heap.adopt(root)) return false;
  header = reinterpret_cast<SequenceHeader*>(heap.address({root.raw(), kSequenceHeaderGranule}));
  if (header->lanes.size != geometry.lanes() || header->segments.size == 0) return false;
  view_lanes();
  const bool ranked = policy().evict == EvictRule::kRank;
  for (const LaneHeader* lane_header : lanes) {
    if (ranked != (lane_header->rank.page != PageId::kNoneRaw)) return false;
    if (policy().entropy.on() != (lane_header->stream.page != PageId::kNoneRaw)) return false;
  }
  const bool centred = policy().centre != 0;
  if (centred && !centres.load(centre_table(), geometry.lanes(), geometry.head_dim)) return false;
  size_scratch();
  return !policy().entropy.on() || load_coding(*this);
}

void SequenceState::destroy() {
  for (uint32_t i = 0; i < lanes.size(); ++i) lane(i).destroy();
  THINKV_CHECK(header->data_pages == 0);
  segments().destroy();
  classes().destroy();
  SharedVector<LayerCodes>(header->codebooks, heap).destroy();
  centre_table().destroy();
  SharedVector<LaneHeader>(header->lanes, heap).destroy();
  pages.end_reservation();
  heap.destroy();
}

void SequenceState::condition(uint32_t lane, float* k, float* v, uint32_t count) const {
  if (policy().rotate != 0) {
    kernels.rotate(k, count, geometry.head_dim);
    kernels.rotate(v, count, geometry.head_dim);
  }
  centres.take_off(lane, k, count);
}

void SequenceState::view_lanes() {
  store.data_pages = &header->data_pages;
  store.sums = policy::keeps_sums(policy());
  store.scored =
      store.sums || (policy().evict == EvictRule::kTbe && selects_by_scores(policy().select));
  const SharedVector<LaneHeader> table(header->lanes, heap);
  lanes.clear();
  lanes.reserve(table.size());
  table.for_each([&](uint32_t, LaneHeader& lane_header) { lanes.push_back(&lane_header); });
}

void SequenceState::size_scratch() {
  const PolicyParams& p = policy();
  layer_given.assign(geometry.layers, 0);
  lane_attended.assign(geometry.lanes(), 0);
  lane_sparsity.assign(geometry.lanes(), SparsityCount{});
  layer_sparsity.assign(geometry.layers, std::numeric_limits<float>::quiet_NaN());
  label_layer.assign(geometry.layers, 0);
  for (uint32_t i = 0; i < p.label_layer_count; ++i) label_layer[p.label_layers[i]] = 1;
  k_rows.assign(size_t{kSlotsPerPageMax} * geometry.head_dim, 0.0f);
  v_rows.assign(size_t{kSlotsPerPageMax} * geometry.head_dim, 0.0f);
  if (p.tier.on()) tier.resize(geometry.lanes());
  if (p.evict != EvictRule::kTbe) return;
  // A merge joins two segments at the last level, each smaller than a whole one.
  const size_t most = size_t{2} * p.segment_tokens;
  rows.resize(most);
  weights.resize(most);
  order.resize(most);
  keep.resize(most);
  if (!selects_by_keys(p.select)) return;
  const uint32_t merged = 2u * p.schedule[p.schedule_length - 1];
  const size_t heads = p.grain == SelectGrain::kLayer ? geometry.kv_heads : 1;
  keys.resize(std::max(p.segment_tokens, merged) * heads * geometry.head_dim);
}

FlushFormats SequenceState::flush_formats(uint32_t layer) const {
  if (policy().tier.on() && policy().tier.dense(layer)) {
    const Format dense = resolve(policy().tier.dense_format);
    return {.sink = dense, .thought = dense, .sink_tokens = 0};
  }
  const SegmentTable table = segments();
  const policy::Segment& open = table[table.size() - 1];
  return {.sink = resolve(policy().sink_format),
          .thought = resolve(policy().thought_format[open.label]),
          .sink_tokens = policy().sink_tokens};
}

Format SequenceState::recode_format(const RankRule& rule, uint32_t layer) const {
  const Format format = resolve(rule.recode_format);
  if (!is_pair(format)) return format;
  if (layer % 2 == 1) return second_of(format);
  return layer + 1 < geometry.layers ? format : single_of(format);
}

uint32_t SequenceState::generated_live() const {
  uint32_t most = 0;
  for (const LaneHeader* lane_header : lanes) {
    most = std::max(most, lane_header->live - lane_header->live_prompt);
  }
  return most;
}

float SequenceState::flush_decay() const {
  const bool decays = !store.sums || policy().score_kind == ScoreKind::kDecayed;
  return decays ? policy().score_decay : 1.0f;
}

uint32_t SequenceState::budget() const {
  if (policy().evict == EvictRule::kNone) return 0;
  return header->budget_tokens == kBudgetNone ? 0 : header->budget_tokens;
}

}  // namespace thinkv::kernels
