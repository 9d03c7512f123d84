// abi_guard.h: how a call of the C ABI comes in and what leaves through it: a status, never an
// exception. Threads: pure functions.
#pragma once

#include <cerrno>
#include <new>

#include "client/abi.h"
#include "client/handles.h"

namespace thinkv::client {

inline Handle to_handle(const void* pointer) {
  return reinterpret_cast<Handle>(pointer);
}
template <class Opaque>
Opaque* to_opaque(Handle handle) {
  return reinterpret_cast<Opaque*>(handle);  // a number, never followed: handles.h
}

template <class Fn>
thinkv_status guard(thinkv_error* error, Fn&& fn) {
  const int saved = errno;
  thinkv_status code = THINKV_OK;
  try {
    if (const Status status = fn(); !status) code = report_error(status.error(), error);
  } catch (const std::bad_alloc&) {
    code = report_error(make_error(ErrorCode::kInternal, "out of memory"), error);
  } catch (...) {
    code = report_error(make_error(ErrorCode::kInternal, "unexpected exception"), error);
  }
  errno = saved;
  return code;
}

inline Error null_argument(const char* name) {
  return describe(ErrorCode::kInvalidArgument, "%s is null", name);
}

// Opens something and hands its handle out.
template <class Opaque, class Fn>
Status open_into(Opaque** out, const char* name, Fn&& fn) {
  if (out == nullptr) return null_argument(name);
  THINKV_ASSIGN_OR_RETURN(const Handle handle, fn());
  *out = to_opaque<Opaque>(handle);
  return {};
}

template <class Fn>
void close_quietly(Fn&& fn) {
  const int saved = errno;
  try {
    fn();
  } catch (...) {
    // Out of memory on the way out: what is left is reclaimed with the process.
  }
  errno = saved;
}

}  // namespace thinkv::client
