// abi.h: structs of the C ABI across library versions, and errors on their way out.
//
// Callers say with struct_size which version of a struct they were built with. Older ones are
// read as if the missing fields were zero; newer ones are accepted while what we do not know is
// zero. Threads: pure functions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "client/error_text.h"
#include "thinkv/result.h"
#include "thinkv/thinkv.h"

namespace thinkv::client {

// Copies an options struct of any version into `known`. `first_bytes`: what version 1 had.
// Errors: kInvalidArgument (too small), kUnsupported (uses fields of a newer library).
template <class Options>
[[nodiscard]] Status read_options(const char* name, const Options& given, size_t first_bytes,
                                  Options& known) {
  const size_t size = given.struct_size;
  if (size < first_bytes || size > 4096) {
    return describe(ErrorCode::kInvalidArgument,
                    "%s.struct_size is %zu, expected %zu: use the INIT macro", name, size,
                    sizeof(Options));
  }
  std::memset(&known, 0, sizeof(known));
  std::memcpy(&known, &given, std::min(size, sizeof(known)));
  const auto* bytes = reinterpret_cast<const unsigned char*>(&given);
  for (size_t i = sizeof(known); i < size; ++i) {
    if (bytes[i] != 0) {
      return describe(ErrorCode::kUnsupported, "%s has fields that this library does not know",
                      name);
    }
  }
  return {};
}

// Reserved fields must be zero, or a later version could not give them a meaning.
template <class Field>
[[nodiscard]] Status check_reserved(const char* name, const Field& field) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&field);
  const bool zero = std::all_of(bytes, bytes + sizeof(field), [](auto b) { return b == 0; });
  if (zero) return {};
  return describe(ErrorCode::kInvalidArgument, "%s has a reserved field that is not zero", name);
}

// Writes as much of `known` as the caller's version has room for; struct_size stays the caller's.
template <class Stats>
[[nodiscard]] Status write_stats(const char* name, const Stats& known, size_t first_bytes,
                                 Stats* out) {
  if (out == nullptr) return describe(ErrorCode::kInvalidArgument, "%s is null", name);
  const uint32_t size = out->struct_size;
  if (size < first_bytes) {
    return describe(ErrorCode::kInvalidArgument, "%s.struct_size is %u, expected %zu", name, size,
                    sizeof(Stats));
  }
  std::memcpy(out, &known, std::min<size_t>(size, sizeof(known)));
  out->struct_size = size;
  return {};
}

// Fills the caller's struct, as far as its version reaches; returns the code.
inline thinkv_status report_error(const Error& error, thinkv_error* out) {
  const auto code = static_cast<thinkv_status>(error.code);
  if (out == nullptr || out->struct_size < offsetof(thinkv_error, reserved)) return code;
  out->code = code;
  out->os_error = error.os_error;
  if (out->struct_size <= offsetof(thinkv_error, text)) return code;
  const size_t room =
      std::min<size_t>(out->struct_size - offsetof(thinkv_error, text), sizeof(out->text));
  const size_t bytes = std::min(std::strlen(error.what), room - 1);
  std::memcpy(out->text, error.what, bytes);
  out->text[bytes] = '\0';
  return code;
}

}  // namespace thinkv::client
