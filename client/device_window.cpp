#include "client/device_window.h"

#include <algorithm>
#include <utility>

#include "client/error_text.h"
#include "client/fork_guard.h"

namespace thinkv::client {
namespace {

using cuda::driver_status;

// The same error with what was being done in front of the driver's words.
template <class... Arguments>
Error in_context(const Error& error, const char* format, Arguments... arguments) {
  Error told = describe(error.code, format, arguments..., error.what);
  told.os_error = error.os_error;
  return told;
}

Result<cuda::Gpu> open_gpu(const cuda::Driver& driver, const DeviceUuid& device) {
  Result<cuda::GpuInfo> info = cuda::find_gpu(driver, device);
  if (!info) {
    Error error = in_context(info.error(), "the GPU of thinkvd's pool is not usable here: %s");
    if (error.code == ErrorCode::kNotFound) error.code = ErrorCode::kUnsupported;
    return error;
  }
  Result<cuda::Gpu> gpu = cuda::Gpu::open(driver, std::move(*info));
  if (!gpu) return in_context(gpu.error(), "no context on the GPU of thinkvd's pool: %s");
  return gpu;
}

}  // namespace

DeviceWindow::DeviceWindow(cuda::Gpu gpu, uint64_t extent_bytes)
    : gpu_(std::move(gpu)), extent_bytes_(extent_bytes), fork_generation_(fork_generation()) {}

Result<std::unique_ptr<DeviceWindow>> DeviceWindow::open(const cuda::Driver& driver,
                                                         const Options& options) {
  THINKV_ASSIGN_OR_RETURN(cuda::Gpu gpu, open_gpu(driver, options.device));
  if (options.extent_bytes == 0 || options.extent_bytes > limits::kExtentBytesMax ||
      options.extent_bytes % gpu.granularity() != 0) {
    return describe(ErrorCode::kInvalidArgument,
                    "extents of %llu bytes are no multiple of the GPU's granularity, %llu",
                    static_cast<unsigned long long>(options.extent_bytes),
                    static_cast<unsigned long long>(gpu.granularity()));
  }
  std::unique_ptr<DeviceWindow> window(new DeviceWindow(std::move(gpu), options.extent_bytes));
  THINKV_TRY(window->reserve(std::clamp(options.extents_min, 1u, limits::kExtentsMax)));
  return window;
}

Status DeviceWindow::reserve(uint32_t extents_min) {
  const cuda::ContextScope scope(gpu_);
  THINKV_TRY(scope.status());
  const cuda::Driver& driver = gpu_.driver();
  for (uint32_t extents = limits::kExtentsMax;;) {
    const uint64_t bytes = extents * extent_bytes_;
    cuda::DevicePointer base = 0;
    const Status reserved = driver_status(driver, driver.mem_address_reserve(&base, bytes, 0, 0, 0),
                                          "cuMemAddressReserve");
    if (reserved) {
      base_ = base;
      extents_ = extents;
      return {};
    }
    if (extents == extents_min) {
      return in_context(reserved.error(),
                        "no device addresses for %u extents of thinkvd's pool: %s", extents);
    }
    extents = std::max(extents / 2, extents_min);
  }
}

DeviceWindow::~DeviceWindow() {
  if (fork_generation_ != fork_generation()) {
    gpu_.abandon();
    return;
  }
  const cuda::ContextScope scope(gpu_);
  // A context that is lost takes its mappings with it, and nobody is left to be told.
  if (!scope.status() || base_ == 0) return;
  for (uint32_t i = 0; i < extents_; ++i) {
    if (mapped_[i]) static_cast<void>(unmap(ExtentId(i)));
  }
  static_cast<void>(gpu_.driver().mem_address_free(base_, extents_ * extent_bytes_));
}

Status DeviceWindow::map(ExtentId extent, int fd, Access access) {
  if (extent.value() >= extents_) {
    return describe(ErrorCode::kUnavailable, "thinkvd sent extent %u, addresses are there for %u",
                    extent.value(), extents_);
  }
  const cuda::ContextScope scope(gpu_);
  THINKV_TRY(scope.status());
  if (mapped_[extent.value()]) THINKV_TRY(unmap(extent));
  const cuda::Driver& driver = gpu_.driver();
  cuda::MemoryHandle handle = 0;
  // NVIDIA's interface carries the descriptor's number in a pointer.
  void* const shareable = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  const Status imported =
      driver_status(driver, driver.mem_import(&handle, shareable, cuda::HandleType::kPosixFd),
                    "cuMemImportFromShareableHandle");
  if (!imported) {
    return in_context(imported.error(), "extent %u cannot be imported: %s", extent.value());
  }
  const Status done = cuda::map_memory(
      gpu_, handle, address(extent), extent_bytes_,
      access == Access::kRead ? cuda::AccessFlags::kRead : cuda::AccessFlags::kReadWrite);
  // The mapping keeps the memory; the handle was only the way to it.
  const Status released = driver_status(driver, driver.mem_release(handle), "cuMemRelease");
  if (!done) return in_context(done.error(), "extent %u cannot be mapped: %s", extent.value());
  mapped_[extent.value()] = true;
  return released;
}

Status DeviceWindow::unmap(ExtentId extent) {
  const cuda::Driver& driver = gpu_.driver();
  const Status unmapped =
      driver_status(driver, driver.mem_unmap(address(extent), extent_bytes_), "cuMemUnmap");
  if (!unmapped) {
    return in_context(unmapped.error(), "extent %u cannot be unmapped: %s", extent.value());
  }
  mapped_[extent.value()] = false;
  return {};
}

}  // namespace thinkv::client
