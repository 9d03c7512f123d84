// sequence.h: one sequence: its KV pages, its segments, and the ThinKV policy that runs on them.
//
// Everything that makes up a sequence lies in pages of the pool (sequence_format.h); an object of
// this class is a view of them and can be made again from the root page (attach). A step asks for
// every page that it can need in begin_step(), so it fails before anything has changed or not at
// all. Nothing in a step allocates from the heap once the lane tables have their size.
//
// The life: create; [prefill every layer once, prefill_end;] then for each token begin_step, for
// each layer append and attend, end_step; release. K and V come after rotary embedding.
// Threads: calls on one sequence must not overlap, except attend_lane() on different lanes.
// Source of the method: arXiv 2510.01290; budgets, floor and label timing as in policy/segments.h.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/sequence/host_tier.h"
#include "kernels/sequence/page_source.h"
#include "kernels/sequence/staging.h"
#include "thinkv/internal/geometry.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/result.h"

namespace thinkv::kernels {

inline constexpr uint32_t kBudgetOfPolicy = 0;
inline constexpr uint32_t kBudgetNone = 0xFFFF'FFFFu;
// What stands in a sequence's header: tokens, or 0 for no budget; of rank rules, whose budget of 0
// is a rule's own, kBudgetNone stays.
[[nodiscard]] constexpr uint32_t budget_in_tokens(uint32_t wanted, const PolicyParams& policy) {
  if (wanted == kBudgetOfPolicy) return policy.budget_tokens;
  if (policy.evict == EvictRule::kRank) return wanted;
  return wanted == kBudgetNone ? 0 : wanted;
}
inline constexpr uint32_t kBufferTokens = 16;  // newest tokens of a lane, kept at 16 bits

struct SequenceOptions {
  uint32_t budget_tokens = kBudgetOfPolicy;  // generated live tokens of a lane
  bool trace_sparsity = false;               // measure all layers at every step
};

// Tokens are counted once a sequence, slots once a lane.
struct SequenceStats {
  uint64_t tokens = 0;  // positions so far, prompt included
  uint64_t prompt_tokens = 0;
  uint64_t live_slots = 0;       // over all lanes
  uint64_t live_tokens_max = 0;  // of one lane, prompt included
  uint64_t pages = 0;            // K/V pages, the 16-bit buffers included
  uint64_t metadata_pages = 0;
  uint64_t page_bytes = 0;
  uint64_t metadata_bytes = 0;  // whole pages
  uint64_t bytes_held = 0;      // (pages + metadata_pages) x page_bytes
  uint64_t bytes_f16 = 0;       // what a 16-bit cache of the same tokens takes
  uint64_t evicted_slots = 0;   // by the policy and by evict()
  uint64_t reused_slots = 0;    // new tokens written into evicted slots
  uint64_t gathered_bytes = 0;  // moved where the prompt was cut; decoding moves nothing
  uint64_t recoded_slots = 0;   // by quantize()
  uint64_t recoded_bytes = 0;   // payload written by quantize()
  uint64_t demotions = 0;       // of segments
  uint64_t merges = 0;          // of segments, floor rule kMerge
  uint64_t over_budget_steps = 0;
  uint64_t refreshes = 0;
  uint64_t steps = 0;
  uint64_t segments[kThoughtCount] = {};  // opened so far, by label
  uint64_t budget_tokens = 0;             // in force; 0: none
  uint64_t tier_bytes = 0;                // in the client's memory, no bytes of the pool
};

// Working memory of attend_lane(): one a thread, reused from call to call.
struct AttendScratch {
  std::vector<PageView> views;
  std::vector<float> query;
  std::vector<float> probabilities;
  // Of policies with streams or a tier.
  StagingPages staging;
  std::vector<std::byte> coded;  // the bytes of a block
  std::vector<uint8_t> codes;
  std::vector<float> k_rows;
  std::vector<float> v_rows;
  TierScratch tier;
};

class SequenceState;

class Sequence {
 public:
  // Takes the metadata pages (buffers come with the first token). Errors: kInvalidArgument,
  // kUnsupported (geometry or policy that cannot be held), and those of PageSource::reserve.
  // `source` and `kernels` outlive the sequence.
  [[nodiscard]] static Result<Sequence> create(PageSource& source, const KernelSet& kernels,
                                               const ModelGeometry& geometry,
                                               const PolicyParams& policy,
                                               const SequenceOptions& options = {});
  // The sequence whose root page is `root`, as it was between two steps. `source` owns its pages.
  // Errors: kInvalidArgument where the root page does not hold a sequence of this layout,
  // kUnsupported where rows of it were in the host tier of the process that detached it.
  // Requires: the pages were written by a Sequence and not changed since.
  [[nodiscard]] static Result<Sequence> attach(PageSource& source, const KernelSet& kernels,
                                               PageId root);

  Sequence(Sequence&&) noexcept;
  Sequence& operator=(Sequence&&) noexcept;
  ~Sequence();  // releases, unless released or detached

  // ---- prompt ----
  // k, v: [tokens, kv_heads, head_dim]. Written at once, in the prompt's formats; never evicted by
  // TBE and outside its budget, while rank rules count and evict it. On error nothing of this layer
  // was written. Errors: kInvalidArgument (layer given before, other token count, a token was
  // decoded), and those of PageSource::reserve.
  [[nodiscard]] Status prefill(uint32_t layer, const float* k, const float* v, uint32_t tokens);
  // Optional, once a layer after its prefill: q [count, q_heads, head_dim], the newest queries of
  // the prompt, after rotary embedding, for rank rules that fire at the prompt's end. Without them
  // those rules wait for the first scores.window steps. All layers or none, the same count.
  // Errors: kInvalidArgument.
  [[nodiscard]] Status prefill_queries(uint32_t layer, const float* q, uint32_t count);
  // Rank rules of the prompt's end run here. Errors: kInvalidArgument unless every layer was given,
  // and those of PageSource::reserve; the prompt then stays open.
  [[nodiscard]] Status prefill_end();

  // ---- one token ----
  // Reserves every page that the step can need. On error nothing has changed.
  // Errors: kInvalidArgument (a step or a prompt is open), and those of PageSource::reserve.
  [[nodiscard]] Status begin_step();
  // k, v: [kv_heads, head_dim]; each layer once a step.
  [[nodiscard]] Status append(uint32_t layer, const float* k, const float* v);
  // q, out: [q_heads, head_dim]; lse: [q_heads] or null, natural logarithm.
  // Errors: kInvalidArgument (this layer was not appended in this step).
  [[nodiscard]] Status attend(uint32_t layer, const float* q, float* out, float* lse);
  // The query heads of one kv head alone: q, out [group, head_dim], lse [group] or null. Different
  // lanes may run on different threads, each with its own scratch.
  [[nodiscard]] Status attend_lane(uint32_t layer, uint32_t kv_head, const float* q, float* out,
                                   float* lse, AttendScratch& scratch);
  // Optional, in a step: q [q_heads, head_dim], a guess of the query that attend will have in this
  // layer. A policy with a tier chooses the rows to fetch by it, once for this step; without it
  // attend chooses by its own query. All other policies take the call and ignore it.
  // Errors: kInvalidArgument.
  [[nodiscard]] Status prefetch(uint32_t layer, const float* q);
  // Budget, and every segment_tokens the refresh: label, close the segment, demote.
  // Errors: kInvalidArgument unless every layer was appended; the step then stays open.
  [[nodiscard]] Status end_step();
  // Takes an open step back, whatever was appended in it. Attention that already ran may have
  // raised scores; nothing else remains of it. Does nothing where no step is open.
  void cancel_step();

  // ---- requests, between steps ----
  // Evicts by position in every lane; the newest 16 positions and what is not live are skipped.
  // Result: (token, lane) pairs evicted. Errors: kInvalidArgument (a step or prompt is open);
  // kUnsupported, with nothing changed, under a policy with streams unless all 64 tokens of a coded
  // block are named, and under one with a tier for tokens in it.
  [[nodiscard]] Result<uint64_t> evict(std::span<const uint32_t> positions);
  // Recodes the live tokens first..last (inclusive) that have left the 16-bit buffer; kF16 and
  // kBf16 both mean the model's 16-bit type. Result: slots recoded. On error nothing has changed.
  // Errors: kInvalidArgument, kUnsupported (a block format; a policy with streams or a tier, which
  // has its formats), and those of PageSource::reserve.
  [[nodiscard]] Result<uint64_t> quantize(uint32_t first, uint32_t last, Format format);
  // Optional: class bits of the tokens from position `first` on, before or after they come, as
  // often as wanted; all others are 0. Kept where the policy reads classes. Also while a prompt is
  // open. Errors: kInvalidArgument, kUnsupported, and those of PageSource::reserve.
  [[nodiscard]] Status token_classes(uint32_t first, std::span<const uint8_t> classes);
  // kBudgetOfPolicy, kBudgetNone or tokens; a lower budget acts at the next end_step().
  [[nodiscard]] Status set_budget(uint32_t budget_tokens);

  // ---- about ----
  [[nodiscard]] SequenceStats stats() const;
  // [layers] of the last finished step; NaN where not measured. Requires: out.size() == layers.
  void sparsity(std::span<float> out) const;
  [[nodiscard]] const ModelGeometry& geometry() const;
  [[nodiscard]] const PolicyParams& policy() const;
  [[nodiscard]] uint32_t tokens() const;
  [[nodiscard]] bool in_step() const;
  // The end of the open step selects among the tokens of every lane: more than counting.
  [[nodiscard]] bool selects_at_end() const;
  [[nodiscard]] PageId root() const;
  // The state for tests and tools; null after release() or detach().
  [[nodiscard]] const SequenceState* state() const { return state_.get(); }

  // Gives every page back. All later calls answer kStale.
  void release();
  // Lets go of the pages without giving them back; result: the root page, for attach(). An open
  // step is cancelled first. kNoPage where there is nothing.
  [[nodiscard]] PageId detach();

 private:
  explicit Sequence(std::unique_ptr<SequenceState> state);
  std::unique_ptr<SequenceState> state_;
};

}  // namespace thinkv::kernels
