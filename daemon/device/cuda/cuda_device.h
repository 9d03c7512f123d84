// cuda_device.h: extents as allocations of a GPU, shared by descriptors (CUDA's VMM interface).
//
// The daemon keeps each allocation's handle and one exported descriptor, and no mapping: it maps a
// new extent once, to zero it. Memory lives as long as any handle, descriptor or mapping of it in
// any process, so it outlives this daemon wherever a client holds the descriptor.
// Threads: the event loop only, as every Device.
#pragma once

#include <memory>
#include <unordered_map>

#include "daemon/device/device.h"
#include "kernels/cuda/gpu.h"
#include "thinkv/internal/unique_fd.h"

namespace thinkv::device {

class CudaDevice final : public Device {
 public:
  // `driver` outlives the device. Errors: kExhausted, kDeviceFailed; os_error is the CUresult.
  [[nodiscard]] static Result<std::unique_ptr<CudaDevice>> open(const cuda::Driver& driver,
                                                                const cuda::GpuInfo& gpu);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  [[nodiscard]] const char* name() const override { return "cuda"; }
  [[nodiscard]] DeviceUuid uuid() const override { return gpu_.info().uuid; }
  // Also kInvalidArgument where `bytes` is not a multiple of granularity().
  [[nodiscard]] Status create_extent(ExtentId extent, uint64_t bytes) override;
  void release_extent(ExtentId extent) override;
  [[nodiscard]] Result<int> export_fd(ExtentId extent) const override;
  [[nodiscard]] Result<Capacity> capacity() const override;

  [[nodiscard]] uint64_t granularity() const { return gpu_.granularity(); }

 private:
  struct Extent {
    cuda::MemoryHandle handle = 0;
    UniqueFd fd;
  };

  explicit CudaDevice(cuda::Gpu gpu) : gpu_(std::move(gpu)) {}

  // Zeroes and exports the new allocation.
  [[nodiscard]] Result<UniqueFd> prepare(cuda::MemoryHandle handle, uint64_t bytes);
  [[nodiscard]] Status zero(cuda::MemoryHandle handle, uint64_t bytes);
  [[nodiscard]] Result<UniqueFd> export_handle(cuda::MemoryHandle handle);
  void release(cuda::MemoryHandle handle);

  cuda::Gpu gpu_;
  std::unordered_map<ExtentId, Extent> extents_;
};

}  // namespace thinkv::device
