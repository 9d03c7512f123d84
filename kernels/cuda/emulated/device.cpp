#include "kernels/cuda/emulated/device.h"

#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>
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

// Threads that wait for each other: a warp, or a block.
struct Barrier {
  uint32_t running = 0;
  uint32_t arrived = 0;
  uint64_t generation = 0;

  void release_if_complete() {
    if (arrived == 0 || arrived < running) return;
    arrived = 0;
    ++generation;
  }
};

struct Fiber {
  context::fiber context;  // where the thread goes on; empty once it has returned
  bool done = false;
};

class Block {
 public:
  Block(uint32_t threads, uint32_t shared_bytes, const std::function<void()>& body)
      : threads_(threads),
        body_(body),
        fibers_(threads),
        warps_((threads + kWarp - 1) / kWarp),
        exchange_(size_t{threads + kWarp} * kPlace),
        copies_(threads),
        shared_(std::make_unique<unsigned char[]>(shared_bytes + kAlignment)),
        shared_bytes_(shared_bytes) {
    // A GPU's shared memory holds whatever was there before.
    std::memset(shared_.get(), 0xFF, shared_bytes + kAlignment);
  }

  void run();

  void wait(Barrier& barrier) {
    const uint64_t mine = barrier.generation;
    ++barrier.arrived;
    barrier.release_if_complete();
    moved_ = true;
    while (barrier.generation == mine) yield();
  }
  [[nodiscard]] Barrier& own_warp() { return warps_[threadIdx.x / kWarp]; }
  [[nodiscard]] Barrier& whole() { return whole_; }
  [[nodiscard]] unsigned char* place(uint32_t lane) {
    return exchange_.data() + size_t{threadIdx.x / kWarp * kWarp + lane} * kPlace;
  }
  [[nodiscard]] CopyQueue& copies() { return copies_[threadIdx.x]; }
  [[nodiscard]] bool lane_runs(uint32_t lane) const {
    const uint32_t thread = threadIdx.x / kWarp * kWarp + lane;
    return thread < threads_ && !fibers_[thread].done;
  }
  [[nodiscard]] unsigned char* shared() const {
    const auto address = reinterpret_cast<uintptr_t>(shared_.get());
    return shared_.get() + (kAlignment - address % kAlignment) % kAlignment;
  }
  [[nodiscard]] uint32_t shared_bytes() const { return shared_bytes_; }

 private:
  static constexpr size_t kPlace = 32;
  static constexpr size_t kAlignment = 128;

  void yield() { main_ = std::move(main_).resume(); }
  void start(uint32_t thread);
  void resume(uint32_t thread);
  [[nodiscard]] bool pass();

  uint32_t threads_;
  const std::function<void()>& body_;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> warps_;
  Barrier whole_;
  std::vector<unsigned char> exchange_;
  std::vector<CopyQueue> copies_;
  std::unique_ptr<unsigned char[]> shared_;
  uint32_t shared_bytes_;
  context::fiber main_;
  bool moved_ = false;  // some thread arrived or returned in this pass
};

Block* current = nullptr;

context::pooled_fixedsize_stack& stacks() {
  static context::pooled_fixedsize_stack pool(kStackBytes);
  return pool;
}

void Block::start(uint32_t thread) {
  fibers_[thread].context =
      context::fiber(std::allocator_arg, stacks(), [this, thread](context::fiber&& from) {
        main_ = std::move(from);
        body_();
        fibers_[thread].done = true;
        return std::move(main_);
      });
}

void Block::resume(uint32_t thread) {
  Fiber& fiber = fibers_[thread];
  threadIdx = {thread, 0, 0};
  fiber.context = std::move(fiber.context).resume();
  if (!fiber.done) return;
  moved_ = true;
  for (Barrier* barrier : {&warps_[thread / kWarp], &whole_}) {
    barrier->running -= 1;
    barrier->release_if_complete();
  }
}

// Every thread that can goes on until it waits. Result: whether any is left.
bool Block::pass() {
  bool left = false;
  for (uint32_t first = 0; first < threads_; first += kWarp) {
    const uint32_t end = first + kWarp < threads_ ? first + kWarp : threads_;
    for (uint32_t thread = first; thread < end; ++thread) {
      if (fibers_[thread].done) continue;
      resume(thread);
      left = left || !fibers_[thread].done;
    }
  }
  return left;
}

void Block::run() {
  whole_.running = threads_;
  for (uint32_t thread = 0; thread < threads_; ++thread) {
    warps_[thread / kWarp].running += 1;
    start(thread);
  }
  for (;;) {
    moved_ = false;
    if (!pass()) return;
    if (!moved_) stop("threads wait for a barrier that others never reach");
  }
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
  current->wait(current->own_warp());
}
void block_barrier() {
  current->wait(current->whole());
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
