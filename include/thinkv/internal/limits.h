// limits.h: every bound, each with its reason.
#pragma once

#include <cstddef>
#include <cstdint>

#include "thinkv/internal/units.h"

namespace thinkv::limits {

// Geometry of a model.
inline constexpr uint32_t kLayersMax = 256;  // the largest open models have about 130
inline constexpr uint32_t kKvHeadsMax = 128;
inline constexpr uint32_t kLanesMax = 8192;       // layers x kv heads; 126 x 64 is the largest seen
inline constexpr uint32_t kGroupMax = 16;         // query heads per kv head, two MMA n-tiles
inline constexpr uint32_t kBatchMax = 4096;       // sequences in one step
inline constexpr uint32_t kTokensMax = 1u << 24;  // positions of a sequence: 16.7 M tokens

// Pool.
inline constexpr uint64_t kExtentBytesMin = uint64_t{2} << 20;  // VMM granularity
inline constexpr uint64_t kExtentBytesMax = uint64_t{1} << 30;  // 466,033 pages of 2,304 B < 2^20
inline constexpr uint32_t kExtentsMax = 4096;                   // 12 bits of PageId
inline constexpr uint32_t kPoolsMax = 16;  // of one daemon: the GPUs of the largest machines
static_assert(kExtentBytesMax / 2304 <= PageId::kIndexMask);

// Tenants and clients. Each client costs two memfds, a socket, an eventfd and a pidfd.
inline constexpr uint32_t kTenantsMax = 32;  // metric label cardinality
inline constexpr uint32_t kClientsMax = 256;
inline constexpr uint32_t kClientsPerUidMax = 64;
inline constexpr uint32_t kModelsPerClientMax = 16;
inline constexpr uint32_t kSequencesPerClientMax = 65536;
inline constexpr uint32_t kPoliciesMax = 128;
inline constexpr size_t kNameMax = 64;  // bytes with the terminating zero

// Control socket (SEQPACKET): set-up, policies, extents, errors. Nothing of a step.
inline constexpr size_t kSocketPathMax = 106;  // sun_path, less its zero and the "~" while binding
inline constexpr size_t kControlMessageMax = 4096;
inline constexpr size_t kFdsPerMessageMax = 4;                  // hello reply: two memfds, one bell
inline constexpr uint64_t kControlBacklogBytesMax = 64 * 1024;  // unsent bytes to one client

// Rings. Powers of two: slot = index & (size - 1) with free-running 64-bit indices.
inline constexpr uint32_t kRequestRing = 256;
// A grant ring holds the high watermark of the largest model: 4 pages for each of 8,192 lanes.
inline constexpr uint32_t kGrantRing = 32768;
// Returns: everything that can be granted at once and the pages of many closed sequences; a full
// return ring only makes the client keep pages a little longer.
inline constexpr uint32_t kReturnRing = 65536;
inline constexpr uint32_t kRequestsPerTurn = 32;  // of one client before the next has its turn
inline constexpr uint32_t kReturnsPerTurn = 8192;

// Lease watermarks, in pages per lane of the registered models (at least kLeasePagesMin).
inline constexpr uint32_t kLeasePagesMin = 64;
inline constexpr uint32_t kLeaseLowPerLane = 1;
inline constexpr uint32_t kLeaseHighPerLane = 3;
static_assert(uint64_t{kLeaseHighPerLane} * kLanesMax <= kGrantRing);

// Configuration.
inline constexpr size_t kConfigBytesMax = 64 * 1024;

}  // namespace thinkv::limits
