// map_reader.h: takes the values of one YAML map by key, and knows which keys exist.
//
// Each getter names a key that the file may hold; finish() refuses all others. A getter leaves
// its output as it was (the default) when the key is absent or wrong. Paths in messages are
// dotted: "pool.bytes", "tenants[].limit".
// Threads: none; borrows the tree and the diagnostics.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/ops/diagnostics.h"
#include "daemon/ops/yaml_tree.h"
#include "thinkv/result.h"

namespace thinkv::ops {

struct Bounds {
  uint64_t min = 0;
  uint64_t max = 0;
};

template <class Enum>
struct Choice {
  std::string_view name;
  Enum value;
};

class MapReader {
 public:
  // `node` may be null: an absent map, of which every key is absent. Anything but a map is an
  // error. `keys`, if given, collects the path of every key that is asked for.
  MapReader(const YamlNode* node, std::string path, Diagnostics* diagnostics,
            std::vector<std::string>* keys = nullptr);

  [[nodiscard]] MapReader child(std::string_view key);
  // The node as it is, null if absent; its kind is the caller's to check.
  [[nodiscard]] const YamlNode* node(std::string_view key);

  bool integer(std::string_view key, Bounds bounds, uint64_t* out);
  bool integer32(std::string_view key, Bounds bounds, uint32_t* out);
  bool bytes(std::string_view key, Bounds bounds, uint64_t* out);
  bool duration_ms(std::string_view key, Bounds bounds, uint64_t* out);
  // Exclusive of `above`, inclusive of `at_most`.
  bool decimal(std::string_view key, double above, double at_most, float* out);
  bool boolean(std::string_view key, bool* out);
  bool text(std::string_view key, size_t bytes_max, std::string* out);
  // A word of letters, digits, '.', '_' and '-': what may become a metric label or a file name.
  bool name(std::string_view key, size_t bytes_max, std::string* out);
  bool texts(std::string_view key, size_t count_max, std::vector<std::string>* out);
  bool integers(std::string_view key, Bounds each, size_t count_max, std::vector<uint32_t>* out);
  template <class Enum>
  bool choice(std::string_view key, std::span<const Choice<Enum>> choices, Enum* out) {
    const YamlNode* found = scalar(key);
    if (found == nullptr) return false;
    std::string allowed;
    for (const Choice<Enum>& choice : choices) {
      if (choice.name == found->scalar) {
        *out = choice.value;
        return true;
      }
      allowed.append(allowed.empty() ? "" : ", ").append(choice.name);
    }
    fail(*found, key, quote(found->scalar) + " is not known; allowed: " + allowed);
    return false;
  }

  [[nodiscard]] bool has(std::string_view key) const;
  void require(std::string_view key);
  // Reports every key that no getter asked for.
  void finish();
  void fail(const YamlNode& at, std::string_view key, std::string_view what);

  [[nodiscard]] std::string path_of(std::string_view key) const;
  [[nodiscard]] static std::string quote(std::string_view text);

 private:
  // The value of `key` if it is a plain or quoted value; otherwise null, with a problem noted
  // unless the key is absent.
  const YamlNode* scalar(std::string_view key);
  const YamlNode* plain(std::string_view key);  // the same, and not quoted
  bool list_fits(const YamlNode& node, std::string_view key, size_t count_max);
  bool parsed(const YamlNode& at, std::string_view key, const Result<uint64_t>& value,
              Bounds bounds, uint64_t* out, std::string (*show)(uint64_t));

  const YamlNode* node_;
  uint32_t line_ = 0;
  std::string path_;
  Diagnostics* diagnostics_;
  std::vector<std::string>* keys_;
  std::vector<std::string> asked_;
};

}  // namespace thinkv::ops
