// sequence.h: one sequence in device memory, as the host knows it.
//
// The host keeps what it needs to promise pages: how many tokens went in. All else is read back on
// demand (numbers), which waits for the stream.
// Threads: calls on one sequence must not overlap.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "client/gpu/engine.h"
#include "client/gpu/tier.h"

namespace thinkv::client {

class GpuBatch;

class GpuSequence {
 public:
  struct Options {
    uint32_t budget_tokens = 0;  // as thinkv_sequence_options
    bool trace_sparsity = false;
  };
  // Errors: kUnsupported (the kernels lack the policy for this shape), kExhausted, kQuotaExceeded.
  [[nodiscard]] static Result<std::unique_ptr<GpuSequence>> open(GpuEngine& engine,
                                                                 const PolicyParams& policy,
                                                                 const Options& options);
  // A sequence of its own that goes on from where this one is; waits for the stream. Errors: as
  // open().
  [[nodiscard]] Result<std::unique_ptr<GpuSequence>> copy();
  // Leaves its batch and gives every page back; waits for the stream.
  ~GpuSequence();
  GpuSequence(const GpuSequence&) = delete;
  GpuSequence& operator=(const GpuSequence&) = delete;

  // k, v: device memory [tokens, kv_heads, head_dim]. As kernels::Sequence::prefill.
  [[nodiscard]] Status prefill(uint32_t layer, const void* k, const void* v, cuda::Element element,
                               uint32_t tokens);
  // q: device memory [count, q_heads, head_dim]; the work on it is in the stream when the call
  // returns, and nothing keeps it. As kernels::Sequence::prefill_queries.
  [[nodiscard]] Status prefill_queries(uint32_t layer, const void* q, cuda::Element element,
                                       uint32_t count);
  [[nodiscard]] Status prefill_end();
  // As kernels::Sequence::token_classes; waits for the stream. Errors: kUnsupported for positions
  // that are too late, kExhausted, kQuotaExceeded.
  [[nodiscard]] Status token_classes(uint32_t first, std::span<const uint8_t> classes);
  // Results count slots over all lanes; both wait for the stream. With entropy whole coded blocks
  // go, and nothing is recoded. Errors: kUnsupported.
  [[nodiscard]] Result<uint64_t> evict(std::span<const uint32_t> positions);
  [[nodiscard]] Result<uint64_t> quantize(uint32_t first, uint32_t last, Format format);
  // Evicts all but the newest `keep` tokens, and at least 16, without waiting. Errors:
  // kUnsupported with entropy.
  [[nodiscard]] Status trim(uint32_t keep);
  [[nodiscard]] Status set_budget(uint32_t budget_tokens);
  // Waits for the stream.
  [[nodiscard]] Result<cuda::SequenceNumbers> numbers();
  // out: [layers]. Waits for the stream.
  [[nodiscard]] Status sparsity(std::span<float> out);

  [[nodiscard]] const GpuEngine& engine() const { return *engine_; }
  [[nodiscard]] PageId root() const { return root_; }
  [[nodiscard]] const PolicyParams& policy() const { return policy_; }
  [[nodiscard]] bool traced() const { return traced_; }
  [[nodiscard]] bool in_prompt() const { return prompt_open_; }
  [[nodiscard]] uint32_t prompt_tokens() const { return prompt_; }
  [[nodiscard]] uint32_t generated_tokens() const { return generated_; }
  // How many of its first `tokens` tokens are in coded blocks, or were.
  [[nodiscard]] uint32_t coded_tokens(uint64_t tokens) const;
  // An upper bound of the pages in any of its lanes' tables.
  [[nodiscard]] uint32_t lane_pages() const { return lane_pages_; }
  // Null where no token lies in a tier.
  [[nodiscard]] const GpuTier* tier() const {
    return tier_ != nullptr && tier_->bytes() != 0 ? tier_.get() : nullptr;
  }

  // ---- for its batch ----
  [[nodiscard]] GpuBatch* batch() const { return batch_; }
  void join(GpuBatch* batch, uint32_t row) { batch_ = batch, row_ = row; }
  [[nodiscard]] uint32_t row() const { return row_; }
  // At most two: 16-bit formats, or a flush that the sinks split.
  static constexpr uint32_t kLanePagesPerFlush = 2;
  // Pages that the step after the next `ahead` can take, with lanes of at most `lane_pages`.
  [[nodiscard]] uint32_t step_pages(uint32_t ahead, uint32_t lane_pages) const;
  // By how many pages a lane can grow in a step that takes at most so many.
  [[nodiscard]] uint32_t lane_pages_of(uint32_t step_pages) const;
  void count_steps(uint32_t steps);
  void uncount_steps(uint32_t steps) { generated_ -= steps; }  // they were not run
  void bound_lane_pages(uint32_t pages) { lane_pages_ = pages; }

 private:
  GpuSequence(GpuEngine& engine, const PolicyParams& policy, uint32_t budget, PageId root)
      : engine_(&engine), policy_(policy), budget_(budget), root_(root) {}
  [[nodiscard]] Status require_idle() const;
  // In the table of a lane of the layer, once the prompt is there.
  [[nodiscard]] uint32_t prompt_pages(uint32_t layer, uint32_t tokens) const;
  [[nodiscard]] Status put_into_tier(uint32_t layer, const void* k, const void* v,
                                     cuda::Element element, uint32_t tokens);
  // Errors: kUnsupported where a position lies in the tier.
  [[nodiscard]] Status require_none_in_tier(std::span<const uint32_t> positions) const;
  // The same, where a lane may have so many. Errors: kUnsupported.
  [[nodiscard]] Result<uint32_t> prompt_lane_pages(uint32_t layer, uint32_t tokens) const;
  struct PromptLayer {
    uint32_t layer;
    const void* k;
    const void* v;
    cuda::Element element;
    uint32_t tokens;
  };
  [[nodiscard]] Status write_prompt(const PromptLayer& prompt);
  // The same with coded blocks, whose bytes the GPU alone knows: what of `promised` pages was not
  // needed is free again before the next layer asks for as many. Waits for the stream.
  [[nodiscard]] Status code_prompt(const PromptLayer& prompt, uint64_t promised);
  // Of `wanted`, ascending, those of whole coded blocks that are still there. Errors: kUnsupported
  // where a token would have to go alone.
  [[nodiscard]] Result<std::vector<uint32_t>> whole_blocks(std::span<const uint32_t> wanted,
                                                           uint64_t tokens) const;
  [[nodiscard]] cuda::StepSequence before_step(uint32_t generated, uint32_t lane_pages) const;
  // The client changes what rules will find, in lanes that then have at most `lane_pages` pages:
  // the steps that were reserved and may still have to run were promised less.
  [[nodiscard]] Status unsettle(uint32_t lane_pages);

  GpuEngine* engine_;
  PolicyParams policy_;
  uint32_t budget_;            // as launch_open's
  uint32_t settled_from_ = 0;  // of cuda::StepSequence
  PageId root_;
  bool traced_ = false;
  bool prompt_open_ = false;
  uint32_t prompt_ = 0;
  uint32_t prompt_queries_ = 0;  // of each layer that were given
  uint32_t classes_end_ = 0;     // positions below it have a place for their class
  uint32_t generated_ = 0;
  uint32_t lane_pages_ = 0;
  std::vector<uint8_t> layer_given_;
  std::vector<uint8_t> queries_given_;  // a flag a layer
  std::unique_ptr<GpuTier> tier_;
  std::vector<uint8_t> block_gone_;  // by coded block: evicted
  uint64_t prompt_surplus_ = 0;      // pages of the newest layer's promise that it did not need
  GpuBatch* batch_ = nullptr;
  uint32_t row_ = 0;
};

}  // namespace thinkv::client
