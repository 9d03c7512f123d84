// lease_source.h: the pages promised to one sequence.
//
// reserve() moves pages from the client's lease into a private stack under the client's mutex;
// take() and give_back() work on the stack alone, without lock or atomic (about 1 ns). settle()
// gives what is left back to the lease: between steps a sequence holds nothing it does not use.
// Threads: as PageSource: calls on one source must not overlap.
#pragma once

#include <mutex>
#include <vector>

#include "client/extent_map.h"
#include "client/lease.h"
#include "kernels/sequence/page_source.h"

namespace thinkv::client {

class LeaseSource final : public kernels::PageSource {
 public:
  // All three outlive the source.
  LeaseSource(std::mutex& mutex, Lease& lease, const ExtentMap& extents)
      : mutex_(mutex), lease_(lease), extents_(extents) {}
  ~LeaseSource() override { settle(); }
  LeaseSource(const LeaseSource&) = delete;
  LeaseSource& operator=(const LeaseSource&) = delete;

  [[nodiscard]] Status reserve(uint32_t pages) override;
  [[nodiscard]] PageId take() override {
    THINKV_CHECK(promised_ > 0 && !stack_.empty());
    --promised_;
    const PageId page = stack_.back();
    stack_.pop_back();
    return page;
  }
  void give_back(PageId page) override { stack_.push_back(page); }
  [[nodiscard]] std::byte* address(PageId page) const override { return extents_.address(page); }

  // Ends the promise; all pages on the stack go back to the lease.
  void settle();

 private:
  std::mutex& mutex_;
  Lease& lease_;
  const ExtentMap& extents_;
  std::vector<PageId> stack_;
  uint32_t promised_ = 0;
};

}  // namespace thinkv::client
