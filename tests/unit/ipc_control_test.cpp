// The control socket's decoder: every rule once kept and once broken.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "daemon/ipc/control_codec.h"
#include "daemon/ipc/pool_choice.h"
#include "thinkv/version.h"

namespace thinkv::ipc {
namespace {

using protocol::MessageType;

protocol::Hello good_hello() {
  protocol::Hello hello{};
  hello.protocol_major = kProtocolMajor;
  hello.role = static_cast<uint32_t>(protocol::ClientRole::kEngine);
  copy_text(hello.client_name, "engine");
  copy_text(hello.library_version, "0.1.0");
  return hello;
}

std::vector<std::byte> bytes_of(const Packet& packet) {
  return {packet.view().begin(), packet.view().end()};
}

std::vector<std::byte> bare(uint32_t type) {
  const protocol::ControlHeader header{protocol::kMagic, static_cast<uint16_t>(type), 0,
                                       sizeof(protocol::ControlHeader), 3};
  std::vector<std::byte> bytes(sizeof header);
  std::memcpy(bytes.data(), &header, sizeof header);
  return bytes;
}

std::string why(const std::vector<std::byte>& packet, size_t fds = 0) {
  const auto decoded = decode_client_message(packet, fds);
  return decoded ? "accepted" : decoded.error().what;
}

void set_header(std::vector<std::byte>* packet, size_t offset, uint32_t value, size_t bytes) {
  std::memcpy(packet->data() + offset, &value, bytes);
}

TEST(ControlDecode, HelloWithAndWithoutPidfd) {
  const auto plain =
      decode_client_message(bytes_of(encode(MessageType::kHello, 9, good_hello())), 0);
  ASSERT_TRUE(plain);
  EXPECT_EQ(plain->request_id, 9u);
  EXPECT_STREQ(std::get<protocol::Hello>(plain->body).client_name, "engine");
  EXPECT_TRUE(decode_client_message(bytes_of(encode(MessageType::kHello, 9, good_hello(), 1)), 1));
}

TEST(ControlDecode, OtherMessages) {
  protocol::RegisterModel model{};
  model.layers = 4;
  EXPECT_TRUE(decode_client_message(bytes_of(encode(MessageType::kRegisterModel, 1, model)), 0));
  protocol::GetPolicy get{};
  copy_text(get.policy_name, "thinkv");
  EXPECT_TRUE(decode_client_message(bytes_of(encode(MessageType::kGetPolicy, 1, get)), 0));
  EXPECT_TRUE(decode_client_message(bare(8), 0));
  EXPECT_TRUE(decode_client_message(bare(11), 0));
}

TEST(ControlDecode, EveryLengthButTheRightOneIsRefused) {
  const std::vector<std::byte> good = bytes_of(encode(MessageType::kHello, 1, good_hello()));
  for (size_t length = 0; length < good.size() + 32; ++length) {
    if (length == good.size()) continue;
    std::vector<std::byte> cut = good;
    cut.resize(length);
    EXPECT_NE(why(cut), "accepted") << length;
    if (length >= sizeof(protocol::ControlHeader)) {  // and when it tells the truth about itself
      set_header(&cut, 8, static_cast<uint32_t>(length), 4);
      EXPECT_NE(why(cut), "accepted") << length;
    }
  }
  EXPECT_EQ(why(std::vector<std::byte>(limits::kControlMessageMax + 1)), "the message is too long");
}

TEST(ControlDecode, EveryReservedByteMustBeZero) {
  const std::vector<std::byte> good =
      bytes_of(encode(MessageType::kRegisterModel, 1, protocol::RegisterModel{}));
  const size_t first =
      sizeof(protocol::ControlHeader) + offsetof(protocol::RegisterModel, reserved);
  for (size_t at = first; at < good.size(); ++at) {
    std::vector<std::byte> bad = good;
    bad[at] = std::byte{1};
    EXPECT_EQ(why(bad), "RegisterModel: reserved bytes must be zero") << at;
  }
  protocol::Hello hello = good_hello();
  hello.reserved[39] = 1;
  EXPECT_EQ(why(bytes_of(encode(MessageType::kHello, 1, hello))),
            "Hello: reserved bytes must be zero");
  protocol::GetPolicy get{};
  get.policy_name[0] = 'x';
  get.reserved[0] = 1;
  EXPECT_EQ(why(bytes_of(encode(MessageType::kGetPolicy, 1, get))),
            "GetPolicy: reserved bytes must be zero");
}

TEST(ControlDecode, TextIsTerminatedAndPrintable) {
  protocol::Hello hello = good_hello();
  std::memset(hello.client_name, 'x', sizeof hello.client_name);
  EXPECT_EQ(why(bytes_of(encode(MessageType::kHello, 1, hello))),
            "Hello: the client's name is not text");
  copy_text(hello.client_name, "a\nb");
  EXPECT_EQ(why(bytes_of(encode(MessageType::kHello, 1, hello))),
            "Hello: the client's name is not text");
  hello = good_hello();
  copy_text(hello.library_version, "\x7f");
  EXPECT_EQ(why(bytes_of(encode(MessageType::kHello, 1, hello))),
            "Hello: the library version is not text");
  hello = good_hello();
  copy_text(hello.pool, "gpu1");
  EXPECT_TRUE(decode_client_message(bytes_of(encode(MessageType::kHello, 1, hello)), 0));
  std::memset(hello.pool, 'x', sizeof hello.pool);
  EXPECT_EQ(why(bytes_of(encode(MessageType::kHello, 1, hello))),
            "Hello: the pool's name is not text");
  protocol::GetPolicy get{};
  EXPECT_EQ(why(bytes_of(encode(MessageType::kGetPolicy, 1, get))), "GetPolicy: the name is empty");
  std::memset(get.policy_name, 'x', sizeof get.policy_name);
  EXPECT_EQ(why(bytes_of(encode(MessageType::kGetPolicy, 1, get))),
            "GetPolicy: the name is not text");
}

TEST(ControlDecode, HeaderRules) {
  const std::vector<std::byte> good = bytes_of(encode(MessageType::kHello, 1, good_hello()));
  std::vector<std::byte> bad = good;
  set_header(&bad, 0, 0x12345678, 4);
  EXPECT_EQ(why(bad), "not a ThinKV message (magic)");
  bad = good;
  set_header(&bad, 8, 5, 4);
  EXPECT_EQ(why(bad), "the message is not as long as it says");
  bad = good;
  set_header(&bad, 6, 2, 2);
  EXPECT_EQ(why(bad, 2), "descriptors where none are expected");
  EXPECT_EQ(why(good, 1), "not as many descriptors as the message says");
  bad = bare(11);
  set_header(&bad, 6, 1, 2);
  EXPECT_EQ(why(bad, 1), "descriptors where none are expected");
}

TEST(ControlDecode, TypesThatNoClientSends) {
  for (uint32_t type = 0; type < 65536; type += type < 20 ? 1 : 997) {
    const std::string text = why(bare(type));
    if (type == 8 || type == 11) {
      EXPECT_EQ(text, "accepted");
    } else {
      EXPECT_NE(text, "accepted") << type;
    }
  }
  EXPECT_EQ(why(bare(2)), "a message that only the daemon sends");
}

TEST(ControlDecode, AnotherMajorVersionIsToldApart) {
  for (const uint32_t major : {0u, kProtocolMajor + 1u, 0xFFFFu}) {
    protocol::Hello hello = good_hello();
    hello.protocol_major = static_cast<uint16_t>(major);
    uint16_t peer = 77;
    const auto decoded =
        decode_client_message(bytes_of(encode(MessageType::kHello, 1, hello)), 0, &peer);
    ASSERT_FALSE(decoded);
    EXPECT_EQ(decoded.error().code, ErrorCode::kVersionMismatch);
    EXPECT_EQ(peer, major);
  }
  protocol::Hello newer_minor = good_hello();
  newer_minor.protocol_minor = 99;
  EXPECT_TRUE(decode_client_message(bytes_of(encode(MessageType::kHello, 1, newer_minor)), 0));
}

TEST(ControlDecode, RoleMustBeKnown) {
  protocol::Hello hello = good_hello();
  for (const uint32_t role : {0u, 3u, 0xFFFFFFFFu}) {
    hello.role = role;
    EXPECT_EQ(why(bytes_of(encode(MessageType::kHello, 1, hello))),
              "Hello: the role must be 1 (engine) or 2 (operator)");
  }
}

TEST(ControlEncode, RefusedTextIsCutAndTerminated) {
  const Packet packet = encode_refused(4, ErrorCode::kNotFound, std::string(5000, 'x'), 2);
  protocol::Refused refused;
  ASSERT_EQ(packet.size, sizeof(protocol::ControlHeader) + sizeof refused);
  std::memcpy(&refused, packet.bytes.data() + sizeof(protocol::ControlHeader), sizeof refused);
  EXPECT_EQ(refused.code, 4);
  EXPECT_EQ(refused.os_error, 2);
  EXPECT_EQ(std::strlen(refused.text), sizeof refused.text - 1);
}

DeviceUuid gpu(uint8_t number) {
  DeviceUuid uuid;
  uuid.bytes[15] = number;
  return uuid;
}

std::vector<ServedPool> three_pools() {
  return {{"ram", "host", {}, 0, nullptr},
          {"gpu0", "cuda", gpu(1), 0, nullptr},
          {"gpu1", "cuda", gpu(2), 0, nullptr}};
}

TEST(PoolChoice, ByNameOrByTheGpusUuid) {
  const std::vector<ServedPool> pools = three_pools();
  EXPECT_EQ(find_pool(pools, "gpu1"), PoolIndex(2));
  EXPECT_EQ(find_pool(pools, "ram"), PoolIndex(0));
  EXPECT_EQ(find_pool(pools, device_uuid_text(gpu(1))), PoolIndex(1));
  EXPECT_EQ(find_pool(pools, device_uuid_text(gpu(2)).substr(4)), PoolIndex(2));
  for (const char* text :
       {"gpu", "gpu11", "GPU1", "GPU-00000000-0000-0000-0000-000000000003",
        "GPU-00000000-0000-0000-0000-000000000000"}) {  // the host pool has no GPU to be found by
    EXPECT_EQ(find_pool(pools, text), std::nullopt) << text;
  }
}

TEST(PoolChoice, NoNameMeansTheOnlyPool) {
  const std::vector<ServedPool> pools = three_pools();
  EXPECT_EQ(find_pool(std::span(pools).first(1), ""), PoolIndex(0));
  EXPECT_EQ(find_pool(pools, ""), std::nullopt);
}

TEST(PoolChoice, TheMessageHasEveryPool) {
  const protocol::Pools message = pools_message(three_pools());
  EXPECT_EQ(message.count, 3u);
  EXPECT_STREQ(message.entries[1].name, "gpu0");
  EXPECT_STREQ(message.entries[0].backend, "host");
  EXPECT_EQ(message.entries[0].device_uuid[15], 0);
  EXPECT_EQ(message.entries[2].device_uuid[15], 2);
  EXPECT_EQ(message.entries[3].name[0], '\0');
  EXPECT_EQ(pool_names(three_pools()),
            "ram (host), gpu0 (cuda, GPU-00000000-0000-0000-0000-000000000001), "
            "gpu1 (cuda, GPU-00000000-0000-0000-0000-000000000002)");
}

}  // namespace
}  // namespace thinkv::ipc
