#include "daemon/ops/metrics.h"

#include <prometheus/collectable.h>
#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <exception>
#include <initializer_list>
#include <mutex>

#include "daemon/ops/totals.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/version.h"

namespace thinkv::ops {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

// Appends to one family.
class Family {
 public:
  Family(std::vector<MetricFamily>* out, MetricType type, const char* name, const char* help)
      : out_(out) {
    family_.type = type;
    family_.name = name;
    family_.help = help;
  }
  ~Family() { out_->push_back(std::move(family_)); }
  Family(const Family&) = delete;
  Family& operator=(const Family&) = delete;

  Family& add(double value, std::initializer_list<ClientMetric::Label> labels = {}) {
    ClientMetric metric;
    metric.label = labels;
    if (family_.type == MetricType::Counter)
      metric.counter.value = value;
    else
      metric.gauge.value = value;
    family_.metric.push_back(std::move(metric));
    return *this;
  }
  Family& add(uint64_t value, std::initializer_list<ClientMetric::Label> labels = {}) {
    return add(static_cast<double>(value), labels);
  }

 private:
  std::vector<MetricFamily>* out_;
  MetricFamily family_;
};

constexpr MetricType kGauge = MetricType::Gauge;
constexpr MetricType kCounter = MetricType::Counter;

void add_pools(const Report& r, std::vector<MetricFamily>* out) {
  Family info(out, kGauge, "thinkv_pool_info", "1, with the pool's backend and GPU as labels.");
  Family bytes(out, kGauge, "thinkv_pool_bytes", "Bytes of a pool by state.");
  Family extents(out, kGauge, "thinkv_extents", "Extents by state.");
  for (const PoolReport& pool : r.pools) {
    const core::Snapshot& s = pool.snapshot;
    const ClientMetric::Label of{"pool", pool.name};
    info.add(uint64_t{1}, {of, {"backend", pool.backend}, {"device", pool.device}});
    bytes.add(s.bytes_total, {of, {"state", "total"}})
        .add(s.bytes_assigned, {of, {"state", "assigned"}})
        .add(s.bytes_granted, {of, {"state", "used"}})
        .add(s.bytes_peak, {of, {"state", "peak"}})
        .add(s.bytes_free, {of, {"state", "free"}})
        .add(s.bytes_reserved_unused, {of, {"state", "reserved"}});
    extents.add(uint64_t{s.extents_unassigned}, {of, {"state", "unassigned"}})
        .add(uint64_t{s.extents_creating}, {of, {"state", "creating"}})
        .add(uint64_t{s.extents_assigned}, {of, {"state", "assigned"}})
        .add(uint64_t{s.extents_retired}, {of, {"state", "retired"}});
  }
}

void add_pages(const Report& r, std::vector<MetricFamily>* out) {
  Family pages(out, kGauge, "thinkv_pages", "Pages of assigned extents by head_dim and state.");
  Family sizes(out, kGauge, "thinkv_page_size_bytes", "Bytes of a page by head_dim.");
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    const ClientMetric::Label dim{"head_dim", std::to_string(kHeadDims[c])};
    sizes.add(uint64_t{page_bytes(kHeadDims[c])}, {dim});
    for (const PoolReport& pool : r.pools) {
      const core::ClassSnapshot& one = pool.snapshot.classes[c];
      const ClientMetric::Label of{"pool", pool.name};
      pages.add(one.granted_pages - one.lease_pages, {of, dim, {"state", "taken"}})
          .add(one.lease_pages, {of, dim, {"state", "leased"}})
          .add(one.free_pages, {of, dim, {"state", "free"}});
    }
  }
}

void add_tenants(const Report& r, std::vector<MetricFamily>* out) {
  Family used(out, kGauge, "thinkv_tenant_bytes", "Bytes granted to a tenant, leases included.");
  Family leased(out, kGauge, "thinkv_tenant_leased_bytes", "Bytes granted but not taken yet.");
  Family quota(out, kGauge, "thinkv_tenant_quota_bytes", "Reserve (min) and limit (max).");
  Family clients(out, kGauge, "thinkv_clients", "Connected engines.");
  Family sequences(out, kGauge, "thinkv_sequences", "Open sequences.");
  Family failures(out, kCounter, "thinkv_allocation_failures_total",
                  "Requests for pages that were refused.");
  for (const PoolReport& pool : r.pools) {
    const ClientMetric::Label of{"pool", pool.name};
    for (const core::TenantSnapshot& t : pool.snapshot.tenants) {
      const ClientMetric::Label tenant{"tenant", t.name};
      used.add(t.used_bytes, {of, tenant});
      leased.add(t.lease_bytes, {of, tenant});
      quota.add(t.reserve_bytes, {of, tenant, {"bound", "min"}})
          .add(t.limit_bytes, {of, tenant, {"bound", "max"}});
      clients.add(uint64_t{t.clients}, {of, tenant});
      sequences.add(t.sequences, {of, tenant});
      failures.add(t.failed_quota, {of, tenant, {"reason", "quota"}})
          .add(t.failed_exhausted, {of, tenant, {"reason", "pool_full"}});
    }
  }
}

void add_requests(const Report& r, std::vector<MetricFamily>* out) {
  Family requests(out, kCounter, "thinkv_requests_total", "Ring requests by operation and code.");
  for (const PoolReport& pool : r.pools) {
    const core::Counters& c = pool.snapshot.counters;
    for (size_t op = 0; op < c.requests.size(); ++op) {
      for (size_t code = 0; code < c.requests[op].size(); ++code) {
        // Success always exists, at 0; an error only once it happened.
        if (code != 0 && c.requests[op][code] == 0) continue;
        requests.add(c.requests[op][code],
                     {{"pool", pool.name},
                      {"op", op_name(op)},
                      {"code", error_code_name(static_cast<ErrorCode>(code))}});
      }
    }
  }
}

void add_core_counters(const Report& r, std::vector<MetricFamily>* out) {
  Family granted(out, kCounter, "thinkv_allocated_pages_total", "Pages granted.");
  Family freed(out, kCounter, "thinkv_freed_pages_total", "Pages that came back.");
  Family cut(out, kCounter, "thinkv_refills_cut_total", "Lease refills below the watermark.");
  Family exits(out, kCounter, "thinkv_client_exits_total", "Engines that ended, by cause.");
  Family violations(out, kCounter, "thinkv_protocol_violations_total",
                    "Engines that broke the protocol.");
  Family created(out, kCounter, "thinkv_extents_created_total", "Extents made.");
  Family failed(out, kCounter, "thinkv_extents_failed_total", "Extents that could not be made.");
  for (const PoolReport& pool : r.pools) {
    const core::Counters& c = pool.snapshot.counters;
    const ClientMetric::Label of{"pool", pool.name};
    granted.add(c.pages_granted, {of});
    freed.add(c.pages_returned, {of, {"cause", "return"}})
        .add(c.pages_reclaimed, {of, {"cause", "client_exit"}});
    cut.add(c.refills_cut, {of});
    for (uint32_t i = 0; i < core::kEndCauseCount; ++i) {
      const char* const cause = core::end_cause_name(static_cast<core::EndCause>(i));
      exits.add(c.ended[i], {of, {"cause", cause}});
    }
    violations.add(c.violations, {of});
    created.add(c.extents_created, {of});
    failed.add(c.extents_failed, {of});
  }
}

void add_server(const Report& r, std::vector<MetricFamily>* out) {
  const ServerReport& s = r.server;
  uint64_t depth = 0;
  for (const ClientReport& client : r.clients) depth += client.requests_waiting;
  Family(out, kGauge, "thinkv_ring_depth", "Requests that wait in rings.").add(depth);
  Family(out, kCounter, "thinkv_ring_full_total", "Turns in which a ring had no place.")
      .add(s.completions_full, {{"direction", "completion"}});
  Family(out, kCounter, "thinkv_doorbells_total", "Wake-ups through a bell.")
      .add(s.bells, {{"direction", "client_to_daemon"}});
  Family(out, kCounter, "thinkv_parks_total", "Clients whose rings went from hot to parked.")
      .add(s.parks);
  Family(out, kGauge, "thinkv_event_loop_lag_seconds", "Lateness of the last timer.")
      .add(static_cast<double>(s.loop_lag_ns) / 1e9);
  Family(out, kCounter, "thinkv_control_messages_total", "Messages on control sockets.")
      .add(s.messages);
  Family(out, kCounter, "thinkv_accept_failures_total", "Connections lost for want of descriptors.")
      .add(s.accept_failures);
  Family rejected(out, kCounter, "thinkv_connections_rejected_total", "Connections refused.");
  for (const auto& [reason, count] : s.rejected) rejected.add(count, {{"reason", reason}});
}

void add_process(const Report& r, std::vector<MetricFamily>* out) {
  Family(out, kGauge, "thinkv_build_info", "1, with the version as labels.")
      .add(uint64_t{1},
           {{"version", kVersionText},
            {"protocol", std::to_string(kProtocolMajor) + "." + std::to_string(kProtocolMinor)},
            {"backend", backend_of(r)}});
  Family(out, kGauge, "thinkv_start_time_seconds", "Start of the daemon, Unix time.")
      .add(r.start_time);
  Family(out, kGauge, "thinkv_config_last_reload_successful", "1 if the last reload was taken.")
      .add(uint64_t{r.reload.successful ? 1u : 0u});
  Family(out, kGauge, "thinkv_config_last_reload_success_timestamp_seconds",
         "Unix time of the configuration in use.")
      .add(r.reload.success_time);
  Family(out, kCounter, "thinkv_config_reloads_total", "Reloads by result.")
      .add(r.reload.succeeded, {{"result", "success"}})
      .add(r.reload.failed, {{"result", "failure"}});
}

std::vector<MetricFamily> families(const Report& report) {
  std::vector<MetricFamily> out;
  add_process(report, &out);
  add_pools(report, &out);
  add_pages(report, &out);
  add_tenants(report, &out);
  add_requests(report, &out);
  add_core_counters(report, &out);
  add_server(report, &out);
  return out;
}

}  // namespace

class Metrics::Source : public prometheus::Collectable {
 public:
  [[nodiscard]] std::vector<MetricFamily> Collect() const override {
    const std::lock_guard lock(mutex_);
    return families(report_);
  }
  void publish(const Report& report) {
    const std::lock_guard lock(mutex_);
    report_ = report;
  }

 private:
  mutable std::mutex mutex_;
  Report report_;
};

class Metrics::Endpoint {
 public:
  explicit Endpoint(const std::string& bind) : exposer(bind, 2) {}
  prometheus::Exposer exposer;
};

Metrics::Metrics()
    : source_(std::make_shared<Source>()) {}  // shared: scrape threads lock a weak_ptr to it
Metrics::~Metrics() = default;

Result<std::unique_ptr<Metrics>> Metrics::start(const std::string& address, uint32_t port,
                                                std::string* why) {
  std::unique_ptr<Metrics> metrics(new Metrics());
  try {
    metrics->endpoint_ = std::make_unique<Endpoint>(address + ":" + std::to_string(port));
    metrics->endpoint_->exposer.RegisterCollectable(metrics->source_);
    const std::vector<int> ports = metrics->endpoint_->exposer.GetListeningPorts();
    metrics->port_ = ports.empty() ? port : static_cast<uint32_t>(ports[0]);
  } catch (const std::exception& error) {
    *why = "cannot listen on " + address + ":" + std::to_string(port) + " for metrics (" +
           error.what() + "): is the port taken? set metrics.port, or off";
    return make_error(ErrorCode::kUnavailable, "metrics endpoint");
  }
  return metrics;
}

void Metrics::publish(const Report& report) {
  source_->publish(report);
}

std::string metrics_text(const Report& report) {
  return prometheus::TextSerializer().Serialize(families(report));
}

}  // namespace thinkv::ops
