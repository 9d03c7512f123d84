// The control socket: what a daemon may send, and how its absence is told.
#include "client/control_socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdlib>
#include <string>
#include <vector>

namespace thinkv::client {
namespace {

using protocol::MessageType;

template <class Body>
std::vector<std::byte> packet(MessageType type, uint16_t fds, const Body& body) {
  protocol::ControlHeader header{.magic = protocol::kMagic,
                                 .type = static_cast<uint16_t>(type),
                                 .fds = fds,
                                 .size = sizeof(header) + sizeof(body),
                                 .request_id = 1};
  std::vector<std::byte> bytes(header.size);
  std::memcpy(bytes.data(), &header, sizeof(header));
  std::memcpy(bytes.data() + sizeof(header), &body, sizeof(body));
  return bytes;
}

TEST(ControlDecode, AcceptsEveryMessageOfADaemon) {
  ControlMessage m;
  EXPECT_TRUE(decode_control(packet(MessageType::kWelcome, 3, protocol::Welcome{}), 3, m));
  EXPECT_TRUE(decode_control(packet(MessageType::kRefused, 0, protocol::Refused{}), 0, m));
  EXPECT_TRUE(
      decode_control(packet(MessageType::kModelRegistered, 0, protocol::ModelRegistered{}), 0, m));
  EXPECT_TRUE(decode_control(packet(MessageType::kPolicyReply, 0, protocol::PolicyReply{}), 0, m));
  EXPECT_TRUE(decode_control(packet(MessageType::kStatusReply, 1, protocol::StatusReply{}), 1, m));
  protocol::Extent extent{};
  extent.extent_id = 77;
  ASSERT_TRUE(decode_control(packet(MessageType::kExtent, 1, extent), 1, m));
  EXPECT_EQ(m.type(), MessageType::kExtent);
  EXPECT_EQ(m.body_as<protocol::Extent>().extent_id, 77u);
}

TEST(ControlDecode, RefusesEveryOtherPacket) {
  ControlMessage m;
  const std::vector<std::byte> good = packet(MessageType::kExtent, 1, protocol::Extent{});
  const auto refuses = [&](auto change, uint32_t fds = 1) {
    std::vector<std::byte> bad = good;
    change(bad);
    const Status decoded = decode_control(bad, fds, m);
    return !decoded && decoded.error().code == ErrorCode::kUnavailable;
  };
  EXPECT_TRUE(refuses([](auto& b) { b.clear(); }));
  EXPECT_TRUE(refuses([](auto& b) { b.resize(15); }));
  EXPECT_TRUE(refuses([](auto& b) { b.resize(b.size() - 1); }));
  EXPECT_TRUE(refuses([](auto& b) { b.push_back(std::byte{0}); }));
  EXPECT_TRUE(refuses([](auto& b) { b[0] ^= std::byte{1}; }));
  EXPECT_TRUE(refuses([](auto& b) { b[8] ^= std::byte{1}; })) << "announced size";
  EXPECT_TRUE(refuses([](auto& b) { b[4] = std::byte{1}; })) << "Hello is for daemons";
  EXPECT_TRUE(refuses([](auto& b) { b[5] = std::byte{9}; })) << "unknown type";
  EXPECT_TRUE(refuses([](auto&) {}, 0));
  EXPECT_TRUE(refuses([](auto&) {}, 2));
  EXPECT_TRUE(refuses([](auto& b) { b[6] = std::byte{0}; })) << "fewer announced than sent";
}

TEST(ControlSocketPath, OptionBeforeEnvironmentBeforeSystem) {
  ::setenv("THINKV_SOCKET", "/from/environment", 1);
  EXPECT_EQ(control_socket_path("/from/option"), "/from/option");
  EXPECT_EQ(control_socket_path(nullptr), "/from/environment");
  ::unsetenv("THINKV_SOCKET");
  ::setenv("XDG_RUNTIME_DIR", "/nonexistent", 1);
  EXPECT_EQ(control_socket_path(nullptr), "/run/thinkvd/control.sock");
}

TEST(ControlSocket, AbsentDaemonSaysWhatToDo) {
  const Result<ControlSocket> socket = ControlSocket::connect("/nonexistent/thinkv.sock");
  ASSERT_FALSE(socket);
  EXPECT_EQ(socket.error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(socket.error().os_error, ENOENT);
  const std::string text = socket.error().what;
  EXPECT_NE(text.find("/nonexistent/thinkv.sock"), std::string::npos);
  EXPECT_NE(text.find("Start thinkvd or set THINKV_SOCKET"), std::string::npos);
}

TEST(ControlSocket, TooLongPathIsTheCallersError) {
  const Result<ControlSocket> socket = ControlSocket::connect(std::string(200, 'x'));
  ASSERT_FALSE(socket);
  EXPECT_EQ(socket.error().code, ErrorCode::kInvalidArgument);
}

struct SocketPair : testing::Test {
  void SetUp() override {
    int fds[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
    ours = ControlSocket(UniqueFd(fds[0]));
    peer = UniqueFd(fds[1]);
  }
  ControlSocket ours;
  UniqueFd peer;
  ControlMessage message;
};

TEST_F(SocketPair, NothingThereIsNotAnError) {
  const Result<bool> got = ours.receive(message, 0);
  ASSERT_TRUE(got);
  EXPECT_FALSE(got.value());
  EXPECT_FALSE(ours.hung_up());
}

TEST_F(SocketPair, HangUpIsUnavailableOnBothWays) {
  peer.reset();
  EXPECT_TRUE(ours.hung_up());
  const Result<bool> got = ours.receive(message, 0);
  ASSERT_FALSE(got);
  EXPECT_EQ(got.error().code, ErrorCode::kUnavailable);
  const Status sent = ours.send_empty(MessageType::kBye, 0);
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().code, ErrorCode::kUnavailable);
}

TEST_F(SocketPair, MessageAboveTheLimitIsRefused) {
  const std::vector<char> big(limits::kControlMessageMax + 1);
  ASSERT_EQ(::send(peer.get(), big.data(), big.size(), 0), static_cast<ssize_t>(big.size()));
  EXPECT_FALSE(ours.receive(message, 0));
}

int open_descriptors() {
  int open = 0;
  for (int fd = 0; fd < 256; ++fd) open += ::fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
  return open;
}

TEST_F(SocketPair, DescriptorsOfARefusedMessageAreClosed) {
  ControlSocket sender(UniqueFd(::dup(peer.get())));
  const int before = open_descriptors();
  // A Hello, which a daemon does not send, with a descriptor.
  ASSERT_TRUE(sender.send(MessageType::kHello, 0, protocol::Hello{}, peer.get()));
  {
    ControlMessage mine;
    EXPECT_FALSE(ours.receive(mine, 0));
  }
  EXPECT_EQ(open_descriptors(), before);
}

}  // namespace
}  // namespace thinkv::client
