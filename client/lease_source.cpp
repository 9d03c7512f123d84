#include "client/lease_source.h"

namespace thinkv::client {

Status LeaseSource::reserve(uint32_t pages) {
  promised_ = 0;
  if (stack_.size() < pages) {
    const auto missing = static_cast<uint32_t>(pages - stack_.size());
    stack_.reserve(pages);
    const std::lock_guard lock(mutex_);
    if (Status taken = lease_.take(missing, stack_); !taken) {
      // Another sequence may need exactly these.
      lease_.give(stack_);
      stack_.clear();
      return taken;
    }
  }
  promised_ = pages;
  return {};
}

void LeaseSource::settle() {
  promised_ = 0;
  if (stack_.empty()) return;
  const std::lock_guard lock(mutex_);
  lease_.give(stack_);
  stack_.clear();
}

}  // namespace thinkv::client
