// diagnostics.h: what is wrong with a file a person wrote, as `file:line: key: what, and what is
// allowed`.
//
// Every problem of a file is collected, so that one run of --check-config shows all of them.
// Threads: none; a value of the loader.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace thinkv::ops {

inline constexpr size_t kDiagnosticsMax = 32;  // of one file; what follows is rarely useful

class Diagnostics {
 public:
  explicit Diagnostics(std::string file) : file_(std::move(file)) {}

  // `line` counts from 1; 0: the file as a whole. `key` may be empty.
  void add(uint32_t line, std::string_view key, std::string_view what) {
    if (lines_.size() >= kDiagnosticsMax) return;
    std::string text = file_;
    if (line > 0) text.append(":").append(std::to_string(line));
    text.append(": ");
    if (!key.empty()) text.append(key).append(": ");
    text.append(what);
    lines_.push_back(std::move(text));
  }
  [[nodiscard]] bool ok() const { return lines_.empty(); }
  [[nodiscard]] const std::vector<std::string>& lines() const { return lines_; }
  [[nodiscard]] const std::string& file() const { return file_; }
  // All problems, one a line, without a final newline.
  [[nodiscard]] std::string text() const {
    std::string joined;
    for (const std::string& line : lines_) {
      if (!joined.empty()) joined.push_back('\n');
      joined.append(line);
    }
    return joined;
  }

 private:
  std::string file_;
  std::vector<std::string> lines_;
};

}  // namespace thinkv::ops
