#include "daemon/ops/scalars.h"

#include <array>
#include <charconv>
#include <limits>

namespace thinkv::ops {
namespace {

constexpr bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

struct Unit {
  std::string_view name;
  uint64_t factor;
};
constexpr std::array<Unit, 5> kByteUnits = {{{"TiB", uint64_t{1} << 40},
                                             {"GiB", uint64_t{1} << 30},
                                             {"MiB", uint64_t{1} << 20},
                                             {"KiB", uint64_t{1} << 10},
                                             {"B", 1}}};
constexpr std::array<Unit, 4> kTimeUnits = {
    {{"ms", 1}, {"s", 1000}, {"min", 60'000}, {"h", 3'600'000}}};

Error invalid(const char* what) {
  return make_error(ErrorCode::kInvalidArgument, what);
}

template <size_t kCount>
Result<uint64_t> parse_with_unit(std::string_view text, const std::array<Unit, kCount>& units,
                                 const char* allowed) {
  size_t digits = 0;
  while (digits < text.size() && is_digit(text[digits])) ++digits;
  if (digits == 0) return invalid(allowed);
  const std::string_view name = text.substr(digits);
  for (const Unit& unit : units) {
    if (unit.name != name) continue;
    THINKV_ASSIGN_OR_RETURN(const uint64_t number, parse_integer(text.substr(0, digits)));
    if (number > std::numeric_limits<uint64_t>::max() / unit.factor) {
      return invalid("number too large");
    }
    return number * unit.factor;
  }
  return invalid(allowed);
}

}  // namespace

Result<uint64_t> parse_integer(std::string_view text) {
  if (text.empty()) return invalid("a whole number is expected");
  for (const char c : text) {
    if (!is_digit(c)) return invalid("a whole number is expected, digits only");
  }
  if (text.size() > 1 && text[0] == '0') {
    return invalid("a number must not begin with 0 (elsewhere that means octal)");
  }
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) {
    return invalid("number too large");
  }
  return value;
}

Result<uint64_t> parse_bytes(std::string_view text) {
  return parse_with_unit(text, kByteUnits,
                         "a size with its unit is expected: B, KiB, MiB, GiB or TiB, as in 512MiB");
}

Result<uint64_t> parse_duration_ms(std::string_view text) {
  return parse_with_unit(text, kTimeUnits,
                         "a time with its unit is expected: ms, s, min or h, as in 10s");
}

Result<uint64_t> parse_percent(std::string_view text) {
  if (text.size() < 2 || text.back() != '%') return invalid("a percentage is expected, as in 50%");
  THINKV_ASSIGN_OR_RETURN(const uint64_t value, parse_integer(text.substr(0, text.size() - 1)));
  if (value > 100) return invalid("a percentage is at most 100%");
  return value;
}

Result<double> parse_decimal(std::string_view text) {
  constexpr const char* kAllowed = "a decimal number is expected, as in 0.97";
  if (text.empty() || text.size() > 12) return invalid(kAllowed);
  size_t dots = 0;
  for (const char c : text) {
    if (c == '.')
      ++dots;
    else if (!is_digit(c))
      return invalid(kAllowed);
  }
  if (dots > 1 || !is_digit(text.front()) || !is_digit(text.back())) return invalid(kAllowed);
  if (text.size() > 1 && text[0] == '0' && text[1] != '.') {
    return invalid("a number must not begin with 0 (elsewhere that means octal)");
  }
  double value = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return invalid(kAllowed);
  return value;
}

Result<bool> parse_boolean(std::string_view text) {
  if (text == "true") return true;
  if (text == "false") return false;
  return invalid("true or false is expected");
}

std::string format_bytes(uint64_t bytes) {
  for (const Unit& unit : kByteUnits) {
    if (bytes >= unit.factor && bytes % unit.factor == 0) {
      return std::to_string(bytes / unit.factor).append(unit.name);
    }
  }
  return "0B";
}

}  // namespace thinkv::ops
