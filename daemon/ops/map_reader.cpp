#include "daemon/ops/map_reader.h"

#include <algorithm>
#include <cctype>

#include "daemon/ops/scalars.h"

namespace thinkv::ops {
namespace {

std::string show_integer(uint64_t value) {
  return std::to_string(value);
}
std::string show_duration(uint64_t ms) {
  return ms % 1000 == 0 ? std::to_string(ms / 1000) + "s" : std::to_string(ms) + "ms";
}

}  // namespace

MapReader::MapReader(const YamlNode* node, std::string path, Diagnostics* diagnostics,
                     std::vector<std::string>* keys)
    : node_(node), path_(std::move(path)), diagnostics_(diagnostics), keys_(keys) {
  if (node_ == nullptr) return;
  line_ = node_->line;
  if (node_->kind == YamlNode::Kind::kMap) return;
  // A heading with nothing under it is as good as absent.
  if (node_->kind != YamlNode::Kind::kNull) {
    diagnostics_->add(line_, path_,
                      std::string("keys and values are expected here, not ") + node_->kind_name());
  }
  node_ = nullptr;
}

MapReader MapReader::child(std::string_view key) {
  return MapReader(node(key), path_of(key), diagnostics_, keys_);
}

const YamlNode* MapReader::node(std::string_view key) {
  asked_.emplace_back(key);
  if (keys_ != nullptr) keys_->push_back(path_of(key));
  if (node_ == nullptr) return nullptr;
  const YamlEntry* entry = node_->find(key);
  return entry == nullptr ? nullptr : &entry->node;
}

const YamlNode* MapReader::scalar(std::string_view key) {
  const YamlNode* found = node(key);
  if (found == nullptr) return nullptr;
  if (found->kind == YamlNode::Kind::kScalar) return found;
  fail(*found, key, std::string("one value is expected, not ") + found->kind_name());
  return nullptr;
}

const YamlNode* MapReader::plain(std::string_view key) {
  const YamlNode* found = scalar(key);
  if (found == nullptr || !found->quoted) return found;
  fail(*found, key, "a number is expected, without quotes");
  return nullptr;
}

bool MapReader::parsed(const YamlNode& at, std::string_view key, const Result<uint64_t>& value,
                       Bounds bounds, uint64_t* out, std::string (*show)(uint64_t)) {
  if (!value) {
    fail(at, key, quote(at.scalar) + ": " + value.error().what);
    return false;
  }
  if (*value < bounds.min || *value > bounds.max) {
    fail(at, key,
         quote(at.scalar) + " is out of range; allowed: " + show(bounds.min) + " to " +
             show(bounds.max));
    return false;
  }
  *out = *value;
  return true;
}

bool MapReader::integer(std::string_view key, Bounds bounds, uint64_t* out) {
  const YamlNode* found = plain(key);
  return found != nullptr &&
         parsed(*found, key, parse_integer(found->scalar), bounds, out, show_integer);
}

bool MapReader::integer32(std::string_view key, Bounds bounds, uint32_t* out) {
  uint64_t wide = 0;
  if (!integer(key, bounds, &wide)) return false;
  *out = static_cast<uint32_t>(wide);
  return true;
}

bool MapReader::bytes(std::string_view key, Bounds bounds, uint64_t* out) {
  const YamlNode* found = plain(key);
  return found != nullptr &&
         parsed(*found, key, parse_bytes(found->scalar), bounds, out, format_bytes);
}

bool MapReader::duration_ms(std::string_view key, Bounds bounds, uint64_t* out) {
  const YamlNode* found = plain(key);
  return found != nullptr &&
         parsed(*found, key, parse_duration_ms(found->scalar), bounds, out, show_duration);
}

bool MapReader::decimal(std::string_view key, double above, double at_most, float* out) {
  const YamlNode* found = plain(key);
  if (found == nullptr) return false;
  const Result<double> value = parse_decimal(found->scalar);
  if (!value) {
    fail(*found, key, quote(found->scalar) + ": " + value.error().what);
    return false;
  }
  // As the float that will be used: a value that rounds to a bound counts as the bound.
  const float rounded = static_cast<float>(*value);
  if (!(rounded > static_cast<float>(above) && rounded <= static_cast<float>(at_most))) {
    fail(*found, key,
         quote(found->scalar) + " is out of range; allowed: above " + std::to_string(above) +
             ", at most " + std::to_string(at_most));
    return false;
  }
  *out = rounded;
  return true;
}

bool MapReader::boolean(std::string_view key, bool* out) {
  const YamlNode* found = plain(key);
  if (found == nullptr) return false;
  const Result<bool> value = parse_boolean(found->scalar);
  if (!value) {
    fail(*found, key, quote(found->scalar) + ": " + value.error().what);
    return false;
  }
  *out = *value;
  return true;
}

bool MapReader::text(std::string_view key, size_t bytes_max, std::string* out) {
  const YamlNode* found = scalar(key);
  if (found == nullptr) return false;
  if (found->scalar.empty() || found->scalar.size() > bytes_max) {
    fail(*found, key, "1 to " + std::to_string(bytes_max) + " bytes are allowed");
    return false;
  }
  *out = found->scalar;
  return true;
}

bool MapReader::name(std::string_view key, size_t bytes_max, std::string* out) {
  std::string value;
  if (!text(key, bytes_max, &value)) return false;
  const bool plain_word = std::all_of(value.begin(), value.end(), [](unsigned char c) {
    return (c < 128 && std::isalnum(c) != 0) || c == '.' || c == '_' || c == '-';
  });
  if (!plain_word || value.front() == '.' || value.front() == '-') {
    fail(node_->find(key)->node, key,  // text() found it
         quote(value) + ": letters, digits, '.', '_' and '-' are allowed, a letter or digit first");
    return false;
  }
  *out = std::move(value);
  return true;
}

bool MapReader::list_fits(const YamlNode& found, std::string_view key, size_t count_max) {
  if (found.kind != YamlNode::Kind::kList) {
    fail(found, key, std::string("a list is expected, not ") + found.kind_name());
    return false;
  }
  if (found.items.size() > count_max) {
    fail(found, key, "at most " + std::to_string(count_max) + " entries are allowed");
    return false;
  }
  return true;
}

bool MapReader::texts(std::string_view key, size_t count_max, std::vector<std::string>* out) {
  const YamlNode* found = node(key);
  if (found == nullptr || !list_fits(*found, key, count_max)) return false;
  std::vector<std::string> values;
  for (const YamlNode& item : found->items) {
    if (item.kind != YamlNode::Kind::kScalar || item.scalar.empty()) {
      fail(item, key, std::string("a text is expected, not ") + item.kind_name());
      return false;
    }
    values.push_back(item.scalar);
  }
  *out = std::move(values);
  return true;
}

bool MapReader::integers(std::string_view key, Bounds each, size_t count_max,
                         std::vector<uint32_t>* out) {
  const YamlNode* found = node(key);
  if (found == nullptr || !list_fits(*found, key, count_max)) return false;
  std::vector<uint32_t> values;
  for (const YamlNode& item : found->items) {
    if (item.kind != YamlNode::Kind::kScalar || item.quoted) {
      fail(item, key, std::string("a number is expected, not ") + item.kind_name());
      return false;
    }
    uint64_t value = 0;
    if (!parsed(item, key, parse_integer(item.scalar), each, &value, show_integer)) return false;
    values.push_back(static_cast<uint32_t>(value));
  }
  *out = std::move(values);
  return true;
}

bool MapReader::has(std::string_view key) const {
  return node_ != nullptr && node_->find(key) != nullptr;
}

void MapReader::require(std::string_view key) {
  if (!has(key)) diagnostics_->add(line_, path_of(key), "must be given");
}

void MapReader::finish() {
  if (node_ == nullptr) return;
  for (const YamlEntry& entry : node_->entries) {
    if (std::find(asked_.begin(), asked_.end(), entry.key) != asked_.end()) continue;
    std::string allowed;
    for (const std::string& key : asked_) allowed.append(allowed.empty() ? "" : ", ").append(key);
    diagnostics_->add(entry.line, path_of(entry.key), "unknown key; allowed here: " + allowed);
  }
}

void MapReader::fail(const YamlNode& at, std::string_view key, std::string_view what) {
  diagnostics_->add(at.line, path_of(key), what);
}

std::string MapReader::path_of(std::string_view key) const {
  std::string path = path_;
  if (!path.empty() && !key.empty()) path.push_back('.');
  return path.append(key);
}

// Longer texts and control characters would make a log line unreadable, or two.
std::string MapReader::quote(std::string_view text) {
  constexpr size_t kShown = 48;
  std::string quoted = "\"";
  for (const char c : text.substr(0, kShown)) {
    quoted.push_back(static_cast<unsigned char>(c) < 0x20 || c == 0x7F ? '?' : c);
  }
  if (text.size() > kShown) quoted.append("...");
  return quoted.append("\"");
}

}  // namespace thinkv::ops
