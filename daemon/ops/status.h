// status.h: the report as JSON, what `thinkvctl status --json` prints.
#pragma once

#include <string>

#include "daemon/ops/report.h"

namespace thinkv::ops {

[[nodiscard]] std::string status_json(const Report& report);

}  // namespace thinkv::ops
