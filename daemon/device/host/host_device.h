// host_device.h: extents as sealed memfds.
//
// Runs wherever Linux runs: the backend of machines without a GPU, of CI and of the quickstart.
// Seals: a client that received the descriptor can neither shrink it (which would kill other
// mappers by SIGBUS), nor grow it, nor add seals.
#pragma once

#include <unordered_map>

#include "daemon/device/device.h"
#include "thinkv/internal/unique_fd.h"

namespace thinkv::device {

class HostDevice final : public Device {
 public:
  [[nodiscard]] const char* name() const override { return "host"; }
  [[nodiscard]] Status create_extent(ExtentId extent, uint64_t bytes) override;
  void release_extent(ExtentId extent) override;
  [[nodiscard]] Result<int> export_fd(ExtentId extent) const override;
  [[nodiscard]] Result<Capacity> capacity() const override;

 private:
  std::unordered_map<ExtentId, UniqueFd> extents_;
};

}  // namespace thinkv::device
