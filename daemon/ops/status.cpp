#include "daemon/ops/status.h"

#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>

#include "daemon/ops/totals.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/version.h"

namespace thinkv::ops {
namespace {

using Json = nlohmann::ordered_json;

Json pool_json(const std::string& backend, const core::Snapshot& s) {
  Json classes = Json::array();
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    classes.push_back({{"head_dim", kHeadDims[c]},
                       {"page_bytes", page_bytes(kHeadDims[c])},
                       {"granted_pages", s.classes[c].granted_pages},
                       {"lease_pages", s.classes[c].lease_pages},
                       {"free_pages", s.classes[c].free_pages}});
  }
  return {{"backend", backend},
          {"bytes_total", s.bytes_total},
          {"bytes_used", s.bytes_granted},
          {"bytes_peak", s.bytes_peak},
          {"bytes_free", s.bytes_free},
          {"bytes_assigned", s.bytes_assigned},
          {"bytes_reserved_unused", s.bytes_reserved_unused},
          {"sequences", s.sequences},
          {"extent_bytes", s.extent_bytes},
          {"extents",
           {{"unassigned", s.extents_unassigned},
            {"creating", s.extents_creating},
            {"assigned", s.extents_assigned},
            {"retired", s.extents_retired}}},
          {"lingering_processes", s.lingering_processes},
          {"page_classes", std::move(classes)}};
}

Json tenant_json(const PoolReport& pool, const core::TenantSnapshot& t) {
  return {{"name", t.name},
          {"pool", pool.name},
          {"configured", t.configured},
          {"used_bytes", t.used_bytes},
          {"lease_bytes", t.lease_bytes},
          {"peak_bytes", t.peak_bytes},
          {"reserve_bytes", t.reserve_bytes},
          {"limit_bytes", t.limit_bytes},
          {"weight", t.weight},
          {"priority", t.priority},
          {"clients", t.clients},
          {"sequences", t.sequences},
          {"extents", t.extents},
          {"failed_quota", t.failed_quota},
          {"failed_exhausted", t.failed_exhausted}};
}

Json counters_json(const ClientReport& c) {
  return {
      {"tokens", c.tokens},
      {"steps", c.steps},
      {"live_slots", c.live_slots},
      {"evicted_slots", c.evicted_slots},
      {"reused_slots", c.reused_slots},
      {"demotions", c.demotions},
      {"over_budget_steps", c.over_budget_steps},
      {"thoughts",
       {{"reasoning", c.thoughts[0]}, {"execution", c.thoughts[1]}, {"transition", c.thoughts[2]}}},
      {"bytes_held", c.held_bytes},
      {"bytes_f16", c.f16_bytes}};
}

Json models_json(const std::vector<core::ModelSnapshot>& models) {
  Json list = Json::array();
  for (const core::ModelSnapshot& m : models) {
    list.push_back({{"id", m.id},
                    {"name", m.name},
                    {"layers", m.geometry.layers},
                    {"q_heads", m.geometry.q_heads},
                    {"kv_heads", m.geometry.kv_heads},
                    {"head_dim", m.geometry.head_dim}});
  }
  return list;
}

Json client_json(const Report& report, const PoolReport& pool, const core::ClientSnapshot& c) {
  const auto told = std::find_if(report.clients.begin(), report.clients.end(),
                                 [&](const ClientReport& r) { return r.id == c.id.value(); });
  const ClientReport mine = told == report.clients.end() ? ClientReport{} : *told;
  std::string tenant;
  for (const core::TenantSnapshot& t : pool.snapshot.tenants) {
    if (t.id == c.tenant) tenant = t.name;
  }
  const uint64_t age_ns = report.now_ns > c.connected_ns ? report.now_ns - c.connected_ns : 0;
  return {{"id", c.id.value()},
          {"name", c.name},
          {"pid", c.pid},
          {"uid", c.uid},
          {"tenant", tenant},
          {"pool", pool.name},
          {"connected_seconds", static_cast<double>(age_ns) / 1e9},
          {"granted_bytes", c.granted_bytes},
          {"lease_bytes", c.lease_bytes},
          {"sequences", c.sequences},
          {"models", models_json(c.models)},
          {"rings", {{"requests_waiting", mine.requests_waiting}, {"unanswered", mine.unanswered}}},
          {"counters", counters_json(mine)}};
}

Json policy_json(const Report& report, const core::PolicySnapshot& p) {
  const auto known =
      std::find_if(report.policies.begin(), report.policies.end(),
                   [&](const PolicyReport& r) { return p.current && r.name == p.params.name; });
  Json entry = {{"name", p.params.name},
                {"current", p.current},
                {"sequences", p.sequences},
                {"prompt", format_info(p.params.prompt_format).name},
                {"reasoning", format_info(p.params.thought_format[0]).name},
                {"execution", format_info(p.params.thought_format[1]).name},
                {"transition", format_info(p.params.thought_format[2]).name},
                {"rotation", p.params.rotate != 0},
                {"evicts", p.params.evict != EvictRule::kNone},
                {"budget_tokens", p.params.budget_tokens},
                {"classes", p.params.label_layer_count == 0 ? 1 : 3}};
  if (known != report.policies.end()) {
    entry["description"] = known->description;
    entry["file"] = known->file;
  }
  return entry;
}

// Every pool has the same policies: each is shown once, with the sequences of all pools. A replaced
// one that is still in use is another policy in each pool.
Json policies_json(const Report& report) {
  std::vector<core::PolicySnapshot> merged;
  for (const PoolReport& pool : report.pools) {
    for (const core::PolicySnapshot& p : pool.snapshot.policies) {
      const auto same =
          std::find_if(merged.begin(), merged.end(), [&](const core::PolicySnapshot& other) {
            return p.current && other.current &&
                   std::string_view(p.params.name) == other.params.name;
          });
      if (same == merged.end()) {
        merged.push_back(p);
      } else {
        same->sequences += p.sequences;
      }
    }
  }
  Json list = Json::array();
  for (const core::PolicySnapshot& p : merged) list.push_back(policy_json(report, p));
  return list;
}

Json core_counters_json(const core::Counters& c) {
  Json ended = Json::object();
  for (uint32_t i = 0; i < core::kEndCauseCount; ++i) {
    ended[core::end_cause_name(static_cast<core::EndCause>(i))] = c.ended[i];
  }
  Json requests = Json::object();
  for (size_t op = 0; op < c.requests.size(); ++op) {
    uint64_t total = 0;
    for (const uint64_t count : c.requests[op]) total += count;
    requests[op_name(op)] = total;
  }
  return {{"clients_connected", c.connected},
          {"clients_refused", c.refused},
          {"clients_ended", std::move(ended)},
          {"requests", std::move(requests)},
          {"pages_granted", c.pages_granted},
          {"pages_returned", c.pages_returned},
          {"pages_reclaimed", c.pages_reclaimed},
          {"refills_cut", c.refills_cut},
          {"failed_quota", c.failed_quota},
          {"failed_exhausted", c.failed_exhausted},
          {"violations", c.violations},
          {"sequences_opened", c.sequences_opened},
          {"sequences_closed", c.sequences_closed},
          {"extents_created", c.extents_created},
          {"extents_failed", c.extents_failed},
          {"extents_released", c.extents_released}};
}

Json pools_json(const Report& report) {
  Json list = Json::array();
  for (const PoolReport& pool : report.pools) {
    Json one = {{"name", pool.name}, {"device", pool.device}};
    one.update(pool_json(pool.backend, pool.snapshot));
    one["counters"] = core_counters_json(pool.snapshot.counters);
    list.push_back(std::move(one));
  }
  return list;
}

Json server_json(const ServerReport& s) {
  Json rejected = Json::object();
  for (const auto& [reason, count] : s.rejected) rejected[reason] = count;
  return {{"connections", s.connections},
          {"accepted", s.accepted},
          {"rejected", std::move(rejected)},
          {"messages", s.messages},
          {"throttled", s.throttled},
          {"bells", s.bells},
          {"parks", s.parks},
          {"completions_full", s.completions_full},
          {"accept_failures", s.accept_failures},
          {"loop_lag_seconds", static_cast<double>(s.loop_lag_ns) / 1e9},
          {"loop_lag_max_seconds", static_cast<double>(s.loop_lag_max_ns) / 1e9}};
}

}  // namespace

const char* op_name(size_t op) {
  constexpr std::array<const char*, core::kOpSlots> kNames = {
      "unknown",    "ping",       "open_sequence", "close_sequence",
      "set_budget", "need_pages", "client_stats"};
  return op < kNames.size() ? kNames[op] : "unknown";
}

std::string status_json(const Report& report) {
  Json tenants = Json::array();
  Json clients = Json::array();
  for (const PoolReport& pool : report.pools) {
    for (const core::TenantSnapshot& t : pool.snapshot.tenants) {
      tenants.push_back(tenant_json(pool, t));
    }
    for (const core::ClientSnapshot& c : pool.snapshot.clients) {
      clients.push_back(client_json(report, pool, c));
    }
  }
  const core::Snapshot total = total_of(report);
  const Json status = {
      {"version", kVersionText},
      {"protocol", std::to_string(kProtocolMajor) + "." + std::to_string(kProtocolMinor)},
      {"pid", ::getpid()},
      {"boot_epoch", report.boot_epoch},
      {"uptime_seconds", static_cast<double>(report.uptime_ns) / 1e9},
      {"socket", report.socket},
      {"metrics", report.metrics},
      {"config",
       {{"file", report.config_file},
        {"last_reload_successful", report.reload.successful},
        {"reloads", report.reload.succeeded},
        {"reloads_failed", report.reload.failed},
        {"problems", report.reload.problems}}},
      {"pool", pool_json(backend_of(report), total)},
      {"pools", pools_json(report)},
      {"tenants", std::move(tenants)},
      {"clients", std::move(clients)},
      {"policies", policies_json(report)},
      {"counters", core_counters_json(total.counters)},
      {"server", server_json(report.server)}};
  // Names may hold any bytes: what is not UTF-8 is replaced.
  return status.dump(2, ' ', false, Json::error_handler_t::replace);
}

}  // namespace thinkv::ops
