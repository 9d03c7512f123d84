// metrics.h: the Prometheus endpoint.
//
// A scrape runs on the endpoint's own threads and formats the last report that publish() left
// under a mutex; it never touches the core. Names and units: base units, `_total` only on counters,
// labels only from the configuration and from fixed sets.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/ops/report.h"
#include "thinkv/result.h"

namespace thinkv::ops {

class Metrics {
 public:
  // Listens on address:port (0: any free port). Errors: kUnavailable (*why: the sentence).
  static Result<std::unique_ptr<Metrics>> start(const std::string& address, uint32_t port,
                                                std::string* why);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // Any thread. Copies.
  void publish(const Report& report);
  [[nodiscard]] uint32_t port() const { return port_; }

 private:
  class Source;
  class Endpoint;
  Metrics();
  std::shared_ptr<Source> source_;  // shared: the exposer's interface keeps a weak_ptr to it
  std::unique_ptr<Endpoint> endpoint_;
  uint32_t port_ = 0;
};

// The text that a scrape returns, for tests.
[[nodiscard]] std::string metrics_text(const Report& report);

}  // namespace thinkv::ops
