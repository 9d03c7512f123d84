// event.h: everything that can happen to the core.
//
// Values in here come from clients and may be anything, except ids that the shell itself made
// (ClientId, process keys, ExtentId of a CreateExtent). Spans and pointers are borrowed for the
// duration of step(). Events of a client that the core does not know (it was refused, or the core
// has ended it by Disconnect) are ignored and get no answer.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <variant>

#include "daemon/core/config.h"
#include "thinkv/internal/geometry.h"
#include "thinkv/internal/protocol.h"
#include "thinkv/internal/units.h"

namespace thinkv::core {

// How a client ended. Used as an index of counters.
enum class EndCause : uint8_t {
  kClean = 0,     // Bye
  kKilled = 1,    // its process ended, or the socket closed without Bye
  kProtocol = 2,  // it broke the protocol
  kSlow = 3,      // it did not read what we sent
  kVersion = 4,   // it speaks another protocol (found after it was admitted)
  kShutdown = 5,  // the daemon stops
};
inline constexpr uint32_t kEndCauseCount = 6;
[[nodiscard]] const char* end_cause_name(EndCause cause);

// A process that may hold mappings of extents. The shell makes one number per process and boot (not
// the pid alone: pids come again) and uses it for each connection of that process.
using ProcessKey = Strong<struct ProcessKeyTag, uint64_t>;

// An engine said Hello. Answer: Admit or Refuse. Operators (status only) never enter the core.
struct ClientConnected {
  ClientId client;     // made by the shell, never 0 and never used before
  ProcessKey process;  // made by the shell
  uint32_t pid = 0;    // for people; not trusted
  uint32_t uid = 0;    // from SO_PEERCRED
  uint32_t gid = 0;
  std::span<const uint32_t> groups;  // supplementary groups, may be empty
  std::string_view name;             // cut to limits::kNameMax - 1
};

// Answer: ReplyModel or Refuse.
struct ModelRegistered {
  ClientId client;
  uint32_t request_id = 0;
  ModelGeometry geometry;  // not validated
  std::string_view name;   // cut to limits::kNameMax - 1
};

// Answer: ReplyPolicy or Refuse.
struct PolicyAsked {
  ClientId client;
  uint32_t request_id = 0;
  std::string_view name;
};

// One descriptor of the request ring, copied once out of shared memory. Answer: exactly one
// Complete, at once or, for kNeedPages, when the extents it waits for are there. The shell takes a
// request only if the completion ring has room for it and for all that are still unanswered.
struct RequestArrived {
  ClientId client;
  protocol::Request request;
};

// The client moved the head of its grant ring by `count`.
// The shell loads the request tail BEFORE the grant heads and delivers the consumption BEFORE the
// requests: a client publishes its heads, then a kNeedPages that counts on them.
struct GrantsConsumed {
  ClientId client;
  uint32_t page_class = 0;  // made by the shell: < kPageClassCount
  uint64_t count = 0;       // more than was granted: protocol violation
};

// Raw page ids from the client's return ring; before or after the consumption that they follow
// from. One bad id ends the client.
struct PagesReturned {
  ClientId client;
  uint32_t page_class = 0;  // made by the shell: < kPageClassCount
  std::span<const uint32_t> pages;
};

// The connection is over. Everything granted comes back now; extents that the process received stay
// with its tenant until ProcessExited.
struct ClientGone {
  ClientId client;
  EndCause cause = EndCause::kKilled;
};

// The pidfd fired: no mapping of this process exists any more. Clients of it that are still
// connected end with kKilled. Unknown keys are ignored.
struct ProcessExited {
  ProcessKey process;
};

// Answers to CreateExtent.
struct ExtentReady {
  ExtentId extent;
};
struct ExtentFailed {
  ExtentId extent;
  int32_t os_error = 0;
  bool retire = false;  // the memory is broken for good: never try this extent again
};

// Answer: ReloadResult. On failure nothing changed.
struct ConfigReloaded {
  const Config* config = nullptr;
};

// Ends every client; later connections are refused with kUnavailable.
struct Shutdown {};

using Event = std::variant<ClientConnected, ModelRegistered, PolicyAsked, RequestArrived,
                           GrantsConsumed, PagesReturned, ClientGone, ProcessExited, ExtentReady,
                           ExtentFailed, ConfigReloaded, Shutdown>;

}  // namespace thinkv::core
