// pool_choice.h: which of a daemon's pools an engine means that named none.
//
// Threads: any; looks at the calling thread's current GPU.
#pragma once

#include <string>

#include "thinkv/internal/protocol.h"
#include "thinkv/result.h"

namespace thinkv::client {

// The name of the pool on this thread's current GPU (cuda::current_gpu). The driver is loaded only
// if one of the pools is on a GPU. Errors: kInvalidArgument, listing the pools (none of them is
// there); kUnavailable (a message that no daemon sends).
[[nodiscard]] Result<std::string> choose_pool(const protocol::Pools& pools);

}  // namespace thinkv::client
