// config_pools.cpp: `pool` and `pools` of thinkvd.yaml.
#include <algorithm>
#include <array>
#include <span>

#include "daemon/ops/config_sections.h"
#include "daemon/ops/scalars.h"

namespace thinkv::ops {
namespace {

constexpr std::array kBackends = {Choice<Backend>{"host", Backend::kHost},
                                  Choice<Backend>{"cuda", Backend::kCuda}};
constexpr uint64_t kPoolBytesMax = uint64_t{16} << 40;

// Only the form is checked here: whether that GPU is there is known when the daemon starts.
void read_device(MapReader* reader, PoolSettings* pool) {
  constexpr size_t kTextMax = 64;
  std::string text;
  if (!reader->text("device", kTextMax, &text) || text == "auto") return;
  const Result<DeviceUuid> uuid = parse_device_uuid(text);
  if (!uuid) {
    reader->fail(*reader->node("device"), "device",
                 MapReader::quote(text) +
                     " is not known; allowed: auto, or a UUID as nvidia-smi -L "
                     "prints it, GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx");
  } else if (pool->backend != Backend::kCuda) {
    reader->fail(*reader->node("device"), "device", "only backend cuda has a device");
  } else {
    pool->device = *uuid;
  }
}

void check_sizes(MapReader* reader, const PoolSettings& pool, bool bytes_given) {
  const auto fail = [&](std::string_view key, const std::string& what) {
    if (const YamlNode* at = reader->node(key)) reader->fail(*at, key, what);
  };
  const std::string extent_key = reader->path_of("extent_bytes");
  if (pool.extent_bytes % limits::kExtentBytesMin != 0) {
    fail("extent_bytes", "must be a multiple of " + format_bytes(limits::kExtentBytesMin));
  } else if (pool.bytes % pool.extent_bytes != 0) {
    fail(bytes_given ? "bytes" : "extent_bytes",
         reader->path_of("bytes") + " (" + format_bytes(pool.bytes) + ") must be a multiple of " +
             extent_key + " (" + format_bytes(pool.extent_bytes) + ")");
  } else if (pool.bytes / pool.extent_bytes > limits::kExtentsMax) {
    fail(bytes_given ? "bytes" : "extent_bytes", "a pool has at most " +
                                                     std::to_string(limits::kExtentsMax) +
                                                     " extents: use a larger " + extent_key);
  }
}

PoolSettings read_pool(MapReader reader, bool named) {
  PoolSettings pool;
  if (named && reader.name("name", limits::kNameMax - 1, &pool.name) &&
      parse_device_uuid(pool.name)) {
    // Clients may say either, so one must not look like the other.
    reader.fail(*reader.node("name"), "name",
                MapReader::quote(pool.name) + " reads as the UUID of a GPU: choose a name");
  }
  if (named) reader.require("name");
  reader.choice<Backend>("backend", kBackends, &pool.backend);
  read_device(&reader, &pool);
  reader.bytes("extent_bytes", {limits::kExtentBytesMin, limits::kExtentBytesMax},
               &pool.extent_bytes);
  const bool given = reader.bytes("bytes", {limits::kExtentBytesMin, kPoolBytesMax}, &pool.bytes);
  check_sizes(&reader, pool, given);
  reader.finish();
  return pool;
}

// A pool that agrees in something with an earlier one.
void check_twins(MapReader* root, const YamlNode& item, std::span<const PoolSettings> earlier,
                 const PoolSettings& pool) {
  for (const PoolSettings& other : earlier) {
    if (other.name == pool.name) {
      root->fail(item, "pools[].name", MapReader::quote(pool.name) + " is given twice");
    }
    if (other.backend != Backend::kCuda || pool.backend != Backend::kCuda) continue;
    if (!other.device || !pool.device) {
      root->fail(item, "pools[].device",
                 "several pools are on GPUs: each must name its own by UUID (nvidia-smi -L)");
    } else if (*other.device == *pool.device) {
      root->fail(item, "pools[].device",
                 device_uuid_text(*pool.device) + " is given twice: a GPU has one pool");
    }
  }
}

bool is_plain(const Config& config) {
  return config.pools.size() == 1 && config.pools[0].name == PoolSettings{}.name;
}

}  // namespace

void read_pools(MapReader* root, Config* config, Diagnostics* diagnostics,
                std::vector<std::string>* keys) {
  const YamlNode* one = root->node("pool");
  const YamlNode* list = root->node("pools");
  if (list == nullptr || list->kind == YamlNode::Kind::kNull) {
    if (keys != nullptr) (void)read_pool(MapReader(nullptr, "pools[]", diagnostics, keys), true);
    config->pools = {read_pool(MapReader(one, "pool", diagnostics, keys), false)};
    return;
  }
  if (one != nullptr && one->kind != YamlNode::Kind::kNull) {
    return root->fail(*list, "pools", "give pool or pools, not both");
  }
  if (list->kind != YamlNode::Kind::kList) {
    return root->fail(*list, "pools", std::string("a list is expected, not ") + list->kind_name());
  }
  if (list->items.empty() || list->items.size() > limits::kPoolsMax) {
    return root->fail(*list, "pools",
                      "1 to " + std::to_string(limits::kPoolsMax) + " entries are allowed");
  }
  config->pools.clear();
  for (const YamlNode& item : list->items) {
    PoolSettings pool = read_pool(MapReader(&item, "pools[]", diagnostics, keys), true);
    check_twins(root, item, config->pools, pool);
    config->pools.push_back(std::move(pool));
  }
}

std::string pool_bytes_text(const Config& config, const PoolSettings& pool) {
  const std::string size = " (" + format_bytes(pool.bytes) + ")";
  if (is_plain(config)) return "pool.bytes" + size;
  return "the bytes of pool " + MapReader::quote(pool.name) + size;
}

void add_pool_keys(const Config& current, const Config& next, std::vector<std::string>* keys) {
  const auto same_name = [](const PoolSettings& a, const PoolSettings& b) {
    return a.name == b.name;
  };
  // Clients hold the place of their pool in the list.
  if (!std::ranges::equal(current.pools, next.pools, same_name)) {
    keys->emplace_back("pools");
    return;
  }
  const std::string section = is_plain(current) ? "pool" : "pools[]";
  bool backend = false, device = false, bytes = false, extent_bytes = false;
  for (size_t i = 0; i < current.pools.size(); ++i) {
    const PoolSettings& a = current.pools[i];
    const PoolSettings& b = next.pools[i];
    backend = backend || a.backend != b.backend;
    device = device || a.device != b.device;
    bytes = bytes || a.bytes != b.bytes;
    extent_bytes = extent_bytes || a.extent_bytes != b.extent_bytes;
  }
  if (backend) keys->push_back(section + ".backend");
  if (device) keys->push_back(section + ".device");
  if (bytes) keys->push_back(section + ".bytes");
  if (extent_bytes) keys->push_back(section + ".extent_bytes");
}

}  // namespace thinkv::ops
