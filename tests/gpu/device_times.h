// device_times.h: what the steps of an extent's life cost on this driver.
#pragma once

#include <chrono>
#include <cstdio>
#include <optional>

#include "kernels/cuda/gpu.h"
#include "thinkv/internal/unique_fd.h"

namespace thinkv::gpu_test {

inline uint64_t now_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() /
                               std::chrono::nanoseconds(1));
}

struct Times {
  uint64_t create = 0, exported = 0, imported = 0, map = 0, zero = 0, unmap = 0, release = 0;
};

#define MEASURE(field, call)                                \
  do {                                                      \
    const uint64_t start = now_ns();                        \
    THINKV_TRY(cuda::driver_status(driver, (call), #call)); \
    times->field += now_ns() - start;                       \
  } while (false)

inline Status measure_one(const cuda::Gpu& gpu, cuda::DevicePointer address, uint64_t bytes,
                          Times* times) {
  const cuda::Driver& driver = gpu.driver();
  const cuda::AllocationProperties properties = gpu.extent_properties();
  const cuda::AccessDescriptor access{{cuda::LocationType::kDevice, gpu.info().ordinal},
                                      cuda::AccessFlags::kReadWrite};
  cuda::MemoryHandle handle = 0;
  cuda::MemoryHandle other = 0;
  int fd = -1;
  MEASURE(create, driver.mem_create(&handle, bytes, &properties, 0));
  MEASURE(exported, driver.mem_export(&fd, handle, cuda::HandleType::kPosixFd, 0));
  const UniqueFd closer(fd);
  void* const shareable = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  MEASURE(imported, driver.mem_import(&other, shareable, cuda::HandleType::kPosixFd));
  MEASURE(map, driver.mem_map(address, bytes, 0, other, 0));
  MEASURE(map, driver.mem_set_access(address, bytes, &access, 1));
  MEASURE(zero, driver.memset_d8_async(address, 0, bytes, nullptr));
  MEASURE(zero, driver.stream_synchronize(nullptr));
  MEASURE(unmap, driver.mem_unmap(address, bytes));
  MEASURE(release, driver.mem_release(other));
  MEASURE(release, driver.mem_release(handle));
  return {};
}

// Prints the means of what one extent costs, step by step.
inline Status print_times(uint64_t bytes) {
  constexpr int kRounds = 16;
  THINKV_ASSIGN_OR_RETURN(const cuda::Driver* driver, cuda::Driver::load());
  THINKV_ASSIGN_OR_RETURN(cuda::GpuInfo info, cuda::find_gpu(*driver, std::nullopt));
  THINKV_ASSIGN_OR_RETURN(const cuda::Gpu gpu, cuda::Gpu::open(*driver, info));
  const cuda::ContextScope scope(gpu);
  THINKV_TRY(scope.status());
  cuda::DevicePointer address = 0;
  THINKV_TRY(cuda::driver_status(*driver, driver->mem_address_reserve(&address, bytes, 0, 0, 0),
                                 "cuMemAddressReserve"));
  Times first;
  THINKV_TRY(measure_one(gpu, address, bytes, &first));  // warms up, and is not counted
  Times sum;
  for (int i = 0; i < kRounds; ++i) THINKV_TRY(measure_one(gpu, address, bytes, &sum));
  const auto us = [](uint64_t ns) { return static_cast<double>(ns) / 1e3 / kRounds; };
  std::printf("%s, driver for CUDA %d.%d, extents of %llu MiB, means of %d in us:\n",
              info.name.c_str(), driver->version / 1000, driver->version % 1000 / 10,
              static_cast<unsigned long long>(bytes >> 20), kRounds);
  std::printf(
      "  create %.1f  export %.1f  import %.1f  map+access %.1f  zero %.1f (%.0f GB/s)  "
      "unmap %.1f  release %.1f\n",
      us(sum.create), us(sum.exported), us(sum.imported), us(sum.map), us(sum.zero),
      static_cast<double>(bytes) / us(sum.zero) / 1e3, us(sum.unmap), us(sum.release));
  return cuda::driver_status(*driver, driver->mem_address_free(address, bytes), "cuMemAddressFree");
}

#undef MEASURE

}  // namespace thinkv::gpu_test
