// service.h: the daemon as a pure state machine: an event and the time in, actions out.
//
// No I/O, clock, thread, driver or file. The same events at the same times give the same actions,
// so tests and fuzzers drive the code that ships. One thread at a time; the shell's event loop owns
// it. A client can make the core refuse, complain or end that client; never fail a check.
//
//   core::Actions actions;                       // reused
//   service->step(core::ClientGone{id, core::EndCause::kKilled}, now_ns, &actions);
//   for (const core::Action& action : actions.list) ...
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "daemon/core/action.h"
#include "daemon/core/config.h"
#include "daemon/core/event.h"
#include "daemon/core/snapshot.h"
#include "thinkv/result.h"

namespace thinkv::core {

class Service {
 public:
  // Allocates all tables. Errors: those of validate(); *why (may be null) says more.
  [[nodiscard]] static Result<std::unique_ptr<Service>> create(const PoolOptions& pool,
                                                               const Config& config,
                                                               std::string* why = nullptr);
  ~Service();
  Service(const Service&) = delete;
  Service& operator=(const Service&) = delete;

  // Clears `actions`, then fills it. now_ns: monotonic, never less than in the call before.
  void step(const Event& event, uint64_t now_ns, Actions* actions);

  // Whether ConfigReloaded with this configuration would be taken now; changes nothing. A shell
  // with several services asks all of them before it tells any. Errors: kInvalidArgument,
  // kExhausted; *why says more.
  [[nodiscard]] Status check_reload(const Config& config, std::string* why) const;

  // Overwrites *out, reusing its memory. O(clients + extents).
  void snapshot(Snapshot* out) const;

  // Null, or which invariant is broken (reliability.md 2.2: I1, I2, and the sums). Walks every
  // page.
  [[nodiscard]] const char* check_invariants() const;

 private:
  class Impl;
  explicit Service(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace thinkv::core
