#include "daemon/ipc/pool_choice.h"

#include <cstring>

#include "daemon/ipc/control_codec.h"
#include "thinkv/internal/check.h"

namespace thinkv::ipc {

std::optional<PoolIndex> find_pool(std::span<const ServedPool> pools, std::string_view text) {
  if (text.empty()) return pools.size() == 1 ? std::optional(PoolIndex(0)) : std::nullopt;
  const Result<DeviceUuid> uuid = parse_device_uuid(text);
  for (uint32_t i = 0; i < pools.size(); ++i) {
    // No name reads as a UUID: the configuration refuses it.
    if (pools[i].name == text || (uuid && pools[i].device == *uuid)) return PoolIndex(i);
  }
  return std::nullopt;
}

std::string pool_names(std::span<const ServedPool> pools) {
  std::string text;
  for (const ServedPool& pool : pools) {
    text.append(text.empty() ? "" : ", ").append(pool.name).append(" (").append(pool.backend);
    if (!pool.device.is_none()) text.append(", ").append(device_uuid_text(pool.device));
    text.push_back(')');
  }
  return text;
}

protocol::Pools pools_message(std::span<const ServedPool> pools) {
  THINKV_CHECK(pools.size() <= limits::kPoolsMax);
  protocol::Pools message{};
  message.count = static_cast<uint32_t>(pools.size());
  for (size_t i = 0; i < pools.size(); ++i) {
    protocol::PoolEntry& entry = message.entries[i];
    copy_text(entry.name, pools[i].name);
    copy_text(entry.backend, pools[i].backend);
    std::memcpy(entry.device_uuid, pools[i].device.bytes.data(), sizeof entry.device_uuid);
  }
  return message;
}

}  // namespace thinkv::ipc
