// engine.h: what all GPU sequences and batches of one model share: the lease in device memory, and
// the host's knowledge of it.
//
// Kernels take pages from a stack on the device; the host fills it before the work that needs them
// is enqueued. How many are left the host never asks: it knows what it refilled, what the last
// finished step reported as used, and an upper bound of what was enqueued since. So no step waits
// for the GPU, and no kernel finds the stack empty.
// Threads: one mutex; every function may be called from any thread. All work goes to one stream
// at a time (set_stream).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "client/gpu/kernel_table.h"
#include "client/gpu/memory.h"
#include "client/session.h"
#include "kernels/cuda/sequence.h"

namespace thinkv::client {

class GpuEngine {
 public:
  // Errors: kUnsupported (built without CUDA, or a shape that the kernels lack), kExhausted.
  [[nodiscard]] static Result<std::unique_ptr<GpuEngine>> open(Session& session,
                                                               const ModelGeometry& geometry);
  ~GpuEngine();
  GpuEngine(const GpuEngine&) = delete;
  GpuEngine& operator=(const GpuEngine&) = delete;

  [[nodiscard]] const KernelTable& kernels() const { return *kernels_; }
  [[nodiscard]] const cuda::Gpu& gpu() const { return window_->gpu(); }
  [[nodiscard]] Session& session() { return *session_; }
  [[nodiscard]] const ModelGeometry& geometry() const { return geometry_; }
  [[nodiscard]] uint32_t multiprocessors() const { return multiprocessors_; }
  // Pool, lease and geometry; no batch.
  [[nodiscard]] cuda::BatchView view() const;

  // The stream of all work that is enqueued from now on. The caller orders the old and the new one.
  void set_stream(StreamHandle stream);
  [[nodiscard]] StreamHandle stream() const;
  // Errors: kInvalidArgument while the stream is being captured: `what` is not part of a graph.
  [[nodiscard]] Status refuse_capture(const char* what) const;

  // Whether a tensor of the engine lies where the kernels can read it. Errors: kInvalidArgument.
  [[nodiscard]] Status check_pointer(const char* name, const void* data) const;

  // Makes sure that what is enqueued next can take `pages`. On error nothing has changed.
  // Errors: kExhausted, kQuotaExceeded, kUnavailable.
  [[nodiscard]] Status promise(uint64_t pages);
  // Working memory of rank rules for this and for all that was needed before; waits for the stream
  // where it has to grow. Errors: kExhausted, with the bytes; kInvalidArgument while the stream is
  // being captured.
  [[nodiscard]] Status make_rank_memory(const cuda::RankNeed& need);
  // What was promised last is not needed: nothing of it was or will be enqueued.
  void take_back(uint64_t pages);
  // Pages that were promised and taken back go to the daemon; waits for the stream.
  [[nodiscard]] Status release(uint64_t pages);
  // What was promised since the start: remembered with a step, and given back with its report.
  [[nodiscard]] uint64_t promised() const { return promised_; }
  // A finished step used `used_total` pages in all, when `promised` had been promised.
  void report(uint64_t used_total, uint64_t promised);

  // A page that the device lease does not hold: the root of a new sequence.
  [[nodiscard]] Result<PageId> take_root();
  void give_root(PageId root);

  // Waits for the stream, then knows the lease exactly and gives the surplus back to the daemon.
  [[nodiscard]] Status settle();
  // Waits for the stream. Errors: kDeviceFailed.
  [[nodiscard]] Status synchronise() const;
  // The pages that sequences hold, as last known.
  [[nodiscard]] uint64_t used_pages() const { return used_; }

  // Pinned memory for what one call reads back (64 KiB); guarded by the caller's use of lock().
  [[nodiscard]] void* answer() const { return answer_.as<void>(); }
  static constexpr uint64_t kAnswerBytes = 64 * 1024;
  [[nodiscard]] std::unique_lock<std::recursive_mutex> lock() { return std::unique_lock(mutex_); }

  // The runtime's error code of a launch as a Status.
  [[nodiscard]] static Status launched(int code, const char* kernel);

 private:
  GpuEngine(Session& session, const ModelGeometry& geometry, const KernelTable& kernels);
  [[nodiscard]] Status make_memory();
  [[nodiscard]] Status refill(uint64_t pages);
  [[nodiscard]] Status enqueue_refill(uint32_t count);
  [[nodiscard]] Status read_lease(cuda::Lease* lease) const;
  [[nodiscard]] Status drain(uint64_t pages);
  // At least so many pages are on the device's stack for what is enqueued next.
  [[nodiscard]] uint64_t level() const;

  Session* session_;
  ModelGeometry geometry_;
  const KernelTable* kernels_;
  const DeviceWindow* window_;
  uint32_t multiprocessors_ = 0;

  mutable std::recursive_mutex mutex_;  // a batch holds it over several calls
  StreamHandle stream_ = nullptr;
  std::unique_ptr<LeaseSource> source_;
  GpuMemory lease_;    // cuda::Lease
  GpuMemory stack_;    // its pages
  GpuMemory staging_;  // pinned: page ids on their way to and from the device
  GpuMemory answer_;
  GpuMemory rank_memory_;     // cuda::RankMemory
  GpuMemory rank_rows_;       // its rows
  cuda::RankNeed rank_need_;  // that they have room for
  uint32_t staged_ = 0;       // ids in staging_ that a kernel may not have read yet

  uint64_t refilled_ = 0;  // pages pushed by the host less pages drained
  uint64_t promised_ = 0;
  uint64_t used_ = 0;     // as last reported
  uint64_t used_at_ = 0;  // promised_ at that moment
};

}  // namespace thinkv::client
