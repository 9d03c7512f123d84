// policy_reader.h: the tree of a policy file as PolicyParams, key by key.
//
// Threads: values.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "daemon/ops/diagnostics.h"
#include "daemon/ops/map_reader.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::ops {

struct PolicySource {
  const YamlNode* tree;            // null: no key is there
  std::string file;                // a calibration file is looked for relative to its folder
  std::vector<std::string>* keys;  // if given, collects every key that a file may hold
};

// Every problem goes to `diagnostics`; the outputs are worth nothing where there was one.
void read_policy(const PolicySource& source, PolicyParams* params, std::string* description,
                 Diagnostics* diagnostics);

// Formats whose slots stand alone.
[[nodiscard]] std::span<const Choice<Format>> format_choices();
// What a rule can name as its format.
[[nodiscard]] std::span<const Choice<Format>> recode_choices();

}  // namespace thinkv::ops
