// lease.h: the pages that this client may use without asking, one list a page class.
//
// Taken from the private list first, then from the grant ring; only when both are short the daemon
// is asked (kNeedPages), and that is the one place where a step can wait. What comes back stays in
// the private list up to the high watermark; the rest goes into the return ring.
// Threads: calls must not overlap (the session's mutex). Ownership: a page is in exactly one of the
// private list, a PageSource, or a sequence.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "client/channel.h"
#include "client/extent_map.h"
#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::client {

struct LeaseOptions {
  Channel* channel = nullptr;
  ExtentMap* extents = nullptr;
  uint32_t page_class = 0;
  // Reads waiting Extent messages from the control socket into the map.
  std::function<Status()> receive_extents = {};
};

class Lease {
 public:
  explicit Lease(LeaseOptions options) : options_(std::move(options)) {}

  void set_high(uint32_t pages) { high_ = pages; }

  // Appends exactly `count` pages to `pages`, or none. Errors: kExhausted, kQuotaExceeded,
  // kUnavailable.
  [[nodiscard]] Status take(uint32_t count, std::vector<PageId>& pages);
  // Gives pages back. Never fails: what does not fit into the return ring is kept.
  void give(std::span<const PageId> pages);

  // Pages that take() has without looking into a ring.
  [[nodiscard]] uint32_t held() const { return static_cast<uint32_t>(free_.size()); }
  // Pages that sequences and sources have.
  [[nodiscard]] uint64_t used() const { return used_; }

 private:
  [[nodiscard]] Status fill(uint32_t count);
  [[nodiscard]] Status pull(uint32_t wanted);
  [[nodiscard]] Status ask(uint32_t pages);
  void return_surplus();

  LeaseOptions options_;
  std::vector<PageId> free_;  // used from the back: the page returned last is warm
  uint64_t used_ = 0;
  uint32_t high_ = limits::kLeasePagesMin;
};

}  // namespace thinkv::client
