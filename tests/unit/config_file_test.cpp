// thinkvd.yaml: good files, and for each bad one the exact message.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "daemon/ops/config.h"
#include "daemon/ops/yaml_tree.h"

namespace thinkv::ops {
namespace {

std::optional<Config> parse(const std::string& text, Diagnostics* diagnostics) {
  return parse_config(text, "/etc/t.yaml", diagnostics);
}

std::string problems(const std::string& text) {
  Diagnostics diagnostics("t.yaml");
  EXPECT_FALSE(parse(text, &diagnostics).has_value()) << text.substr(0, 200);
  return diagnostics.text();
}

std::string source_file(const std::string& name) {
  const char* root = std::getenv("THINKV_SOURCE_DIR");
  return std::string(root == nullptr ? "." : root) + "/" + name;
}

// Keys of a file as dotted paths; list items as "[]".
void collect_keys(const YamlNode& node, const std::string& path, std::vector<std::string>* keys) {
  for (const YamlEntry& entry : node.entries) {
    const std::string at = path.empty() ? entry.key : path + "." + entry.key;
    keys->push_back(at);
    collect_keys(entry.node, at, keys);
    for (const YamlNode& item : entry.node.items) collect_keys(item, at + "[]", keys);
  }
}

// The `pools` of the shipped file stand in a comment, because `pool` excludes them.
std::string commented_pools() {
  std::ifstream in(source_file("config/thinkvd.yaml"));
  std::string line;
  std::string text;
  while (std::getline(in, line)) {
    if (line == "# pools:" || (!text.empty() && line.starts_with("# "))) {
      text.append(line.substr(2)).append("\n");
    } else if (!text.empty()) {
      break;
    }
  }
  return text;
}

TEST(ConfigFile, ShippedFileHasExactlyTheKeysOfTheCode) {
  const std::string file = source_file("config/thinkvd.yaml");
  Diagnostics diagnostics(file);
  const auto text = read_text_file(file, &diagnostics);
  ASSERT_TRUE(text) << diagnostics.text();
  std::vector<std::string> keys;
  for (const std::string& part : {*text, commented_pools()}) {
    const auto tree = parse_yaml(part, &diagnostics);
    ASSERT_TRUE(tree) << diagnostics.text();
    collect_keys(*tree, "", &keys);
  }
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  EXPECT_EQ(keys, config_keys());
}

TEST(ConfigFile, ThePoolsOfTheShippedComment) {
  Diagnostics diagnostics("t.yaml");
  const auto config = parse(commented_pools(), &diagnostics);
  ASSERT_TRUE(config) << diagnostics.text();
  ASSERT_EQ(config->pools.size(), 2u);
  EXPECT_EQ(config->pools[1].name, "gpu1");
  EXPECT_EQ(config->pools[1].backend, Backend::kCuda);
  EXPECT_EQ(config->pools[1].bytes, uint64_t{64} << 30);
  EXPECT_EQ(restart_keys(default_config(), *config), std::vector<std::string>{"pools"});
}

TEST(ConfigFile, EveryKeyOfTheShippedFileIsExplained) {
  std::ifstream in(source_file("config/thinkvd.yaml"));
  std::string line;
  std::string before;
  int keys = 0;
  while (std::getline(in, line)) {
    const size_t start = line.find_first_not_of(" -");
    const bool key =
        start != std::string::npos && line[start] != '#' && line.find(':') != std::string::npos;
    const bool section = key && line.back() == ':';
    if (key && !section && line.find("groups:") == std::string::npos) {
      EXPECT_NE(before.find('#'), std::string::npos) << line;
      ++keys;
    }
    before = line;
  }
  EXPECT_GT(keys, 15);
}

TEST(ConfigFile, ShippedFileSaysTheDefaults) {
  const std::string file = source_file("config/thinkvd.yaml");
  Diagnostics diagnostics(file);
  const auto shipped = load_config(file, &diagnostics);
  ASSERT_TRUE(shipped) << diagnostics.text();
  const Config code = default_config();
  EXPECT_EQ(shipped->socket_path, code.socket_path);
  EXPECT_EQ(shipped->socket_access, code.socket_access);
  EXPECT_EQ(shipped->pools, code.pools);
  EXPECT_EQ(shipped->tenants, code.tenants);
  EXPECT_EQ(shipped->default_tenant, code.default_tenant);
  EXPECT_EQ(shipped->metrics_address, code.metrics_address);
  EXPECT_EQ(shipped->metrics_port, code.metrics_port);
  EXPECT_EQ(shipped->log_level, code.log_level);
  EXPECT_EQ(shipped->clients_max, code.clients_max);
  EXPECT_EQ(shipped->clients_per_user_max, code.clients_per_user_max);
  EXPECT_EQ(shipped->messages_per_second, code.messages_per_second);
  EXPECT_EQ(shipped->slow_client_ms, code.slow_client_ms);
  EXPECT_TRUE(restart_keys(code, *shipped).empty());
}

TEST(ConfigFile, EmptyFileIsTheDefaults) {
  for (const char* text : {"", "# nothing\n", "pool:\n", "{}\n"}) {
    Diagnostics diagnostics("t.yaml");
    const auto config = parse(text, &diagnostics);
    ASSERT_TRUE(config) << diagnostics.text();
    EXPECT_EQ(config->tenants, default_config().tenants);
  }
}

TEST(ConfigFile, EveryKindOfValue) {
  Diagnostics diagnostics("t.yaml");
  const auto config = parse(
      "socket: {path: run/c.sock, access: user}\n"
      "pool: {backend: host, bytes: 2GiB, extent_bytes: 128MiB}\n"
      "tenants:\n"
      "  - {name: prod, users: [0, 1234], groups: [0], reserve: 25%, limit: 1536MiB, weight: 3,\n"
      "     priority: 90}\n"
      "  - {name: rest}\n"
      "default_tenant: none\n"
      "policies: {directories: [p, /abs], files: [one.yaml]}\n"
      "metrics: {address: 0.0.0.0, port: off}\n"
      "log: {level: debug}\n"
      "limits: {clients: 8, clients_per_user: 2, messages_per_second: 50, slow_client: 1500ms}\n",
      &diagnostics);
  ASSERT_TRUE(config) << diagnostics.text();
  EXPECT_EQ(config->socket_path, "/etc/run/c.sock");
  EXPECT_EQ(config->socket_access, SocketAccess::kUser);
  ASSERT_EQ(config->pools.size(), 1u);
  EXPECT_EQ(config->pools[0].name, "default");
  EXPECT_EQ(config->pools[0].bytes, uint64_t{2} << 30);
  EXPECT_EQ(config->pools[0].extent_bytes, uint64_t{128} << 20);
  ASSERT_EQ(config->tenants.size(), 2u);
  EXPECT_EQ(config->tenants[0].uids, (std::vector<uint32_t>{0, 1234}));
  EXPECT_EQ(config->tenants[0].gids, (std::vector<uint32_t>{0}));
  EXPECT_EQ(config->tenants[0].limit, (Share{uint64_t{1536} << 20, false}));
  EXPECT_EQ(config->tenants[0].priority, 90u);
  EXPECT_EQ(config->tenants[1].limit.of(uint64_t{2} << 30), uint64_t{2} << 30);
  EXPECT_EQ(config->tenants[0].reserve.of(uint64_t{2} << 30), uint64_t{512} << 20);
  EXPECT_EQ(config->default_tenant, "");
  EXPECT_EQ(config->policy_directories, (std::vector<std::string>{"/etc/p", "/abs"}));
  EXPECT_EQ(config->policy_files, (std::vector<std::string>{"/etc/one.yaml"}));
  EXPECT_EQ(config->metrics_port, 0u);
  EXPECT_EQ(config->slow_client_ms, 1500u);
}

TEST(ConfigFile, RestartKeysAreNamed) {
  Config next = default_config();
  next.pools[0].bytes *= 2;
  next.socket_path = "/x";
  next.log_level = LogLevel::kDebug;
  EXPECT_EQ(restart_keys(default_config(), next),
            (std::vector<std::string>{"socket.path", "pool.bytes"}));
}

TEST(ConfigFile, BackendAndItsDevice) {
  Diagnostics diagnostics("t.yaml");
  const auto plain = parse("pool: {backend: cuda}", &diagnostics);
  ASSERT_TRUE(plain) << diagnostics.text();
  EXPECT_EQ(plain->pools[0].backend, Backend::kCuda);
  EXPECT_FALSE(plain->pools[0].device);
  const auto chosen = parse(
      "pool: {device: GPU-FACE0000-c0de-0000-0000-00000000000a, backend: cuda}", &diagnostics);
  ASSERT_TRUE(chosen) << diagnostics.text();
  ASSERT_TRUE(chosen->pools[0].device);
  EXPECT_EQ(device_uuid_text(*chosen->pools[0].device), "GPU-face0000-c0de-0000-0000-00000000000a");
  const auto bare =
      parse("pool: {backend: cuda, device: face0000-c0de-0000-0000-00000000000a}", &diagnostics);
  ASSERT_TRUE(bare) << diagnostics.text();
  EXPECT_EQ(bare->pools[0].device, chosen->pools[0].device);
  const auto host = parse("pool: {backend: host, device: auto}", &diagnostics);
  ASSERT_TRUE(host) << diagnostics.text();
  EXPECT_EQ(restart_keys(*host, *plain), std::vector<std::string>{"pool.backend"});
  EXPECT_EQ(restart_keys(*plain, *chosen), std::vector<std::string>{"pool.device"});
}

TEST(ConfigFile, SeveralPoolsAndTheSharesOfTenantsInEach) {
  Diagnostics diagnostics("t.yaml");
  const auto config = parse(
      "pools:\n"
      "  - {name: gpu0, backend: cuda, device: GPU-face0000-c0de-0000-0000-000000000001}\n"
      "  - {name: gpu1, backend: cuda, device: GPU-face0000-c0de-0000-0000-000000000002,\n"
      "     bytes: 4GiB, extent_bytes: 128MiB}\n"
      "  - {name: ram, bytes: 128MiB, extent_bytes: 2MiB}\n"
      "tenants: [{name: default, reserve: 25%, limit: 128MiB}]\n",
      &diagnostics);
  EXPECT_FALSE(config);
  EXPECT_EQ(diagnostics.text(), "t.yaml:6: tenants[].reserve: is more than the tenant's limit")
      << "25 % of 1 GiB";
  Diagnostics none("t.yaml");
  const auto fitting = parse(
      "pools: [{name: a}, {name: b, bytes: 128MiB}]\n"
      "tenants: [{name: default, reserve: 10%, limit: 50%}]\n",
      &none);
  ASSERT_TRUE(fitting) << none.text();
  ASSERT_EQ(fitting->pools.size(), 2u);
  EXPECT_EQ(fitting->pools[0].bytes, uint64_t{1} << 30);
  const TenantSettings& tenant = fitting->tenants[0];
  EXPECT_EQ(tenant.limit.of(fitting->pools[0].bytes), uint64_t{512} << 20);
  EXPECT_EQ(tenant.limit.of(fitting->pools[1].bytes), uint64_t{64} << 20);
}

TEST(ConfigFile, RestartKeysOfSeveralPools) {
  Diagnostics none("t.yaml");
  const auto two = parse("pools: [{name: a}, {name: b}]", &none);
  const auto swapped = parse("pools: [{name: b}, {name: a}]", &none);
  const auto larger = parse("pools: [{name: a}, {name: b, bytes: 2GiB, backend: cuda}]", &none);
  ASSERT_TRUE(two && swapped && larger) << none.text();
  EXPECT_EQ(restart_keys(*two, *swapped), std::vector<std::string>{"pools"});
  EXPECT_EQ(restart_keys(*two, default_config()), std::vector<std::string>{"pools"});
  EXPECT_EQ(restart_keys(*two, *larger),
            (std::vector<std::string>{"pools[].backend", "pools[].bytes"}));
  const auto same = parse("pools: [{name: default}]", &none);
  ASSERT_TRUE(same) << none.text();
  EXPECT_TRUE(restart_keys(*same, default_config()).empty());
}

TEST(ConfigFile, TextsThatAreNoUuid) {
  for (const char* text :
       {"GPU-", "GPU-face0000-c0de-0000-0000-00000000000", "\"\"",
        "GPU-face0000-c0de-0000-0000-00000000000a0", "GPU-face0000xc0de-0000-0000-00000000000a",
        "GPU-face0000-c0de-0000-0000-00000000000g", "MIG-face0000-c0de-0000-0000-00000000000a",
        "GPU-00000000-0000-0000-0000-000000000000"}) {
    EXPECT_NE(problems(std::string("pool: {backend: cuda, device: ") + text + "}")
                  .find("t.yaml:1: pool.device: "),
              std::string::npos)
        << text;
  }
}

struct BadFile {
  const char* text;
  const char* message;
};

class ConfigFileBad : public testing::TestWithParam<BadFile> {};

TEST_P(ConfigFileBad, SaysWhereWhatAndWhatIsAllowed) {
  EXPECT_EQ(problems(GetParam().text), GetParam().message);
}

#define THINKV_UNIT_TEXT "a size with its unit is expected: B, KiB, MiB, GiB or TiB, as in 512MiB"

INSTANTIATE_TEST_SUITE_P(
    Shape, ConfigFileBad,
    testing::Values(
        BadFile{"colour: red",
                "t.yaml:1: colour: unknown key; allowed here: socket, pool, "
                "pools, tenants, default_tenant, policies, metrics, log, limits"},
        BadFile{"log: {level: info}\npool: {}\nlog: {level: error}",
                "t.yaml:3: log: given twice, first in line 1"},
        BadFile{"pool:\n  bytes: 1GiB\n  bytes: 2GiB",
                "t.yaml:3: bytes: given twice, first in line 2"},
        BadFile{"pool: 5", "t.yaml:1: pool: keys and values are expected here, not a value"},
        BadFile{"pool: [1]", "t.yaml:1: pool: keys and values are expected here, not a list"},
        BadFile{"a: &x 1\nb: *x",
                "t.yaml:1: anchors (&name) are not allowed: write the value where it is used"},
        BadFile{"log: {level: !!str info}", "t.yaml:1: tags (!!type) are not allowed"},
        BadFile{"? [a]\n: 1", "t.yaml:1: a key must be a plain word"},
        BadFile{"limits: {clients: [8]}",
                "t.yaml:1: limits.clients: one value is expected, not a list"},
        BadFile{"limits: {clients: }",
                "t.yaml:1: limits.clients: one value is expected, not nothing"},
        BadFile{"policies: {directories: here}",
                "t.yaml:1: policies.directories: a list is expected, not a value"}));

INSTANTIATE_TEST_SUITE_P(
    Numbers, ConfigFileBad,
    testing::Values(
        BadFile{"pool: {bytes: 512MB}", "t.yaml:1: pool.bytes: \"512MB\": " THINKV_UNIT_TEXT},
        BadFile{"pool: {bytes: 1073741824}",
                "t.yaml:1: pool.bytes: \"1073741824\": " THINKV_UNIT_TEXT},
        BadFile{"pool: {bytes: 1.5GiB}", "t.yaml:1: pool.bytes: \"1.5GiB\": " THINKV_UNIT_TEXT},
        BadFile{"pool: {bytes: -1GiB}", "t.yaml:1: pool.bytes: \"-1GiB\": " THINKV_UNIT_TEXT},
        BadFile{"pool: {bytes: \"1GiB\"}",
                "t.yaml:1: pool.bytes: a number is expected, without quotes"},
        BadFile{"pool: {bytes: 010GiB}",
                "t.yaml:1: pool.bytes: \"010GiB\": a number must not "
                "begin with 0 (elsewhere that means octal)"},
        BadFile{"pool: {bytes: 99999999999TiB}",
                "t.yaml:1: pool.bytes: \"99999999999TiB\": number too large"},
        BadFile{"pool: {bytes: 99999999999999999999GiB}",
                "t.yaml:1: pool.bytes: \"99999999999999999999GiB\": number too large"},
        BadFile{"pool: {bytes: 17TiB}",
                "t.yaml:1: pool.bytes: \"17TiB\" is out of range; allowed: 2MiB to 16TiB"},
        BadFile{"pool: {bytes: 100MiB}",
                "t.yaml:1: pool.bytes: pool.bytes (100MiB) must be a "
                "multiple of pool.extent_bytes (64MiB)"},
        BadFile{"pool: {extent_bytes: 3MiB}",
                "t.yaml:1: pool.extent_bytes: must be a multiple of 2MiB"},
        BadFile{"pool: {bytes: 1TiB, extent_bytes: 2MiB}",
                "t.yaml:1: pool.bytes: a pool has at most 4096 extents: use a larger "
                "pool.extent_bytes"},
        BadFile{"limits: {clients: 0}",
                "t.yaml:1: limits.clients: \"0\" is out of range; allowed: 1 to 256"},
        BadFile{"limits: {clients: 0x10}",
                "t.yaml:1: limits.clients: \"0x10\": a whole number is expected, digits only"},
        BadFile{"limits: {clients: 1_000}",
                "t.yaml:1: limits.clients: \"1_000\": a whole number is expected, digits only"},
        BadFile{"limits: {slow_client: 10}",
                "t.yaml:1: limits.slow_client: \"10\": a time with its unit is expected: ms, s, "
                "min or h, as in 10s"},
        BadFile{"limits: {slow_client: 2h}",
                "t.yaml:1: limits.slow_client: \"2h\" is out of range; allowed: 100ms to 3600s"},
        BadFile{"metrics: {port: 65536}",
                "t.yaml:1: metrics.port: \"65536\" is not a port; allowed: 1 to 65535, off"}));

INSTANTIATE_TEST_SUITE_P(
    Words, ConfigFileBad,
    testing::Values(
        BadFile{"pool: {backend: gpu}",
                "t.yaml:1: pool.backend: \"gpu\" is not known; allowed: host, cuda"},
        BadFile{"pool: {device: GPU-face0000-c0de-0000-0000-000000000001}",
                "t.yaml:1: pool.device: only backend cuda has a device"},
        BadFile{"pool: {backend: cuda, device: 0}",
                "t.yaml:1: pool.device: \"0\" is not known; allowed: auto, or a UUID as "
                "nvidia-smi -L prints it, GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"},
        BadFile{"pool: {backend: cuda, bytes: 100MiB}",
                "t.yaml:1: pool.bytes: pool.bytes (100MiB) must be a "
                "multiple of pool.extent_bytes (64MiB)"},
        BadFile{"socket: {access: all}",
                "t.yaml:1: socket.access: \"all\" is not known; allowed: user, group, everyone"},
        BadFile{"socket: {path: \"\"}", "t.yaml:1: socket.path: 1 to 106 bytes are allowed"},
        BadFile{"metrics: {address: localhost}",
                "t.yaml:1: metrics.address: \"localhost\" is not an IPv4 address, as in "
                "127.0.0.1"},
        BadFile{"log: {level: verbose}",
                "t.yaml:1: log.level: \"verbose\" is not known; allowed: "
                "debug, info, warning, error"}));

#define THINKV_GPU_1 "backend: cuda, device: GPU-face0000-c0de-0000-0000-000000000001"

INSTANTIATE_TEST_SUITE_P(
    Pools, ConfigFileBad,
    testing::Values(
        BadFile{"pool: {bytes: 1GiB}\npools: [{name: a}]",
                "t.yaml:2: pools: give pool or pools, not both"},
        BadFile{"pools: []", "t.yaml:1: pools: 1 to 16 entries are allowed"},
        BadFile{"pools: {name: a}", "t.yaml:1: pools: a list is expected, not a map"},
        BadFile{"pools: [{bytes: 1GiB}]", "t.yaml:1: pools[].name: must be given"},
        BadFile{"pool: {name: a}",
                "t.yaml:1: pool.name: unknown key; allowed here: backend, device, extent_bytes, "
                "bytes"},
        BadFile{"pools:\n  - {name: a}\n  - {name: a}",
                "t.yaml:3: pools[].name: \"a\" is given twice"},
        BadFile{"pools:\n  - {name: a, " THINKV_GPU_1 "}\n  - {name: b, " THINKV_GPU_1 "}",
                "t.yaml:3: pools[].device: GPU-face0000-c0de-0000-0000-000000000001 is given "
                "twice: a GPU has one pool"},
        BadFile{"pools:\n  - {name: a, " THINKV_GPU_1 "}\n  - {name: b, backend: cuda}",
                "t.yaml:3: pools[].device: several pools are on GPUs: each must name its own by "
                "UUID (nvidia-smi -L)"},
        BadFile{"pools: [{name: face0000-c0de-0000-0000-000000000001}]",
                "t.yaml:1: pools[].name: \"face0000-c0de-0000-0000-000000000001\" reads as the "
                "UUID of a GPU: choose a name"},
        BadFile{"pools: [{name: a, bytes: 100MiB}]",
                "t.yaml:1: pools[].bytes: pools[].bytes (100MiB) must be a multiple of "
                "pools[].extent_bytes (64MiB)"},
        BadFile{"pools: [{name: a}, {name: b, bytes: 64MiB}]\n"
                "tenants: [{name: default, limit: 512MiB}]",
                "t.yaml:2: tenants[].limit: \"512MiB\" is more than the bytes of pool \"b\" "
                "(64MiB)"},
        BadFile{"pools: [{name: a}, {name: b, bytes: 64MiB}]\n"
                "tenants: [{name: default, reserve: 40MiB}, {name: x, reserve: 40MiB}]",
                "t.yaml:2: tenants: the reserves add up to more than the bytes of pool \"b\" "
                "(64MiB)"}));

INSTANTIATE_TEST_SUITE_P(
    Tenants, ConfigFileBad,
    testing::Values(
        BadFile{"tenants: []", "t.yaml:1: tenants: 1 to 32 entries are allowed"},
        BadFile{"tenants: {name: a}", "t.yaml:1: tenants: a list is expected, not a map"},
        BadFile{"tenants: [{name: a, limit: 101%}]\ndefault_tenant: a",
                "t.yaml:1: tenants[].limit: \"101%\": a percentage is at most 100%"},
        BadFile{"tenants: [{name: a, limit: 2GiB}]\ndefault_tenant: a",
                "t.yaml:1: tenants[].limit: \"2GiB\" is more than pool.bytes (1GiB)"},
        BadFile{"tenants: [{name: a, limit: 0B}]\ndefault_tenant: a",
                "t.yaml:1: tenants[].limit: must be more than 0"},
        BadFile{"tenants: [{name: a, limit: 1MiB, reserve: 2MiB}]\ndefault_tenant: a",
                "t.yaml:1: tenants[].reserve: is more than the tenant's limit"},
        BadFile{"tenants:\n  - {name: a, reserve: 60%}\n  - {name: b, reserve: 60%}\n"
                "default_tenant: a",
                "t.yaml:2: tenants: the reserves add up to more than pool.bytes (1GiB)"},
        BadFile{"tenants: [{name: a}, {name: a}]\ndefault_tenant: a",
                "t.yaml:1: tenants[].name: \"a\" is given twice"},
        BadFile{"tenants: [{name: \"a b\"}]\ndefault_tenant: none",
                "t.yaml:1: tenants[].name: \"a b\": letters, digits, '.', '_' and '-' are "
                "allowed, a letter or digit first"},
        BadFile{"tenants: [{weight: 1}]\ndefault_tenant: none",
                "t.yaml:1: tenants[].name: must be given"},
        BadFile{"tenants: [{name: a, users: [no-such-user-here]}]\ndefault_tenant: a",
                "t.yaml:1: tenants[].users: no user \"no-such-user-here\" on this machine; a name "
                "or a number is allowed"},
        BadFile{"tenants: [{name: a}]",
                "t.yaml:1: default_tenant: \"default\" is not a tenant; allowed: none, a"},
        BadFile{"default_tenant: x",
                "t.yaml:1: default_tenant: \"x\" is not a tenant; allowed: none, default"}));

TEST(ConfigFile, BrokenYamlIsAnErrorWithItsLine) {
  EXPECT_TRUE(problems("pool:\n  bytes: [1\nlog: }").starts_with("t.yaml:"));
  EXPECT_NE(problems("pool: {bytes: 1GiB").find("not YAML"), std::string::npos);
  EXPECT_NE(problems("log: {level: info}\n---\nlog: {}").find("second document"),
            std::string::npos);
  EXPECT_EQ(problems(std::string("log\0: 1", 7)), "t.yaml: not a text file: it has a zero byte");
}

TEST(ConfigFile, LargeAndDeepFilesAreRefused) {
  EXPECT_EQ(problems(std::string(64 * 1024 + 1, '#')), "t.yaml: larger than 64 KiB");
  EXPECT_NE(problems(std::string(60'000, '[')), "");
  EXPECT_NE(problems(std::string(60'000, '{')), "");
  EXPECT_NE(problems(std::string(30, '[') + std::string(30, ']')).find("nested too deeply"),
            std::string::npos);
}

TEST(ConfigFile, AllProblemsOfAFileAreShownAtOnce) {
  const std::string text = problems("pool: {bytes: 1}\nlog: {level: x}\nnew: 1");
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
}

TEST(ConfigFile, AFileThatCannotBeRead) {
  Diagnostics absent("/no/such.yaml");
  EXPECT_FALSE(load_config("/no/such.yaml", &absent));
  EXPECT_EQ(absent.text(), "/no/such.yaml: cannot be read: No such file or directory");
  Diagnostics folder("/tmp");
  EXPECT_FALSE(load_config("/tmp", &folder));
  EXPECT_EQ(folder.text(), "/tmp: not a regular file");
}

}  // namespace
}  // namespace thinkv::ops
