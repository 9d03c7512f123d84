// gpu.h: one GPU of the driver, with its primary context, and memory mapped on it.
//
// The primary context is the one that the CUDA runtime (PyTorch, cudart) uses in the same process:
// our mappings are addresses in the kernels of the engine.
// Threads: any; mappings of one range must not overlap in time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/cuda/driver.h"
#include "thinkv/internal/device_uuid.h"
#include "thinkv/result.h"

namespace thinkv::cuda {

struct GpuInfo {
  DeviceOrdinal ordinal = 0;
  DeviceUuid uuid;
  std::string name;
  ComputeMode compute_mode = ComputeMode::kDefault;
};

// The GPU with this UUID, or the first one. No context is made.
// Errors: kNotFound (no such GPU in this process), kUnsupported (it cannot share memory between
// processes), kDeviceFailed.
[[nodiscard]] Result<GpuInfo> find_gpu(const Driver& driver, const std::optional<DeviceUuid>& uuid);

// The GPU that the engine uses on this thread: that of the current context, or, where there is none
// yet, the first one, as in the CUDA runtime. Errors: kUnsupported (no GPU), kDeviceFailed.
[[nodiscard]] Result<DeviceUuid> current_gpu(const Driver& driver);

// Holds the primary context of a GPU while it lives.
class Gpu {
 public:
  // Errors: kExhausted (no memory for a context), kDeviceFailed.
  [[nodiscard]] static Result<Gpu> open(const Driver& driver, GpuInfo info);
  Gpu(Gpu&& other) noexcept;
  Gpu& operator=(Gpu&& other) = delete;
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu();

  [[nodiscard]] const Driver& driver() const { return *driver_; }
  [[nodiscard]] const GpuInfo& info() const { return info_; }
  [[nodiscard]] ContextHandle context() const { return context_; }
  // What an extent is made of.
  [[nodiscard]] AllocationProperties extent_properties() const;
  // Sizes and addresses of mappings are multiples of it.
  [[nodiscard]] uint64_t granularity() const { return granularity_; }

  // Forgets the context without a call: in a forked child the driver must not be touched.
  void abandon() { context_ = nullptr; }

 private:
  Gpu(const Driver& driver, GpuInfo info, ContextHandle context)
      : driver_(&driver), info_(std::move(info)), context_(context) {}

  const Driver* driver_;
  GpuInfo info_;
  ContextHandle context_;
  uint64_t granularity_ = 0;
};

// Makes the GPU's context current on this thread, and the one before it at the end.
class ContextScope {
 public:
  explicit ContextScope(const Gpu& gpu);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;
  [[nodiscard]] const Status& status() const { return status_; }

 private:
  const Gpu& gpu_;
  Status status_;
};

// Maps all of `handle` at `address`, which lies in a reserved range with nothing mapped. On an
// error nothing is mapped. Requires: the context is current.
[[nodiscard]] Status map_memory(const Gpu& gpu, MemoryHandle handle, DevicePointer address,
                                uint64_t bytes, AccessFlags access);

}  // namespace thinkv::cuda
