// totals.h: all pools of a daemon together.
#pragma once

#include <string>

#include "daemon/ops/report.h"

namespace thinkv::ops {

// "host", "cuda", or "mixed" where the pools differ.
[[nodiscard]] std::string backend_of(const Report& report);

// The numbers of the pools added up, the lists left empty. A sum of peaks is no peak: the pools
// need not have had theirs at one time. extent_bytes: 0 where the pools differ.
[[nodiscard]] core::Snapshot total_of(const Report& report);

}  // namespace thinkv::ops
