// objects.h: what the handles of the C ABI stand for, and who closes whom.
//
// client > model > sequence, step. A parent owns the list of its children's handles; closing it
// closes them first, each after its running calls ended. A child's functions may use its parent
// without a pin: the parent cannot be destroyed while a child is there.
// Threads: as in thinkv.h. The lists have a mutex; sequences and steps are pinned exclusively.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/gpu/batch.h"
#include "client/gpu/engine.h"
#include "client/gpu/sequence.h"
#include "client/handles.h"
#include "client/session.h"
#include "kernels/host/thread_pool.h"
#include "kernels/sequence/sequence.h"
#include "thinkv/internal/geometry.h"

namespace thinkv::client {

// Handles of children. Threads: any.
class Children {
 public:
  void add(Handle handle);
  void remove(Handle handle);
  [[nodiscard]] std::vector<Handle> all() const;

 private:
  mutable std::mutex mutex_;
  std::vector<Handle> handles_;
};

struct Client {
  std::unique_ptr<Session> session;
  kernels::ThreadPool pool;
  Children models;

  Client(std::unique_ptr<Session> opened, uint32_t threads)
      : session(std::move(opened)), pool(kernels::ThreadPool::Options{.threads = threads}) {}
};

struct Model {
  Client* client = nullptr;
  Handle handle = 0;
  ModelGeometry geometry;
  uint32_t id = 0;                 // the daemon's
  std::unique_ptr<GpuEngine> gpu;  // cuda backend: not null
  Children sequences;
  Children steps;
  Children batches;
};

// A sequence and where its pages come from: in host memory, or on the GPU (`gpu` not null). The
// order of the members is the order of their life: the sequence gives its pages to the source, the
// source to the lease.
struct SequenceObject {
  Model* model = nullptr;
  Handle handle = 0;
  uint64_t id = 0;             // the daemon's
  uint32_t budget_tokens = 0;  // as the caller gave it
  std::unique_ptr<LeaseSource> source;
  std::optional<kernels::Sequence> sequence;
  std::unique_ptr<GpuSequence> gpu;
  kernels::SequenceStats reported;  // what the client's counters know of
  std::atomic<Handle> step{0};      // that it is part of
  uint64_t live_tokens = 0;         // of a lane on average, at the last step's end

  // Adds what changed since the last report to the client's counters. On the GPU it waits for the
  // stream. Errors: kDeviceFailed; never on the host.
  Status report();
  [[nodiscard]] Result<kernels::SequenceStats> stats();
};

// Rows of a step on the GPU.
struct BatchObject {
  Model* model = nullptr;
  Handle handle = 0;
  std::unique_ptr<GpuBatch> batch;
};

// One decode step of a batch. All sequences in it move in lockstep: layer by layer, each once.
struct StepObject {
  Model* model = nullptr;
  Handle handle = 0;
  std::vector<SequenceObject*> sequences;
  std::vector<uint8_t> appended;              // a flag a layer
  std::vector<float> k_rows, v_rows, q_rows;  // converted 16-bit input

  // k, v: [batch, kv_heads, head_dim]. Errors: kInvalidArgument (layer).
  [[nodiscard]] Status append(uint32_t layer, const float* k, const float* v);
  // q, out: [batch, q_heads, head_dim]; lse: [batch, q_heads] or null.
  [[nodiscard]] Status attend(uint32_t layer, const float* q, float* out, float* lse);
  // Errors: kInvalidArgument where a layer was not appended; the step is cancelled then.
  [[nodiscard]] Status end();
  void cancel();

 private:
  // Lets the sequences go: they may join another step.
  void dissolve();
};

// All five close what hangs on them, wait for running calls, and do nothing on a closed handle.
void close_client(Handle handle);
void close_model(Handle handle);
void close_sequence(Handle handle);
void close_step(Handle handle);  // cancels it
void close_batch(Handle handle);

// Errors as thinkv.h says. `options` were checked for struct_size, nothing else.
[[nodiscard]] Result<Handle> open_client(const SessionOptions& options, uint32_t threads);
[[nodiscard]] Result<Handle> open_model(Handle client, const ModelGeometry& geometry,
                                        const std::string& name);
struct SequenceOpenOptions {
  std::string policy;
  uint32_t budget_tokens = 0;
  bool trace_sparsity = false;
};
[[nodiscard]] Result<Handle> open_sequence(Handle model, const SequenceOpenOptions& options);
// Errors: kUnsupported on the host backend. `source` stays pinned by the caller.
[[nodiscard]] Result<Handle> copy_sequence(SequenceObject& source);
[[nodiscard]] Result<Handle> open_batch(Handle model, const GpuBatch::Options& options);
[[nodiscard]] Result<Handle> begin_step(Handle model, std::span<const Handle> sequences);
// Ends the step and frees it in any case.
[[nodiscard]] Status end_step(Handle step);

// A pinned sequence, and the step it is in, if any, pinned too: a call on either excludes others.
class SequencePin {
 public:
  [[nodiscard]] static Result<SequencePin> get(Handle handle);
  [[nodiscard]] SequenceObject* operator->() const { return &*sequence_; }
  [[nodiscard]] SequenceObject& operator*() const { return *sequence_; }

 private:
  SequencePin(Pinned<SequenceObject> sequence, std::optional<Pinned<StepObject>> step)
      : sequence_(std::move(sequence)), step_(std::move(step)) {}
  Pinned<SequenceObject> sequence_;
  std::optional<Pinned<StepObject>> step_;
};

}  // namespace thinkv::client
