// fake_libcuda_state.h: what the two halves of the fake driver share: its state, under one lock.
#pragma once

#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "tests/support/fake_libcuda.h"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace thinkv::test::fake_cuda {

inline constexpr int32_t kDevicesMax = 16;

struct Memory {  // of a handle
  int fd = -1;
  size_t bytes = 0;
  int32_t device = 0;
  bool created = false;  // counted against the device
};
struct Mapping {
  size_t bytes = 0;
  int32_t device = 0;  // whose memory it is
  cuda::AccessFlags access = cuda::AccessFlags::kNone;
};
struct Allocation {  // cuMemAlloc, cuMemHostAlloc
  size_t bytes = 0;
  int32_t device = 0;
  bool on_device = false;
};

struct State {
  std::recursive_mutex mutex;
  std::map<cuda::MemoryHandle, Memory> memories;
  std::map<cuda::DevicePointer, size_t> reservations;
  std::map<cuda::DevicePointer, Mapping> mappings;
  std::map<cuda::DevicePointer, Allocation> allocations;
  cuda::MemoryHandle last_handle = 0x1000;
  std::array<size_t, kDevicesMax> contexts_retained{};  // of each device
  bool initialised = false;
};
[[nodiscard]] State& state();

// Of this thread.
[[nodiscard]] std::vector<void*>& context_stack();

[[nodiscard]] inline size_t number_of(const char* variable, size_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 0);
}

[[nodiscard]] bool valid_device(int32_t device);

// A primary context is the number of its device, from 1.
[[nodiscard]] inline int32_t device_of(void* context) {
  return static_cast<int32_t>(reinterpret_cast<intptr_t>(context) - 1);
}
// Requires: enter(..., true) said yes.
[[nodiscard]] inline int32_t current_device() {
  return device_of(context_stack().back());
}

// What a call answers before it does anything: success, or why not.
[[nodiscard]] cuda::DriverResult enter(const char* name, bool needs_context);

#define FAKE_ENTER(name, needs_context)                                           \
  const std::lock_guard lock(::thinkv::test::fake_cuda::state().mutex);           \
  if (const auto refused = ::thinkv::test::fake_cuda::enter(name, needs_context); \
      refused != ::thinkv::cuda::kSuccess) {                                      \
    return refused;                                                               \
  }                                                                               \
  static_assert(true)

}  // namespace thinkv::test::fake_cuda
