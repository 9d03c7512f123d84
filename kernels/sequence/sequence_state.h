// sequence_state.h: the view that a Sequence has of its pages, and the working memory of a step.
//
// Everything that must outlive the process is behind `header`; all else is made again from it.
// Internal to this folder, and open to tests and tools that look at lanes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/policy/rank_trigger.h"
#include "kernels/sequence/buffer.h"
#include "kernels/sequence/centre.h"
#include "kernels/sequence/coding.h"
#include "kernels/sequence/host_tier.h"
#include "kernels/sequence/lane.h"
#include "kernels/sequence/rank_work.h"
#include "kernels/sequence/sequence.h"
#include "kernels/sequence/sequence_format.h"
#include "kernels/sequence/shared_vector.h"

namespace thinkv::kernels {

using SegmentTable = SharedVector<policy::Segment>;
using ClassTable = SharedVector<uint8_t>;

class SequenceState {
 public:
  enum class Phase : uint8_t { kIdle, kPrompt, kStep };

  SequenceState(PageSource& source, const KernelSet& kernel_set, const ModelGeometry& shape);
  SequenceState(const SequenceState&) = delete;  // `store` points into the object
  SequenceState& operator=(const SequenceState&) = delete;

  // New metadata. On error no page is held. Errors: those of PageSource::reserve.
  [[nodiscard]] Status create(const PolicyParams& policy, const SequenceOptions& options);
  // Result: false where the pages do not fit together.
  [[nodiscard]] bool adopt(PageId root);
  void destroy();

  [[nodiscard]] SegmentTable segments() const { return {header->segments, *store.heap}; }
  [[nodiscard]] ClassTable classes() const { return {header->classes, *store.heap}; }
  [[nodiscard]] CentreTable centre_table() const { return {header->centres, *store.heap}; }
  [[nodiscard]] Lane lane(uint32_t index) const { return {store, *lanes[index]}; }
  // One kv head's K and V as they came [count, head_dim] become what its lane keeps: rotated and
  // centred where the policy says so.
  void condition(uint32_t lane, float* k, float* v, uint32_t count) const;
  [[nodiscard]] uint32_t lane_index(uint32_t layer, uint32_t kv_head) const {
    return layer * geometry.kv_heads + kv_head;
  }
  [[nodiscard]] const PolicyParams& policy() const { return header->policy; }
  // A policy's kF16 and kBf16 are the model's 16-bit type, and so is kThink.
  [[nodiscard]] Format resolve(Format format) const {
    if (is_think(format)) return store.wide == Format::kBf16 ? Format::kThinkBf16 : Format::kThink;
    return is_16bit(format) ? store.wide : format;
  }
  // What tokens that the rule recodes become in a lane of that layer: of a pair format, its view.
  [[nodiscard]] Format recode_format(const RankRule& rule, uint32_t layer) const;
  [[nodiscard]] FlushFormats flush_formats(uint32_t layer) const;
  // What a flush multiplies the numbers of slots with.
  [[nodiscard]] float flush_decay() const;
  [[nodiscard]] FlushScratch flush_scratch() { return {k_rows.data(), v_rows.data()}; }
  // Generated live tokens of the fullest lane: what the budget bounds.
  [[nodiscard]] uint32_t generated_live() const;
  // The budget in force; 0: none.
  [[nodiscard]] uint32_t budget() const;

  Pages pages;
  MetaHeap heap;
  const KernelSet& kernels;
  ModelGeometry geometry;
  float softmax_scale;
  LaneStore store;
  SequenceHeader* header = nullptr;
  std::vector<LaneHeader*> lanes;
  Centres centres;

  // The step or prompt in progress.
  Phase phase = Phase::kIdle;
  bool closing = false;     // this step completes the open segment
  bool emitting = false;    // this step accumulates scores
  bool flushing = false;    // buffers are flushed at the end of this step
  bool firing = false;      // rank rules run at the end of this step
  policy::Moment moment{};  // of rank rules: the end of this step, or of the prompt
  uint32_t prompt_tokens = 0;
  std::vector<uint8_t> layer_given;    // appended in this step, or prefilled
  std::vector<uint8_t> lane_attended;  // in this step
  std::vector<SparsityCount> lane_sparsity;
  std::vector<float> layer_sparsity;  // of the last finished step
  std::vector<uint8_t> label_layer;   // the refresh reads this layer

  // Working memory, sized once.
  std::vector<float> k_rows;  // [kSlotsPerPageMax, head_dim]
  std::vector<float> v_rows;
  std::vector<SlotRow> rows;  // of one segment in one lane
  std::vector<float> keys;    // [rows, dim of the selection]
  std::vector<float> weights;
  std::vector<uint32_t> order;
  std::vector<uint8_t> keep;
  AttendScratch attend_scratch;
  RankWork rank;
  CodingWork coding;           // of a policy with streams
  std::vector<TierLane> tier;  // by lane, of a policy with a tier; else empty
  TierScratch tier_scratch;

 private:
  void create_root(const PolicyParams& policy, bool trace_sparsity);
  void push_lanes(SharedVector<LaneHeader> table);
  void push_codebooks();
  void view_lanes();
  void size_scratch();
};

// The parts of a step; see Sequence for what they do and return.
[[nodiscard]] Status reserve_step(SequenceState& state);
void append_layer(SequenceState& state, uint32_t layer, const float* k, const float* v);
[[nodiscard]] Status attend_one_lane(const SequenceState& state, SparsityCount* sparsity,
                                     uint32_t lane, bool emit, const float* q, float* out,
                                     float* lse, AttendScratch& scratch);
[[nodiscard]] Status prefill_layer(SequenceState& state, uint32_t layer, const float* k,
                                   const float* v, uint32_t tokens);
void finish_step(SequenceState& state);
// What attention sees of a lane: its pages in the order of the table, then the buffer's.
void collect_views(const SequenceState& state, uint32_t lane, std::vector<PageView>& views);
// Writes the chosen slots of page `index` again in `format`, then drops them. Requires: room in
// the lane's table and promised pages for them.
void recode_slots(SequenceState& state, Lane& lane, uint32_t index, uint64_t chosen, Format format);
void undo_step(SequenceState& state);
[[nodiscard]] uint64_t evict_positions(SequenceState& state, std::span<const uint32_t> positions);
[[nodiscard]] Result<uint64_t> recode(SequenceState& state, uint32_t first, uint32_t end,
                                      Format format);

}  // namespace thinkv::kernels
