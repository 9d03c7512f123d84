// batch.h: the rows of a decode step on the GPU: a fixed set of places that sequences join and
// leave, and the working memory of the kernels, at addresses that never change.
//
// begin, append, attend and end only launch kernels, so a step can be captured in a CUDA graph and
// replayed; reserve() is the host's part of a step and comes before each run of it.
// Threads: calls on one batch must not overlap.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "client/gpu/engine.h"
#include "client/gpu/sequence.h"

namespace thinkv::client {

class GpuBatch {
 public:
  struct Options {
    uint32_t capacity = 1;
    uint32_t tokens_max = 0;  // live tokens of a lane, on average over the rows; 0: 8192
    bool grows = false;       // reserve() makes the working memory larger instead of failing
  };
  // Errors: kExhausted, kInvalidArgument.
  [[nodiscard]] static Result<std::unique_ptr<GpuBatch>> open(GpuEngine& engine,
                                                              const Options& options);
  // Its sequences leave; waits for the stream.
  ~GpuBatch();
  GpuBatch(const GpuBatch&) = delete;
  GpuBatch& operator=(const GpuBatch&) = delete;

  [[nodiscard]] uint32_t capacity() const { return options_.capacity; }
  [[nodiscard]] GpuEngine& engine() const { return *engine_; }

  // Puts a sequence into a row, or takes it out (null). Between steps.
  [[nodiscard]] Status set(uint32_t row, GpuSequence* sequence);
  // Promises the pages of the next `steps` steps and counts these as done: each run of a step,
  // launched or replayed, must be covered. On error nothing has changed. Errors: kExhausted,
  // kQuotaExceeded, kUnavailable, kInternal (a kernel reported a defect).
  [[nodiscard]] Status reserve(uint32_t steps);

  // Takes the newest reserve() back, whose steps will not be launched. Errors: kInvalidArgument
  // where there is none, or where the GPU reported one of its steps.
  [[nodiscard]] Status unreserve();

  [[nodiscard]] Status begin();
  [[nodiscard]] Status append(uint32_t layer, const void* k, const void* v, cuda::Element element);
  struct Attend {
    const void* q = nullptr;
    cuda::Element q_element = cuda::Element::kF32;
    void* out = nullptr;
    cuda::Element out_element = cuda::Element::kF32;
    float* lse = nullptr;
    uint32_t window = 0;
    uint32_t sinks = 0;
    bool silent = false;        // measures nothing
    bool measure_only = false;  // does nothing in layers where nothing is measured
  };
  [[nodiscard]] Status attend(uint32_t layer, const Attend& io);
  // A guess of the query, [q_heads, head_dim], that the row's sequence will attend with in the step
  // in progress: the rows of its tier are chosen by it, and not by that query. Nothing where it has
  // no tier.
  [[nodiscard]] Status prefetch(uint32_t row, uint32_t layer, const void* q, cuda::Element element);
  [[nodiscard]] Status end();

  // Steps that were reserved and that the GPU did not report yet: they may still have to run.
  [[nodiscard]] uint64_t unreported_steps() const { return reserved_steps_ - reported_steps_; }
  // Live slots over all lanes and rows at the last step that the GPU reported.
  [[nodiscard]] uint64_t live_slots() const;

 private:
  GpuBatch(GpuEngine& engine, const Options& options) : engine_(&engine), options_(options) {}
  [[nodiscard]] Status make_memory();
  [[nodiscard]] Status make_lists();
  [[nodiscard]] Status make_stream_pages();
  [[nodiscard]] Status grow(uint64_t pages);
  [[nodiscard]] Status clear_rows();
  // Reads what the GPU reported.
  [[nodiscard]] Status poll();
  struct StepPages {
    uint64_t taken;         // at most, by the steps
    uint64_t listed;        // at most, in one layer's list
    cuda::RankNeed ranked;  // of all rows
  };
  [[nodiscard]] Result<StepPages> pages_of_steps(uint32_t steps) const;
  [[nodiscard]] Result<StepPages> make_room(uint32_t steps);
  [[nodiscard]] Status use_policy(const GpuSequence& sequence);
  [[nodiscard]] Status use_emission(const GpuSequence& sequence);
  [[nodiscard]] Status use_tier(const GpuSequence& sequence);
  [[nodiscard]] Status fetch(uint32_t layer, const Attend& io);
  [[nodiscard]] Status use_streams(const GpuSequence& sequence);
  [[nodiscard]] Status read_streams(uint32_t layer);
  [[nodiscard]] Status require_layer(uint32_t layer) const;
  [[nodiscard]] uint64_t row_count() const;
  void report_counters(uint32_t steps);

  struct Reserved {
    uint32_t count;     // steps of this reserve()
    uint64_t steps;     // of this batch, so far
    uint64_t promised;  // of the engine, when those had been promised
    uint64_t pages;     // promised for them
  };

  GpuEngine* engine_;
  Options options_;
  cuda::BatchView view_{};
  cuda::AttendShape shape_{};
  uint32_t lanes_ = 0;  // of all rows, in one layer
  std::vector<GpuSequence*> rows_;
  std::vector<uint64_t> joined_at_;  // reserved_steps_ when the row's sequence came
  float softmax_scale_ = 0.0f;
  // What the launches are made for; sequences that need more must join before the first of them.
  bool launched_ = false;
  bool emission_ = false;  // attention is measured in some layer
  bool scored_ = false;    // in all layers, into the slots' scores
  bool traced_ = false;    // in all layers, for the sparsity
  std::vector<uint8_t> label_layers_;
  std::optional<uint8_t> rotate_;
  bool blocks_ = false;   // some sequence may have had pages of block formats
  bool streams_ = false;  // some sequence may have had coded blocks
  bool centred_ = false;  // some sequence had centred keys
  bool lse_read_ = false;
  float near_zero_ = 0.01f;
  uint8_t score_reduce_ = 0;
  GpuMemory roots_, positions_, emit_, lane_begin_, sites_, pages_, score_rows_, sparsity_, parts_,
      emit_scratch_, progress_, stream_pages_;
  GpuTierMemory tier_memory_;  // open where some sequence had a tier

  uint32_t list_pages_ = 0;  // of one layer's list
  uint64_t reserved_steps_ = 0;
  uint64_t reported_steps_ = 0;
  std::deque<Reserved> history_;  // not reported yet, oldest first
  uint64_t reported_live_ = 0, reported_held_ = 0;
};

}  // namespace thinkv::client
