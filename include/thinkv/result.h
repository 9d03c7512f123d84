// result.h: how every ThinKV function says what went wrong.
//
// Error is trivially copyable and never allocates, so it works on out-of-memory paths. A longer
// text for a person (with names and numbers in it) is made where the error leaves the system:
// the daemon's log, the control socket, thinkv_error. Result<T> and Status are a strict subset
// of std::expected's member names; nodiscard at class level makes a dropped error a warning.
// Threads: values, no shared state.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

namespace thinkv {

// What the CALLER does about it; a new code needs a caller that acts differently.
// Values are those of the C ABI (thinkv.h) and are never renumbered.
enum class ErrorCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // fix the call
  kExhausted = 2,        // the pool has no page left: evict, wait or retry
  kQuotaExceeded = 3,    // this tenant's limit is reached: close sequences or raise the limit
  kNotFound = 4,         // no such sequence, policy, tenant
  kStale = 5,            // the handle was closed or belongs to an earlier daemon: re-open
  kUnavailable = 6,      // the daemon is not there: start it, reconnect
  kVersionMismatch = 7,  // library and daemon do not speak the same protocol: upgrade one
  kPermission = 8,       // this user may not
  kUnsupported = 9,      // valid, but not built or not possible here
  kDeviceFailed = 10,    // the device context is dead: restart
  kInternal = 11,        // a defect of ours
};

[[nodiscard]] constexpr const char* error_code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kOk:
      return "ok";
    case ErrorCode::kInvalidArgument:
      return "invalid argument";
    case ErrorCode::kExhausted:
      return "pool exhausted";
    case ErrorCode::kQuotaExceeded:
      return "quota exceeded";
    case ErrorCode::kNotFound:
      return "not found";
    case ErrorCode::kStale:
      return "stale handle";
    case ErrorCode::kUnavailable:
      return "daemon unavailable";
    case ErrorCode::kVersionMismatch:
      return "version mismatch";
    case ErrorCode::kPermission:
      return "permission denied";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kDeviceFailed:
      return "device failed";
    case ErrorCode::kInternal:
      return "internal error";
  }
  return "unknown error";
}

struct Error {
  ErrorCode code = ErrorCode::kInternal;
  const char* what = "";  // static string; never owned
  int32_t os_error = 0;   // errno or CUresult, 0 if none
  uint32_t line = 0;
  const char* file = "";
};
static_assert(std::is_trivially_copyable_v<Error>);

[[nodiscard]] constexpr Error make_error(
    ErrorCode code, const char* what, int32_t os_error = 0,
    // Not std::source_location: clang 14 has the builtins only.
    uint32_t line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  return Error{code, what, os_error, line, file};
}

// A T or an Error. Requires: has_value() before value(), !has_value() before error().
template <class T>
class [[nodiscard]] Result {
 public:
  using value_type = T;
  Result(T value) : has_value_(true) { new (&storage_.value) T(std::move(value)); }
  Result(const Error& error) : has_value_(false) { storage_.error = error; }
  Result(Result&& other) noexcept : has_value_(other.has_value_) { take(std::move(other)); }
  Result& operator=(Result&& other) noexcept {
    if (this != &other) {
      destroy();
      has_value_ = other.has_value_;
      take(std::move(other));
    }
    return *this;
  }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
  ~Result() { destroy(); }

  [[nodiscard]] bool has_value() const { return has_value_; }
  explicit operator bool() const { return has_value_; }
  [[nodiscard]] T& value() & { return require_value(); }
  [[nodiscard]] const T& value() const& { return const_cast<Result*>(this)->require_value(); }
  [[nodiscard]] T&& value() && { return std::move(require_value()); }
  [[nodiscard]] T& operator*() & { return require_value(); }
  [[nodiscard]] const T& operator*() const& { return value(); }
  [[nodiscard]] T* operator->() { return &require_value(); }
  [[nodiscard]] const T* operator->() const { return &value(); }
  [[nodiscard]] const Error& error() const {
    if (has_value_) std::abort();
    return storage_.error;
  }

 private:
  union Storage {
    Storage() : error{} {}
    Storage(const Storage&) = delete;
    Storage& operator=(const Storage&) = delete;
    ~Storage() {}
    T value;
    Error error;
  };
  T& require_value() {
    if (!has_value_) std::abort();
    return storage_.value;
  }
  void take(Result&& other) {
    if (has_value_) {
      new (&storage_.value) T(std::move(other.storage_.value));
    } else {
      storage_.error = other.storage_.error;
    }
  }
  void destroy() {
    if (has_value_) storage_.value.~T();
  }
  Storage storage_;
  bool has_value_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(const Error& error) : error_(error), has_value_(false) {}
  [[nodiscard]] bool has_value() const { return has_value_; }
  explicit operator bool() const { return has_value_; }
  [[nodiscard]] const Error& error() const {
    if (has_value_) std::abort();
    return error_;
  }

 private:
  Error error_{};
  bool has_value_ = true;
};

using Status = Result<void>;

}  // namespace thinkv

// The only two control-flow macros of the project.
#define THINKV_CONCAT_INNER(a, b) a##b
#define THINKV_CONCAT(a, b) THINKV_CONCAT_INNER(a, b)
#define THINKV_TRY(expr)                                                           \
  do {                                                                             \
    if (auto thinkv_status = (expr); !thinkv_status) return thinkv_status.error(); \
  } while (false)
// NOLINTBEGIN(bugprone-macro-parentheses): `lhs` may be a declaration, `tmp` is a name.
#define THINKV_ASSIGN_OR_RETURN(lhs, expr) \
  THINKV_ASSIGN_OR_RETURN_INNER(THINKV_CONCAT(thinkv_result_, __LINE__), lhs, expr)
#define THINKV_ASSIGN_OR_RETURN_INNER(tmp, lhs, expr) \
  auto tmp = (expr);                                  \
  if (!tmp) return tmp.error();                       \
  lhs = std::move(tmp).value()
// NOLINTEND(bugprone-macro-parentheses)
