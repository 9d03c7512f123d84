// fork_guard.h: which side of a fork this is.
//
// A forked child has the parent's handles and sockets but not its mappings (MADV_DONTFORK): one
// ring with two writers would corrupt both. Every call of the C ABI compares the number that its
// client was opened under with the current one; a child sees another number.
#pragma once

#include <cstdint>

namespace thinkv::client {

// Changes in each forked child. The first call registers with pthread_atfork.
[[nodiscard]] uint64_t fork_generation();

}  // namespace thinkv::client
