// geometry.h: the shape of a model's attention, as registered by a client.
#pragma once

#include <cmath>
#include <cstdint>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/page_format.h"
#include "thinkv/result.h"

namespace thinkv {

enum class ValueType : uint32_t { kFp16 = 0, kBf16 = 1 };  // of 16-bit pages

struct ModelGeometry {
  uint32_t layers = 0;
  uint32_t q_heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  ValueType value_type = ValueType::kFp16;
  float softmax_scale = 0.0f;  // 0: 1 / sqrt(head_dim)

  // A lane is one (layer, kv head) of one sequence.
  [[nodiscard]] constexpr uint32_t lanes() const { return layers * kv_heads; }
  [[nodiscard]] constexpr uint32_t group() const { return q_heads / kv_heads; }
  // Bytes that a 16-bit cache needs for one token, all layers.
  [[nodiscard]] constexpr uint64_t token_bytes_f16() const {
    return uint64_t{lanes()} * head_dim * 4;
  }
};

// What attention multiplies the logits by. Requires: head_dim > 0.
[[nodiscard]] inline float softmax_scale_of(const ModelGeometry& g) {
  return g.softmax_scale > 0.0f ? g.softmax_scale
                                : 1.0f / std::sqrt(static_cast<float>(g.head_dim));
}

[[nodiscard]] constexpr Status validate(const ModelGeometry& g) {
  using enum ErrorCode;
  if (g.layers == 0 || g.layers > limits::kLayersMax) {
    return make_error(kInvalidArgument, "layers must be 1..256");
  }
  if (g.kv_heads == 0 || g.kv_heads > limits::kKvHeadsMax ||
      g.layers * g.kv_heads > limits::kLanesMax) {
    return make_error(kInvalidArgument, "kv_heads must be 1..128 and layers x kv_heads <= 8192");
  }
  if (g.q_heads == 0 || g.q_heads > limits::kKvHeadsMax * limits::kGroupMax ||
      g.q_heads % g.kv_heads != 0 || g.q_heads / g.kv_heads > limits::kGroupMax) {
    return make_error(kInvalidArgument, "q_heads must be 1 to 16 times kv_heads, a whole multiple");
  }
  if (!head_dim_supported(g.head_dim)) {
    return make_error(kUnsupported, "head_dim must be 64, 128 or 256");
  }
  if (g.value_type != ValueType::kFp16 && g.value_type != ValueType::kBf16) {
    return make_error(kInvalidArgument, "value type must be fp16 or bf16");
  }
  if (!(g.softmax_scale >= 0.0f && g.softmax_scale < 1e6f)) {
    return make_error(kInvalidArgument, "softmax_scale must be finite and not negative");
  }
  return {};
}

}  // namespace thinkv
