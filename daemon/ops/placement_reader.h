// placement_reader.h: the sections `entropy` and `tier` of a policy file.
//
// Threads: values.
#pragma once

#include "daemon/ops/map_reader.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::ops {

void read_placement(MapReader* root, PolicyParams* params);

}  // namespace thinkv::ops
