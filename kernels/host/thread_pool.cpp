#include "kernels/host/thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace thinkv::kernels {

// The started threads and the loop they work on.
class ThreadPool::Workers {
 public:
  explicit Workers(uint32_t wanted) : wanted_(wanted), owner_(::getpid()) {}
  ~Workers() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // In a forked child the threads do not exist, and the locks are as the fork found them.
  [[nodiscard]] bool usable() const { return owner_ == ::getpid(); }
  // True if the caller's loop may use the workers now: then run() and give_turn() follow. A flag
  // and not a mutex, because a nested loop asks again on the thread that has the turn.
  [[nodiscard]] bool take_turn() { return !taken_.exchange(true, std::memory_order_acquire); }
  void give_turn() { taken_.store(false, std::memory_order_release); }

  void run(uint32_t count, Task task) {
    start_threads();
    {
      const std::lock_guard lock(mutex_);
      task_ = task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      busy_ = static_cast<uint32_t>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    take_indices(task, count);
    // Every worker passes through this loop before the next may change task_ and next_.
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void take_indices(Task task, uint32_t count) {
    for (;;) {
      const uint32_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      task.call(task.context, i);
    }
  }

  void start_threads() {
    if (started_) return;
    started_ = true;
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the new threads
    threads_.reserve(wanted_);
    for (uint32_t i = 0; i < wanted_; ++i) {
      try {
        threads_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        break;  // the process may have no more threads: fewer workers do the same work
      }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) return;
      seen = generation_;
      const Task task = task_;
      const uint32_t count = count_;
      lock.unlock();
      take_indices(task, count);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const uint32_t wanted_;
  const pid_t owner_;
  std::atomic<bool> taken_{false};
  bool started_ = false;
  std::vector<std::thread> threads_;
  std::atomic<uint32_t> next_{0};

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::condition_variable done_;
  Task task_{};
  uint32_t count_ = 0;
  uint32_t busy_ = 0;
  uint64_t generation_ = 0;
  bool stopping_ = false;
};

ThreadPool::ThreadPool(Options options)
    : threads_(options.threads != 0 ? options.threads
                                    : std::max(1u, std::thread::hardware_concurrency())),
      workers_(std::make_unique<Workers>(threads_ - 1)) {}

ThreadPool::~ThreadPool() {
  if (!workers_->usable()) static_cast<void>(workers_.release());
}

void ThreadPool::run(uint32_t count, Task task) {
  if (threads_ > 1 && count > 1 && workers_->usable()) {
    if (workers_->take_turn()) {
      workers_->run(count, task);
      return workers_->give_turn();
    }
  }
  for (uint32_t i = 0; i < count; ++i) task.call(task.context, i);
}

}  // namespace thinkv::kernels
