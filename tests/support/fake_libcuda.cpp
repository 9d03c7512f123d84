// fake_libcuda.cpp: a libcuda.so.1 without a GPU, for tests on machines that have none.
//
// Memory of a device is a memfd that is full of 0xA5 (a real driver promises no zeros either),
// device pointers are host pointers, exporting gives a duplicate of the memfd and importing maps it
// again: so processes share memory as they do through the real driver. It checks what the real
// one checks: handles, ranges, double maps, a current context. Its GPUs are no peers: one may not
// map another's memory.
//   FAKE_CUDA_DEVICES=n            GPUs (2, at most 16)
//   FAKE_CUDA_VERSION=v            of the driver (12040)
//   FAKE_CUDA_BYTES=n              of each GPU (4 GiB), counted per process
//   FAKE_CUDA_RESERVE_MAX=n        longest range of addresses
//   FAKE_CUDA_COMPUTE_MODE=m       of every GPU (0)
//   FAKE_CUDA_FAIL=NAME:N:CODE     call number N of NAME, counted from the first call after this
//                                  variable changed, and every later one, answers CODE
// Threads: one lock around everything. This file: devices and contexts; fake_libcuda_memory.cpp:
// memory.
#include <cstdio>
#include <cstring>
#include <string>

#include "tests/support/fake_libcuda_state.h"

namespace fake = thinkv::test::fake_cuda;
using thinkv::cuda::DriverResult;

namespace {

constexpr DriverResult kOk = thinkv::cuda::kSuccess;
constexpr DriverResult kInvalid = thinkv::cuda::kErrorInvalidValue;

// The code that FAKE_CUDA_FAIL wants for this call of `name`, or success.
DriverResult wanted_failure(const char* name) {
  static std::string rule;
  static uint64_t calls = 0;
  const char* text = std::getenv("FAKE_CUDA_FAIL");
  if (text == nullptr) {
    rule.clear();
    return kOk;
  }
  if (rule != text) {
    rule = text;
    calls = 0;
  }
  const size_t first = rule.find(':');
  if (first == std::string::npos || rule.compare(0, first, name) != 0) return kOk;
  char* end = nullptr;
  const uint64_t from = std::strtoull(rule.c_str() + first + 1, &end, 10);
  ++calls;
  return calls >= from && *end == ':' ? static_cast<DriverResult>(std::strtol(end + 1, nullptr, 10))
                                      : kOk;
}

}  // namespace

namespace thinkv::test::fake_cuda {

State& state() {
  static State only;
  return only;
}

std::vector<void*>& context_stack() {
  thread_local std::vector<void*> stack;
  return stack;
}

bool valid_device(int32_t device) {
  return device >= 0 && device < kDevicesMax &&
         static_cast<size_t>(device) < number_of("FAKE_CUDA_DEVICES", 2);
}

DriverResult enter(const char* name, bool needs_context) {
  if (!state().initialised) return cuda::kErrorNotInitialized;
  if (needs_context && context_stack().empty()) return cuda::kErrorInvalidContext;
  return wanted_failure(name);
}

}  // namespace thinkv::test::fake_cuda

// What is still held in this process: for tests of leaks, and the proof that this library is
// loaded.
FAKE_EXPORT void fake_cuda_held(fake::Held* held) {
  const std::lock_guard lock(fake::state().mutex);
  fake::State& state = fake::state();
  size_t contexts = 0;
  for (const size_t retained : state.contexts_retained) contexts += retained;
  *held = {state.memories.size(),
           state.mappings.size(),
           state.reservations.size(),
           state.allocations.size(),
           contexts,
           fake::context_stack().size()};
}

FAKE_EXPORT DriverResult cuInit(unsigned flags) {
  const std::lock_guard lock(fake::state().mutex);
  if (flags != 0) return kInvalid;
  if (!fake::valid_device(0)) return thinkv::cuda::kErrorNoDevice;
  const DriverResult wanted = wanted_failure("cuInit");
  fake::state().initialised = wanted == kOk;
  return wanted;
}

FAKE_EXPORT DriverResult cuDriverGetVersion(int32_t* version) {
  *version = static_cast<int32_t>(fake::number_of("FAKE_CUDA_VERSION", 12040));
  return kOk;
}

FAKE_EXPORT DriverResult cuGetErrorName(DriverResult error, const char** text) {
  *text = error == kOk ? "CUDA_SUCCESS" : "CUDA_ERROR_FAKE";
  return kOk;
}

FAKE_EXPORT DriverResult cuGetErrorString(DriverResult error, const char** text) {
  *text = error == thinkv::cuda::kErrorOutOfMemory ? "out of memory" : "a fake error";
  return kOk;
}

FAKE_EXPORT DriverResult cuDeviceGetCount(int32_t* count) {
  FAKE_ENTER("cuDeviceGetCount", false);
  *count = static_cast<int32_t>(fake::number_of("FAKE_CUDA_DEVICES", 2));
  return kOk;
}

FAKE_EXPORT DriverResult cuDeviceGet(int32_t* device, int32_t index) {
  FAKE_ENTER("cuDeviceGet", false);
  if (!fake::valid_device(index)) return thinkv::cuda::kErrorInvalidDevice;
  *device = index;
  return kOk;
}

FAKE_EXPORT DriverResult cuDeviceGetName(char* name, int32_t bytes, int32_t device) {
  FAKE_ENTER("cuDeviceGetName", false);
  if (!fake::valid_device(device) || bytes <= 0) return kInvalid;
  std::snprintf(name, static_cast<size_t>(bytes), "Fake GPU %d", device);
  return kOk;
}

FAKE_EXPORT DriverResult cuDeviceGetUuid_v2(thinkv::cuda::DriverUuid* uuid, int32_t device) {
  FAKE_ENTER("cuDeviceGetUuid_v2", false);
  if (!fake::valid_device(device)) return thinkv::cuda::kErrorInvalidDevice;
  const thinkv::DeviceUuid of_device = fake::uuid_of(device);
  std::memcpy(uuid->bytes, of_device.bytes.data(), sizeof(uuid->bytes));
  return kOk;
}

FAKE_EXPORT DriverResult cuDeviceGetAttribute(int32_t* value,
                                              thinkv::cuda::DeviceAttribute attribute,
                                              int32_t device) {
  FAKE_ENTER("cuDeviceGetAttribute", false);
  if (!fake::valid_device(device)) return thinkv::cuda::kErrorInvalidDevice;
  switch (attribute) {
    case thinkv::cuda::DeviceAttribute::kComputeMode:
      *value = static_cast<int32_t>(fake::number_of("FAKE_CUDA_COMPUTE_MODE", 0));
      break;
    case thinkv::cuda::DeviceAttribute::kMultiprocessors:
      *value = 4;
      break;
    default:
      *value = 1;  // it can
  }
  return kOk;
}

FAKE_EXPORT DriverResult cuDevicePrimaryCtxRetain(void** context, int32_t device) {
  FAKE_ENTER("cuDevicePrimaryCtxRetain", false);
  if (!fake::valid_device(device)) return thinkv::cuda::kErrorInvalidDevice;
  ++fake::state().contexts_retained[static_cast<size_t>(device)];
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(device) + 1);
  return kOk;
}

FAKE_EXPORT DriverResult cuDevicePrimaryCtxRelease_v2(int32_t device) {
  FAKE_ENTER("cuDevicePrimaryCtxRelease_v2", false);
  if (!fake::valid_device(device)) return thinkv::cuda::kErrorInvalidDevice;
  size_t& retained = fake::state().contexts_retained[static_cast<size_t>(device)];
  if (retained == 0) return thinkv::cuda::kErrorInvalidContext;
  --retained;
  return kOk;
}

FAKE_EXPORT DriverResult cuCtxPushCurrent_v2(void* context) {
  FAKE_ENTER("cuCtxPushCurrent_v2", false);
  const int32_t device = fake::device_of(context);
  if (!fake::valid_device(device) ||
      fake::state().contexts_retained[static_cast<size_t>(device)] == 0) {
    return thinkv::cuda::kErrorInvalidContext;
  }
  fake::context_stack().push_back(context);
  return kOk;
}

FAKE_EXPORT DriverResult cuCtxPopCurrent_v2(void** context) {
  FAKE_ENTER("cuCtxPopCurrent_v2", true);
  *context = fake::context_stack().back();
  fake::context_stack().pop_back();
  return kOk;
}

FAKE_EXPORT DriverResult cuCtxGetDevice(int32_t* device) {
  FAKE_ENTER("cuCtxGetDevice", true);
  *device = fake::current_device();
  return kOk;
}

FAKE_EXPORT DriverResult cuStreamSynchronize(void* /*stream*/) {
  FAKE_ENTER("cuStreamSynchronize", true);
  return kOk;
}

FAKE_EXPORT DriverResult cuStreamIsCapturing(void* /*stream*/, int32_t* status) {
  FAKE_ENTER("cuStreamIsCapturing", true);
  *status = 0;
  return kOk;
}
