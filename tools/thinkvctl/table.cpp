#include "tools/thinkvctl/table.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace thinkv::ctl {
namespace {

// Characters that a terminal shows, counting UTF-8 sequences as one.
size_t shown(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0u) != 0x80u;
  }));
}

std::string padded(const std::string& text, size_t width, Align align) {
  const size_t length = shown(text);
  const std::string space(width > length ? width - length : 0, ' ');
  return align == Align::kLeft ? text + space : space + text;
}

}  // namespace

Table::Table(std::string title, std::vector<Column> columns)
    : title_(std::move(title)), columns_(std::move(columns)) {}

void Table::add(std::vector<std::string> cells) {
  cells.resize(columns_.size());
  for (std::string& cell : cells) cell = printable(cell);
  rows_.push_back(std::move(cells));
}

std::string Table::render() const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < columns_.size(); ++c) {
    size_t width = shown(columns_[c].title);
    for (const auto& row : rows_) width = std::max(width, shown(row[c]));
    widths.push_back(width);
  }
  size_t inner = widths.size() * 3 - 1;
  for (const size_t width : widths) inner += width;
  // The last column takes what the title needs.
  const size_t title_width = std::max(shown(title_), rows_.empty() ? shown(empty_text_) : 0) + 2;
  if (title_width > inner) {
    widths.back() += title_width - inner;
    inner = title_width;
  }
  std::string rule = "+";
  for (const size_t width : widths) rule.append(width + 2, '-').append("+");
  rule.append("\n");
  std::string out = "+" + std::string(inner, '-') + "+\n| " +
                    padded(title_, inner - 2, Align::kLeft) + " |\n" + rule + "|";
  for (size_t c = 0; c < columns_.size(); ++c) {
    out.append(" ").append(padded(columns_[c].title, widths[c], columns_[c].align)).append(" |");
  }
  out.append("\n").append(rule);
  for (const auto& row : rows_) {
    out.append("|");
    for (size_t c = 0; c < row.size(); ++c) {
      out.append(" ").append(padded(row[c], widths[c], columns_[c].align)).append(" |");
    }
    out.append("\n");
  }
  if (rows_.empty()) {
    out.append("| ").append(padded(empty_text_, inner - 2, Align::kLeft)).append(" |\n");
  }
  return out.append(rule);
}

std::string human_bytes(uint64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.2f} {}", value, kUnits[unit]);
}

std::string human_count(uint64_t count) {
  std::string digits = std::to_string(count);
  for (size_t at = digits.size(); at > 3; at -= 3) digits.insert(at - 3, ",");
  return digits;
}

std::string human_seconds(double seconds) {
  const uint64_t whole = seconds > 0 ? static_cast<uint64_t>(seconds) : 0;
  if (whole < 60) return fmt::format("{}s", whole);
  if (whole < 3600) return fmt::format("{}m {:02}s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{}h {:02}m", whole / 3600, whole / 60 % 60);
  return fmt::format("{}d {:02}h", whole / 86400, whole / 3600 % 24);
}

std::string printable(std::string_view text) {
  std::string out(text);
  std::replace_if(
      out.begin(), out.end(),
      [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; }, '?');
  return out;
}

std::string bar(uint64_t taken, uint64_t leased, uint64_t total, uint32_t width) {
  const auto cells = [&](uint64_t bytes) {
    if (total == 0) return size_t{0};
    const double share = static_cast<double>(std::min(bytes, total)) / static_cast<double>(total);
    return static_cast<size_t>(share * width + 0.5);
  };
  const size_t all = cells(taken + leased);
  const size_t solid = std::min(all, cells(taken));
  return "[" + std::string(solid, '#') + std::string(all - solid, '=') +
         std::string(width - all, ' ') + "]";
}

}  // namespace thinkv::ctl
