// fake_libcuda.h: what tests know of the fake driver (fake_libcuda.cpp), and how they ask it.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

#include "kernels/cuda/driver_types.h"
#include "thinkv/internal/device_uuid.h"

namespace thinkv::test::fake_cuda {

inline constexpr uint8_t kGarbage = 0xA5;  // in new memory

struct Held {
  size_t memories = 0;
  size_t mappings = 0;
  size_t reservations = 0;
  size_t allocations = 0;    // cuMemAlloc and cuMemHostAlloc
  size_t contexts = 0;       // retained
  size_t context_stack = 0;  // of this thread
  friend bool operator==(const Held&, const Held&) = default;
};

[[nodiscard]] inline DeviceUuid uuid_of(int32_t device) {
  DeviceUuid uuid;
  uuid.bytes = {0xFA, 0xCE, 0, 0, 0xC0, 0xDE};
  uuid.bytes[15] = static_cast<uint8_t>(device + 1);
  return uuid;
}

// What this process holds of the fake driver. nullopt: it is not the driver that is loaded.
[[nodiscard]] inline std::optional<Held> held() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::nullopt;
  void* found = ::dlsym(library, "fake_cuda_held");
  std::optional<Held> held;
  if (found != nullptr) {
    void (*ask)(Held*) = nullptr;
    std::memcpy(&ask, &found, sizeof(ask));
    ask(&held.emplace());
  }
  ::dlclose(library);
  return held;
}

}  // namespace thinkv::test::fake_cuda
