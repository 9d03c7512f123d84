#include "client/gpu/memory.h"

#include "client/error_text.h"
#include "client/fork_guard.h"

namespace thinkv::client {
namespace {

constexpr unsigned kHostAllocPortable = 1;   // CU_MEMHOSTALLOC_PORTABLE
constexpr unsigned kHostAllocDeviceMap = 2;  // CU_MEMHOSTALLOC_DEVICEMAP

}  // namespace

Result<GpuMemory> GpuMemory::make(const cuda::Gpu& gpu, Place place, uint64_t bytes,
                                  const char* name) {
  const cuda::ContextScope context(gpu);
  THINKV_TRY(context.status());
  const cuda::Driver& driver = gpu.driver();
  GpuMemory memory;
  memory.gpu_ = &gpu;
  memory.place_ = place;
  memory.bytes_ = bytes;
  memory.fork_generation_ = fork_generation();
  cuda::DriverResult result = cuda::kSuccess;
  if (place == Place::kDevice) {
    result = driver.mem_alloc(&memory.address_, bytes);
  } else {
    void* host = nullptr;
    result = driver.host_alloc(&host, bytes, kHostAllocPortable | kHostAllocDeviceMap);
    memory.address_ = reinterpret_cast<cuda::DevicePointer>(host);
  }
  if (result != cuda::kSuccess) {
    memory.address_ = 0;
    const Error error = cuda::driver_error(driver, result, "memory");
    return describe(error.code, "%llu bytes of %s for %s cannot be had: %s",
                    static_cast<unsigned long long>(bytes),
                    place == Place::kDevice ? "GPU memory outside the pool" : "pinned memory", name,
                    error.what);
  }
  result = driver.memset_d8_async(memory.address_, 0, bytes, nullptr);
  if (result == cuda::kSuccess) result = driver.stream_synchronize(nullptr);
  if (result != cuda::kSuccess) return cuda::driver_error(driver, result, "cuMemsetD8Async");
  return memory;
}

GpuMemory::~GpuMemory() {
  if (address_ == 0 || fork_generation_ != fork_generation()) return;
  const cuda::ContextScope context(*gpu_);
  if (!context.status()) return;
  if (place_ == Place::kDevice) {
    static_cast<void>(gpu_->driver().mem_free(address_));
  } else {
    static_cast<void>(gpu_->driver().host_free(reinterpret_cast<void*>(address_)));
  }
}

}  // namespace thinkv::client
