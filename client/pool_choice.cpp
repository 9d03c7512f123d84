#include "client/pool_choice.h"

#include <cstring>
#include <span>

#include "client/error_text.h"
#include "kernels/cuda/gpu.h"
#include "thinkv/internal/device_uuid.h"

namespace thinkv::client {
namespace {

DeviceUuid device_of(const protocol::PoolEntry& entry) {
  DeviceUuid uuid;
  static_assert(sizeof(entry.device_uuid) == sizeof(uuid.bytes));
  std::memcpy(uuid.bytes.data(), entry.device_uuid, sizeof(entry.device_uuid));
  return uuid;
}

std::string name_of(const protocol::PoolEntry& entry) {
  return {entry.name, ::strnlen(entry.name, sizeof(entry.name))};
}

Error name_one(std::span<const protocol::PoolEntry> entries, const std::string& because) {
  std::string names;
  for (const protocol::PoolEntry& entry : entries) {
    names.append(names.empty() ? "" : ", ").append(name_of(entry));
  }
  return describe(ErrorCode::kInvalidArgument,
                  "thinkvd has several pools%s: name one (pool_name, or THINKV_POOL): %s",
                  because.c_str(), names.c_str());
}

}  // namespace

Result<std::string> choose_pool(const protocol::Pools& pools) {
  if (pools.count < 1 || pools.count > limits::kPoolsMax) {
    return describe(ErrorCode::kUnavailable, "thinkvd announced %u pools", pools.count);
  }
  const auto entries = std::span(pools.entries).first(pools.count);
  bool on_gpu = false;
  for (const protocol::PoolEntry& entry : entries) on_gpu = on_gpu || !device_of(entry).is_none();
  if (!on_gpu) return name_one(entries, "");
  const Result<const cuda::Driver*> driver = cuda::Driver::load();
  if (!driver) return name_one(entries, " and this process has no GPU");
  const Result<DeviceUuid> current = cuda::current_gpu(**driver);
  if (!current) return name_one(entries, " and this process has no GPU");
  for (const protocol::PoolEntry& entry : entries) {
    if (device_of(entry) == *current) return name_of(entry);
  }
  return name_one(entries, ", none on " + device_uuid_text(*current));
}

}  // namespace thinkv::client
