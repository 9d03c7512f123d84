// policy_file.h: a policy YAML file as PolicyParams, and the set of policies of a daemon.
//
// The schema is shown, with comments, in config/policies/thinkv.yaml.
// Threads: values.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/ops/diagnostics.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::ops {

struct Policy {
  PolicyParams params;
  std::string description;
  std::string file;
};

// `text` as if read from `file`; a calibration file is looked for relative to its folder.
[[nodiscard]] std::optional<Policy> parse_policy(const std::string& text, const std::string& file,
                                                 Diagnostics* diagnostics);
[[nodiscard]] std::optional<Policy> load_policy(const std::string& file, Diagnostics* diagnostics);

struct PolicySet {
  std::vector<Policy> policies;  // by name, ascending, names unique
  [[nodiscard]] const Policy* find(std::string_view name) const;
};

// All `*.yaml` of `directories` (not of their subfolders) and all `files`. Every problem of every
// file goes to `problems`, one a line; nullopt if there was any, or if nothing was found.
[[nodiscard]] std::optional<PolicySet> load_policies(const std::vector<std::string>& directories,
                                                     const std::vector<std::string>& files,
                                                     std::vector<std::string>* problems);

// Every key that a policy file may hold, as dotted paths, sorted.
[[nodiscard]] std::vector<std::string> policy_keys();

// The folders of the shipped policies: beside the program (build tree, bundle) or installed.
// Empty if none exists.
[[nodiscard]] std::vector<std::string> installed_policy_directories();

}  // namespace thinkv::ops
