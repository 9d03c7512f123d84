#include "daemon/ops/totals.h"

namespace thinkv::ops {
namespace {

// A counter that is added there must be added up here: this finds out.
static_assert(sizeof(core::Counters) ==
              sizeof(uint64_t) * (core::kOpSlots * core::kErrorCodes + core::kEndCauseCount + 16));

void add(core::Counters& to, const core::Counters& from) {
  for (size_t op = 0; op < to.requests.size(); ++op) {
    for (size_t code = 0; code < to.requests[op].size(); ++code) {
      to.requests[op][code] += from.requests[op][code];
    }
  }
  for (size_t i = 0; i < to.ended.size(); ++i) to.ended[i] += from.ended[i];
  to.connected += from.connected;
  to.refused += from.refused;
  to.pages_granted += from.pages_granted;
  to.pages_returned += from.pages_returned;
  to.pages_reclaimed += from.pages_reclaimed;
  to.refills_cut += from.refills_cut;
  to.failed_quota += from.failed_quota;
  to.failed_exhausted += from.failed_exhausted;
  to.violations += from.violations;
  to.sequences_opened += from.sequences_opened;
  to.sequences_closed += from.sequences_closed;
  to.extents_created += from.extents_created;
  to.extents_failed += from.extents_failed;
  to.extents_released += from.extents_released;
  to.reloads += from.reloads;
  to.reloads_failed += from.reloads_failed;
}

void add(core::Snapshot& to, const core::Snapshot& from) {
  to.bytes_total += from.bytes_total;
  to.bytes_assigned += from.bytes_assigned;
  to.bytes_granted += from.bytes_granted;
  to.bytes_peak += from.bytes_peak;
  to.bytes_free += from.bytes_free;
  to.bytes_reserved_unused += from.bytes_reserved_unused;
  to.extents_unassigned += from.extents_unassigned;
  to.extents_creating += from.extents_creating;
  to.extents_assigned += from.extents_assigned;
  to.extents_retired += from.extents_retired;
  to.sequences += from.sequences;
  to.lingering_processes += from.lingering_processes;
  for (size_t c = 0; c < to.classes.size(); ++c) {
    to.classes[c].granted_pages += from.classes[c].granted_pages;
    to.classes[c].lease_pages += from.classes[c].lease_pages;
    to.classes[c].free_pages += from.classes[c].free_pages;
  }
  add(to.counters, from.counters);
}

}  // namespace

std::string backend_of(const Report& report) {
  std::string backend;
  for (const PoolReport& pool : report.pools) {
    if (!backend.empty() && backend != pool.backend) return "mixed";
    backend = pool.backend;
  }
  return backend;
}

core::Snapshot total_of(const Report& report) {
  core::Snapshot total;
  for (const PoolReport& pool : report.pools) add(total, pool.snapshot);
  for (const PoolReport& pool : report.pools) {
    const bool first = &pool == &report.pools.front();
    const bool same = first || total.extent_bytes == pool.snapshot.extent_bytes;
    total.extent_bytes = same ? pool.snapshot.extent_bytes : 0;
    if (!same) break;
  }
  return total;
}

}  // namespace thinkv::ops
