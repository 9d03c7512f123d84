// pool_choice.h: the pools that a daemon serves, and which of them a client means. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "daemon/core/service.h"
#include "thinkv/internal/device_uuid.h"
#include "thinkv/internal/protocol.h"
#include "thinkv/internal/units.h"

namespace thinkv::ipc {

struct ServedPool {
  std::string name;
  std::string backend;
  DeviceUuid device;  // none on the host backend
  uint64_t extent_bytes = 0;
  core::Service* service = nullptr;  // borrowed
};

// The pool with this name, or on the GPU with this UUID as text. An empty text means the only pool.
[[nodiscard]] std::optional<PoolIndex> find_pool(std::span<const ServedPool> pools,
                                                 std::string_view text);

// "gpu0 (cuda, GPU-...), ram (host)"
[[nodiscard]] std::string pool_names(std::span<const ServedPool> pools);

// Requires: at most limits::kPoolsMax.
[[nodiscard]] protocol::Pools pools_message(std::span<const ServedPool> pools);

}  // namespace thinkv::ipc
