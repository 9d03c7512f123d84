// status.h: the report as JSON, what `thinkvctl status --json` prints.
//
// `pools` has each pool with its counters; `pool` and `counters` are all of them together.
// `tenants` and `clients` are lists over all pools, with the pool's name in each entry.
#pragma once

#include <string>

#include "daemon/ops/report.h"

namespace thinkv::ops {

[[nodiscard]] std::string status_json(const Report& report);

}  // namespace thinkv::ops
