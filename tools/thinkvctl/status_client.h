// status_client.h: asks a running thinkvd for its status over the control socket.
#pragma once

#include <string>

#include "thinkv/result.h"

namespace thinkv::ctl {

// $THINKV_SOCKET, else the user's own socket if it exists, else the system's.
[[nodiscard]] std::string default_socket();

// The status as JSON text. Errors: kUnavailable (no daemon, or it does not answer), kPermission,
// or what the daemon said. *why is a sentence for a person.
[[nodiscard]] Result<std::string> fetch_status(const std::string& socket, std::string* why);

}  // namespace thinkv::ctl
