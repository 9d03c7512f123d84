// check.h: assertions on our own invariants, on in every build.
//
// Never on what another process, the configuration, a file or the driver said: that is a Result.
// A failed check is a defect of ours; stopping before the damage spreads is the safe reaction,
// because pages and leases are reclaimed from outside.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace thinkv::internal {

[[noreturn]] inline void check_failed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "thinkv: check failed: %s (%s:%d)\n", condition, file, line);
  std::fflush(stderr);
  std::abort();
}

}  // namespace thinkv::internal

#define THINKV_CHECK(condition)                      \
  (__builtin_expect(static_cast<bool>(condition), 1) \
       ? static_cast<void>(0)                        \
       : ::thinkv::internal::check_failed(#condition, __FILE__, __LINE__))

// O(n) walks: debug and sanitizer builds only.
#if !defined(NDEBUG) || defined(THINKV_DCHECK_ON)
#define THINKV_DCHECK(condition) THINKV_CHECK(condition)
#else
#define THINKV_DCHECK(condition) static_cast<void>(sizeof(static_cast<bool>(condition)))
#endif
