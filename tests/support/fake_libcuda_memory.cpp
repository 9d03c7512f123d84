// fake_libcuda_memory.cpp: the memory of the fake driver (see fake_libcuda.cpp).
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#include "tests/support/fake_libcuda_state.h"

namespace fake = thinkv::test::fake_cuda;
using fake::Allocation;
using fake::Mapping;
using thinkv::cuda::AccessDescriptor;
using thinkv::cuda::AccessFlags;
using thinkv::cuda::AllocationProperties;
using thinkv::cuda::DevicePointer;
using thinkv::cuda::DriverResult;
using thinkv::cuda::MemoryHandle;

namespace {

constexpr size_t kGranularity = size_t{2} << 20;
constexpr DriverResult kOk = thinkv::cuda::kSuccess;
constexpr DriverResult kInvalid = thinkv::cuda::kErrorInvalidValue;

size_t device_bytes() {
  return fake::number_of("FAKE_CUDA_BYTES", size_t{4} << 30);
}

size_t used_bytes(int32_t device) {
  size_t used = 0;
  for (const auto& [handle, memory] : fake::state().memories)
    used += memory.created && memory.device == device ? memory.bytes : 0;
  return used;
}

// Memory of a device goes from process to process by its descriptor alone, so the device is in the
// memfd's name.
constexpr char kMemfdName[] = "fake-cuda-";

// -1: not ours. The link reads "/memfd:NAME (deleted)".
int32_t device_of_memfd(int fd) {
  char link[128] = {};
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (::readlink(path.c_str(), link, sizeof(link) - 1) < 0) return -1;
  const char* found = std::strstr(link, kMemfdName);
  return found == nullptr
             ? -1
             : static_cast<int32_t>(std::strtol(found + sizeof(kMemfdName) - 1, nullptr, 10));
}

void* host(DevicePointer address) {
  return reinterpret_cast<void*>(address);
}

bool inside_reservation(DevicePointer address, size_t bytes) {
  auto after = fake::state().reservations.upper_bound(address);
  if (after == fake::state().reservations.begin()) return false;
  const auto& [start, length] = *std::prev(after);
  return address - start < length && bytes <= length - (address - start);
}

// The mapping that holds all of the range, or null.
const Mapping* mapping_of(DevicePointer address, size_t bytes) {
  auto after = fake::state().mappings.upper_bound(address);
  if (after == fake::state().mappings.begin()) return nullptr;
  const auto& [start, mapping] = *std::prev(after);
  const bool inside = address - start < mapping.bytes && bytes <= mapping.bytes - (address - start);
  return inside ? &mapping : nullptr;
}

bool overlaps_mapping(DevicePointer address, size_t bytes) {
  for (const auto& [start, mapping] : fake::state().mappings) {
    if (address < start + mapping.bytes && start < address + bytes) return true;
  }
  return false;
}

bool fill_with_garbage(int fd, size_t bytes) {
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return false;
  std::memset(data, fake::kGarbage, bytes);
  ::munmap(data, bytes);
  return true;
}

// The allocation that holds all of the range, or null.
const Allocation* allocation_of(DevicePointer address, size_t bytes) {
  auto after = fake::state().allocations.upper_bound(address);
  if (after == fake::state().allocations.begin()) return nullptr;
  const auto& [start, allocation] = *std::prev(after);
  const size_t offset = address - start;
  return offset < allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}

// Whether a device copy may touch the range.
bool accessible(DevicePointer address, size_t bytes, bool write) {
  if (const Mapping* mapping = mapping_of(address, bytes); mapping != nullptr) {
    return mapping->access == AccessFlags::kReadWrite ||
           (!write && mapping->access == AccessFlags::kRead);
  }
  const Allocation* allocation = allocation_of(address, bytes);
  return allocation != nullptr;
}

// Memory of this process alone.
// Requires: a current context.
DriverResult allocate(DevicePointer* address, size_t bytes, bool on_device) {
  constexpr size_t kAlignment = 512;
  // No GPU has more, and the address sanitizer ends a process that asks for much more.
  constexpr size_t kMost = size_t{1} << 38;
  if (bytes == 0) return kInvalid;
  if (bytes > kMost) return thinkv::cuda::kErrorOutOfMemory;
  void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (data == nullptr) return thinkv::cuda::kErrorOutOfMemory;
  std::memset(data, fake::kGarbage, bytes);
  *address = reinterpret_cast<DevicePointer>(data);
  fake::state().allocations[*address] = {bytes, fake::current_device(), on_device};
  return kOk;
}

DriverResult deallocate(DevicePointer address, bool on_device) {
  const auto found = fake::state().allocations.find(address);
  if (found == fake::state().allocations.end() || found->second.on_device != on_device) {
    return kInvalid;
  }
  std::free(host(address));
  fake::state().allocations.erase(found);
  return kOk;
}

}  // namespace

FAKE_EXPORT DriverResult cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  FAKE_ENTER("cuMemGetInfo_v2", true);
  *total_bytes = device_bytes();
  *free_bytes = *total_bytes - std::min(*total_bytes, used_bytes(fake::current_device()));
  return kOk;
}

FAKE_EXPORT DriverResult cuMemGetAllocationGranularity(size_t* bytes,
                                                       const AllocationProperties* properties,
                                                       thinkv::cuda::Granularity /*option*/) {
  FAKE_ENTER("cuMemGetAllocationGranularity", false);
  if (!fake::valid_device(properties->location.id)) return thinkv::cuda::kErrorInvalidDevice;
  *bytes = kGranularity;
  return kOk;
}

FAKE_EXPORT DriverResult cuMemCreate(MemoryHandle* handle, size_t bytes,
                                     const AllocationProperties* properties,
                                     unsigned long long flags) {
  FAKE_ENTER("cuMemCreate", false);
  if (flags != 0 || bytes == 0 || bytes % kGranularity != 0 ||
      properties->type != thinkv::cuda::AllocationType::kPinned ||
      properties->requested_handles != thinkv::cuda::HandleType::kPosixFd ||
      properties->location.type != thinkv::cuda::LocationType::kDevice ||
      !fake::valid_device(properties->location.id)) {
    return kInvalid;
  }
  const int32_t device = properties->location.id;
  if (bytes > device_bytes() - std::min(device_bytes(), used_bytes(device))) {
    return thinkv::cuda::kErrorOutOfMemory;
  }
  const int fd = ::memfd_create((kMemfdName + std::to_string(device)).c_str(), MFD_CLOEXEC);
  if (fd < 0) return thinkv::cuda::kErrorOperatingSystem;
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0 || !fill_with_garbage(fd, bytes)) {
    ::close(fd);
    return thinkv::cuda::kErrorOutOfMemory;
  }
  *handle = ++fake::state().last_handle;
  fake::state().memories[*handle] = {fd, bytes, device, true};
  return kOk;
}

FAKE_EXPORT DriverResult cuMemRelease(MemoryHandle handle) {
  FAKE_ENTER("cuMemRelease", false);
  const auto found = fake::state().memories.find(handle);
  if (found == fake::state().memories.end()) return kInvalid;
  ::close(found->second.fd);
  fake::state().memories.erase(found);
  return kOk;
}

// Without close-on-exec, as nobody promises it.
FAKE_EXPORT DriverResult cuMemExportToShareableHandle(void* shareable, MemoryHandle handle,
                                                      thinkv::cuda::HandleType type,
                                                      unsigned long long flags) {
  FAKE_ENTER("cuMemExportToShareableHandle", false);
  const auto found = fake::state().memories.find(handle);
  if (found == fake::state().memories.end() || flags != 0 ||
      type != thinkv::cuda::HandleType::kPosixFd) {
    return kInvalid;
  }
  const int copy = ::dup(found->second.fd);
  if (copy < 0) return thinkv::cuda::kErrorOperatingSystem;
  std::memcpy(shareable, &copy, sizeof(copy));
  return kOk;
}

FAKE_EXPORT DriverResult cuMemImportFromShareableHandle(MemoryHandle* handle, void* shareable,
                                                        thinkv::cuda::HandleType type) {
  FAKE_ENTER("cuMemImportFromShareableHandle", false);
  const int fd = static_cast<int>(reinterpret_cast<intptr_t>(shareable));
  struct stat info {};
  if (type != thinkv::cuda::HandleType::kPosixFd || ::fstat(fd, &info) != 0 ||
      !S_ISREG(info.st_mode)) {
    return kInvalid;
  }
  const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return thinkv::cuda::kErrorOperatingSystem;
  *handle = ++fake::state().last_handle;
  fake::state().memories[*handle] = {copy, static_cast<size_t>(info.st_size), device_of_memfd(copy),
                                     false};
  return kOk;
}

FAKE_EXPORT DriverResult cuMemAddressReserve(DevicePointer* address, size_t bytes, size_t alignment,
                                             DevicePointer wanted, unsigned long long flags) {
  FAKE_ENTER("cuMemAddressReserve", false);
  if (bytes == 0 || bytes % kGranularity != 0 || alignment != 0 || wanted != 0 || flags != 0) {
    return kInvalid;
  }
  if (bytes > fake::number_of("FAKE_CUDA_RESERVE_MAX", SIZE_MAX))
    return thinkv::cuda::kErrorOutOfMemory;
  // Longer by one granule, so that an aligned range lies inside; the rest is left unused.
  void* data = ::mmap(nullptr, bytes + kGranularity, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return thinkv::cuda::kErrorOutOfMemory;
  const auto start = reinterpret_cast<DevicePointer>(data);
  *address = (start + kGranularity - 1) / kGranularity * kGranularity;
  ::munmap(data, *address - start);
  ::munmap(host(*address + bytes), kGranularity - (*address - start));
  fake::state().reservations[*address] = bytes;
  return kOk;
}

FAKE_EXPORT DriverResult cuMemAddressFree(DevicePointer address, size_t bytes) {
  FAKE_ENTER("cuMemAddressFree", false);
  const auto found = fake::state().reservations.find(address);
  if (found == fake::state().reservations.end() || found->second != bytes ||
      overlaps_mapping(address, bytes)) {
    return kInvalid;
  }
  ::munmap(host(address), bytes);
  fake::state().reservations.erase(found);
  return kOk;
}

FAKE_EXPORT DriverResult cuMemMap(DevicePointer address, size_t bytes, size_t offset,
                                  MemoryHandle handle, unsigned long long flags) {
  FAKE_ENTER("cuMemMap", false);
  const auto found = fake::state().memories.find(handle);
  if (found == fake::state().memories.end() || flags != 0 || offset != 0 ||
      found->second.bytes != bytes || address % kGranularity != 0 ||
      !inside_reservation(address, bytes) || overlaps_mapping(address, bytes)) {
    return kInvalid;
  }
  void* data = ::mmap(host(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, found->second.fd, 0);
  if (data == MAP_FAILED) return thinkv::cuda::kErrorOutOfMemory;
  fake::state().mappings[address] = {bytes, found->second.device, AccessFlags::kNone};
  return kOk;
}

FAKE_EXPORT DriverResult cuMemUnmap(DevicePointer address, size_t bytes) {
  FAKE_ENTER("cuMemUnmap", false);
  const auto found = fake::state().mappings.find(address);
  if (found == fake::state().mappings.end() || found->second.bytes != bytes) return kInvalid;
  ::mmap(host(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
  fake::state().mappings.erase(found);
  return kOk;
}

FAKE_EXPORT DriverResult cuMemSetAccess(DevicePointer address, size_t bytes,
                                        const AccessDescriptor* access, size_t count) {
  FAKE_ENTER("cuMemSetAccess", false);
  const auto found = fake::state().mappings.find(address);
  if (count != 1 || found == fake::state().mappings.end() || found->second.bytes != bytes ||
      !fake::valid_device(access->location.id)) {
    return kInvalid;
  }
  // Memory of no fake device is a test's own file: any may map it.
  if (found->second.device >= 0 && found->second.device != access->location.id) {
    return thinkv::cuda::kErrorInvalidDevice;
  }
  const bool write = access->flags == AccessFlags::kReadWrite;
  const bool read = write || access->flags == AccessFlags::kRead;
  const int protection = (read ? PROT_READ : PROT_NONE) | (write ? PROT_WRITE : PROT_NONE);
  if (::mprotect(host(address), bytes, protection) != 0) return kInvalid;
  found->second.access = access->flags;
  return kOk;
}

FAKE_EXPORT DriverResult cuMemsetD8Async(DevicePointer address, uint8_t value, size_t bytes,
                                         void* /*stream*/) {
  FAKE_ENTER("cuMemsetD8Async", true);
  if (!accessible(address, bytes, true)) return thinkv::cuda::kErrorIllegalAddress;
  std::memset(host(address), value, bytes);
  return kOk;
}

FAKE_EXPORT DriverResult cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
  FAKE_ENTER("cuMemcpyHtoD_v2", true);
  if (!accessible(to, bytes, true)) return thinkv::cuda::kErrorIllegalAddress;
  std::memcpy(host(to), from, bytes);
  return kOk;
}

FAKE_EXPORT DriverResult cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
  FAKE_ENTER("cuMemcpyDtoH_v2", true);
  if (!accessible(from, bytes, false)) return thinkv::cuda::kErrorIllegalAddress;
  std::memcpy(to, host(from), bytes);
  return kOk;
}

FAKE_EXPORT DriverResult cuMemsetD32Async(DevicePointer address, uint32_t value, size_t words,
                                          void* /*stream*/) {
  FAKE_ENTER("cuMemsetD32Async", true);
  if (address % sizeof(value) != 0) return kInvalid;
  if (!accessible(address, words * sizeof(value), true)) return thinkv::cuda::kErrorIllegalAddress;
  std::fill_n(static_cast<uint32_t*>(host(address)), words, value);
  return kOk;
}

FAKE_EXPORT DriverResult cuMemAlloc_v2(DevicePointer* address, size_t bytes) {
  FAKE_ENTER("cuMemAlloc_v2", true);
  return allocate(address, bytes, true);
}

FAKE_EXPORT DriverResult cuMemFree_v2(DevicePointer address) {
  FAKE_ENTER("cuMemFree_v2", true);
  return deallocate(address, true);
}

FAKE_EXPORT DriverResult cuMemHostAlloc(void** address, size_t bytes, unsigned /*flags*/) {
  FAKE_ENTER("cuMemHostAlloc", true);
  DevicePointer made = 0;
  const DriverResult result = allocate(&made, bytes, false);
  *address = host(made);
  return result;
}

FAKE_EXPORT DriverResult cuMemFreeHost(void* address) {
  FAKE_ENTER("cuMemFreeHost", true);
  return deallocate(reinterpret_cast<DevicePointer>(address), false);
}

// The memory type (1 is the host's, 2 the device's) and the device's ordinal.
FAKE_EXPORT DriverResult cuPointerGetAttribute(void* value, int32_t attribute,
                                               DevicePointer address) {
  FAKE_ENTER("cuPointerGetAttribute", false);
  constexpr int32_t kMemoryType = 2;
  constexpr int32_t kDeviceOrdinal = 9;
  const Allocation* allocation = allocation_of(address, 1);
  const Mapping* mapping = mapping_of(address, 1);
  // Memory of a library that has no fake of its own (PyTorch's CPU tensors) passes for the GPU's.
  const bool known = mapping != nullptr || allocation != nullptr;
  const bool adopted = !known && std::getenv("THINKV_FAKE_CUDA_ADOPTS") != nullptr;
  if (!known && !adopted) return kInvalid;
  if (attribute == kDeviceOrdinal) {
    const int32_t device = adopted ? 0 : mapping != nullptr ? mapping->device : allocation->device;
    std::memcpy(value, &device, sizeof(device));
    return kOk;
  }
  if (attribute != kMemoryType) return kInvalid;
  const uint32_t type = adopted || mapping != nullptr || allocation->on_device ? 2 : 1;
  std::memcpy(value, &type, sizeof(type));
  return kOk;
}
