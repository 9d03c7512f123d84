// protocol.h: messages of the control socket (AF_UNIX, SEQPACKET) and descriptors of the rings.
//
// One packet is one message: ControlHeader, then exactly one body. Fixed width, little-endian,
// no pointers, no bool; reserved bytes are zero when sent and refused when not. Client and
// daemon each copy a message once, validate the copy and use only the copy.
//
//   client                         daemon
//   Hello (+ pidfd, optional) ->
//                              <-  Welcome (+ fds: daemon-written and client-written memfd, bell)
//                                  or Pools (there are several and Hello named none: connect again
//                                  and name one), or Refused; after both the socket closes
//   RegisterModel             ->
//                              <-  ModelRegistered | Refused
//   GetPolicy                 ->
//                              <-  PolicyReply | Refused
//   GetStatus                 ->                      (any time, also as the only request)
//                              <-  StatusReply (+ fd: sealed memfd with JSON text)
//                              <-  Extent (+ fd)      pushed before the first page of it is granted
//   Bye                       ->                      clean close; EOF without it counts as a crash
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::protocol {

inline constexpr uint32_t kMagic = 0x31564B54;  // "TKV1"

enum class MessageType : uint16_t {
  kHello = 1,
  kWelcome = 2,
  kRefused = 3,
  kRegisterModel = 4,
  kModelRegistered = 5,
  kGetPolicy = 6,
  kPolicyReply = 7,
  kGetStatus = 8,
  kStatusReply = 9,
  kExtent = 10,
  kBye = 11,
  kPools = 12,
};

struct ControlHeader {
  uint32_t magic;
  uint16_t type;        // MessageType
  uint16_t fds;         // descriptors that travel with the message
  uint32_t size;        // of the whole packet, header included
  uint32_t request_id;  // echoed in the reply; 0 in pushed messages
};
static_assert(sizeof(ControlHeader) == 16);

enum class ClientRole : uint32_t { kEngine = 1, kOperator = 2 };  // operators only read status

struct Hello {
  uint16_t protocol_major;
  uint16_t protocol_minor;
  uint32_t role;  // ClientRole
  char client_name[limits::kNameMax];
  char library_version[16];
  char pool[limits::kNameMax];  // its name, or its GPU's UUID as text; empty: the only pool
  uint8_t reserved[40];
};
static_assert(sizeof(Hello) == 192);
static_assert(offsetof(Hello, pool) == 88);

struct Welcome {
  uint16_t protocol_major;
  uint16_t protocol_minor;
  uint32_t reserved0;
  uint64_t boot_epoch;  // changes at each start of the daemon
  uint64_t client_id;
  uint64_t daemon_region_bytes;  // of the memfd that the daemon writes
  uint64_t client_region_bytes;  // of the memfd that the client writes
  char tenant[limits::kNameMax];
  char backend[16];  // "host" | "cuda"
  char daemon_version[16];
  uint8_t device_uuid[16];  // of the GPU with the extents; zeros on the host backend
  uint64_t extent_bytes;    // of every extent of the pool
  char pool[limits::kNameMax];
  uint8_t reserved[32];
};
static_assert(sizeof(Welcome) == 256);
static_assert(offsetof(Welcome, device_uuid) == 136 && offsetof(Welcome, extent_bytes) == 152);
static_assert(offsetof(Welcome, pool) == 160);

struct PoolEntry {
  char name[limits::kNameMax];
  char backend[16];
  uint8_t device_uuid[16];  // zeros on the host backend
};
static_assert(sizeof(PoolEntry) == 96);

struct Pools {
  uint32_t count;  // 2 to limits::kPoolsMax
  uint32_t reserved[3];
  PoolEntry entries[limits::kPoolsMax];  // zeros after the first `count`
};
static_assert(sizeof(Pools) == 1552);

struct Refused {
  int32_t code;  // ErrorCode
  int32_t os_error;
  char text[504];  // for a person: what, and what to do
};
static_assert(sizeof(Refused) == 512);

struct RegisterModel {
  uint32_t layers;
  uint32_t q_heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t value_type;
  float softmax_scale;
  char model_name[limits::kNameMax];
  uint8_t reserved[40];
};
static_assert(sizeof(RegisterModel) == 128);

struct ModelRegistered {
  uint32_t model_id;
  uint32_t page_class;
  uint32_t page_bytes;
  uint32_t lease_low_pages;   // the daemon refills below this
  uint32_t lease_high_pages;  // up to this
  uint8_t reserved[44];
};
static_assert(sizeof(ModelRegistered) == 64);

struct GetPolicy {
  char policy_name[kPolicyNameMax];
  uint8_t reserved[16];
};
static_assert(sizeof(GetPolicy) == 64);

struct PolicyReply {
  uint32_t policy_id;
  uint32_t reserved[15];
  PolicyParams params;
};
static_assert(sizeof(PolicyReply) == 64 + sizeof(PolicyParams));

struct StatusReply {
  uint64_t json_bytes;
  uint8_t reserved[56];
};
static_assert(sizeof(StatusReply) == 64);

struct Extent {
  uint32_t extent_id;
  uint32_t page_class;
  uint32_t page_bytes;
  uint32_t page_count;
  uint64_t extent_bytes;
  uint32_t generation;  // of the id: it may come again with other memory behind it
  uint8_t reserved[36];
};
static_assert(sizeof(Extent) == 64);

// ---- ring descriptors, 64 bytes ----

enum class Op : uint16_t {
  kPing = 1,
  kOpenSequence = 2,   // arg: model id, policy id, budget tokens (0: the policy's), reserved
  kCloseSequence = 3,  // handle
  kSetBudget = 4,      // handle; arg[0] tokens
  kNeedPages = 5,      // arg[0] page class, arg[1] pages that must be in the lease
  kClientStats = 6,    // result: pages granted, used by the tenant, tenant limit, pool free, pool
};

struct Request {
  uint16_t op;    // Op
  uint8_t flags;  // 0
  uint8_t size;   // 64
  uint32_t reserved0;
  uint64_t user_data;  // echoed
  uint64_t handle;     // sequence id
  uint64_t arg[4];
  uint64_t reserved1;
};
static_assert(sizeof(Request) == 64);

struct Completion {
  uint64_t user_data;
  int32_t status;   // ErrorCode
  uint32_t detail;  // numbers of the error: see the op; 0 otherwise
  uint64_t result[5];
  uint64_t reserved0;
};
static_assert(sizeof(Completion) == 64);

static_assert(std::is_trivially_copyable_v<Request> && std::is_trivially_copyable_v<Hello>);
static_assert(sizeof(ControlHeader) + sizeof(Refused) <= limits::kControlMessageMax);
static_assert(sizeof(ControlHeader) + sizeof(Pools) <= limits::kControlMessageMax);

}  // namespace thinkv::protocol
