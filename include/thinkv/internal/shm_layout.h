// shm_layout.h: the two memfds of one client, byte by byte.
//
// Daemon region: written by the daemon alone (sealed against new writable mappings), mapped
// read-only by the client. Client region: written by the client alone, mapped read-only by the
// daemon. No lock, no pointer and no trusted index lives in either: each side keeps its own
// indices in private memory and treats what it reads as hostile input.
// Every index is free-running (slot = index & (size - 1)) and alone on 128 bytes, because
// prefetchers work on pairs of lines. Orders: the writer stores data, then the index with
// release; the reader loads the index with acquire, then reads data. See ring.h for the views.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/internal/protocol.h"

namespace thinkv::shm {

inline constexpr uint32_t kMagicDaemon = 0x44564B54;  // "TKVD"
inline constexpr uint32_t kMagicClient = 0x43564B54;  // "TKVC"

struct alignas(128) Index {
  std::atomic<uint64_t> value;
  uint8_t pad[120];
};
struct alignas(128) Flag {
  std::atomic<uint32_t> value;
  uint8_t pad[124];
};
static_assert(sizeof(Index) == 128 && sizeof(Flag) == 128);
static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::atomic<uint32_t>::is_always_lock_free);

struct DaemonRegion {
  uint32_t magic;
  uint16_t protocol_major;
  uint16_t protocol_minor;
  uint64_t boot_epoch;
  uint8_t reserved[112];
  Flag parked;         // 1: the daemon sleeps; a client that publishes rings its bell
  Flag doorbell;       // bumped with each batch of completions or grants: the futex word
  Flag closing;        // ErrorCode once the daemon lets go of this client (shutdown, violation)
  Index request_head;  // requests consumed
  Index completion_tail;
  Index grant_tail[kPageClassCount];
  Index return_head[kPageClassCount];
  protocol::Completion completions[limits::kRequestRing];
  std::atomic<uint32_t> grants[kPageClassCount][limits::kGrantRing];  // PageId::raw
};

// What a client says about itself for `thinkvctl top`; plain numbers, shown and never trusted.
struct ClientCounters {
  std::atomic<uint64_t> tokens;  // appended, prompt included
  std::atomic<uint64_t> live_slots;
  std::atomic<uint64_t> evicted_slots;
  std::atomic<uint64_t> reused_slots;
  std::atomic<uint64_t> steps;
  std::atomic<uint64_t> demotions;
  std::atomic<uint64_t> over_budget_steps;
  std::atomic<uint64_t> thoughts[kThoughtCount];
  std::atomic<uint64_t> held_bytes;  // pages in use + metadata
  std::atomic<uint64_t> f16_bytes;   // what a 16-bit cache would hold
  std::atomic<uint64_t> reserved[4];
};
static_assert(sizeof(ClientCounters) == 128);

struct ClientRegion {
  uint32_t magic;
  uint16_t protocol_major;
  uint16_t protocol_minor;
  uint8_t reserved[120];
  Flag sleeping;  // 1: a thread waits on the doorbell; the daemon wakes it
  Index request_tail;
  Index completion_head;
  Index grant_head[kPageClassCount];
  Index return_tail[kPageClassCount];
  ClientCounters counters;
  protocol::Request requests[limits::kRequestRing];
  std::atomic<uint32_t> returns[kPageClassCount][limits::kReturnRing];
};

static_assert(std::is_standard_layout_v<DaemonRegion> && std::is_standard_layout_v<ClientRegion>);
static_assert(offsetof(DaemonRegion, parked) == 128 && offsetof(DaemonRegion, doorbell) == 256);
static_assert(offsetof(DaemonRegion, request_head) == 512);
static_assert(offsetof(DaemonRegion, grant_tail) == 768);
static_assert(offsetof(DaemonRegion, completions) == 1536);
static_assert(offsetof(ClientRegion, sleeping) == 128);
static_assert(offsetof(ClientRegion, request_tail) == 256);
static_assert(offsetof(ClientRegion, grant_head) == 512);
static_assert(offsetof(ClientRegion, counters) == 1280);
static_assert(offsetof(ClientRegion, requests) == 1408);

}  // namespace thinkv::shm
