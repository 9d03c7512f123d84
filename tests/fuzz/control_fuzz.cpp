// Packets of the control socket: the first byte says how many descriptors came along.
//
// Properties: no packet crashes the decoder, and what it accepts encodes back to the same bytes.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <variant>

#include "daemon/ipc/control_codec.h"
#include "thinkv/internal/check.h"

namespace {

using thinkv::ipc::Bye;
using thinkv::ipc::decode_client_message;
using thinkv::ipc::encode;
using thinkv::ipc::GetStatus;
using thinkv::ipc::Packet;
using thinkv::protocol::MessageType;

struct Encode {
  uint32_t id;
  uint16_t fds;
  Packet operator()(const thinkv::protocol::Hello& b) const {
    return encode(MessageType::kHello, id, b, fds);
  }
  Packet operator()(const thinkv::protocol::RegisterModel& b) const {
    return encode(MessageType::kRegisterModel, id, b, fds);
  }
  Packet operator()(const thinkv::protocol::GetPolicy& b) const {
    return encode(MessageType::kGetPolicy, id, b, fds);
  }
  Packet operator()(GetStatus) const { return {}; }
  Packet operator()(Bye) const { return {}; }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const size_t fds = data[0] % 5;
  const auto packet = std::as_bytes(std::span(data + 1, size - 1));
  uint16_t major = 0;
  const auto message = decode_client_message(packet, fds, &major);
  if (!message) {
    THINKV_CHECK(message.error().what[0] != '\0');
    return 0;
  }
  const Packet again =
      std::visit(Encode{message->request_id, static_cast<uint16_t>(fds)}, message->body);
  if (again.size == 0) return 0;  // no body
  THINKV_CHECK(again.size == packet.size());
  THINKV_CHECK(std::memcmp(again.bytes.data(), packet.data(), packet.size()) == 0);
  return 0;
}
