// notify.h: tells systemd what the daemon does; nothing without $NOTIFY_SOCKET.
#pragma once

namespace thinkv::ops {

void notify_ready();
void notify_reloading();  // followed by notify_ready()
void notify_stopping();

}  // namespace thinkv::ops
