// table.h: boxed text tables, and numbers as people read them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace thinkv::ctl {

enum class Align : uint8_t { kLeft, kRight };

struct Column {
  std::string title;
  Align align = Align::kRight;
};

// Cells may hold any bytes: control characters become '?', so a client's name cannot move the
// cursor of an operator's terminal.
class Table {
 public:
  Table(std::string title, std::vector<Column> columns);
  // Requires: as many cells as columns.
  void add(std::vector<std::string> cells);
  // What is shown in place of rows when there is none.
  void set_empty_text(std::string text) { empty_text_ = std::move(text); }
  [[nodiscard]] std::string render() const;

 private:
  std::string title_;
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
  std::string empty_text_ = "none";
};

[[nodiscard]] std::string human_bytes(uint64_t bytes);    // "1.50 GiB"
[[nodiscard]] std::string human_count(uint64_t count);    // "1,234,567"
[[nodiscard]] std::string human_seconds(double seconds);  // "2h 05m"
[[nodiscard]] std::string printable(std::string_view text);
// `taken` as '#', then `leased` as '=', of `total`; `width` characters between the brackets.
[[nodiscard]] std::string bar(uint64_t taken, uint64_t leased, uint64_t total, uint32_t width);

}  // namespace thinkv::ctl
