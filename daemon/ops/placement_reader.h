// placement_reader.h: the sections `entropy` and `tier` of a policy file.
//
// Threads: values.
#pragma once

#include "daemon/ops/diagnostics.h"
#include "daemon/ops/map_reader.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::ops {

// Requires: all other keys of the policy are read, because the sections are checked against them.
void read_placement(MapReader* root, PolicyParams* params, Diagnostics* diagnostics,
                    bool lists_keys);

}  // namespace thinkv::ops
