// yaml_tree.h: the strict subset of YAML that our files are written in.
//
// Built from yaml-cpp's events and not from its nodes: the node API accepts duplicate keys
// silently (the first wins) and follows aliases into cycles. Here duplicates, anchors, aliases,
// tags, second documents and nesting beyond kYamlDepthMax are errors with their line.
// This file and its .cpp are the only ones that see yaml-cpp, and its exceptions end there.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/ops/diagnostics.h"

namespace thinkv::ops {

inline constexpr uint32_t kYamlDepthMax = 16;
inline constexpr uint32_t kYamlNodesMax = 20000;  // 64 KiB of "- a" lines

struct YamlEntry;

struct YamlNode {
  enum class Kind : uint8_t { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  bool quoted = false;  // of a scalar: always a text, never a number
  uint32_t line = 0;    // from 1
  std::string scalar;
  std::vector<YamlNode> items;     // of a list
  std::vector<YamlEntry> entries;  // of a map, in file order, keys unique

  [[nodiscard]] const YamlEntry* find(std::string_view key) const;
  [[nodiscard]] const char* kind_name() const;  // "a list", for messages
};

struct YamlEntry {
  std::string key;
  uint32_t line = 0;
  YamlNode node;
};

// The one document of `text`; an empty text is a null node. Problems go to `diagnostics`, and
// nullopt comes back when there was any.
[[nodiscard]] std::optional<YamlNode> parse_yaml(const std::string& text, Diagnostics* diagnostics);

// Reads a regular file of at most limits::kConfigBytesMax bytes.
[[nodiscard]] std::optional<std::string> read_text_file(const std::string& path,
                                                        Diagnostics* diagnostics);

}  // namespace thinkv::ops
