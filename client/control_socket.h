// control_socket.h: packets and descriptors of the control socket, client side.
//
// One SEQPACKET packet is one message. What arrives is copied once and checked (decode_control)
// before anything looks at it; descriptors are owned by the message that brought them.
// Threads: none of its own; calls must not overlap.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/protocol.h"
#include "thinkv/internal/unique_fd.h"
#include "thinkv/result.h"

namespace thinkv::client {

struct ControlMessage {
  protocol::ControlHeader header{};
  std::array<std::byte, limits::kControlMessageMax> body{};
  std::array<UniqueFd, limits::kFdsPerMessageMax> fds;

  [[nodiscard]] protocol::MessageType type() const {
    return static_cast<protocol::MessageType>(header.type);
  }
  // Requires: decode_control accepted the message and type() is the one of Body.
  template <class Body>
  [[nodiscard]] Body body_as() const {
    Body copy{};
    std::memcpy(&copy, body.data(), sizeof(Body));
    return copy;
  }
};

// Checks one packet from the daemon: magic, announced size, a type that daemons send, the body's
// size for that type, the number of descriptors. Fills header and body of `message`.
// Errors: kUnavailable, saying what was wrong. Pure: any bytes may be given.
[[nodiscard]] Status decode_control(std::span<const std::byte> packet, uint32_t fd_count,
                                    ControlMessage& message);

// options > THINKV_SOCKET > $XDG_RUNTIME_DIR/thinkv/control.sock if it exists > the system's.
[[nodiscard]] std::string control_socket_path(const char* from_options);

class ControlSocket {
 public:
  ControlSocket() = default;
  explicit ControlSocket(UniqueFd fd) : fd_(std::move(fd)) {}

  // Errors: kUnavailable (nobody listens), kPermission, kInvalidArgument (path too long).
  [[nodiscard]] static Result<ControlSocket> connect(const std::string& path);

  template <class Body>
  [[nodiscard]] Status send(protocol::MessageType type, uint32_t request_id, const Body& body,
                            int fd = -1) {
    return send_bytes(type, request_id, std::as_bytes(std::span<const Body, 1>(&body, 1)), fd);
  }
  [[nodiscard]] Status send_empty(protocol::MessageType type, uint32_t request_id) {
    return send_bytes(type, request_id, {}, -1);
  }
  // Waits up to `timeout_ms` (0: looks only). Result: whether a message was there.
  // Errors: kUnavailable (the peer hung up or broke the protocol).
  [[nodiscard]] Result<bool> receive(ControlMessage& message, int timeout_ms);
  // The other end is closed. Does not consume messages.
  [[nodiscard]] bool hung_up() const;
  [[nodiscard]] int fd() const { return fd_.get(); }

 private:
  [[nodiscard]] Status send_bytes(protocol::MessageType type, uint32_t request_id,
                                  std::span<const std::byte> body, int fd);
  [[nodiscard]] Result<bool> receive_now(ControlMessage& message);
  UniqueFd fd_;
};

}  // namespace thinkv::client
