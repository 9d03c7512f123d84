#include "daemon/ipc/control_codec.h"

#include <algorithm>

#include "thinkv/version.h"

namespace thinkv::ipc {
namespace {

using protocol::ControlHeader;
using protocol::MessageType;

Error invalid(const char* what) {
  return make_error(ErrorCode::kInvalidArgument, what);
}

template <size_t kBytes>
bool all_zero(const uint8_t (&bytes)[kBytes]) {
  return std::all_of(bytes, bytes + kBytes, [](uint8_t byte) { return byte == 0; });
}

// Zero-terminated text without control characters: it goes into logs and terminals.
template <size_t kBytes>
bool is_text(const char (&field)[kBytes]) {
  const char* end = std::find(field, field + kBytes, '\0');
  if (end == field + kBytes) return false;
  return std::none_of(field, end,
                      [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
}

template <class Body>
Result<Body> body_of(std::span<const std::byte> packet) {
  if (packet.size() != sizeof(ControlHeader) + sizeof(Body)) {
    return invalid("the message has the wrong size for its type");
  }
  Body body;
  std::memcpy(&body, packet.data() + sizeof(ControlHeader), sizeof body);
  return body;
}

Result<protocol::Hello> decode_hello(std::span<const std::byte> packet, uint16_t* peer_major) {
  // The first body bytes are the version in every version of the protocol: look at them before
  // the size, so that a newer library is told what is wrong.
  uint16_t major = 0;
  if (packet.size() < sizeof(ControlHeader) + sizeof major) return invalid("Hello is too short");
  std::memcpy(&major, packet.data() + sizeof(ControlHeader), sizeof major);
  if (peer_major != nullptr) *peer_major = major;
  if (major != kProtocolMajor) {
    return make_error(ErrorCode::kVersionMismatch, "another protocol version");
  }
  THINKV_ASSIGN_OR_RETURN(const protocol::Hello hello, body_of<protocol::Hello>(packet));
  if (hello.role != static_cast<uint32_t>(protocol::ClientRole::kEngine) &&
      hello.role != static_cast<uint32_t>(protocol::ClientRole::kOperator)) {
    return invalid("Hello: the role must be 1 (engine) or 2 (operator)");
  }
  if (!is_text(hello.client_name)) return invalid("Hello: the client's name is not text");
  if (!is_text(hello.library_version)) return invalid("Hello: the library version is not text");
  if (!is_text(hello.pool)) return invalid("Hello: the pool's name is not text");
  if (!all_zero(hello.reserved)) return invalid("Hello: reserved bytes must be zero");
  return hello;
}

Result<protocol::RegisterModel> decode_model(std::span<const std::byte> packet) {
  THINKV_ASSIGN_OR_RETURN(const protocol::RegisterModel model,
                          body_of<protocol::RegisterModel>(packet));
  if (!is_text(model.model_name)) return invalid("RegisterModel: the name is not text");
  if (!all_zero(model.reserved)) return invalid("RegisterModel: reserved bytes must be zero");
  return model;
}

Result<protocol::GetPolicy> decode_get_policy(std::span<const std::byte> packet) {
  THINKV_ASSIGN_OR_RETURN(const protocol::GetPolicy get, body_of<protocol::GetPolicy>(packet));
  if (!is_text(get.policy_name)) return invalid("GetPolicy: the name is not text");
  if (get.policy_name[0] == '\0') return invalid("GetPolicy: the name is empty");
  if (!all_zero(get.reserved)) return invalid("GetPolicy: reserved bytes must be zero");
  return get;
}

Status check_header(const ControlHeader& header, size_t packet_size, size_t fd_count) {
  if (header.magic != protocol::kMagic) return invalid("not a ThinKV message (magic)");
  if (header.size != packet_size) return invalid("the message is not as long as it says");
  const bool is_hello = header.type == static_cast<uint16_t>(MessageType::kHello);
  if (header.fds > (is_hello ? 1 : 0)) return invalid("descriptors where none are expected");
  if (header.fds != fd_count) return invalid("not as many descriptors as the message says");
  return {};
}

}  // namespace

Result<ClientMessage> decode_client_message(std::span<const std::byte> packet, size_t fd_count,
                                            uint16_t* peer_major) {
  if (packet.size() > limits::kControlMessageMax) return invalid("the message is too long");
  if (packet.size() < sizeof(ControlHeader)) return invalid("the message is too short");
  ControlHeader header;
  std::memcpy(&header, packet.data(), sizeof header);
  THINKV_TRY(check_header(header, packet.size(), fd_count));
  ClientMessage message;
  message.request_id = header.request_id;
  switch (static_cast<MessageType>(header.type)) {
    case MessageType::kHello: {
      THINKV_ASSIGN_OR_RETURN(message.body, decode_hello(packet, peer_major));
      return message;
    }
    case MessageType::kRegisterModel: {
      THINKV_ASSIGN_OR_RETURN(message.body, decode_model(packet));
      return message;
    }
    case MessageType::kGetPolicy: {
      THINKV_ASSIGN_OR_RETURN(message.body, decode_get_policy(packet));
      return message;
    }
    case MessageType::kGetStatus:
    case MessageType::kBye:
      if (packet.size() != sizeof header) return invalid("a body where none is expected");
      if (static_cast<MessageType>(header.type) == MessageType::kBye) {
        message.body = Bye{};
      } else {
        message.body = GetStatus{};
      }
      return message;
    case MessageType::kWelcome:
    case MessageType::kRefused:
    case MessageType::kModelRegistered:
    case MessageType::kPolicyReply:
    case MessageType::kStatusReply:
    case MessageType::kExtent:
    case MessageType::kPools:
      return invalid("a message that only the daemon sends");
  }
  return invalid("unknown message type");
}

Packet encode_refused(uint32_t request_id, ErrorCode code, std::string_view text,
                      int32_t os_error) {
  protocol::Refused refused{};
  refused.code = static_cast<int32_t>(code);
  refused.os_error = os_error;
  copy_text(refused.text, text);
  return encode(protocol::MessageType::kRefused, request_id, refused);
}

}  // namespace thinkv::ipc
