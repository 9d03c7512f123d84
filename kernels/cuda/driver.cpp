#include "kernels/cuda/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace thinkv::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr size_t kTextMax = 240;

thread_local char text_of_thread[kTextMax];

// Looks functions up until one is missing.
class Symbols {
 public:
  explicit Symbols(void* library) : library_(library) {}

  template <class Function>
  void find(const char* name, Function** out) {
    if (missing_ != nullptr) return;
    void* found = ::dlsym(library_, name);
    if (found == nullptr) {
      missing_ = name;
      return;
    }
    // ISO C++ has no cast from an object's address to a function's; POSIX promises that the bits
    // are the same.
    static_assert(sizeof(found) == sizeof(*out));
    std::memcpy(out, &found, sizeof(found));
  }
  [[nodiscard]] const char* missing() const { return missing_; }

 private:
  void* library_;
  const char* missing_ = nullptr;
};

// cuda.h gives several functions new names by macro (cuMemGetInfo is cuMemGetInfo_v2): the old
// names are still exported and mean 32-bit interfaces, or UUIDs that do not know MIG.
void find_device_functions(Symbols& symbols, Driver* driver) {
  symbols.find("cuInit", &driver->init);
  symbols.find("cuDriverGetVersion", &driver->get_version);
  symbols.find("cuGetErrorName", &driver->get_error_name);
  symbols.find("cuGetErrorString", &driver->get_error_string);
  symbols.find("cuDeviceGetCount", &driver->device_get_count);
  symbols.find("cuDeviceGet", &driver->device_get);
  symbols.find("cuDeviceGetName", &driver->device_get_name);
  symbols.find("cuDeviceGetUuid_v2", &driver->device_get_uuid);
  symbols.find("cuDeviceGetAttribute", &driver->device_get_attribute);
  symbols.find("cuDevicePrimaryCtxRetain", &driver->primary_context_retain);
  symbols.find("cuDevicePrimaryCtxRelease_v2", &driver->primary_context_release);
  symbols.find("cuCtxPushCurrent_v2", &driver->context_push);
  symbols.find("cuCtxPopCurrent_v2", &driver->context_pop);
  symbols.find("cuCtxGetDevice", &driver->context_get_device);
  symbols.find("cuStreamSynchronize", &driver->stream_synchronize);
  symbols.find("cuStreamIsCapturing", &driver->stream_is_capturing);
}

void find_memory_functions(Symbols& symbols, Driver* driver) {
  symbols.find("cuMemGetInfo_v2", &driver->mem_get_info);
  symbols.find("cuMemGetAllocationGranularity", &driver->mem_get_granularity);
  symbols.find("cuMemCreate", &driver->mem_create);
  symbols.find("cuMemRelease", &driver->mem_release);
  symbols.find("cuMemExportToShareableHandle", &driver->mem_export);
  symbols.find("cuMemImportFromShareableHandle", &driver->mem_import);
  symbols.find("cuMemAddressReserve", &driver->mem_address_reserve);
  symbols.find("cuMemAddressFree", &driver->mem_address_free);
  symbols.find("cuMemMap", &driver->mem_map);
  symbols.find("cuMemUnmap", &driver->mem_unmap);
  symbols.find("cuMemSetAccess", &driver->mem_set_access);
  symbols.find("cuMemsetD8Async", &driver->memset_d8_async);
  symbols.find("cuMemsetD32Async", &driver->memset_d32_async);
  symbols.find("cuMemAlloc_v2", &driver->mem_alloc);
  symbols.find("cuMemFree_v2", &driver->mem_free);
  symbols.find("cuMemHostAlloc", &driver->host_alloc);
  symbols.find("cuMemFreeHost", &driver->host_free);
  symbols.find("cuPointerGetAttribute", &driver->pointer_get_attribute);
  symbols.find("cuMemcpyHtoD_v2", &driver->memcpy_to_device);
  symbols.find("cuMemcpyDtoH_v2", &driver->memcpy_to_host);
}

const char* words_for(const Driver& driver, DriverResult result) {
  const char* text = nullptr;
  if (driver.get_error_string(result, &text) != kSuccess || text == nullptr) {
    return "an error this driver has no words for";
  }
  return text;
}

Error no_gpu() {
  return describe_device(ErrorCode::kUnsupported, kErrorNoDevice,
                         "the NVIDIA driver finds no GPU (is one built in, not hidden by "
                         "CUDA_VISIBLE_DEVICES, and may this user open /dev/nvidia0?)");
}

Status check_version(Driver* driver) {
  if (const DriverResult result = driver->get_version(&driver->version); result != kSuccess) {
    return driver_error(*driver, result, "cuDriverGetVersion");
  }
  if (driver->version >= kDriverVersionMin) return {};
  return describe_device(ErrorCode::kUnsupported, 0,
                         "the NVIDIA driver supports CUDA %d.%d, ThinKV needs %d.%d or newer: "
                         "update the driver",
                         driver->version / 1000, driver->version % 1000 / 10,
                         kDriverVersionMin / 1000, kDriverVersionMin % 1000 / 10);
}

Status initialise(const Driver& driver) {
  const DriverResult result = driver.init(0);
  if (result == kErrorNoDevice) return no_gpu();
  if (result != kSuccess) return driver_error(driver, result, "cuInit");
  int32_t count = 0;
  THINKV_TRY(driver_status(driver, driver.device_get_count(&count), "cuDeviceGetCount"));
  if (count <= 0) return no_gpu();
  return {};
}

// An Error whose text lives as long as the process. Only load() uses it, once.
Error keep_for_ever(const Error& error) {
  static char text[kTextMax];
  std::snprintf(text, sizeof(text), "%s", error.what);
  Error kept = error;
  kept.what = text;
  return kept;
}

}  // namespace

Error describe_device(ErrorCode code, DriverResult result, const char* format, ...) {
  // Through a local: the arguments may point into the buffer that is about to be written.
  char text[kTextMax];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  std::memcpy(text_of_thread, text, sizeof(text_of_thread));
  return make_error(code, text_of_thread, result);
}

Error driver_error(const Driver& driver, DriverResult result, const char* call) {
  // Descriptors run out inside the driver as an error of the operating system.
  const bool later = result == kErrorOutOfMemory || result == kErrorOperatingSystem;
  return describe_device(later ? ErrorCode::kExhausted : ErrorCode::kDeviceFailed, result,
                         "%s: %s (CUDA error %d)%s", call, words_for(driver, result), result,
                         is_sticky(result) ? "; the context is lost: restart this process" : "");
}

bool is_sticky(DriverResult result) {
  // Beside those with names: NVLINK_UNCORRECTABLE, CONTAINED, LAUNCH_TIMEOUT, CONTEXT_IS_DESTROYED,
  // ASSERT, HARDWARE_STACK_ERROR to INVALID_PC, MPS_CLIENT_TERMINATED.
  constexpr std::array kSticky = {kErrorEccUncorrectable,
                                  220,
                                  226,
                                  kErrorIllegalAddress,
                                  702,
                                  709,
                                  710,
                                  714,
                                  715,
                                  716,
                                  717,
                                  718,
                                  kErrorLaunchFailed,
                                  810};
  return std::find(kSticky.begin(), kSticky.end(), result) != kSticky.end();
}

Status open_driver(const char* library, Driver* driver) {
  void* opened = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) {
    return describe_device(ErrorCode::kUnsupported, 0,
                           "no CUDA driver on this machine: %s cannot be loaded (install the "
                           "NVIDIA driver, or use the host backend)",
                           library);
  }
  Symbols symbols(opened);
  find_device_functions(symbols, driver);
  find_memory_functions(symbols, driver);
  if (symbols.missing() != nullptr) {
    ::dlclose(opened);
    return describe_device(ErrorCode::kUnsupported, 0,
                           "the NVIDIA driver is too old: %s has no %s; ThinKV needs a driver for "
                           "CUDA %d.%d or newer",
                           library, symbols.missing(), kDriverVersionMin / 1000,
                           kDriverVersionMin % 1000 / 10);
  }
  THINKV_TRY(check_version(driver));
  return initialise(*driver);
}

Result<const Driver*> Driver::load() {
  static Driver driver;
  // A local static: the first caller opens, others wait for it.
  static const Status loaded = [] {
    const Status opened = open_driver(kLibrary, &driver);
    return opened ? opened : Status(keep_for_ever(opened.error()));
  }();
  if (!loaded) return loaded.error();
  return &driver;
}

}  // namespace thinkv::cuda
