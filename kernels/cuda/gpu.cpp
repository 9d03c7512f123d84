#include "kernels/cuda/gpu.h"

#include <cstring>
#include <utility>

namespace thinkv::cuda {
namespace {

Result<DeviceUuid> uuid_of(const Driver& driver, DeviceOrdinal ordinal) {
  DriverUuid raw{};
  THINKV_TRY(driver_status(driver, driver.device_get_uuid(&raw, ordinal), "cuDeviceGetUuid"));
  DeviceUuid uuid;
  static_assert(sizeof(raw.bytes) == sizeof(uuid.bytes));
  std::memcpy(uuid.bytes.data(), raw.bytes, sizeof(raw.bytes));
  return uuid;
}

Result<GpuInfo> read_info(const Driver& driver, int32_t index) {
  GpuInfo info;
  THINKV_TRY(driver_status(driver, driver.device_get(&info.ordinal, index), "cuDeviceGet"));
  THINKV_ASSIGN_OR_RETURN(info.uuid, uuid_of(driver, info.ordinal));
  return info;
}

Result<int32_t> attribute(const Driver& driver, DeviceAttribute which, DeviceOrdinal ordinal) {
  int32_t value = 0;
  THINKV_TRY(driver_status(driver, driver.device_get_attribute(&value, which, ordinal),
                           "cuDeviceGetAttribute"));
  return value;
}

Status read_rest(const Driver& driver, GpuInfo* info) {
  char name[128] = {};
  THINKV_TRY(driver_status(driver, driver.device_get_name(name, sizeof(name) - 1, info->ordinal),
                           "cuDeviceGetName"));
  info->name = name;
  THINKV_ASSIGN_OR_RETURN(const int32_t mode,
                          attribute(driver, DeviceAttribute::kComputeMode, info->ordinal));
  info->compute_mode = static_cast<ComputeMode>(mode);
  for (const DeviceAttribute needed :
       {DeviceAttribute::kVirtualMemoryManagement, DeviceAttribute::kPosixFdHandles}) {
    THINKV_ASSIGN_OR_RETURN(const int32_t there, attribute(driver, needed, info->ordinal));
    if (there == 0) {
      return describe_device(ErrorCode::kUnsupported, 0,
                             "%s cannot share memory between processes by file descriptors "
                             "(attribute %d)",
                             info->name.c_str(), static_cast<int>(needed));
    }
  }
  return {};
}

}  // namespace

Result<GpuInfo> find_gpu(const Driver& driver, const std::optional<DeviceUuid>& uuid) {
  int32_t count = 0;
  THINKV_TRY(driver_status(driver, driver.device_get_count(&count), "cuDeviceGetCount"));
  std::string seen;
  for (int32_t i = 0; i < count; ++i) {
    THINKV_ASSIGN_OR_RETURN(GpuInfo info, read_info(driver, i));
    if (!uuid || info.uuid == *uuid) {
      THINKV_TRY(read_rest(driver, &info));
      return info;
    }
    seen.append(seen.empty() ? "" : ", ").append(device_uuid_text(info.uuid));
  }
  return describe_device(ErrorCode::kNotFound, kErrorInvalidDevice, "no %s here; there is: %s",
                         uuid ? device_uuid_text(*uuid).c_str() : "GPU",
                         seen.empty() ? "none" : seen.c_str());
}

Result<DeviceUuid> current_gpu(const Driver& driver) {
  DeviceOrdinal device = 0;
  const DriverResult current = driver.context_get_device(&device);
  if (current == kErrorInvalidContext) {
    THINKV_TRY(driver_status(driver, driver.device_get(&device, 0), "cuDeviceGet"));
  } else {
    THINKV_TRY(driver_status(driver, current, "cuCtxGetDevice"));
  }
  return uuid_of(driver, device);
}

Result<Gpu> Gpu::open(const Driver& driver, GpuInfo info) {
  ContextHandle context = nullptr;
  THINKV_TRY(driver_status(driver, driver.primary_context_retain(&context, info.ordinal),
                           "cuDevicePrimaryCtxRetain"));
  Gpu gpu(driver, std::move(info), context);
  const AllocationProperties properties = gpu.extent_properties();
  size_t granularity = 0;
  THINKV_TRY(driver_status(
      driver, driver.mem_get_granularity(&granularity, &properties, Granularity::kMinimum),
      "cuMemGetAllocationGranularity"));
  if (granularity == 0) {
    return describe_device(ErrorCode::kDeviceFailed, 0, "the driver says a granularity of 0 bytes");
  }
  gpu.granularity_ = granularity;
  return gpu;
}

Gpu::Gpu(Gpu&& other) noexcept
    : driver_(other.driver_),
      info_(std::move(other.info_)),
      context_(std::exchange(other.context_, nullptr)),
      granularity_(other.granularity_) {}

Gpu::~Gpu() {
  // Nobody is left to tell of a failure, and at exit the driver may be gone before us.
  if (context_ != nullptr) static_cast<void>(driver_->primary_context_release(info_.ordinal));
}

AllocationProperties Gpu::extent_properties() const {
  AllocationProperties properties{};
  properties.type = AllocationType::kPinned;
  properties.requested_handles = HandleType::kPosixFd;
  properties.location = {LocationType::kDevice, info_.ordinal};
  return properties;
}

ContextScope::ContextScope(const Gpu& gpu)
    : gpu_(gpu),
      status_(driver_status(gpu.driver(), gpu.driver().context_push(gpu.context()),
                            "cuCtxPushCurrent")) {}

ContextScope::~ContextScope() {
  ContextHandle popped = nullptr;
  if (status_) static_cast<void>(gpu_.driver().context_pop(&popped));
}

Status map_memory(const Gpu& gpu, MemoryHandle handle, DevicePointer address, uint64_t bytes,
                  AccessFlags access) {
  const Driver& driver = gpu.driver();
  THINKV_TRY(driver_status(driver, driver.mem_map(address, bytes, 0, handle, 0), "cuMemMap"));
  const AccessDescriptor descriptor{{LocationType::kDevice, gpu.info().ordinal}, access};
  const DriverResult allowed = driver.mem_set_access(address, bytes, &descriptor, 1);
  if (allowed == kSuccess) return {};
  const Error error = driver_error(driver, allowed, "cuMemSetAccess");
  static_cast<void>(driver.mem_unmap(address, bytes));  // the first error is the one to tell
  return error;
}

}  // namespace thinkv::cuda
