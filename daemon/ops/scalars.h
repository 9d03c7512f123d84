// scalars.h: numbers with units, as people write them in our files.
//
// Pure functions of the text. An error's `what` says what is allowed.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "thinkv/result.h"

namespace thinkv::ops {

// Decimal digits only: "12". No sign, no leading zero ("010" is 8 elsewhere), no separators.
[[nodiscard]] Result<uint64_t> parse_integer(std::string_view text);
// "64B", "512KiB", "64MiB", "2GiB", "1TiB": powers of 1024, a unit always.
[[nodiscard]] Result<uint64_t> parse_bytes(std::string_view text);
// "250ms", "10s", "5min", "1h" -> milliseconds; a unit always.
[[nodiscard]] Result<uint64_t> parse_duration_ms(std::string_view text);
// "0%" .. "100%" -> 0..100.
[[nodiscard]] Result<uint64_t> parse_percent(std::string_view text);
// "0.97", "12": decimal, no exponent, no sign, at most 12 characters.
[[nodiscard]] Result<double> parse_decimal(std::string_view text);
[[nodiscard]] Result<bool> parse_boolean(std::string_view text);

// The largest unit that shows the number exactly: 2147483648 -> "2GiB".
[[nodiscard]] std::string format_bytes(uint64_t bytes);

}  // namespace thinkv::ops
