// control_codec.h: packets of the control socket to values and back. Pure; fuzzed.
//
// A packet is copied out of the socket once; everything here works on that private copy.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <type_traits>
#include <variant>

#include "thinkv/internal/check.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/protocol.h"
#include "thinkv/result.h"

namespace thinkv::ipc {

struct GetStatus {};
struct Bye {};

// What a client may say.
struct ClientMessage {
  uint32_t request_id = 0;
  std::variant<protocol::Hello, protocol::RegisterModel, protocol::GetPolicy, GetStatus, Bye> body;
};

// `fd_count` descriptors came with the packet. Names inside are zero-terminated afterwards.
// Errors: kVersionMismatch (a Hello of another major version; *peer_major, if given, is set);
// kInvalidArgument (anything else; `what` says which rule).
[[nodiscard]] Result<ClientMessage> decode_client_message(std::span<const std::byte> packet,
                                                          size_t fd_count,
                                                          uint16_t* peer_major = nullptr);

// One packet to send. Large enough for every body that the daemon sends.
struct Packet {
  std::array<std::byte, sizeof(protocol::ControlHeader) + sizeof(protocol::Pools)> bytes{};
  uint32_t size = 0;
  [[nodiscard]] std::span<const std::byte> view() const { return std::span(bytes).first(size); }
};

template <class Body>
[[nodiscard]] Packet encode(protocol::MessageType type, uint32_t request_id, const Body& body,
                            uint16_t fd_count = 0) {
  static_assert(std::is_trivially_copyable_v<Body>);
  static_assert(sizeof(protocol::ControlHeader) + sizeof(Body) <= sizeof(Packet::bytes));
  Packet packet;
  packet.size = static_cast<uint32_t>(sizeof(protocol::ControlHeader) + sizeof(Body));
  const protocol::ControlHeader header{protocol::kMagic, static_cast<uint16_t>(type), fd_count,
                                       packet.size, request_id};
  std::memcpy(packet.bytes.data(), &header, sizeof header);
  std::memcpy(packet.bytes.data() + sizeof header, &body, sizeof body);
  return packet;
}

// Refused with a sentence for a person, cut to what fits.
[[nodiscard]] Packet encode_refused(uint32_t request_id, ErrorCode code, std::string_view text,
                                    int32_t os_error = 0);

// Fills a fixed, zero-terminated field. Requires: kBytes > 0.
template <size_t kBytes>
void copy_text(char (&field)[kBytes], std::string_view text) {
  const size_t length = text.size() < kBytes - 1 ? text.size() : kBytes - 1;
  std::memset(field, 0, kBytes);
  std::memcpy(field, text.data(), length);
}

}  // namespace thinkv::ipc
