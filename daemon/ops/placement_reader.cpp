#include "daemon/ops/placement_reader.h"

#include <vector>

#include "daemon/ops/policy_reader.h"
#include "thinkv/internal/limits.h"

namespace thinkv::ops {
namespace {

template <class Small>
void read_small(MapReader* map, const char* key, Bounds bounds, Small* out) {
  uint32_t value = *out;
  if (map->integer32(key, bounds, &value)) *out = static_cast<Small>(value);
}

void read_entropy(MapReader entropy, bool given, EntropyParams* params) {
  entropy.decimal("key_step", 0.0, double{kStepShareMax}, &params->key_step);
  entropy.decimal("value_step", 0.0, double{kStepShareMax}, &params->value_step);
  entropy.integer32("recent", {2 * kStreamBlockTokens, kEntropyRecentMax}, &params->recent);
  if (given) {
    entropy.require("key_step");
    entropy.require("value_step");
  }
  entropy.finish();
}

void read_tier(MapReader tier, bool given, TierParams* params) {
  std::vector<uint32_t> dense;
  tier.bytes("host_bytes", {1, kTierBytesMax}, &params->host_bytes);
  tier.integers("dense_layers", {0, limits::kLayersMax - 1}, limits::kLayersMax, &dense);
  for (const uint32_t layer : dense) params->dense_layers[layer / 32] |= 1u << layer % 32;
  tier.choice<Format>("dense_format", format_choices(), &params->dense_format);
  read_small(&tier, "start", {0, kTierTokensMax}, &params->start);
  read_small(&tier, "recent", {0, kTierTokensMax}, &params->recent);
  read_small(&tier, "fetch", {1, kTierTokensMax}, &params->fetch);
  read_small(&tier, "channels", {1, kTierChannelsMax}, &params->channels);
  if (given) tier.require("host_bytes");
  tier.finish();
}

}  // namespace

void read_placement(MapReader* root, PolicyParams* params) {
  read_entropy(root->child("entropy"), root->has("entropy"), &params->entropy);
  read_tier(root->child("tier"), root->has("tier"), &params->tier);
}

}  // namespace thinkv::ops
