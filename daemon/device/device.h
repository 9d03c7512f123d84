// device.h: where the memory of extents comes from.
//
// One interface, two backends: host (sealed memfds, kernels on the CPU) and cuda (a GPU's memory).
// The shell calls it for the core's actions and answers ExtentReady or ExtentFailed.
// Threads: the event loop only. Ownership: the device owns each extent's memory and descriptor
// until release_extent or destruction; memory behind descriptors that were sent lives on with its
// mappers.
#pragma once

#include <cstdint>

#include "thinkv/internal/device_uuid.h"
#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::device {

struct Capacity {
  uint64_t total_bytes = 0;      // of the device
  uint64_t available_bytes = 0;  // that could be taken now, by anybody
};

class Device {
 public:
  Device() = default;
  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // "host" | "cuda": what Welcome and the status report. Static.
  [[nodiscard]] virtual const char* name() const = 0;

  // The GPU, by which clients find it among theirs; none on the host backend.
  [[nodiscard]] virtual DeviceUuid uuid() const { return {}; }

  // Makes `bytes` of new memory that reads as zeros, committed: a later write cannot fail for want
  // of memory. Errors: kExhausted (os_error ENOMEM, ENOSPC, EMFILE, ENFILE: may work later),
  // kInvalidArgument (0 bytes, or the extent exists: release it first), kDeviceFailed (the device
  // will not do it later either). os_error is an errno, or the CUresult of the cuda backend.
  [[nodiscard]] virtual Status create_extent(ExtentId extent, uint64_t bytes) = 0;

  // Drops our hold on the memory. An extent that does not exist is left alone.
  virtual void release_extent(ExtentId extent) = 0;

  // The descriptor to send to clients: borrowed, valid until release_extent.
  // Errors: kNotFound.
  [[nodiscard]] virtual Result<int> export_fd(ExtentId extent) const = 0;

  // Errors: kUnavailable, or kExhausted without a free descriptor; with errno.
  [[nodiscard]] virtual Result<Capacity> capacity() const = 0;
};

}  // namespace thinkv::device
