// log.h: the daemon's log: lines on stderr, which systemd or a terminal takes.
//
// No file of our own: a full disk must not stop the event loop. Libraries of the daemon log through
// spdlog's default logger, which this sets up once, before any thread. Lines that a client can
// provoke are limited where they are written.
#pragma once

#include "daemon/ops/config.h"

namespace thinkv::ops {

void start_log(LogLevel level);
void set_log_level(LogLevel level);

}  // namespace thinkv::ops
