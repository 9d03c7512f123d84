#include "daemon/device/factory.h"

#include <spdlog/spdlog.h>

#include <utility>

#include "daemon/device/cuda/advice.h"
#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/cuda/facts.h"
#include "daemon/device/host/host_device.h"

namespace thinkv::device {
namespace {

// Logs warnings. Errors: the first error among the advice, in *why.
Status heed(const std::vector<Advice>& advice, std::string* why) {
  for (const Advice& one : advice) {
    if (one.severity == Severity::kWarning) {
      spdlog::warn("{}", one.text);
      continue;
    }
    *why = one.text;
    return make_error(ErrorCode::kInvalidArgument, "the GPU cannot serve this pool");
  }
  return {};
}

// The failed step's error, and its sentence in *why.
Error failed(const Error& error, std::string* why) {
  *why = std::string("pool.backend is cuda: ") + error.what;
  if (error.code == ErrorCode::kNotFound) why->append(" (pool.device; nvidia-smi -L lists them)");
  return error;
}

Status check_capacity(const CudaDevice& device, const DeviceOptions& options, std::string* why) {
  if (options.extent_bytes % device.granularity() != 0) {
    *why = "pool.extent_bytes must be a multiple of this GPU's granularity, " +
           std::to_string(device.granularity()) + " bytes";
    return make_error(ErrorCode::kInvalidArgument, "size of an extent");
  }
  const Result<Capacity> capacity = device.capacity();
  if (!capacity) return failed(capacity.error(), why);
  const std::optional<Advice> advice = advise_memory(*capacity, options.pool_bytes);
  return advice ? heed({*advice}, why) : Status{};
}

Result<std::unique_ptr<Device>> make_cuda(const DeviceOptions& options, std::string* why) {
  const Result<const cuda::Driver*> driver = cuda::Driver::load();
  if (!driver) return failed(driver.error(), why);
  const Result<cuda::GpuInfo> gpu = cuda::find_gpu(**driver, options.gpu);
  if (!gpu) return failed(gpu.error(), why);
  // Before a context is made: in a wrong mode that fails with less helpful words.
  THINKV_TRY(heed(advise(read_facts(*gpu)), why));
  Result<std::unique_ptr<CudaDevice>> device = CudaDevice::open(**driver, *gpu);
  if (!device) return failed(device.error(), why);
  THINKV_TRY(check_capacity(**device, options, why));
  spdlog::info("GPU {} ({}), driver for CUDA {}.{}", gpu->name, device_uuid_text(gpu->uuid),
               (*driver)->version / 1000, (*driver)->version % 1000 / 10);
  return std::unique_ptr<Device>(std::move(*device));
}

}  // namespace

Result<std::unique_ptr<Device>> make_device(const DeviceOptions& options, std::string* why) {
  if (options.kind == Kind::kCuda) return make_cuda(options, why);
  return std::unique_ptr<Device>(std::make_unique<HostDevice>());
}

}  // namespace thinkv::device
