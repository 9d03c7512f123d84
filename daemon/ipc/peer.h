// peer.h: who is at the other end of a socket, according to the kernel.
//
// Nothing of it comes from the wire: a client's own idea of its pid is meaningless across
// namespaces, and a pid alone can be reused. The pidfd it may send is checked against the kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "thinkv/internal/unique_fd.h"
#include "thinkv/result.h"

namespace thinkv::ipc {

struct Peer {
  uint32_t pid = 0;  // in our pid namespace
  uint32_t uid = 0;
  uint32_t gid = 0;
  std::vector<uint32_t> groups;  // supplementary
};

// Errors: kPermission (the kernel does not say).
[[nodiscard]] Result<Peer> peer_of(int socket);

// A pidfd of the peer process: from the kernel where it gives one (SO_PEERPIDFD); else `sent`, if
// it is valid and really that process; else opened here by pid. A `sent` that is not the peer's is
// an error in any case. Errors: kPermission (not the peer's), kUnavailable (the process is gone).
[[nodiscard]] Result<UniqueFd> verified_pidfd(int socket, const Peer& peer, UniqueFd sent);

// Whether the process behind a pidfd has ended. Not blocking.
[[nodiscard]] bool process_ended(int pidfd);

}  // namespace thinkv::ipc
