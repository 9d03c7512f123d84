// driver_types.h: the types of the CUDA driver's interface that we use, declared by ourselves.
//
// With them libcuda can be used where no CUDA toolkit is installed: in every build, on every
// machine. Values and layouts are those of cuda.h of CUDA 12 and 13, which NVIDIA keeps stable;
// tests/unit/cuda_driver_types_test.cpp compares them where cuda.h exists.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thinkv::cuda {

// CUresult. An enum of NVIDIA's has more values than we name, so it is a number here.
using DriverResult = int32_t;
inline constexpr DriverResult kSuccess = 0;
inline constexpr DriverResult kErrorInvalidValue = 1;
inline constexpr DriverResult kErrorOutOfMemory = 2;
inline constexpr DriverResult kErrorNotInitialized = 3;
inline constexpr DriverResult kErrorStubLibrary = 34;
inline constexpr DriverResult kErrorDeviceUnavailable = 46;
inline constexpr DriverResult kErrorNoDevice = 100;
inline constexpr DriverResult kErrorInvalidDevice = 101;
inline constexpr DriverResult kErrorInvalidContext = 201;
inline constexpr DriverResult kErrorEccUncorrectable = 214;
inline constexpr DriverResult kErrorOperatingSystem = 304;
inline constexpr DriverResult kErrorInvalidHandle = 400;
inline constexpr DriverResult kErrorIllegalAddress = 700;
inline constexpr DriverResult kErrorLaunchFailed = 719;
inline constexpr DriverResult kErrorSystemDriverMismatch = 803;
inline constexpr DriverResult kErrorUnknown = 999;

using DeviceOrdinal = int32_t;            // CUdevice
using DevicePointer = uint64_t;           // CUdeviceptr
using ContextHandle = void*;              // CUcontext
using StreamHandle = void*;               // CUstream; null is the context's default stream
using MemoryHandle = unsigned long long;  // CUmemGenericAllocationHandle

struct DriverUuid {  // CUuuid
  char bytes[16];
};

enum class DeviceAttribute : int32_t {
  kMultiprocessors = 16,
  kComputeMode = 20,
  kVirtualMemoryManagement = 102,
  kPosixFdHandles = 103,
};
enum class ComputeMode : int32_t { kDefault = 0, kProhibited = 2, kExclusiveProcess = 3 };

enum class LocationType : int32_t { kDevice = 1 };
enum class AllocationType : int32_t { kPinned = 1 };
enum class HandleType : int32_t { kPosixFd = 1 };
enum class AccessFlags : int32_t { kNone = 0, kRead = 1, kReadWrite = 3 };
enum class Granularity : int32_t { kMinimum = 0, kRecommended = 1 };

struct MemoryLocation {  // CUmemLocation
  LocationType type;
  int32_t id;
};
static_assert(sizeof(MemoryLocation) == 8);

struct AllocationProperties {  // CUmemAllocationProp
  AllocationType type;
  HandleType requested_handles;
  MemoryLocation location;
  void* win32_metadata;
  uint8_t compression;
  uint8_t gpu_direct_rdma;
  uint16_t usage;
  uint8_t reserved[4];
};
static_assert(sizeof(AllocationProperties) == 32);
static_assert(offsetof(AllocationProperties, win32_metadata) == 16);

struct AccessDescriptor {  // CUmemAccessDesc
  MemoryLocation location;
  AccessFlags flags;
};
static_assert(sizeof(AccessDescriptor) == 12);

}  // namespace thinkv::cuda
