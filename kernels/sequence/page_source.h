// page_source.h: where a sequence gets its pages from.
//
// A sequence asks for everything that a step can need in one reserve(), before it changes
// anything; after that it takes pages without a way to fail. The client implements this over its
// lease, tests over a vector. All pages of one source have one size (one page class).
// Ownership: one source object belongs to one sequence, because what is reserved is promised to
// its caller alone; many sources may share one lease behind it.
// Threads: calls on one source must not overlap, except address(), which any number of threads
// may call at once while no other function of the same source runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::kernels {

class PageSource {
 public:
  virtual ~PageSource() = default;

  // Promises `pages` calls of take(), in place of any earlier promise: reserve(0) lets go of what
  // was promised and not taken. May talk to the daemon. On error the earlier promise is gone too.
  // Errors: kExhausted, kQuotaExceeded, kUnavailable.
  [[nodiscard]] virtual Status reserve(uint32_t pages) = 0;

  // A page with undefined contents, the caller's until give_back(). Never fails.
  // Requires: a promise left from reserve(); each call uses one up.
  [[nodiscard]] virtual PageId take() = 0;

  // Requires: `page` came from take() of this source and was not given back since. It does not
  // renew a promise.
  virtual void give_back(PageId page) = 0;

  // The first byte of a page that is taken, 64-byte aligned, valid until it is given back.
  [[nodiscard]] virtual std::byte* address(PageId page) const = 0;
};

}  // namespace thinkv::kernels
