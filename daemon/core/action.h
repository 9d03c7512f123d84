// action.h: what the core wants done, in this order.
//
// The shell executes a list from front to back. Events that follow from it (ExtentReady of a
// CreateExtent) are fed to step() after the whole list is done. Order that matters and is kept
// here: CreateExtent before SendExtent of it, SendExtent before the first GrantPages with pages of
// it to that client, GrantPages before the Complete that promised them, and nothing for a client
// after its Disconnect.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "daemon/core/event.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/internal/protocol.h"
#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::core {

// Send Welcome. The tenant's name is in the snapshot and here for the message.
struct Admit {
  ClientId client;
  TenantId tenant;
  std::string tenant_name;
};

// Send Refused. `fatal`: the client is not (or no longer) known to the core: close after sending.
struct Refuse {
  ClientId client;
  uint32_t request_id = 0;
  ErrorCode code = ErrorCode::kInternal;
  bool fatal = false;
  std::string text;
};

struct ReplyModel {
  ClientId client;
  uint32_t request_id = 0;
  protocol::ModelRegistered reply{};
};

struct ReplyPolicy {
  ClientId client;
  uint32_t request_id = 0;
  protocol::PolicyReply reply{};
};

// Send the Extent message with the extent's descriptor. If the message cannot be sent, not even
// later, the client must be ended (ClientGone kSlow): it could not map its pages.
struct SendExtent {
  ClientId client;
  protocol::Extent message{};
};

// Push pages_of(grant) into the grant ring of the class. The ring has room: the core counts.
struct GrantPages {
  ClientId client;
  uint32_t page_class = 0;
  uint32_t first = 0;  // into Actions::pages
  uint32_t count = 0;
};

// Push into the completion ring.
struct Complete {
  ClientId client;
  protocol::Completion completion{};
};

// Make new memory for the extent, reading as zeros; answer ExtentReady or ExtentFailed.
struct CreateExtent {
  ExtentId extent;
  uint64_t bytes = 0;
  uint32_t generation = 0;  // counts the memories behind this id, from 1
};

// Give the memory of the extent back. No process maps it any more. A later CreateExtent of the id
// is the recycling of the extent for another tenant.
struct ReleaseExtent {
  ExtentId extent;
};

// The client is already gone for the core and everything it held is reclaimed: set the closing
// flag, send Refused with code and text if possible, close. Keep watching its pidfd for
// ProcessExited.
struct Disconnect {
  ClientId client;
  ErrorCode code = ErrorCode::kInternal;
  EndCause cause = EndCause::kProtocol;
  std::string text;
};

struct ReloadResult {
  ErrorCode code = ErrorCode::kOk;
  std::string text;  // what is wrong, if anything
};

using Action = std::variant<Admit, Refuse, ReplyModel, ReplyPolicy, SendExtent, GrantPages,
                            Complete, CreateExtent, ReleaseExtent, Disconnect, ReloadResult>;

// Reused between calls of step() so that the steady state allocates nothing.
struct Actions {
  std::vector<Action> list;
  std::vector<uint32_t> pages;  // raw page ids of all GrantPages of the list

  void clear() {
    list.clear();
    pages.clear();
  }
  [[nodiscard]] std::span<const uint32_t> pages_of(const GrantPages& grant) const {
    return std::span(pages).subspan(grant.first, grant.count);
  }
};

}  // namespace thinkv::core
