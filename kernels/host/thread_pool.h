// thread_pool.h: a few threads for loops over lanes.
//
// Threads: parallel_for may be called from any thread. One loop at a time uses the workers; a loop
// that finds them busy, or that is started inside another loop, runs on its caller alone. Workers
// start with the first loop, sleep between loops, never spin, and block all signals, because the
// process belongs to the engine. After fork the child has no workers: its loops run on the caller,
// and the destructor there leaves what it cannot join.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace thinkv::kernels {

class ThreadPool {
 public:
  struct Options {
    uint32_t threads = 0;  // that work on a loop, the caller included; 0: one a hardware thread
  };
  explicit ThreadPool(Options options);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();  // Requires: no loop is running.

  // Calls fn(i) once for each i < count, in no particular order, and returns when all have
  // returned. What they wrote is visible to the caller. fn must not throw.
  template <class Fn>
  void parallel_for(uint32_t count, Fn&& fn) {
    using Callable = std::remove_reference_t<Fn>;
    run(count, {.context = const_cast<void*>(static_cast<const void*>(std::addressof(fn))),
                .call = [](void* context, uint32_t i) { (*static_cast<Callable*>(context))(i); }});
  }

  [[nodiscard]] uint32_t threads() const { return threads_; }

 private:
  struct Task {
    void* context;
    void (*call)(void* context, uint32_t index);
  };
  class Workers;
  void run(uint32_t count, Task task);

  const uint32_t threads_;
  std::unique_ptr<Workers> workers_;
};

}  // namespace thinkv::kernels
