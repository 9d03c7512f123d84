// client_link.h: the shared memory of one engine: two regions, their rings, the bell.
//
// The event loop reads what the client wrote (hostile input: see ring.h), and writes completions,
// grants and indices. Nothing is visible to the client before publish(), and publish() wakes it.
//
//   parked    the daemon sleeps as far as this client is concerned: a client that publishes and
//             sees it rings the bell (eventfd). Both sides: store, full fence, load, so that one
//             of them sees the other.
//   doorbell  bumped with each batch; the futex word of a client that sleeps.
// Threads: the event loop only.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "daemon/ipc/memfd_region.h"
#include "thinkv/internal/ring.h"
#include "thinkv/internal/shm_layout.h"
#include "thinkv/internal/unique_fd.h"
#include "thinkv/result.h"

namespace thinkv::ipc {

// Plain numbers out of ClientCounters, as the client tells them: shown, never trusted.
struct ReportedCounters {
  uint64_t tokens = 0;
  uint64_t live_slots = 0;
  uint64_t evicted_slots = 0;
  uint64_t reused_slots = 0;
  uint64_t steps = 0;
  uint64_t demotions = 0;
  uint64_t over_budget_steps = 0;
  std::array<uint64_t, kThoughtCount> thoughts{};
  uint64_t held_bytes = 0;
  uint64_t f16_bytes = 0;
};

class ClientLink {
 public:
  // Errors: kExhausted with errno (memory or descriptors).
  static Result<std::unique_ptr<ClientLink>> create(uint64_t boot_epoch);
  ClientLink(const ClientLink&) = delete;
  ClientLink& operator=(const ClientLink&) = delete;

  [[nodiscard]] int daemon_region_fd() const { return daemon_.fd(); }
  [[nodiscard]] int client_region_fd() const { return client_.fd(); }
  [[nodiscard]] int bell_fd() const { return bell_.get(); }
  // Empties the bell without ever blocking, whatever the client did to its flags.
  void silence_bell();

  // Requests that can be taken now: there is one, and its completion has a place.
  [[nodiscard]] uint32_t requests_ready();
  // Requires: fewer calls than requests_ready() said.
  [[nodiscard]] protocol::Request take_request();
  // A request waits and the completion ring is full: the client does not read.
  [[nodiscard]] bool stalled() const { return stalled_; }

  // How far the client moved its head of the grant ring since the last call.
  [[nodiscard]] uint64_t take_consumed(uint32_t page_class);
  // Copies returned page ids out, at most into.size().
  [[nodiscard]] uint32_t take_returns(uint32_t page_class, std::span<uint32_t> into);

  // False: no room. The core and requests_ready() count, so then the client broke an index.
  [[nodiscard]] bool push_grants(uint32_t page_class, std::span<const uint32_t> pages);
  [[nodiscard]] bool push_completion(const protocol::Completion& completion);

  // Makes pushed and taken entries visible and wakes a sleeping client. Cheap when nothing is new.
  void publish();

  // The client moved an index to where it cannot be.
  [[nodiscard]] bool broken() const;

  // True: the client was marked parked; it rings from now on. False: there is work again.
  [[nodiscard]] bool try_park();
  void unpark();
  [[nodiscard]] bool parked() const { return parked_; }

  // Tells the client that the daemon lets go of it, and wakes it.
  void close(ErrorCode code);

  [[nodiscard]] ReportedCounters counters() const;
  [[nodiscard]] uint32_t unanswered() const { return unanswered_; }
  [[nodiscard]] uint32_t requests_waiting();

 private:
  ClientLink(MemfdRegion daemon, MemfdRegion client, UniqueFd bell);
  [[nodiscard]] bool has_work();
  void wake();

  using RequestRing = RingConsumer<protocol::Request, limits::kRequestRing>;
  using CompletionRing = RingProducer<protocol::Completion, limits::kRequestRing>;
  using GrantRing = RingProducer<uint32_t, limits::kGrantRing>;
  using ReturnRing = RingConsumer<uint32_t, limits::kReturnRing>;

  MemfdRegion daemon_;
  MemfdRegion client_;
  UniqueFd bell_;
  shm::DaemonRegion* out_;
  const shm::ClientRegion* in_;
  RequestRing requests_;
  CompletionRing completions_;
  std::array<GrantRing, kPageClassCount> grants_;
  std::array<ReturnRing, kPageClassCount> returns_;
  std::array<uint64_t, kPageClassCount> consumed_{};
  uint32_t unanswered_ = 0;
  bool taken_ = false;  // entries since publish()
  bool pushed_ = false;
  bool parked_ = false;
  bool stalled_ = false;
};

}  // namespace thinkv::ipc
