#include "client/error_text.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace thinkv::client {
namespace {

thread_local char text_of_thread[kErrorTextMax];

// Through a local, because the arguments may point into the buffer that is about to be written.
const char* keep(const char* text) {
  const size_t bytes = std::min(std::strlen(text), sizeof(text_of_thread) - 1);
  std::memmove(text_of_thread, text, bytes);
  text_of_thread[bytes] = '\0';
  return text_of_thread;
}

}  // namespace

Error describe(ErrorCode code, const char* format, ...) {
  char text[kErrorTextMax];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return make_error(code, keep(text));
}

Error describe_os(ErrorCode code, int os_error, const char* format, ...) {
  char text[kErrorTextMax];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  char reason[96];
  // The GNU form returns the text, which need not be in the buffer given.
  const char* words = ::strerror_r(os_error, reason, sizeof(reason));
  char whole[kErrorTextMax + sizeof(reason) + 4];
  std::snprintf(whole, sizeof(whole), "%s: %s", text, words);
  return make_error(code, keep(whole), os_error);
}

}  // namespace thinkv::client
