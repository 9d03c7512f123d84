// ring_daemon.h: the daemon's side of the rings of one client, for tests of the client's side.
//
// Works on the two regions through plain pointers, so a test can put both sides on one mapping,
// which is the only place where ThreadSanitizer sees races. It keeps a ledger: a page that is
// granted twice, or returned by somebody who does not have it, is counted as a fault.
// Threads: run() in one thread; the constructor, stop() and the counters from any.
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "thinkv/internal/ring.h"
#include "thinkv/internal/shm_layout.h"
#include "thinkv/internal/unique_fd.h"
#include "thinkv/version.h"

namespace thinkv::test {

// Both regions in ordinary zeroed memory.
struct Regions {
  std::unique_ptr<shm::DaemonRegion> daemon{new shm::DaemonRegion{}};
  std::unique_ptr<shm::ClientRegion> client{new shm::ClientRegion{}};
};

class RingDaemon {
 public:
  struct Options {
    shm::DaemonRegion* out = nullptr;
    const shm::ClientRegion* in = nullptr;
    uint32_t page_class = 0;
    uint32_t pages = 0;         // of extent 0 that this client may have
    bool always_sleep = false;  // leaves a pause before each answer, so that the client sleeps
    bool mute = false;          // answers nothing
  };

  explicit RingDaemon(const Options& options)
      : options_(options),
        requests_(options.in->requests, &options.in->request_tail.value,
                  &options.out->request_head.value),
        completions_(options.out->completions, &options.out->completion_tail.value,
                     &options.in->completion_head.value),
        grants_(options.out->grants[options.page_class],
                &options.out->grant_tail[options.page_class].value,
                &options.in->grant_head[options.page_class].value),
        returns_(options.in->returns[options.page_class],
                 &options.in->return_tail[options.page_class].value,
                 &options.out->return_head[options.page_class].value),
        granted_(options.pages, false) {
    for (uint32_t i = 0; i < options.pages; ++i) free_.push_back(i);
  }
  ~RingDaemon() { stop(); }

  void start() {
    thread_ = std::thread([this] { run(); });
  }
  void stop() {
    stopping_.store(true);
    if (thread_.joinable()) thread_.join();
  }

  [[nodiscard]] uint32_t faults() const { return faults_.load(); }
  [[nodiscard]] uint32_t free_pages() const { return free_count_.load(); }
  // Requests of each op seen so far.
  [[nodiscard]] uint32_t seen(protocol::Op op) const {
    return seen_[static_cast<size_t>(op)].load();
  }

 private:
  void run() {
    while (!stopping_.load()) {
      take_returns();
      const uint32_t count = options_.mute ? 0 : requests_.available();
      for (uint32_t i = 0; i < count; ++i) answer(requests_.pop());
      if (count > 0) {
        requests_.publish();
        ring_doorbell();
      } else {
        std::this_thread::yield();
      }
    }
    take_returns();
  }

  void answer(const protocol::Request& request) {
    if (request.op < seen_.size()) seen_[request.op].fetch_add(1);
    if (options_.always_sleep) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    protocol::Completion completion{};
    completion.user_data = request.user_data;
    const auto op = static_cast<protocol::Op>(request.op);
    if (op == protocol::Op::kNeedPages && !grant(request.arg[1])) {
      completion.status = 2;  // kExhausted
      completion.result[0] = options_.pages;
    }
    if (op == protocol::Op::kOpenSequence) completion.result[0] = ++next_sequence_;
    if (completions_.free() == 0) return;
    completions_.push(completion);
    completions_.publish();
  }

  bool grant(uint64_t wanted) {
    take_returns();
    if (wanted > free_.size() || wanted > grants_.free()) return false;
    for (uint64_t i = 0; i < wanted; ++i) {
      const uint32_t page = free_.front();
      free_.pop_front();
      if (granted_[page]) faults_.fetch_add(1);
      granted_[page] = true;
      grants_.push(page);
    }
    grants_.publish();
    free_count_.store(static_cast<uint32_t>(free_.size()));
    return true;
  }

  void take_returns() {
    const uint32_t count = returns_.available();
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t page = returns_.pop();
      if (page >= granted_.size() || !granted_[page]) {
        faults_.fetch_add(1);
        continue;
      }
      granted_[page] = false;
      free_.push_back(page);
    }
    if (count > 0) returns_.publish();
    free_count_.store(static_cast<uint32_t>(free_.size()));
  }

  void ring_doorbell() {
    options_.out->doorbell.value.fetch_add(1, std::memory_order_seq_cst);
    if (options_.in->sleeping.value.load(std::memory_order_seq_cst) != 0) {
      ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&options_.out->doorbell.value), FUTEX_WAKE,
                1, nullptr, nullptr, 0);
    }
  }

  Options options_;
  RingConsumer<protocol::Request, limits::kRequestRing> requests_;
  RingProducer<protocol::Completion, limits::kRequestRing> completions_;
  RingProducer<uint32_t, limits::kGrantRing> grants_;
  RingConsumer<uint32_t, limits::kReturnRing> returns_;
  std::deque<uint32_t> free_;
  std::vector<bool> granted_;
  std::array<std::atomic<uint32_t>, 16> seen_{};
  std::atomic<uint32_t> faults_{0};
  std::atomic<uint32_t> free_count_{0};
  std::atomic<bool> stopping_{false};
  uint64_t next_sequence_ = 0;
  std::thread thread_;
};

// A sealed memfd of `bytes` zeros, as the daemon makes them.
inline constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
inline UniqueFd sealed_memfd(uint64_t bytes, int seals = kSizeSeals) {
  UniqueFd fd(::memfd_create("thinkv-test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return UniqueFd();
  if (seals != 0 && ::fcntl(fd.get(), F_ADD_SEALS, seals) != 0) return UniqueFd();
  return fd;
}

// The Extent message of extent 0 with pages of `page_class`.
inline protocol::Extent extent_message(uint32_t page_class, uint64_t bytes) {
  protocol::Extent extent{};
  extent.page_class = page_class;
  extent.page_bytes = page_bytes(kHeadDims[page_class]);
  extent.page_count = static_cast<uint32_t>(bytes / extent.page_bytes);
  extent.extent_bytes = bytes;
  extent.generation = 1;
  return extent;
}

}  // namespace thinkv::test
