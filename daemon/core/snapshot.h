// snapshot.h: the state of the core as numbers, for metrics, status and tests.
//
// A value: the shell copies it under its own mutex and other threads read the copy.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "daemon/core/event.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/units.h"

namespace thinkv::core {

inline constexpr uint32_t kOpSlots = 7;      // protocol::Op 1..6; 0 counts unknown operations
inline constexpr uint32_t kErrorCodes = 12;  // ErrorCode 0..11

// Since start; only ever up.
struct Counters {
  std::array<std::array<uint64_t, kErrorCodes>, kOpSlots> requests{};  // [op][code]
  std::array<uint64_t, kEndCauseCount> ended{};                        // clients by cause
  uint64_t connected = 0;
  uint64_t refused = 0;  // connections not admitted
  uint64_t pages_granted = 0;
  uint64_t pages_returned = 0;    // by clients that live
  uint64_t pages_reclaimed = 0;   // from clients that ended
  uint64_t refills_cut = 0;       // refills that got less than the watermark asks for
  uint64_t failed_quota = 0;      // kNeedPages over the tenant's limit
  uint64_t failed_exhausted = 0;  // kNeedPages that the pool could not meet
  uint64_t violations = 0;
  uint64_t sequences_opened = 0;
  uint64_t sequences_closed = 0;
  uint64_t extents_created = 0;
  uint64_t extents_failed = 0;
  uint64_t extents_released = 0;
  uint64_t reloads = 0;
  uint64_t reloads_failed = 0;
};

struct ClassSnapshot {  // pages of one class
  uint64_t granted_pages = 0;
  uint64_t lease_pages = 0;  // of those: in grant rings, not taken by the client yet
  uint64_t free_pages = 0;   // in assigned extents (0 in a client's numbers)
  uint32_t low = 0;          // watermarks (0 in the pool's numbers)
  uint32_t high = 0;
};

struct TenantSnapshot {
  TenantId id;
  std::string name;
  bool configured = true;  // false: removed by a reload, still holds something
  uint64_t reserve_bytes = 0;
  uint64_t limit_bytes = 0;  // effective: the pool where the configuration says 0
  uint32_t weight = 0;
  uint32_t priority = 0;
  uint64_t used_bytes = 0;  // granted pages, leases included
  uint64_t peak_bytes = 0;
  uint64_t lease_bytes = 0;
  uint32_t extents = 0;
  uint32_t clients = 0;
  uint64_t sequences = 0;
  uint64_t failed_quota = 0;
  uint64_t failed_exhausted = 0;
};

struct ModelSnapshot {
  uint32_t id = 0;
  std::string name;
  ModelGeometry geometry;
};

struct ClientSnapshot {
  ClientId id;
  TenantId tenant;
  uint32_t pid = 0;
  uint32_t uid = 0;
  std::string name;
  uint64_t connected_ns = 0;  // time of its ClientConnected
  uint64_t granted_bytes = 0;
  uint64_t lease_bytes = 0;
  uint64_t sequences = 0;
  uint32_t pending_requests = 0;
  std::array<ClassSnapshot, kPageClassCount> classes{};
  std::vector<ModelSnapshot> models;
};

struct PolicySnapshot {
  PolicyId id;
  PolicyParams params;
  bool current = true;  // false: replaced by a reload, still used
  uint64_t sequences = 0;
};

struct Snapshot {
  uint64_t bytes_total = 0;     // extents x extent size
  uint64_t bytes_assigned = 0;  // extents that belong to a tenant (their memory exists or is made)
  uint64_t bytes_granted = 0;   // pages that clients hold, leases included
  uint64_t bytes_peak = 0;      // highest bytes_granted
  uint64_t bytes_free = 0;      // total - granted - retired extents
  uint64_t bytes_reserved_unused = 0;  // kept free for tenants' reserves
  uint32_t extents_unassigned = 0;
  uint32_t extents_creating = 0;
  uint32_t extents_assigned = 0;
  uint32_t extents_retired = 0;
  uint64_t extent_bytes = 0;
  uint64_t sequences = 0;
  uint32_t lingering_processes = 0;  // disconnected, but may still map extents
  std::array<ClassSnapshot, kPageClassCount> classes{};
  std::vector<TenantSnapshot> tenants;
  std::vector<ClientSnapshot> clients;
  std::vector<PolicySnapshot> policies;
  Counters counters;
};

}  // namespace thinkv::core
