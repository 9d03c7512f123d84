#include "daemon/ops/policy_file.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>

#include "daemon/ops/map_reader.h"
#include "daemon/ops/policy_reader.h"
#include "daemon/ops/yaml_tree.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::ops {
namespace {

bool find_yaml_files(const std::string& directory, std::vector<std::string>* files,
                     std::vector<std::string>* problems) {
  std::error_code error;
  for (std::filesystem::directory_iterator at(directory, error), end; !error && at != end;
       at.increment(error)) {
    const std::filesystem::path& path = at->path();
    std::error_code ignored;
    if (path.extension() == ".yaml" && at->is_regular_file(ignored)) {
      files->push_back(path.string());
    }
    if (files->size() > limits::kPoliciesMax) break;
  }
  if (error) problems->push_back(directory + ": cannot be read: " + error.message());
  return !error;
}

}  // namespace

std::optional<Policy> parse_policy(const std::string& text, const std::string& file,
                                   Diagnostics* diagnostics) {
  const std::optional<YamlNode> tree = parse_yaml(text, diagnostics);
  if (!tree) return std::nullopt;
  Policy policy;
  policy.file = file;
  if (tree->kind != YamlNode::Kind::kMap) {
    diagnostics->add(tree->line, "",
                     std::string("keys and values are expected, not ") + tree->kind_name());
    return std::nullopt;
  }
  read_policy({.tree = &*tree, .file = file, .keys = nullptr}, &policy.params, &policy.description,
              diagnostics);
  if (!diagnostics->ok()) return std::nullopt;
  if (!policy_params_valid(policy.params)) {
    // The checks above are meant to say this in words; the last word is that of the contract.
    diagnostics->add(0, "", "the values do not go together");
    return std::nullopt;
  }
  return policy;
}

std::optional<Policy> load_policy(const std::string& file, Diagnostics* diagnostics) {
  const std::optional<std::string> text = read_text_file(file, diagnostics);
  if (!text) return std::nullopt;
  return parse_policy(*text, file, diagnostics);
}

const Policy* PolicySet::find(std::string_view name) const {
  for (const Policy& policy : policies) {
    if (name == policy.params.name) return &policy;
  }
  return nullptr;
}

std::optional<PolicySet> load_policies(const std::vector<std::string>& directories,
                                       const std::vector<std::string>& files,
                                       std::vector<std::string>* problems) {
  std::vector<std::string> all = files;
  const size_t before = problems->size();
  for (const std::string& directory : directories) find_yaml_files(directory, &all, problems);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  if (all.size() > limits::kPoliciesMax) {
    problems->push_back("more than " + std::to_string(limits::kPoliciesMax) + " policies");
    return std::nullopt;
  }
  PolicySet set;
  for (const std::string& file : all) {
    Diagnostics diagnostics(file);
    std::optional<Policy> policy = load_policy(file, &diagnostics);
    problems->insert(problems->end(), diagnostics.lines().begin(), diagnostics.lines().end());
    if (!policy) continue;
    if (const Policy* same = set.find(policy->params.name)) {
      problems->push_back(file + ": name: " + MapReader::quote(policy->params.name) +
                          " is already the name of " + same->file);
      continue;
    }
    set.policies.push_back(std::move(*policy));
  }
  if (set.policies.empty() && problems->size() == before) {
    std::string places;
    for (const std::string& directory : directories) places.append(" ").append(directory);
    problems->push_back("no policy found in" + (places.empty() ? " any folder" : places) +
                        ": set policies.directories");
  }
  if (problems->size() != before) return std::nullopt;
  std::sort(set.policies.begin(), set.policies.end(), [](const Policy& a, const Policy& b) {
    return std::strcmp(a.params.name, b.params.name) < 0;
  });
  return set;
}

std::vector<std::string> policy_keys() {
  std::vector<std::string> keys;
  Diagnostics none("");
  Policy policy;
  read_policy({.tree = nullptr, .file = "", .keys = &keys}, &policy.params, &policy.description,
              &none);
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  return keys;
}

std::vector<std::string> installed_policy_directories() {
  std::error_code error;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
  const std::array<std::filesystem::path, 5> places = {
      std::filesystem::path("/etc/thinkv/policies"), program / "../config/policies",
      program / "../../config/policies", program / "../share/thinkv/policies",
      std::filesystem::path("/usr/share/thinkv/policies")};
  for (const std::filesystem::path& place : places) {
    if (!std::filesystem::is_directory(place, error)) continue;
    std::vector<std::string> found = {place.lexically_normal().string()};
    if (std::filesystem::is_directory(place / "formats", error)) {
      found.push_back((place / "formats").lexically_normal().string());
    }
    return found;
  }
  return {};
}

}  // namespace thinkv::ops
