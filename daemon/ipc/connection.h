// connection.h: one accepted control socket and what hangs on it.
//
// Sends never block: what the socket does not take waits in a bounded queue. Reads are limited by
// a token bucket. Threads: the event loop only.
#pragma once

#include <utility>  // before asio 1.18, whose awaitable.hpp uses std::exchange without it

#include <boost/asio/basic_seq_packet_socket.hpp>
#include <boost/asio/generic/seq_packet_protocol.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/core/event.h"
#include "daemon/ipc/client_link.h"
#include "daemon/ipc/control_codec.h"
#include "daemon/ipc/peer.h"

namespace thinkv::ipc {

using PacketSocket =
    boost::asio::basic_seq_packet_socket<boost::asio::generic::seq_packet_protocol>;

// Messages a second, with a burst of a tenth of a second.
class TokenBucket {
 public:
  TokenBucket(uint32_t per_second, uint64_t now_ns);
  [[nodiscard]] bool take(uint64_t now_ns);

 private:
  uint64_t cost_ns_;  // of one message
  uint64_t burst_ns_;
  uint64_t credit_ns_;
  uint64_t last_ns_;
};

enum class SendResult : uint8_t { kSent, kQueued, kOverflow, kGone };

class Connection {
 public:
  enum class State : uint8_t {
    kNew,       // no Hello yet
    kOperator,  // reads status only
    kEngine,    // known to the core, has a link
    kClosing,   // the last message is on its way out
    kClosed,    // to be removed
  };

  Connection(uint64_t id, PacketSocket socket, Peer peer, TokenBucket bucket, uint64_t now_ns);

  // Sends now or later, in order; descriptors that wait are duplicated. kOverflow: the peer does
  // not read (limits::kControlBacklogBytesMax).
  [[nodiscard]] SendResult send(const Packet& packet, std::span<const int> fds);
  // Sends what waits, as far as the socket takes it.
  [[nodiscard]] SendResult flush();
  [[nodiscard]] bool backlog() const { return !queue_.empty(); }
  // Reads away what is unread: closing over it would reset the peer before it reads our answer.
  void drain();

  uint64_t id;
  PacketSocket socket;
  Peer peer;
  TokenBucket bucket;
  State state = State::kNew;
  uint64_t accepted_ns;
  uint64_t process_key = 0;  // 0: none
  PoolIndex pool;            // of an engine
  uint32_t hello_request_id = 0;
  std::string name;

  // Engines only.
  std::unique_ptr<ClientLink> link;
  std::unique_ptr<boost::asio::posix::stream_descriptor> bell;  // a duplicate of the link's
  bool hot = false;                                             // its rings are polled
  bool dirty = false;  // its rings have something to publish
  uint64_t last_work_ns = 0;
  uint64_t stalled_since_ns = 0;  // 0: it reads
  bool write_armed = false;

 private:
  struct Waiting {
    std::vector<std::byte> bytes;  // of one packet, and no more: many small ones can wait
    std::vector<UniqueFd> fds;
  };
  [[nodiscard]] SendResult enqueue(const Packet& packet, std::span<const int> fds);

  std::deque<Waiting> queue_;
  uint64_t queue_bytes_ = 0;
};

}  // namespace thinkv::ipc
