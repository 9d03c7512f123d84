// device_uuid.h: which GPU, in a form that every process agrees on.
//
// Ordinals do not: CUDA_VISIBLE_DEVICES renumbers the GPUs of each process. All zeros: no GPU.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "thinkv/result.h"

namespace thinkv {

struct DeviceUuid {
  std::array<uint8_t, 16> bytes{};
  friend bool operator==(const DeviceUuid&, const DeviceUuid&) = default;
  [[nodiscard]] bool is_none() const { return *this == DeviceUuid{}; }
};

namespace internal {

[[nodiscard]] constexpr int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// Where the text form has a dash: 8-4-4-4-12 digits.
[[nodiscard]] constexpr bool uuid_dash_at(size_t i) {
  return i == 8 || i == 13 || i == 18 || i == 23;
}

}  // namespace internal

// "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", as nvidia-smi -L prints it; the prefix may be absent.
// Errors: kInvalidArgument, also for the UUID of no GPU.
[[nodiscard]] inline Result<DeviceUuid> parse_device_uuid(std::string_view text) {
  constexpr std::string_view kPrefix = "GPU-";
  constexpr size_t kTextBytes = 36;
  if (text.starts_with(kPrefix)) text.remove_prefix(kPrefix.size());
  const Error wrong = make_error(ErrorCode::kInvalidArgument, "not the UUID of a GPU");
  if (text.size() != kTextBytes) return wrong;
  DeviceUuid uuid;
  size_t digits = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (internal::uuid_dash_at(i)) {
      if (text[i] != '-') return wrong;
      continue;
    }
    const int digit = internal::hex_digit(text[i]);
    if (digit < 0) return wrong;
    uint8_t& byte = uuid.bytes[digits / 2];
    byte = static_cast<uint8_t>(byte << 4 | digit);
    ++digits;
  }
  if (uuid.is_none()) return wrong;
  return uuid;
}

[[nodiscard]] inline std::string device_uuid_text(const DeviceUuid& uuid) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text = "GPU-";
  for (size_t i = 0; i < uuid.bytes.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text.push_back('-');
    text.push_back(kDigits[uuid.bytes[i] >> 4]);
    text.push_back(kDigits[uuid.bytes[i] & 15]);
  }
  return text;
}

}  // namespace thinkv
