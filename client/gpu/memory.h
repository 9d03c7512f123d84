// memory.h: device memory and pinned host memory of this process, outside the pool.
//
// Working memory of kernels and what host and device tell each other. Pinned memory has one
// address for both. Move-only; freed on destruction, in the process that made it.
// Threads: any. Requires: no kernel uses the memory any more when it is freed.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels/cuda/gpu.h"
#include "thinkv/result.h"

namespace thinkv::client {

class GpuMemory {
 public:
  enum class Place { kDevice, kPinnedHost };

  GpuMemory() = default;
  GpuMemory(GpuMemory&& other) noexcept { swap(other); }
  GpuMemory& operator=(GpuMemory&& other) noexcept {
    GpuMemory(std::move(other)).swap(*this);
    return *this;
  }
  ~GpuMemory();

  // Zeroed. Errors: kExhausted, kDeviceFailed.
  [[nodiscard]] static Result<GpuMemory> make(const cuda::Gpu& gpu, Place place, uint64_t bytes,
                                              const char* name);

  template <class T>
  [[nodiscard]] T* as() const {
    return reinterpret_cast<T*>(address_);
  }
  [[nodiscard]] uint64_t bytes() const { return bytes_; }

 private:
  void swap(GpuMemory& other) {
    std::swap(gpu_, other.gpu_);
    std::swap(place_, other.place_);
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
    std::swap(fork_generation_, other.fork_generation_);
  }

  const cuda::Gpu* gpu_ = nullptr;
  Place place_ = Place::kDevice;
  cuda::DevicePointer address_ = 0;
  uint64_t bytes_ = 0;
  uint64_t fork_generation_ = 0;
};

}  // namespace thinkv::client
