// ring.h: single-producer single-consumer rings whose two indices live in two processes.
//
// The producer owns `tail` (in memory only it can write), the consumer owns `head`. Each keeps its
// own index in private memory, so nothing the peer writes can move it; the peer's index is input:
// it must lie within one ring size of ours, else the peer broke the protocol.
// Threads: one producer thread, one consumer thread. publish: store-release of the index after the
// entries, paired with the load-acquire in the other side's available()/free().
#pragma once

#include <atomic>
#include <cstdint>

#include "thinkv/internal/check.h"

namespace thinkv {

// Copies one entry out of, or into, shared memory. Page ids are atomics; descriptors are plain
// bytes that the consumer copies exactly once.
template <class Entry>
struct RingAccess {
  using Stored = Entry;
  static Entry load(const Stored& slot) { return slot; }
  static void store(Stored& slot, const Entry& value) { slot = value; }
};
template <>
struct RingAccess<uint32_t> {
  using Stored = std::atomic<uint32_t>;
  static uint32_t load(const Stored& slot) { return slot.load(std::memory_order_relaxed); }
  static void store(Stored& slot, uint32_t value) { slot.store(value, std::memory_order_relaxed); }
};

template <class Entry, uint32_t kSize>
class RingProducer {
  static_assert((kSize & (kSize - 1)) == 0);

 public:
  using Stored = typename RingAccess<Entry>::Stored;
  RingProducer(Stored* slots, std::atomic<uint64_t>* tail, const std::atomic<uint64_t>* head)
      : slots_(slots), tail_word_(tail), head_word_(head) {}

  // Entries that fit now. 0 also when the peer's index is impossible: see broken().
  [[nodiscard]] uint32_t free() {
    const uint64_t head = head_word_->load(std::memory_order_acquire);
    if (head > tail_ || tail_ - head > kSize || head < seen_head_) {
      broken_ = true;
      return 0;
    }
    seen_head_ = head;
    return kSize - static_cast<uint32_t>(tail_ - head);
  }
  // Requires: free() was at least the number of pushes since the last call of free().
  void push(const Entry& entry) {
    RingAccess<Entry>::store(slots_[tail_ & (kSize - 1)], entry);
    ++tail_;
  }
  void publish() { tail_word_->store(tail_, std::memory_order_release); }
  [[nodiscard]] uint64_t tail() const { return tail_; }
  [[nodiscard]] uint64_t seen_head() const { return seen_head_; }
  [[nodiscard]] bool broken() const { return broken_; }

 private:
  Stored* slots_;
  std::atomic<uint64_t>* tail_word_;
  const std::atomic<uint64_t>* head_word_;
  uint64_t tail_ = 0;
  uint64_t seen_head_ = 0;
  bool broken_ = false;
};

template <class Entry, uint32_t kSize>
class RingConsumer {
  static_assert((kSize & (kSize - 1)) == 0);

 public:
  using Stored = typename RingAccess<Entry>::Stored;
  RingConsumer(const Stored* slots, const std::atomic<uint64_t>* tail, std::atomic<uint64_t>* head)
      : slots_(slots), tail_word_(tail), head_word_(head) {}

  // Entries to read now. 0 also when the peer's index is impossible: see broken().
  [[nodiscard]] uint32_t available() {
    const uint64_t tail = tail_word_->load(std::memory_order_acquire);
    if (tail < seen_tail_ || tail - head_ > kSize) {
      broken_ = true;
      return 0;
    }
    seen_tail_ = tail;
    return static_cast<uint32_t>(tail - head_);
  }
  // The next entry, copied once. Requires: fewer pops than available() said.
  [[nodiscard]] Entry pop() {
    THINKV_DCHECK(head_ < seen_tail_);
    const Entry entry = RingAccess<Entry>::load(slots_[head_ & (kSize - 1)]);
    ++head_;
    return entry;
  }
  // Gives the popped slots back to the producer.
  void publish() { head_word_->store(head_, std::memory_order_release); }
  [[nodiscard]] uint64_t head() const { return head_; }
  [[nodiscard]] bool broken() const { return broken_; }

 private:
  const Stored* slots_;
  const std::atomic<uint64_t>* tail_word_;
  std::atomic<uint64_t>* head_word_;
  uint64_t head_ = 0;
  uint64_t seen_tail_ = 0;
  bool broken_ = false;
};

}  // namespace thinkv
