// The report as JSON and as metrics, and the numbers with units of the files.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "daemon/ops/metrics.h"
#include "daemon/ops/scalars.h"
#include "daemon/ops/status.h"
#include "daemon/ops/totals.h"

namespace thinkv::ops {
namespace {

Report sample() {
  Report report;
  report.now_ns = 5'000'000'000u;
  report.pools.push_back({"default", "host", "", {}});
  core::Snapshot& s = report.pools[0].snapshot;
  s.bytes_total = 1000;
  s.bytes_granted = 400;
  s.classes[0].granted_pages = 10;
  s.classes[0].lease_pages = 4;
  core::TenantSnapshot tenant;
  tenant.id = TenantId(1);
  tenant.name = "prod";
  tenant.used_bytes = 400;
  tenant.failed_quota = 3;
  s.tenants.push_back(tenant);
  core::ClientSnapshot client;
  client.id = ClientId(9);
  client.tenant = TenantId(1);
  client.name = "qq\xffzzq";  // not UTF-8
  client.connected_ns = 3'000'000'000u;
  s.clients.push_back(client);
  s.counters.requests[1][0] = 12;
  s.counters.requests[5][3] = 2;
  s.counters.ended[1] = 4;
  ClientReport told;
  told.id = 9;
  told.tokens = 77;
  told.requests_waiting = 5;
  report.clients.push_back(told);
  report.server.rejected = {{"version", 6}};
  report.reload.successful = false;
  report.reload.problems = "f.yaml:3: pool: bad";
  return report;
}

TEST(Status, JoinsTheCoreAndTheClientsCounters) {
  const auto status = nlohmann::json::parse(status_json(sample()));
  EXPECT_EQ(status["pool"]["bytes_total"], 1000);
  EXPECT_EQ(status["pool"]["bytes_used"], 400);
  EXPECT_EQ(status["clients"][0]["tenant"], "prod");
  EXPECT_EQ(status["clients"][0]["counters"]["tokens"], 77);
  EXPECT_EQ(status["clients"][0]["connected_seconds"], 2.0);
  EXPECT_EQ(status["counters"]["clients_ended"]["killed"], 4);
  EXPECT_EQ(status["config"]["problems"], "f.yaml:3: pool: bad");
}

// The sample with a second pool, on a GPU, that has the same tenant and policy.
Report sample_of_two() {
  Report report = sample();
  core::PolicySnapshot policy{};
  policy.params.name[0] = 'p';
  policy.sequences = 2;
  report.pools[0].snapshot.policies.push_back(policy);
  PoolReport second{"gpu1", "cuda", "GPU-1", report.pools[0].snapshot};
  second.snapshot.bytes_granted = 50;
  second.snapshot.clients[0].id = ClientId(10);
  second.snapshot.policies[0].sequences = 5;
  report.pools.push_back(second);
  return report;
}

TEST(Status, SeveralPoolsStandBesideTheirSum) {
  const auto status = nlohmann::json::parse(status_json(sample_of_two()));
  ASSERT_EQ(status["pools"].size(), 2u);
  EXPECT_EQ(status["pools"][0]["name"], "default");
  EXPECT_EQ(status["pools"][0]["bytes_used"], 400);
  EXPECT_EQ(status["pools"][1]["name"], "gpu1");
  EXPECT_EQ(status["pools"][1]["device"], "GPU-1");
  EXPECT_EQ(status["pools"][1]["bytes_used"], 50);
  EXPECT_EQ(status["pools"][1]["counters"]["clients_ended"]["killed"], 4);
  EXPECT_EQ(status["pool"]["backend"], "mixed");
  EXPECT_EQ(status["pool"]["bytes_used"], 450);
  EXPECT_EQ(status["pool"]["page_classes"][0]["granted_pages"], 20);
  EXPECT_EQ(status["counters"]["clients_ended"]["killed"], 8);
  EXPECT_EQ(status["counters"]["requests"]["ping"], 24);
  EXPECT_EQ(status["tenants"][1]["pool"], "gpu1");
  EXPECT_EQ(status["clients"][1]["pool"], "gpu1");
  EXPECT_EQ(status["clients"][1]["tenant"], "prod");
}

TEST(Status, APolicyOfSeveralPoolsIsShownOnceUnlessReplaced) {
  Report report = sample_of_two();
  auto policies = nlohmann::json::parse(status_json(report))["policies"];
  ASSERT_EQ(policies.size(), 1u);
  EXPECT_EQ(policies[0]["sequences"], 7);
  report.pools[1].snapshot.policies[0].current = false;
  policies = nlohmann::json::parse(status_json(report))["policies"];
  ASSERT_EQ(policies.size(), 2u);
  EXPECT_EQ(policies[1]["sequences"], 5);
}

TEST(Totals, EveryCounterIsAddedUp) {
  constexpr size_t kWords = sizeof(core::Counters) / sizeof(uint64_t);
  std::array<uint64_t, kWords> words{};
  for (size_t i = 0; i < kWords; ++i) words[i] = i + 1;
  Report report;
  for (int pool = 0; pool < 3; ++pool) {
    report.pools.emplace_back();
    core::Counters& counters = report.pools.back().snapshot.counters;
    std::memcpy(static_cast<void*>(&counters), words.data(), sizeof counters);
    report.pools.back().snapshot.extent_bytes = 64;
  }
  const core::Snapshot total = total_of(report);
  std::array<uint64_t, kWords> sums{};
  std::memcpy(sums.data(), &total.counters, sizeof total.counters);
  for (size_t i = 0; i < kWords; ++i) EXPECT_EQ(sums[i], 3 * (i + 1)) << "word " << i;
  EXPECT_EQ(total.extent_bytes, 64u);
  report.pools[2].snapshot.extent_bytes = 32;
  EXPECT_EQ(total_of(report).extent_bytes, 0u);
}

TEST(Metrics, SeveralPoolsAreToldApartByTheirLabel) {
  const std::string text = metrics_text(sample_of_two());
  for (const char* line :
       {"thinkv_pool_bytes{pool=\"default\",state=\"used\"} 400\n",
        "thinkv_pool_bytes{pool=\"gpu1\",state=\"used\"} 50\n",
        "thinkv_tenant_bytes{pool=\"gpu1\",tenant=\"prod\"} 400\n",
        "thinkv_allocated_pages_total{pool=\"gpu1\"} 0\n",
        "thinkv_pool_info{pool=\"gpu1\",backend=\"cuda\",device=\"GPU-1\"} 1\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << text;
  }
}

TEST(Status, AClientThatReportedNothingIsStillListed) {
  Report report = sample();
  report.clients.clear();
  const auto status = nlohmann::json::parse(status_json(report));
  EXPECT_EQ(status["clients"][0]["counters"]["tokens"], 0);
}

TEST(Status, EmptyReportIsValid) {
  const auto status = nlohmann::json::parse(status_json(Report{}));
  EXPECT_TRUE(status["clients"].empty());
  EXPECT_TRUE(status["tenants"].empty());
}

TEST(Metrics, LinesCarryValuesAndLabels) {
  const std::string text = metrics_text(sample());
  for (const char* line :
       {"thinkv_pool_bytes{pool=\"default\",state=\"used\"} 400\n",
        "thinkv_tenant_bytes{pool=\"default\",tenant=\"prod\"} 400\n",
        "thinkv_pages{pool=\"default\",head_dim=\"64\",state=\"taken\"} 6\n",
        "thinkv_pages{pool=\"default\",head_dim=\"64\",state=\"leased\"} 4\n",
        "thinkv_requests_total{pool=\"default\",op=\"ping\",code=\"ok\"} 12\n",
        "thinkv_requests_total{pool=\"default\",op=\"need_pages\",code=\"quota exceeded\"} 2\n",
        "thinkv_allocation_failures_total{pool=\"default\",tenant=\"prod\",reason=\"quota\"} 3\n",
        "thinkv_client_exits_total{pool=\"default\",cause=\"killed\"} 4\n", "thinkv_ring_depth 5\n",
        "thinkv_connections_rejected_total{reason=\"version\"} 6\n",
        "thinkv_config_last_reload_successful 0\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << text;
  }
}

TEST(Metrics, NoClientNamePidOrPathIsALabel) {
  const std::string text = metrics_text(sample());
  EXPECT_EQ(text.find("zzq"), std::string::npos);
  EXPECT_EQ(text.find("pid"), std::string::npos);
}

TEST(Metrics, EveryFamilyIsOursAndHasHelpAndCountersEndInTotal) {
  const std::string text = metrics_text(sample());
  size_t families = 0;
  for (size_t at = text.find("# TYPE "); at != std::string::npos;
       at = text.find("# TYPE ", at + 1)) {
    const std::string line = text.substr(at + 7, text.find('\n', at) - at - 7);
    const std::string name = line.substr(0, line.find(' '));
    const bool counter = line.ends_with(" counter");
    EXPECT_TRUE(name.starts_with("thinkv_")) << name;
    EXPECT_EQ(counter, name.ends_with("_total")) << name;
    EXPECT_NE(text.find("# HELP " + name + " "), std::string::npos) << name;
    ++families;
  }
  EXPECT_GT(families, 25u);
}

TEST(Metrics, ATakenPortIsAnErrorWithWhatToDo) {
  std::string why;
  auto first = Metrics::start("127.0.0.1", 0, &why);
  ASSERT_TRUE(first) << why;
  EXPECT_FALSE(Metrics::start("127.0.0.1", (*first)->port(), &why));
  EXPECT_NE(why.find("set metrics.port, or off"), std::string::npos) << why;
}

TEST(Scalars, Bytes) {
  EXPECT_EQ(*parse_bytes("512MiB"), uint64_t{512} << 20);
  EXPECT_EQ(*parse_bytes("0B"), 0u);
  EXPECT_EQ(*parse_bytes("16777215TiB"), uint64_t{16777215} << 40);
  for (const char* bad : {"", "MiB", "1", "1 MiB", "1mib", "1MB", "+1MiB", "-1MiB", "1e3MiB",
                          "01MiB", "16777216TiB", "18446744073709551616B", "1MiB "}) {
    EXPECT_FALSE(parse_bytes(bad)) << bad;
  }
  EXPECT_EQ(format_bytes(uint64_t{3} << 30), "3GiB");
  EXPECT_EQ(format_bytes(1025), "1025B");
  EXPECT_EQ(format_bytes(0), "0B");
}

TEST(Scalars, IntegersTimesSharesAndDecimals) {
  EXPECT_EQ(*parse_integer("18446744073709551615"), UINT64_MAX);
  EXPECT_EQ(*parse_duration_ms("2min"), 120'000u);
  EXPECT_EQ(*parse_percent("100%"), 100u);
  EXPECT_EQ(*parse_decimal("0.25"), 0.25);
  for (const char* bad : {"", "-1", "+1", "007", "1.0", "0x1", "18446744073709551616", " 1"}) {
    EXPECT_FALSE(parse_integer(bad)) << bad;
  }
  for (const char* bad : {"10", "s", "10 s", "1d", "-1s", "99999999999999999999h"}) {
    EXPECT_FALSE(parse_duration_ms(bad)) << bad;
  }
  for (const char* bad : {"%", "101%", "5", "1.5%", "-1%"}) EXPECT_FALSE(parse_percent(bad)) << bad;
  for (const char* bad : {"", ".5", "5.", "1.2.3", "1e3", "nan", "inf", "-0.5", "00.5"}) {
    EXPECT_FALSE(parse_decimal(bad)) << bad;
  }
  EXPECT_TRUE(*parse_boolean("true"));
  for (const char* bad : {"", "yes", "True", "1", "on"}) EXPECT_FALSE(parse_boolean(bad)) << bad;
}

}  // namespace
}  // namespace thinkv::ops
