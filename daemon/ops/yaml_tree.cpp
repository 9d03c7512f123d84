#include "daemon/ops/yaml_tree.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <sstream>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/unique_fd.h"

namespace thinkv::ops {

const YamlEntry* YamlNode::find(std::string_view key) const {
  for (const YamlEntry& entry : entries) {
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

const char* YamlNode::kind_name() const {
  switch (kind) {
    case Kind::kNull:
      return "nothing";
    case Kind::kScalar:
      return "a value";
    case Kind::kList:
      return "a list";
    case Kind::kMap:
      return "a map";
  }
  return "nothing";
}

namespace {

uint32_t line_of(const YAML::Mark& mark) {
  return mark.line < 0 ? 0 : static_cast<uint32_t>(mark.line) + 1;
}

// Builds the tree. After the first problem nothing more is built: the events go on, because an
// event handler cannot stop the parser.
class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(Diagnostics* diagnostics) : diagnostics_(diagnostics) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) fail(mark, "a second document; a file holds one");
  }
  void OnDocumentEnd() override {}
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    fail(mark, "aliases (*name) are not allowed: write the value");
  }
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    add_leaf(mark, "", anchor, YamlNode::Kind::kNull, {});
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    add_leaf(mark, tag, anchor, YamlNode::Kind::kScalar, value);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, YamlNode::Kind::kList);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, YamlNode::Kind::kMap);
  }
  void OnMapEnd() override { close(); }

  [[nodiscard]] YamlNode take() { return std::move(root_); }

 private:
  // A container whose end has not come yet, and the key that waits for its value.
  struct Open {
    YamlNode node;
    bool has_key = false;
    std::string key;
    uint32_t key_line = 0;
  };

  void fail(const YAML::Mark& mark, std::string_view what) {
    if (!failed_) diagnostics_->add(line_of(mark), "", what);
    failed_ = true;
  }
  bool accept(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (failed_) return false;
    if (anchor != YAML::NullAnchor) {
      fail(mark, "anchors (&name) are not allowed: write the value where it is used");
    } else if (!tag.empty() && tag != "?" && tag != "!") {
      fail(mark, "tags (!!type) are not allowed");
    } else if (++nodes_ > kYamlNodesMax) {
      fail(mark, "too many values in one file");
    }
    return !failed_;
  }
  void add_leaf(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                YamlNode::Kind kind, const std::string& value) {
    if (!accept(mark, tag, anchor)) return;
    YamlNode node;
    node.kind = kind;
    node.quoted = tag == "!";
    node.line = line_of(mark);
    node.scalar = value;
    attach(mark, std::move(node));
  }
  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
            YamlNode::Kind kind) {
    if (!accept(mark, tag, anchor)) return;
    if (stack_.size() >= kYamlDepthMax) return fail(mark, "nested too deeply");
    if (!stack_.empty() && wants_key()) return fail(mark, "a key must be a plain word");
    Open opened;
    opened.node.kind = kind;
    opened.node.line = line_of(mark);
    stack_.push_back(std::move(opened));
  }
  void close() {
    if (failed_ || stack_.empty()) return;
    YamlNode node = std::move(stack_.back().node);
    stack_.pop_back();
    YAML::Mark mark;
    mark.line = static_cast<int>(node.line) - 1;
    attach(mark, std::move(node));
  }
  [[nodiscard]] bool wants_key() const {
    return stack_.back().node.kind == YamlNode::Kind::kMap && !stack_.back().has_key;
  }
  void attach(const YAML::Mark& mark, YamlNode node) {
    if (stack_.empty()) {
      root_ = std::move(node);
      return;
    }
    Open& parent = stack_.back();
    if (parent.node.kind == YamlNode::Kind::kList) {
      parent.node.items.push_back(std::move(node));
    } else if (parent.has_key) {
      parent.node.entries.push_back({std::move(parent.key), parent.key_line, std::move(node)});
      parent.has_key = false;
    } else {
      take_key(mark, std::move(node));
    }
  }
  void take_key(const YAML::Mark& mark, YamlNode node) {
    if (node.kind != YamlNode::Kind::kScalar || node.scalar.empty()) {
      return fail(mark, "a key must be a plain word");
    }
    Open& parent = stack_.back();
    if (const YamlEntry* first = parent.node.find(node.scalar)) {
      if (!failed_) {
        diagnostics_->add(node.line, node.scalar,
                          "given twice, first in line " + std::to_string(first->line));
      }
      failed_ = true;
      return;
    }
    parent.has_key = true;
    parent.key = std::move(node.scalar);
    parent.key_line = node.line;
  }

  Diagnostics* diagnostics_;
  YamlNode root_;
  std::vector<Open> stack_;
  uint32_t documents_ = 0;
  uint32_t nodes_ = 0;
  bool failed_ = false;
};

}  // namespace

std::optional<YamlNode> parse_yaml(const std::string& text, Diagnostics* diagnostics) {
  if (text.size() > limits::kConfigBytesMax) {
    diagnostics->add(0, "", "larger than 64 KiB");
    return std::nullopt;
  }
  if (text.find('\0') != std::string::npos) {
    diagnostics->add(0, "", "not a text file: it has a zero byte");
    return std::nullopt;
  }
  TreeBuilder builder(diagnostics);
  try {
    std::istringstream in(text);
    YAML::Parser parser(in);
    while (parser.HandleNextDocument(builder)) {
      if (!diagnostics->ok()) break;
    }
  } catch (const YAML::Exception& error) {
    diagnostics->add(line_of(error.mark), "", "not YAML: " + error.msg);
  } catch (const std::exception& error) {
    diagnostics->add(0, "", std::string("not YAML: ") + error.what());
  }
  if (!diagnostics->ok()) return std::nullopt;
  return builder.take();
}

std::optional<std::string> read_text_file(const std::string& path, Diagnostics* diagnostics) {
  // O_NONBLOCK: a fifo at this path must not hang the start.
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) {
    diagnostics->add(0, "", std::string("cannot be read: ") + std::strerror(errno));
    return std::nullopt;
  }
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode)) {
    diagnostics->add(0, "", "not a regular file");
    return std::nullopt;
  }
  std::string text;
  char buffer[8192];
  for (;;) {
    const ssize_t got = ::read(fd.get(), buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      diagnostics->add(0, "", std::string("cannot be read: ") + std::strerror(errno));
      return std::nullopt;
    }
    if (got == 0) return text;
    text.append(buffer, static_cast<size_t>(got));
    if (text.size() > limits::kConfigBytesMax) {
      diagnostics->add(0, "", "larger than 64 KiB");
      return std::nullopt;
    }
  }
}

}  // namespace thinkv::ops
