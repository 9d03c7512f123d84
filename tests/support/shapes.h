// shapes.h: small geometries and plain policies, for tests on the host and on the device.
#pragma once

#include <cstdint>
#include <cstdio>

#include "thinkv/internal/geometry.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::testing {

// One query head for each kv head.
inline ModelGeometry geometry_of(uint32_t layers, uint32_t kv_heads, uint32_t head_dim,
                                 ValueType type = ValueType::kFp16) {
  return {.layers = layers,
          .q_heads = kv_heads,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .value_type = type};
}

// Everything in one format, nothing evicted.
inline PolicyParams plain_policy(Format format) {
  PolicyParams p;
  std::snprintf(p.name, sizeof p.name, "%s", "test");
  p.prompt_format = p.sink_format = format;
  for (Format& f : p.thought_format) f = format;
  return p;
}

}  // namespace thinkv::testing
