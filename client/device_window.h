// device_window.h: where the extents of a pool on a GPU lie in this process's device addresses.
//
// One range of addresses is reserved for all extents that a pool can have, in steps of the extent's
// size, and extent i is mapped at base + i x extent_bytes. So a page's address is arithmetic on its
// id and kernels need no table. Reserving costs no memory.
// Threads: map() under the session's mutex; everything else from any, for extents that were mapped
// before. A forked child must not touch it: CUDA does not survive a fork.
#pragma once

#include <bitset>
#include <cstdint>
#include <memory>

#include "client/mapped_range.h"
#include "kernels/cuda/gpu.h"
#include "thinkv/internal/device_uuid.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::client {

class DeviceWindow {
 public:
  struct Options {
    DeviceUuid device = {};
    uint64_t extent_bytes = 0;
    uint32_t extents_min = 1;  // fewer are of no use: the extents of the pool
  };

  // Reserves addresses for limits::kExtentsMax extents, or for as many as can be had.
  // Errors: kUnsupported (the GPU is not visible in this process), kInvalidArgument (sizes),
  // kExhausted, kDeviceFailed; os_error is the CUresult.
  [[nodiscard]] static Result<std::unique_ptr<DeviceWindow>> open(const cuda::Driver& driver,
                                                                  const Options& options);
  ~DeviceWindow();
  DeviceWindow(const DeviceWindow&) = delete;
  DeviceWindow& operator=(const DeviceWindow&) = delete;

  // Maps the memory behind `fd` as this extent, instead of what was there. No kernel may be using
  // the old memory. After an error nothing is mapped there. `access` guards against our own
  // mistakes only: the exporter cannot force it.
  // Errors: kUnavailable (no such extent), kExhausted, kDeviceFailed.
  [[nodiscard]] Status map(ExtentId extent, int fd, Access access);

  [[nodiscard]] bool mapped(ExtentId extent) const {
    return extent.value() < extents_ && mapped_[extent.value()];
  }
  [[nodiscard]] cuda::DevicePointer base() const { return base_; }
  [[nodiscard]] uint64_t extent_bytes() const { return extent_bytes_; }
  [[nodiscard]] uint32_t extents() const { return extents_; }
  // Requires: mapped(extent).
  [[nodiscard]] cuda::DevicePointer address(ExtentId extent) const {
    return base_ + extent.value() * extent_bytes_;
  }
  // What kernels compute from `page.raw()`. Requires: mapped(page.extent()).
  [[nodiscard]] cuda::DevicePointer address(PageId page, uint32_t page_bytes) const {
    return address(page.extent()) + uint64_t{page.index()} * page_bytes;
  }
  [[nodiscard]] const cuda::Gpu& gpu() const { return gpu_; }

 private:
  DeviceWindow(cuda::Gpu gpu, uint64_t extent_bytes);
  [[nodiscard]] Status reserve(uint32_t extents_min);
  [[nodiscard]] Status unmap(ExtentId extent);

  cuda::Gpu gpu_;
  uint64_t extent_bytes_;
  uint64_t fork_generation_;
  cuda::DevicePointer base_ = 0;
  uint32_t extents_ = 0;  // with reserved addresses
  std::bitset<limits::kExtentsMax> mapped_;
};

}  // namespace thinkv::client
