// rule_reader.h: the list `rules` of a policy file.
//
// Threads: values.
#pragma once

#include <string>
#include <vector>

#include "daemon/ops/diagnostics.h"
#include "daemon/ops/map_reader.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::ops {

// Requires: all other keys of the policy are read, because rules are checked against them.
void read_rules(MapReader* root, PolicyParams* params, Diagnostics* diagnostics,
                std::vector<std::string>* keys);

}  // namespace thinkv::ops
