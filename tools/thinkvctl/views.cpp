#include "tools/thinkvctl/views.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "tools/thinkvctl/table.h"

namespace thinkv::ctl {
namespace {

using nlohmann::json;

const json& child(const json& node, const char* key) {
  static const json kNothing = json::object();
  if (!node.is_object()) return kNothing;
  const auto found = node.find(key);
  return found == node.end() ? kNothing : *found;
}

uint64_t number(const json& node, const char* key) {
  const json& value = child(node, key);
  return value.is_number_unsigned() ? value.get<uint64_t>() : 0;
}

double real(const json& node, const char* key) {
  const json& value = child(node, key);
  return value.is_number() ? value.get<double>() : 0.0;
}

std::string text(const json& node, const char* key) {
  const json& value = child(node, key);
  return value.is_string() ? value.get<std::string>() : std::string();
}

std::string bytes(const json& node, const char* key) {
  return human_bytes(number(node, key));
}
std::string count(const json& node, const char* key) {
  return human_count(number(node, key));
}

std::string percent(uint64_t part, uint64_t whole) {
  if (whole == 0) return "-";
  return fmt::format("{:.1f}%", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

// How many times smaller than a 16-bit cache of the same tokens.
std::string ratio(const json& counters) {
  const uint64_t held = number(counters, "bytes_held");
  const uint64_t full = number(counters, "bytes_f16");
  if (held == 0 || full == 0) return "-";
  return fmt::format("{:.1f}x", static_cast<double>(full) / static_cast<double>(held));
}

std::string thoughts(const json& counters) {
  const json& t = child(counters, "thoughts");
  return fmt::format("{}/{}/{}", number(t, "reasoning"), number(t, "execution"),
                     number(t, "transition"));
}

std::string heading(const json& status) {
  return fmt::format("thinkvd {} (protocol {}), pid {}, up {}, {}", text(status, "version"),
                     text(status, "protocol"), number(status, "pid"),
                     human_seconds(real(status, "uptime_seconds")), text(status, "socket"));
}

bool several_pools(const json& status) {
  return child(status, "pools").size() > 1;
}

// Adds the pool's column where there is more than one to tell apart.
std::vector<Column> with_pool(const json& status, std::vector<Column> columns) {
  if (several_pools(status)) columns.insert(columns.begin(), {"pool", Align::kLeft});
  return columns;
}
std::vector<std::string> with_pool(const json& status, const std::string& pool,
                                   std::vector<std::string> cells) {
  if (several_pools(status)) cells.insert(cells.begin(), pool);
  return cells;
}

std::vector<std::string> pool_cells(const json& pool) {
  const json& extents = child(pool, "extents");
  const uint64_t assigned = number(extents, "assigned");
  const uint64_t all = assigned + number(extents, "unassigned") + number(extents, "creating") +
                       number(extents, "retired");
  return {bytes(pool, "bytes_total"),
          bytes(pool, "bytes_used"),
          percent(number(pool, "bytes_used"), number(pool, "bytes_total")),
          bytes(pool, "bytes_peak"),
          bytes(pool, "bytes_free"),
          fmt::format("{} of {}", assigned, all),
          count(pool, "sequences")};
}

const std::vector<Column> kPoolColumns = {{"total"}, {"used"},    {"used %"},   {"peak"},
                                          {"free"},  {"extents"}, {"sequences"}};

std::string pool_table(const json& status) {
  if (!several_pools(status)) {
    const json& pool = child(status, "pool");
    Table table("Pool on backend " + text(pool, "backend"), kPoolColumns);
    table.add(pool_cells(pool));
    return table.render();
  }
  std::vector<Column> columns = {{"pool", Align::kLeft}, {"backend", Align::kLeft}};
  columns.insert(columns.end(), kPoolColumns.begin(), kPoolColumns.end());
  columns.emplace_back("GPU", Align::kLeft);
  Table table("Pools", columns);
  for (const json& pool : child(status, "pools")) {
    std::vector<std::string> cells = pool_cells(pool);
    cells.insert(cells.begin(), {text(pool, "name"), text(pool, "backend")});
    cells.push_back(text(pool, "device"));
    table.add(std::move(cells));
  }
  return table.render();
}

std::string tenants_table(const json& status) {
  Table table("Tenants", with_pool(status, {{"name", Align::kLeft},
                                            {"used"},
                                            {"leased"},
                                            {"reserve"},
                                            {"limit"},
                                            {"priority"},
                                            {"clients"},
                                            {"sequences"},
                                            {"refused"}}));
  for (const json& tenant : child(status, "tenants")) {
    table.add(with_pool(
        status, text(tenant, "pool"),
        {text(tenant, "name"), bytes(tenant, "used_bytes"), bytes(tenant, "lease_bytes"),
         bytes(tenant, "reserve_bytes"), bytes(tenant, "limit_bytes"), count(tenant, "priority"),
         count(tenant, "clients"), count(tenant, "sequences"),
         human_count(number(tenant, "failed_quota") + number(tenant, "failed_exhausted"))}));
  }
  return table.render();
}

std::string clients_table(const json& status) {
  Table table("Clients (thoughts: reasoning/execution/transition; ratio: against 16 bits)",
              with_pool(status, {{"pid"},
                                 {"name", Align::kLeft},
                                 {"tenant", Align::kLeft},
                                 {"granted"},
                                 {"leased"},
                                 {"seqs"},
                                 {"tokens"},
                                 {"held"},
                                 {"ratio"},
                                 {"evicted"},
                                 {"reused"},
                                 {"thoughts"}}));
  table.set_empty_text("no engine is connected");
  for (const json& client : child(status, "clients")) {
    const json& told = child(client, "counters");
    table.add(with_pool(
        status, text(client, "pool"),
        {std::to_string(number(client, "pid")), text(client, "name"), text(client, "tenant"),
         bytes(client, "granted_bytes"), bytes(client, "lease_bytes"), count(client, "sequences"),
         count(told, "tokens"), bytes(told, "bytes_held"), ratio(told),
         count(told, "evicted_slots"), count(told, "reused_slots"), thoughts(told)}));
  }
  return table.render();
}

std::string warnings(const json& status) {
  const json& config = child(status, "config");
  const json& successful = child(config, "last_reload_successful");
  std::string out;
  if (successful.is_boolean() && !successful.get<bool>()) {
    out.append("The last reload was refused, the old configuration is in use:\n" +
               text(config, "problems") + "\n");
  }
  if (text(status, "metrics").starts_with("failed")) {
    out.append("Metrics " + printable(text(status, "metrics")) + "\n");
  }
  return out;
}

std::string colored(const std::string& text, bool color, const char* code) {
  return color ? fmt::format("\x1b[{}m{}\x1b[0m", code, text) : text;
}

// Green below 75 %, yellow below 90 %, then red.
const char* load_color(uint64_t used, uint64_t total) {
  if (total == 0 || used < total / 4 * 3) return "32";
  return used < total / 10 * 9 ? "33" : "31";
}

std::string top_line(const std::string& label, uint64_t used, uint64_t leased, uint64_t total,
                     bool color) {
  const std::string drawn = colored(bar(used - std::min(used, leased), leased, total, 40), color,
                                    load_color(used, total));
  return fmt::format("{:<24.24} {} {:>10} / {:<10} {:>6}\n", printable(label), drawn,
                     human_bytes(used), human_bytes(total), percent(used, total));
}

// The lines of one pool. Entries that name no pool (an older daemon) belong to the only one.
std::string top_pool(const json& status, const json& pool, const std::string& label, bool color) {
  std::string tenants;
  uint64_t leased = 0;
  for (const json& tenant : child(status, "tenants")) {
    if (several_pools(status) && text(tenant, "pool") != text(pool, "name")) continue;
    leased += number(tenant, "lease_bytes");
    tenants.append(top_line("  " + text(tenant, "name"), number(tenant, "used_bytes"),
                            number(tenant, "lease_bytes"), number(tenant, "limit_bytes"), color));
  }
  return top_line(label + " (" + text(pool, "backend") + ")", number(pool, "bytes_used"), leased,
                  number(pool, "bytes_total"), color) +
         tenants;
}

// What a client could have at most: all of its pool.
uint64_t total_for(const json& status, const json& client) {
  for (const json& pool : child(status, "pools")) {
    if (text(pool, "name") == text(client, "pool")) return number(pool, "bytes_total");
  }
  return number(child(status, "pool"), "bytes_total");
}

}  // namespace

std::string status_view(const json& status) {
  return heading(status) + "\n" + pool_table(status) + tenants_table(status) +
         clients_table(status) + warnings(status);
}

std::string policies_view(const json& status) {
  Table table("Policies", {{"name", Align::kLeft},
                           {"prompt", Align::kLeft},
                           {"reasoning", Align::kLeft},
                           {"execution", Align::kLeft},
                           {"transition", Align::kLeft},
                           {"rotated", Align::kLeft},
                           {"budget"},
                           {"sequences"},
                           {"description", Align::kLeft}});
  for (const json& policy : child(status, "policies")) {
    const bool evicts = child(policy, "evicts").is_boolean() && child(policy, "evicts").get<bool>();
    const uint64_t budget = number(policy, "budget_tokens");
    const bool current =
        !child(policy, "current").is_boolean() || child(policy, "current").get<bool>();
    const json& rotation = child(policy, "rotation");
    table.add({text(policy, "name") + (current ? "" : " (replaced)"), text(policy, "prompt"),
               text(policy, "reasoning"), text(policy, "execution"), text(policy, "transition"),
               rotation.is_boolean() && rotation.get<bool>() ? "yes" : "no",
               !evicts       ? "no eviction"
               : budget == 0 ? "none"
                             : human_count(budget),
               count(policy, "sequences"), text(policy, "description")});
  }
  return table.render();
}

std::string top_view(const json& status, bool color) {
  std::string out = heading(status) + "\n\n";
  if (several_pools(status)) {
    for (const json& pool : child(status, "pools")) {
      out.append(top_pool(status, pool, text(pool, "name"), color));
    }
  } else {
    out.append(top_pool(status, child(status, "pool"), "pool", color));
  }
  std::vector<json> clients;
  for (const json& client : child(status, "clients")) clients.push_back(client);
  std::sort(clients.begin(), clients.end(), [](const json& a, const json& b) {
    return number(a, "granted_bytes") > number(b, "granted_bytes");
  });
  out.append("\n").append(clients.empty() ? "no engine is connected\n" : "");
  for (const json& client : clients) {
    const json& told = child(client, "counters");
    out.append(top_line(fmt::format("{} {}", number(client, "pid"), text(client, "name")),
                        number(client, "granted_bytes"), number(client, "lease_bytes"),
                        total_for(status, client), color));
    out.append(fmt::format("{:<24} {} tokens, held {}, ratio {}, evicted {}, reused {}\n", "",
                           count(told, "tokens"), bytes(told, "bytes_held"), ratio(told),
                           count(told, "evicted_slots"), count(told, "reused_slots")));
  }
  return out.append("\n# in use   = leased, not taken yet\n").append(warnings(status));
}

}  // namespace thinkv::ctl
