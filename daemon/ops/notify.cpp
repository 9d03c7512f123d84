#include "daemon/ops/notify.h"

#include <systemd/sd-daemon.h>

namespace thinkv::ops {

void notify_ready() {
  (void)::sd_notify(0, "READY=1\nSTATUS=serving");
}
void notify_reloading() {
  (void)::sd_notify(0, "RELOADING=1\nSTATUS=reloading");
}
void notify_stopping() {
  (void)::sd_notify(0, "STOPPING=1\nSTATUS=stopping");
}

}  // namespace thinkv::ops
