// seq_packet.h: one packet with descriptors over a SEQPACKET socket, without blocking.
//
// Asio has no call for descriptors; it only says when a socket is ready. Raw system calls, no
// SIGPIPE, every received descriptor close-on-exec and owned from the first instruction.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/unique_fd.h"
#include "thinkv/result.h"

namespace thinkv::ipc {

// Errors: kUnavailable with os_error EAGAIN (later), or what sendmsg said (the peer is gone).
[[nodiscard]] Status send_packet(int socket, std::span<const std::byte> packet,
                                 std::span<const int> fds);

struct Received {
  uint32_t size = 0;  // 0: the peer closed
  uint32_t fd_count = 0;
  std::array<UniqueFd, limits::kFdsPerMessageMax> fds;
};

// `buffer` needs limits::kControlMessageMax bytes. Errors: kUnavailable with os_error EAGAIN
// (nothing there) or what recvmsg said; kInvalidArgument: cut (too long, too many descriptors).
[[nodiscard]] Result<Received> receive_packet(int socket, std::span<std::byte> buffer);

}  // namespace thinkv::ipc
