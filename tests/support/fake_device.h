// fake_device.h: a device without memory whose n-th creation fails.
#pragma once

#include <cerrno>
#include <cstdint>
#include <set>

#include "daemon/device/device.h"

namespace thinkv::testing {

class FakeDevice final : public device::Device {
 public:
  // Creation number n (from 1) and the `count - 1` after it fail; 0: none.
  void fail_from(uint64_t n, uint64_t count = 1) {
    fail_first_ = n;
    fail_count_ = count;
  }
  [[nodiscard]] const char* name() const override { return "host"; }
  [[nodiscard]] Status create_extent(ExtentId extent, uint64_t bytes) override {
    ++creations_;
    if (bytes == 0 || alive_.contains(extent)) {
      return make_error(ErrorCode::kInvalidArgument, "extent exists");
    }
    if (fail_first_ != 0 && creations_ >= fail_first_ && creations_ - fail_first_ < fail_count_) {
      return make_error(ErrorCode::kExhausted, "no memory", ENOMEM);
    }
    alive_.insert(extent);
    return {};
  }
  void release_extent(ExtentId extent) override { alive_.erase(extent); }
  [[nodiscard]] Result<int> export_fd(ExtentId extent) const override {
    if (!alive_.contains(extent)) return make_error(ErrorCode::kNotFound, "no such extent");
    return static_cast<int>(extent.value()) + 1000;
  }
  [[nodiscard]] Result<device::Capacity> capacity() const override {
    return make_error(ErrorCode::kUnavailable, "not a real device");
  }
  [[nodiscard]] bool alive(ExtentId extent) const { return alive_.contains(extent); }
  [[nodiscard]] size_t alive_count() const { return alive_.size(); }
  [[nodiscard]] uint64_t creations() const { return creations_; }

 private:
  std::set<ExtentId> alive_;
  uint64_t creations_ = 0;
  uint64_t fail_first_ = 0;
  uint64_t fail_count_ = 1;
};

}  // namespace thinkv::testing
