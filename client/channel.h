// channel.h: the rings of one client, client side: requests, completions, grants, returns.
//
// Works on two regions that the caller mapped (shm_layout.h): it writes only the client's, and
// treats the daemon's as input. A peer that breaks the rules of the rings makes the channel
// broken; every call then answers kUnavailable, and nothing aborts.
// Threads: calls must not overlap (the session's mutex), so each ring has one producer here.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "thinkv/internal/ring.h"
#include "thinkv/internal/shm_layout.h"
#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::client {

using Clock = std::chrono::steady_clock;

// Order the store of one side before the load of the other (Dekker): sleeping / parked against
// ring indices. ThreadSanitizer does not model fences, so there it is a locked instruction.
void full_fence();

struct ChannelOptions {
  const shm::DaemonRegion* daemon = nullptr;
  shm::ClientRegion* client = nullptr;
  int bell_fd = -1;                           // eventfd; -1: the daemon never parks (tests)
  std::function<bool()> daemon_gone = {};     // asked while waiting; null: never gone
  std::chrono::microseconds spin{20};         // before a wait sleeps; 0 sleeps at once
  std::chrono::milliseconds timeout{10'000};  // of a round trip
};

class Channel {
 public:
  explicit Channel(ChannelOptions options);

  // One request and its completion; fills user_data and size itself. A completion with an error
  // status is a result, not an Error. Errors: kUnavailable (gone, timed out, broken).
  [[nodiscard]] Result<protocol::Completion> call(protocol::Request request);

  // Appends up to `wanted` granted pages to `pages`; how many there were.
  uint32_t pull_grants(uint32_t page_class, uint32_t wanted, std::vector<PageId>& pages);
  // Granted pages that were not pulled yet.
  [[nodiscard]] uint32_t grants_waiting(uint32_t page_class) {
    return grants_[page_class].available();
  }
  // Gives pages back; how many fitted into the ring, from the front. The rest stays the caller's.
  uint32_t push_returns(uint32_t page_class, std::span<const PageId> pages);

  // Whether the daemon can still be talked to; costs a system call. Errors: kUnavailable with the
  // reason.
  [[nodiscard]] Status healthy() const;
  void set_spin(std::chrono::microseconds spin) { options_.spin = spin; }

 private:
  using Requests = RingProducer<protocol::Request, limits::kRequestRing>;
  using Completions = RingConsumer<protocol::Completion, limits::kRequestRing>;
  using Grants = RingConsumer<uint32_t, limits::kGrantRing>;
  using Returns = RingProducer<uint32_t, limits::kReturnRing>;

  // True once the completion of `user_data` is in `completion`; others are dropped: they belong
  // to calls that timed out.
  bool take_completion(uint64_t user_data, protocol::Completion& completion);
  void sleep_until_doorbell(Clock::time_point deadline);
  void ring_bell_if_parked();
  [[nodiscard]] bool broken() const;
  [[nodiscard]] Status flags_ok() const;  // the part of healthy() that only reads memory

  ChannelOptions options_;
  Requests requests_;
  Completions completions_;
  std::vector<Grants> grants_;  // one a page class
  std::vector<Returns> returns_;
  uint64_t next_user_data_ = 1;
};

}  // namespace thinkv::client
