#include "kernels/cuda/emulated/device.h"

#include <bit>
#include <boost/context/fiber.hpp>
#include <boost/context/stack_context.hpp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

namespace thinkv::cuda::emulated {
namespace {

namespace context = boost::context;

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr uint32_t kWarp = 32;

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Sets of a warp's lanes.
struct Warp {
  uint32_t running = 0;  // have not returned
  uint32_t ready = 0;    // and wait for nothing
  uint32_t at_warp = 0;  // wait for the others of the warp
  uint32_t at_block = 0;

  void release_if_complete() {
    if (at_warp != running) return;
    ready |= at_warp;
    at_warp = 0;
  }
};

// Stacks that are used again. With Boost's own pool of them cuda_refresh_test takes 1.2 times as
// long.
struct StackPool {
  using Memory = std::unique_ptr<unsigned char[]>;
  static std::vector<Memory>& unused() {
    static std::vector<Memory> all;
    return all;
  }
  context::stack_context allocate() {
    if (unused().empty()) {
      unused().push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
    }
    context::stack_context stack;
    stack.size = kStackBytes;
    stack.sp = unused().back().release() + kStackBytes;
    unused().pop_back();
    return stack;
  }
  void deallocate(const context::stack_context& stack) {
    unused().emplace_back(static_cast<unsigned char*>(stack.sp) - stack.size);
  }
};

class Block {
 public:
  Block(uint32_t threads, uint32_t shared_bytes, const std::function<void()>& body)
      : threads_(threads),
        body_(body),
        fibers_(threads + 1),
        warps_((threads + kWarp - 1) / kWarp),
        exchange_(size_t{threads + kWarp} * kPlace),
        copies_(threads),
        shared_(std::make_unique<unsigned char[]>(shared_bytes + kAlignment)),
        shared_bytes_(shared_bytes) {
    // A GPU's shared memory holds whatever was there before.
    std::memset(shared_.get(), 0xFF, shared_bytes + kAlignment);
  }

  void run();
  void wait_for_warp();
  void wait_for_block();

  [[nodiscard]] unsigned char* place(uint32_t lane) {
    return exchange_.data() + size_t{threadIdx.x / kWarp * kWarp + lane} * kPlace;
  }
  [[nodiscard]] CopyQueue& copies() { return copies_[threadIdx.x]; }
  [[nodiscard]] bool lane_runs(uint32_t lane) const {
    return (warps_[threadIdx.x / kWarp].running >> lane & 1) != 0;
  }
  [[nodiscard]] unsigned char* shared() const {
    const auto address = reinterpret_cast<uintptr_t>(shared_.get());
    return shared_.get() + (kAlignment - address % kAlignment) % kAlignment;
  }
  [[nodiscard]] uint32_t shared_bytes() const { return shared_bytes_; }

 private:
  static constexpr size_t kPlace = 32;
  static constexpr size_t kAlignment = 128;

  void start(uint32_t thread);
  void finish(uint32_t thread);
  void release_if_complete(Warp& warp);
  void wait(uint32_t Warp::*place);
  [[nodiscard]] uint32_t next_after(uint32_t thread) const;
  void go_on(uint32_t from, uint32_t to);
  void keep(context::fiber&& came_from);

  uint32_t threads_;
  const std::function<void()>& body_;
  // Where each thread goes on; empty for the one that runs and for those that have returned. The
  // last is the launch itself.
  std::vector<context::fiber> fibers_;
  std::vector<Warp> warps_;
  uint32_t running_ = 0;   // threads that have not returned
  uint32_t at_block_ = 0;  // of them wait for all others
  uint32_t left_ = 0;      // the fiber that ran before this one
  std::vector<unsigned char> exchange_;
  std::vector<CopyQueue> copies_;
  std::unique_ptr<unsigned char[]> shared_;
  uint32_t shared_bytes_;
};

Block* current = nullptr;

void Block::start(uint32_t thread) {
  Warp& warp = warps_[thread / kWarp];
  warp.running |= 1u << thread % kWarp;
  warp.ready |= 1u << thread % kWarp;
  ++running_;
  fibers_[thread] =
      context::fiber(std::allocator_arg, StackPool{}, [this, thread](context::fiber&& from) {
        keep(std::move(from));
        body_();
        finish(thread);
        threadIdx.x = next_after(thread);
        return std::move(fibers_[threadIdx.x]);
      });
}

void Block::finish(uint32_t thread) {
  Warp& warp = warps_[thread / kWarp];
  warp.running &= ~(1u << thread % kWarp);
  warp.ready &= warp.running;
  --running_;
  release_if_complete(warp);
}

// Who waits for this warp, or for the block, where nobody is missing any more.
void Block::release_if_complete(Warp& warp) {
  warp.release_if_complete();
  if (at_block_ == 0 || at_block_ < running_) return;
  at_block_ = 0;
  for (Warp& each : warps_) {
    each.ready |= each.at_block;
    each.at_block = 0;
  }
}

void Block::wait_for_warp() {
  wait(&Warp::at_warp);
}

void Block::wait_for_block() {
  ++at_block_;
  wait(&Warp::at_block);
}

void Block::wait(uint32_t Warp::*place) {
  const uint32_t thread = threadIdx.x;
  const uint32_t bit = 1u << thread % kWarp;
  Warp& warp = warps_[thread / kWarp];
  warp.ready &= ~bit;
  warp.*place |= bit;
  release_if_complete(warp);
  if ((warp.ready & bit) == 0) go_on(thread, next_after(thread));
}

// The next thread in the block's order, round and round, that waits for nothing; once all have
// returned, the launch.
uint32_t Block::next_after(uint32_t thread) const {
  if (running_ == 0) return threads_;
  const uint32_t own = thread / kWarp;
  const auto warps = static_cast<uint32_t>(warps_.size());
  uint32_t ready = warps_[own].ready & ~((2u << thread % kWarp) - 1);
  for (uint32_t i = own, seen = 0; seen <= warps; ++seen) {
    if (ready != 0) return i * kWarp + static_cast<uint32_t>(std::countr_zero(ready));
    i = i + 1 < warps ? i + 1 : 0;
    ready = warps_[i].ready;
  }
  stop("threads wait for a barrier that others never reach");
}

void Block::go_on(uint32_t from, uint32_t to) {
  left_ = from;
  threadIdx.x = to;
  keep(std::move(fibers_[to]).resume());
}

// A fiber that gave way goes on here later; one that has returned is empty.
void Block::keep(context::fiber&& came_from) {
  if (came_from) fibers_[left_] = std::move(came_from);
}

void Block::run() {
  threadIdx = {0, 0, 0};
  for (uint32_t thread = 0; thread < threads_; ++thread) start(thread);
  go_on(threads_, 0);
}

}  // namespace

void run(uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
         const std::function<void()>& body) {
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  for (uint32_t index = 0; index < blocks; ++index) {
    blockIdx = {index, 0, 0};
    Block block(threads, shared_bytes, body);
    current = &block;
    block.run();
    current = nullptr;
  }
}

void warp_barrier() {
  current->wait_for_warp();
}
void block_barrier() {
  current->wait_for_block();
}
unsigned char* exchange(uint32_t lane) {
  return current->place(lane);
}
unsigned char* dynamic_shared() {
  return current->shared();
}
uint32_t dynamic_shared_bytes() {
  return current->shared_bytes();
}
bool lane_runs(uint32_t lane) {
  return current->lane_runs(lane);
}
CopyQueue& copies() {
  return current->copies();
}

}  // namespace thinkv::cuda::emulated
