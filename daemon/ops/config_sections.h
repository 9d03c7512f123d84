// config_sections.h: the sections of thinkvd.yaml that have files of their own. Included by
// config*.cpp alone.
#pragma once

#include <string>
#include <vector>

#include "daemon/ops/config.h"
#include "daemon/ops/map_reader.h"

namespace thinkv::ops {

// `pool` or `pools`. Tenants are read after it: their sizes are compared with the pools'.
void read_pools(MapReader* root, Config* config, Diagnostics* diagnostics,
                std::vector<std::string>* keys);
void read_tenants(MapReader* root, Config* config, Diagnostics* diagnostics,
                  std::vector<std::string>* keys);
// Requires: read_tenants was called.
void read_default_tenant(MapReader* root, Config* config);

// The part of restart_keys() that is about pools.
void add_pool_keys(const Config& current, const Config& next, std::vector<std::string>* keys);

}  // namespace thinkv::ops
