// advice.h: what is wrong with the GPU or its settings for a daemon that owns its memory.
//
// Decisions only: facts.h reads the facts. A warning is logged; an error refuses the start, because
// a pool that cannot keep its promises is worse than none.
// Threads: pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "daemon/device/device.h"
#include "kernels/cuda/driver_types.h"

namespace thinkv::device {

struct GpuFacts {
  std::string gpu;                       // name and UUID
  std::string mps_pipe;                  // of the MPS control daemon; empty: MPS is not in force
  std::optional<bool> persistence_mode;  // nullopt: NVML does not say
  cuda::ComputeMode compute_mode = cuda::ComputeMode::kDefault;
};

enum class Severity : uint8_t { kWarning, kError };

struct Advice {
  Severity severity = Severity::kWarning;
  std::string text;  // one line: what is so, why it matters, what to do
};

[[nodiscard]] std::vector<Advice> advise(const GpuFacts& facts);

// Whether the pool can be had at all. Extents are taken as they are needed, but the reserves of
// tenants are promises from the start.
[[nodiscard]] std::optional<Advice> advise_memory(const Capacity& capacity, uint64_t pool_bytes);

}  // namespace thinkv::device
