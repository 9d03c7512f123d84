// Our declarations of the driver's types against NVIDIA's own: compiled where cuda.h exists.
#include <cuda.h>
#include <gtest/gtest.h>

#include <type_traits>

#include "kernels/cuda/driver_types.h"

namespace thinkv::cuda {
namespace {

#define SAME_VALUE(ours, theirs) static_assert(static_cast<long long>(ours) == (theirs))
#define SAME_FIELD(ours, our_field, theirs, their_field)                     \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field)); \
  static_assert(sizeof(ours::our_field) == sizeof(theirs::their_field))

static_assert(sizeof(DriverResult) == sizeof(CUresult));
static_assert(std::is_same_v<DeviceOrdinal, CUdevice>);
static_assert(sizeof(DevicePointer) == sizeof(CUdeviceptr) && std::is_unsigned_v<CUdeviceptr>);
static_assert(sizeof(ContextHandle) == sizeof(CUcontext));
static_assert(sizeof(StreamHandle) == sizeof(CUstream));
static_assert(std::is_same_v<MemoryHandle, CUmemGenericAllocationHandle>);
static_assert(sizeof(DriverUuid) == sizeof(CUuuid));

SAME_VALUE(kSuccess, CUDA_SUCCESS);
SAME_VALUE(kErrorInvalidValue, CUDA_ERROR_INVALID_VALUE);
SAME_VALUE(kErrorOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(kErrorNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
SAME_VALUE(kErrorNoDevice, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(kErrorInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
SAME_VALUE(kErrorInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
SAME_VALUE(kErrorEccUncorrectable, CUDA_ERROR_ECC_UNCORRECTABLE);
SAME_VALUE(kErrorOperatingSystem, CUDA_ERROR_OPERATING_SYSTEM);
SAME_VALUE(kErrorIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
SAME_VALUE(kErrorLaunchFailed, CUDA_ERROR_LAUNCH_FAILED);
SAME_VALUE(kErrorUnknown, CUDA_ERROR_UNKNOWN);

SAME_VALUE(DeviceAttribute::kMultiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME_VALUE(DeviceAttribute::kComputeMode, CU_DEVICE_ATTRIBUTE_COMPUTE_MODE);
SAME_VALUE(DeviceAttribute::kVirtualMemoryManagement,
           CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME_VALUE(DeviceAttribute::kPosixFdHandles,
           CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
SAME_VALUE(ComputeMode::kDefault, CU_COMPUTEMODE_DEFAULT);
SAME_VALUE(ComputeMode::kProhibited, CU_COMPUTEMODE_PROHIBITED);
SAME_VALUE(ComputeMode::kExclusiveProcess, CU_COMPUTEMODE_EXCLUSIVE_PROCESS);
SAME_VALUE(LocationType::kDevice, CU_MEM_LOCATION_TYPE_DEVICE);
SAME_VALUE(AllocationType::kPinned, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME_VALUE(HandleType::kPosixFd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
SAME_VALUE(AccessFlags::kNone, CU_MEM_ACCESS_FLAGS_PROT_NONE);
SAME_VALUE(AccessFlags::kRead, CU_MEM_ACCESS_FLAGS_PROT_READ);
SAME_VALUE(AccessFlags::kReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME_VALUE(Granularity::kMinimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
SAME_VALUE(Granularity::kRecommended, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);

static_assert(sizeof(MemoryLocation) == sizeof(CUmemLocation));
SAME_FIELD(MemoryLocation, type, CUmemLocation, type);
SAME_FIELD(MemoryLocation, id, CUmemLocation, id);
static_assert(sizeof(AllocationProperties) == sizeof(CUmemAllocationProp));
SAME_FIELD(AllocationProperties, type, CUmemAllocationProp, type);
SAME_FIELD(AllocationProperties, requested_handles, CUmemAllocationProp, requestedHandleTypes);
SAME_FIELD(AllocationProperties, location, CUmemAllocationProp, location);
SAME_FIELD(AllocationProperties, win32_metadata, CUmemAllocationProp, win32HandleMetaData);
SAME_FIELD(AllocationProperties, compression, CUmemAllocationProp, allocFlags.compressionType);
SAME_FIELD(AllocationProperties, gpu_direct_rdma, CUmemAllocationProp,
           allocFlags.gpuDirectRDMACapable);
SAME_FIELD(AllocationProperties, usage, CUmemAllocationProp, allocFlags.usage);
static_assert(sizeof(AccessDescriptor) == sizeof(CUmemAccessDesc));
SAME_FIELD(AccessDescriptor, location, CUmemAccessDesc, location);
SAME_FIELD(AccessDescriptor, flags, CUmemAccessDesc, flags);

#define THINKV_STRING_INNER(name) #name
#define THINKV_STRING(name) THINKV_STRING_INNER(name)

// The names that driver.cpp looks up are those that cuda.h gives its functions by macro.
TEST(CudaDriverTypes, VersionedNamesAreThoseOfTheHeader) {
  EXPECT_STREQ(THINKV_STRING(cuMemGetInfo), "cuMemGetInfo_v2");
  EXPECT_STREQ(THINKV_STRING(cuDeviceGetUuid), "cuDeviceGetUuid_v2");
  EXPECT_STREQ(THINKV_STRING(cuDevicePrimaryCtxRelease), "cuDevicePrimaryCtxRelease_v2");
  EXPECT_STREQ(THINKV_STRING(cuCtxPushCurrent), "cuCtxPushCurrent_v2");
  EXPECT_STREQ(THINKV_STRING(cuCtxPopCurrent), "cuCtxPopCurrent_v2");
  EXPECT_STREQ(THINKV_STRING(cuCtxGetDevice), "cuCtxGetDevice");
  EXPECT_STREQ(THINKV_STRING(cuMemcpyHtoD), "cuMemcpyHtoD_v2");
  EXPECT_STREQ(THINKV_STRING(cuMemcpyDtoH), "cuMemcpyDtoH_v2");
  EXPECT_STREQ(THINKV_STRING(cuMemAlloc), "cuMemAlloc_v2");
  EXPECT_STREQ(THINKV_STRING(cuMemFree), "cuMemFree_v2");
  EXPECT_STREQ(THINKV_STRING(cuMemHostAlloc), "cuMemHostAlloc");
  EXPECT_STREQ(THINKV_STRING(cuMemCreate), "cuMemCreate");
  EXPECT_STREQ(THINKV_STRING(cuMemMap), "cuMemMap");
}

}  // namespace
}  // namespace thinkv::cuda
