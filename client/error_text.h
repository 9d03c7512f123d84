// error_text.h: errors with numbers and names in them.
//
// Error::what points at a static string everywhere else; here it points at a buffer of the calling
// thread, which the next described error of the same thread overwrites. The C ABI copies the text
// out before it returns, so an engine never sees the buffer.
#pragma once

#include "thinkv/result.h"

namespace thinkv::client {

inline constexpr size_t kErrorTextMax = 240;  // thinkv_error::text

// printf-style; longer texts are cut. Arguments may point at an earlier text of this thread.
[[nodiscard, gnu::format(printf, 2, 3)]] Error describe(ErrorCode code, const char* format, ...);
// The same, followed by ": " and the system's words for `os_error`.
[[nodiscard, gnu::format(printf, 3, 4)]] Error describe_os(ErrorCode code, int os_error,
                                                           const char* format, ...);

}  // namespace thinkv::client
