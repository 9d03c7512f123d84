// factory.h: makes the device that the configuration names.
//
// Warnings about the machine go to the log; what makes serving impossible is an error whose text
// says what to do.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "daemon/device/device.h"

namespace thinkv::device {

enum class Kind : uint8_t { kHost, kCuda };

struct DeviceOptions {
  Kind kind = Kind::kHost;
  std::optional<DeviceUuid> gpu = std::nullopt;  // cuda; nullopt: the first
  uint64_t pool_bytes = 0;
  uint64_t extent_bytes = 0;
};

// Errors: kUnsupported (no driver, no GPU, a GPU that cannot do it), kNotFound (not that GPU),
// kInvalidArgument (sizes or modes that cannot work), kExhausted, kDeviceFailed. *why is a
// sentence for a person.
[[nodiscard]] Result<std::unique_ptr<Device>> make_device(const DeviceOptions& options,
                                                          std::string* why);

}  // namespace thinkv::device
