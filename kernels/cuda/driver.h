// driver.h: the CUDA driver, found when the program runs.
//
// libcuda.so.1 belongs to the kernel driver of a machine and is not there without one, so nothing
// links against it: one binary serves machines with and without a GPU.
// Threads: load() from any; the functions are as thread-safe as NVIDIA's. A forked child must not
// use a driver that its parent loaded.
#pragma once

#include "kernels/cuda/driver_types.h"
#include "thinkv/result.h"

namespace thinkv::cuda {

// The oldest driver that runs our kernels (sm_90 code of CUDA 12), as cuDriverGetVersion says it.
inline constexpr int32_t kDriverVersionMin = 12000;

struct Driver {
  // libcuda.so.1, opened and initialised once per process; later calls return the same, also the
  // same error. It stays loaded. Errors: as open_driver.
  [[nodiscard]] static Result<const Driver*> load();

  int32_t version = 0;  // 12040 is 12.4

  DriverResult (*init)(unsigned flags) = nullptr;
  DriverResult (*get_version)(int32_t* version) = nullptr;
  DriverResult (*get_error_name)(DriverResult error, const char** text) = nullptr;
  DriverResult (*get_error_string)(DriverResult error, const char** text) = nullptr;
  DriverResult (*device_get_count)(int32_t* count) = nullptr;
  DriverResult (*device_get)(DeviceOrdinal* device, int32_t index) = nullptr;
  DriverResult (*device_get_name)(char* name, int32_t bytes, DeviceOrdinal device) = nullptr;
  DriverResult (*device_get_uuid)(DriverUuid* uuid, DeviceOrdinal device) = nullptr;
  DriverResult (*device_get_attribute)(int32_t* value, DeviceAttribute attribute,
                                       DeviceOrdinal device) = nullptr;
  DriverResult (*primary_context_retain)(ContextHandle* context, DeviceOrdinal device) = nullptr;
  DriverResult (*primary_context_release)(DeviceOrdinal device) = nullptr;
  DriverResult (*context_push)(ContextHandle context) = nullptr;
  DriverResult (*context_pop)(ContextHandle* context) = nullptr;
  DriverResult (*context_get_device)(DeviceOrdinal* device) = nullptr;
  DriverResult (*stream_synchronize)(StreamHandle stream) = nullptr;
  DriverResult (*stream_is_capturing)(StreamHandle stream, int32_t* status) = nullptr;

  DriverResult (*mem_get_info)(size_t* free_bytes, size_t* total_bytes) = nullptr;
  DriverResult (*mem_get_granularity)(size_t* bytes, const AllocationProperties* properties,
                                      Granularity option) = nullptr;
  DriverResult (*mem_create)(MemoryHandle* handle, size_t bytes,
                             const AllocationProperties* properties,
                             unsigned long long flags) = nullptr;
  DriverResult (*mem_release)(MemoryHandle handle) = nullptr;
  DriverResult (*mem_export)(void* shareable, MemoryHandle handle, HandleType type,
                             unsigned long long flags) = nullptr;
  DriverResult (*mem_import)(MemoryHandle* handle, void* shareable, HandleType type) = nullptr;
  DriverResult (*mem_address_reserve)(DevicePointer* address, size_t bytes, size_t alignment,
                                      DevicePointer wanted, unsigned long long flags) = nullptr;
  DriverResult (*mem_address_free)(DevicePointer address, size_t bytes) = nullptr;
  DriverResult (*mem_map)(DevicePointer address, size_t bytes, size_t offset, MemoryHandle handle,
                          unsigned long long flags) = nullptr;
  DriverResult (*mem_unmap)(DevicePointer address, size_t bytes) = nullptr;
  DriverResult (*mem_set_access)(DevicePointer address, size_t bytes,
                                 const AccessDescriptor* access, size_t count) = nullptr;
  DriverResult (*memset_d8_async)(DevicePointer address, uint8_t value, size_t bytes,
                                  StreamHandle stream) = nullptr;
  DriverResult (*memset_d32_async)(DevicePointer address, uint32_t value, size_t words,
                                   StreamHandle stream) = nullptr;
  // Memory of this process alone. host_alloc: pinned, one address for host and device.
  DriverResult (*mem_alloc)(DevicePointer* address, size_t bytes) = nullptr;
  DriverResult (*mem_free)(DevicePointer address) = nullptr;
  DriverResult (*host_alloc)(void** address, size_t bytes, unsigned flags) = nullptr;
  DriverResult (*host_free)(void* address) = nullptr;
  DriverResult (*pointer_get_attribute)(void* value, int32_t attribute,
                                        DevicePointer address) = nullptr;
  DriverResult (*memcpy_to_device)(DevicePointer to, const void* from, size_t bytes) = nullptr;
  DriverResult (*memcpy_to_host)(void* to, DevicePointer from, size_t bytes) = nullptr;
};

// What load() does once, for any library file: opens it, resolves every function above, checks
// the version, initialises it, counts devices. Where the library itself cannot be used it is
// closed again. Error::what is a whole sentence in a buffer of the calling thread.
// Errors: kUnsupported (no libcuda, too old, no GPU: ThinKV on this machine means the host
// backend), kDeviceFailed (the driver is there and broken; os_error is its CUresult).
[[nodiscard]] Status open_driver(const char* library, Driver* driver);

// The Error of a driver call that failed: kExhausted where a later try may succeed (out of memory,
// out of descriptors), otherwise kDeviceFailed. os_error is the CUresult; Error::what names the
// call and the driver's words, in a buffer of the calling thread.
[[nodiscard]] Error driver_error(const Driver& driver, DriverResult result, const char* call);

// driver_error, or success. `call` is the name in NVIDIA's documentation.
[[nodiscard]] inline Status driver_status(const Driver& driver, DriverResult result,
                                          const char* call) {
  if (result == kSuccess) return {};
  return driver_error(driver, result, call);
}

// Whether the context that saw this error answers every later call with it, whatever the call:
// only a new process helps.
[[nodiscard]] bool is_sticky(DriverResult result);

// printf-style Error::what in a buffer of the calling thread, which the next one overwrites.
[[nodiscard, gnu::format(printf, 3, 4)]] Error describe_device(ErrorCode code, DriverResult result,
                                                               const char* format, ...);

}  // namespace thinkv::cuda
