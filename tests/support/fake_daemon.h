// fake_daemon.h: a daemon of one client, in a thread, that can be wrong in chosen ways.
//
// Speaks the control socket by itself (its own bytes, not the daemon's code), and the rings
// through RingDaemon. Threads: constructor and destructor in the test's thread.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/support/ring_daemon.h"
#include "thinkv/internal/device_uuid.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/result.h"

namespace thinkv::test {

struct FakeFaults {
  ErrorCode refuse_hello = ErrorCode::kOk;
  uint16_t protocol_major = kProtocolMajor;
  uint64_t region_bytes_less = 0;
  uint64_t announce_more = 0;
  int seals = kSizeSeals;
  bool wrong_magic = false;
  bool wrong_epoch = false;
  bool silent = false;
  bool bad_policy = false;
  const char* backend = "host";
  DeviceUuid device = {};
  uint64_t extent_bytes = limits::kExtentBytesMin;
  uint32_t pages = 0;  // of head_dim 64 in one extent, which is sent after Welcome; 0: no extent
  std::vector<protocol::PoolEntry> pools = {};  // what a Hello that names none is told
  uint32_t pools_count_more = 0;                // than there are
  bool pools_always = false;                    // also a Hello that names one
};

[[nodiscard]] inline protocol::PoolEntry pool_entry(const char* name, const DeviceUuid& device) {
  protocol::PoolEntry entry{};
  std::snprintf(entry.name, sizeof entry.name, "%s", name);
  std::snprintf(entry.backend, sizeof entry.backend, "%s", device.is_none() ? "host" : "cuda");
  std::memcpy(entry.device_uuid, device.bytes.data(), sizeof entry.device_uuid);
  return entry;
}

class FakeDaemon {
 public:
  explicit FakeDaemon(const FakeFaults& faults) : faults_(faults) {
    char folder[] = "/tmp/thinkv-fake-XXXXXX";
    folder_ = ::mkdtemp(folder);
    path_ = folder_ + "/control.sock";
    listener_ = UniqueFd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.c_str(), path_.size() + 1);
    THINKV_CHECK(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) ==
                 0);
    THINKV_CHECK(::listen(listener_.get(), 4) == 0);
    thread_ = std::thread([this] { serve(); });
  }
  ~FakeDaemon() {
    stopping_.store(true);
    thread_.join();
    rings_.reset();
    ::unlink(path_.c_str());
    ::rmdir(folder_.c_str());
    if (daemon_ != nullptr) ::munmap(daemon_, sizeof(*daemon_));
    if (client_ != nullptr) ::munmap(client_, sizeof(*client_));
  }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  void serve() {
    UniqueFd peer;
    while (!stopping_.load()) {
      pollfd entry{
          .fd = peer.valid() ? peer.get() : listener_.get(), .events = POLLIN, .revents = 0};
      if (::poll(&entry, 1, 5) <= 0) continue;
      if (!peer.valid()) {
        peer = UniqueFd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        continue;
      }
      alignas(8) std::byte packet[limits::kControlMessageMax];
      if (::recv(peer.get(), packet, sizeof(packet), 0) <= 0) {
        peer.reset();
        continue;
      }
      protocol::ControlHeader header{};
      std::memcpy(&header, packet, sizeof(header));
      if (faults_.silent) continue;
      if (header.type == static_cast<uint16_t>(protocol::MessageType::kHello)) {
        protocol::Hello hello{};
        std::memcpy(&hello, packet + sizeof(header), sizeof(hello));
        if (!faults_.pools.empty() && (faults_.pools_always || hello.pool[0] == '\0')) {
          tell_pools(peer.get(), header.request_id);
          peer.reset();
          continue;
        }
        pool_ = hello.pool;
      }
      answer(peer.get(), header);
    }
  }

  void answer(int peer, const protocol::ControlHeader& header) {
    switch (static_cast<protocol::MessageType>(header.type)) {
      case protocol::MessageType::kHello:
        return welcome(peer, header.request_id);
      case protocol::MessageType::kRegisterModel: {
        protocol::ModelRegistered reply{};
        reply.model_id = ++models_;
        reply.page_class = 0;
        reply.page_bytes = page_bytes(64);
        reply.lease_low_pages = 64;
        reply.lease_high_pages = 64;
        return send(peer, protocol::MessageType::kModelRegistered, header.request_id, reply, {});
      }
      case protocol::MessageType::kGetPolicy: {
        protocol::PolicyReply reply{};
        reply.policy_id = 5;
        std::snprintf(reply.params.name, sizeof reply.params.name, "%s", "test");
        if (faults_.bad_policy) reply.params.segment_tokens = 7;
        return send(peer, protocol::MessageType::kPolicyReply, header.request_id, reply, {});
      }
      default:
        return;
    }
  }

  void tell_pools(int peer, uint32_t request_id) {
    protocol::Pools pools{};
    pools.count = static_cast<uint32_t>(faults_.pools.size()) + faults_.pools_count_more;
    std::copy(faults_.pools.begin(), faults_.pools.end(), pools.entries);
    send(peer, protocol::MessageType::kPools, request_id, pools, {});
  }

  void welcome(int peer, uint32_t request_id) {
    if (faults_.refuse_hello != ErrorCode::kOk) {
      protocol::Refused refused{};
      refused.code = static_cast<int32_t>(faults_.refuse_hello);
      std::snprintf(refused.text, sizeof refused.text, "%s", "refused for a test");
      return send(peer, protocol::MessageType::kRefused, request_id, refused, {});
    }
    const uint64_t daemon_bytes = sizeof(shm::DaemonRegion) - faults_.region_bytes_less;
    daemon_fd_ = sealed_memfd(daemon_bytes, faults_.seals);
    client_fd_ = sealed_memfd(sizeof(shm::ClientRegion), faults_.seals);
    bell_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (faults_.region_bytes_less == 0) map_regions();
    protocol::Welcome reply{};
    reply.protocol_major = faults_.protocol_major;
    reply.boot_epoch = 42;
    reply.client_id = 1;
    reply.daemon_region_bytes = daemon_bytes + faults_.announce_more;
    reply.client_region_bytes = sizeof(shm::ClientRegion);
    reply.extent_bytes = faults_.extent_bytes;
    std::memcpy(reply.device_uuid, faults_.device.bytes.data(), sizeof(reply.device_uuid));
    std::snprintf(reply.backend, sizeof reply.backend, "%s", faults_.backend);
    std::snprintf(reply.pool, sizeof reply.pool, "%s", pool_.c_str());
    std::snprintf(reply.daemon_version, sizeof reply.daemon_version, "%s", "test");
    send(peer, protocol::MessageType::kWelcome, request_id, reply,
         {daemon_fd_.get(), client_fd_.get(), bell_.get()});
    if (faults_.pages > 0) {
      extent_fd_ = sealed_memfd(faults_.extent_bytes);
      send(peer, protocol::MessageType::kExtent, 0, extent_message(0, faults_.extent_bytes),
           {extent_fd_.get()});
    }
    if (rings_) rings_->start();  // after the extent, so that no page is granted before it
  }

  void map_regions() {
    daemon_ = static_cast<shm::DaemonRegion*>(
        ::mmap(nullptr, sizeof(*daemon_), PROT_READ | PROT_WRITE, MAP_SHARED, daemon_fd_.get(), 0));
    client_ = static_cast<shm::ClientRegion*>(
        ::mmap(nullptr, sizeof(*client_), PROT_READ, MAP_SHARED, client_fd_.get(), 0));
    daemon_->magic = faults_.wrong_magic ? 0 : shm::kMagicDaemon;
    daemon_->protocol_major = kProtocolMajor;
    daemon_->boot_epoch = faults_.wrong_epoch ? 41 : 42;
    rings_ = std::make_unique<RingDaemon>(
        RingDaemon::Options{.out = daemon_, .in = client_, .pages = faults_.pages});
  }

  template <class Body>
  void send(int peer, protocol::MessageType type, uint32_t request_id, Body body,
            const std::vector<int>& fds) {
    protocol::ControlHeader header{.magic = protocol::kMagic,
                                   .type = static_cast<uint16_t>(type),
                                   .fds = static_cast<uint16_t>(fds.size()),
                                   .size = sizeof(header) + sizeof(body),
                                   .request_id = request_id};
    iovec parts[2] = {{&header, sizeof(header)}, {&body, sizeof(body)}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 4)] = {};
    if (!fds.empty()) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
      cmsghdr* rights = CMSG_FIRSTHDR(&message);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
      std::memcpy(CMSG_DATA(rights), fds.data(), sizeof(int) * fds.size());
    }
    static_cast<void>(::sendmsg(peer, &message, MSG_NOSIGNAL));
  }

  FakeFaults faults_;
  std::string folder_;
  std::string path_;
  std::string pool_;  // that the last Hello named
  UniqueFd listener_;
  UniqueFd daemon_fd_;
  UniqueFd client_fd_;
  UniqueFd bell_;
  UniqueFd extent_fd_;
  shm::DaemonRegion* daemon_ = nullptr;
  shm::ClientRegion* client_ = nullptr;
  uint32_t models_ = 0;
  std::atomic<bool> stopping_{false};
  std::unique_ptr<RingDaemon> rings_;
  std::thread thread_;
};

}  // namespace thinkv::test
