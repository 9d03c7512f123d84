#include "kernels/stream/coded_block.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "thinkv/internal/check.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

template <class T>
std::byte* put(std::byte* at, const T& value) {
  std::memcpy(at, &value, sizeof value);
  return at + sizeof value;
}
template <class T>
const std::byte* get(const std::byte* at, T* value) {
  std::memcpy(value, at, sizeof *value);
  return at + sizeof *value;
}

// Steps, then zeros, as the device reads them: each array on its own.
std::byte* put_scales(std::byte* at, std::span<const UnitScale> scales) {
  for (const UnitScale& scale : scales) at = put(at, scale.step);
  for (const UnitScale& scale : scales) at = put(at, scale.zero);
  return at;
}
const std::byte* get_scales(const std::byte* at, std::span<UnitScale> scales) {
  for (UnitScale& scale : scales) at = get(at, &scale.step);
  for (UnitScale& scale : scales) at = get(at, &scale.zero);
  return at;
}

uint16_t to_wide(float value, Format wide) {
  return wide == Format::kBf16 ? bf16_from_float(value) : fp16_from_float(value);
}
float from_wide(uint16_t bits, Format wide) {
  return wide == Format::kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

// Of a key: a scale a channel.
void dequantise_row(const uint8_t* codes, std::span<const UnitScale> scales, float* out) {
  for (size_t c = 0; c < scales.size(); ++c) out[c] = dequantise(codes[c], scales[c]);
}
// Of a value: one scale.
void dequantise_row(const uint8_t* codes, uint32_t dim, UnitScale scale, float* out) {
  for (uint32_t c = 0; c < dim; ++c) out[c] = dequantise(codes[c], scale);
}

void encode_raw(const BlockRows& rows, std::vector<std::byte>& out) {
  out.resize(raw_block_bytes(rows.dim));
  std::byte* at = out.data();
  const size_t values = size_t{kBlockTokens} * rows.dim;
  for (const float* side : {rows.k, rows.v}) {
    for (size_t i = 0; i < values; ++i) at = put(at, to_wide(side[i], rows.wide));
  }
}

}  // namespace

bool quantise_unit(const float* x, size_t n, size_t stride, float share, uint8_t* codes,
                   UnitScale* scale) {
  float low = x[0], high = x[0];
  for (size_t i = 0; i < n; ++i) {
    const float value = x[i * stride];
    if (!std::isfinite(value)) return false;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (!scale_unit(low, high, share, scale)) return false;
  for (size_t i = 0; i < n; ++i) {
    const int64_t code = unit_code(x[i * stride], *scale);
    if (code < 0 || code > 255) return false;
    codes[i * stride] = static_cast<uint8_t>(code);
  }
  return true;
}

void quantise_block(const float* k, const float* v, uint32_t dim, StepShares shares,
                    BlockCodes& block) {
  const size_t values = size_t{kBlockTokens} * dim;
  block.k_scales.assign(dim, {});
  block.v_scales.assign(kBlockTokens, {});
  block.k.assign(values, 0);
  block.v.assign(values, 0);
  bool fits = true;
  for (uint32_t c = 0; fits && c < dim; ++c) {
    fits =
        quantise_unit(k + c, kBlockTokens, dim, shares.key, block.k.data() + c, &block.k_scales[c]);
  }
  for (uint32_t t = 0; fits && t < kBlockTokens; ++t) {
    const size_t row = size_t{t} * dim;
    fits = quantise_unit(v + row, dim, 1, shares.value, block.v.data() + row, &block.v_scales[t]);
  }
  block.representable = fits;
}

void count_codes(const BlockCodes& block, BlockCounts& counts) {
  if (!block.representable) return;
  for (const uint8_t code : block.k) counts.key[code] += 1;
  for (const uint8_t code : block.v) counts.value[code] += 1;
}

bool encode_block(const BlockCodes& block, const BlockRows& rows, const BlockEncoders& encoders,
                  std::vector<std::byte>& out) {
  if (!block.representable) {
    encode_raw(rows, out);
    return true;
  }
  out.resize(block_head_bytes(rows.dim));
  const size_t run = size_t{kRunTokens} * rows.dim;
  std::array<uint16_t, 2 * kBlockRuns> run_bytes{};
  // At most 8 x 256 codes of 15 bits.
  static_assert(kRunTokens * 256 * kCodeBitsMax / 8 < 65536);
  for (uint32_t r = 0; r < 2 * kBlockRuns; ++r) {
    const bool of_key = r < kBlockRuns;
    const std::vector<uint8_t>& codes = of_key ? block.k : block.v;
    const size_t before = out.size();
    (of_key ? encoders.key : encoders.value)
        .encode({codes.data() + (r % kBlockRuns) * run, run}, out);
    run_bytes[r] = static_cast<uint16_t>(out.size() - before);
  }
  std::byte* at = put(out.data(), run_bytes);
  at = put_scales(at, block.k_scales);
  at = put_scales(at, block.v_scales);
  THINKV_CHECK(at == out.data() + block_head_bytes(rows.dim));
  return false;
}

bool decode_block(std::span<const std::byte> bytes, const BlockDecoders& decoders,
                  std::vector<uint8_t>& codes, const BlockOutput& out) {
  const uint32_t dim = out.dim;
  if (bytes.size() < block_head_bytes(dim) || dim > 256) return false;
  std::array<uint16_t, 2 * kBlockRuns> run_bytes;
  std::array<UnitScale, 256> k_scales;
  std::array<UnitScale, kBlockTokens> v_scales;
  const std::byte* at = get(bytes.data(), &run_bytes);
  at = get_scales(at, {k_scales.data(), dim});
  static_cast<void>(get_scales(at, v_scales));
  std::span<const std::byte> left = bytes.subspan(block_head_bytes(dim));
  const size_t run = size_t{kRunTokens} * dim;
  codes.resize(run);
  for (uint32_t r = 0; r < 2 * kBlockRuns; ++r) {
    const bool of_key = r < kBlockRuns;
    if (left.size() < run_bytes[r]) return false;
    const HuffmanDecoder& decoder = of_key ? decoders.key : decoders.value;
    if (!decoder.decode(left.first(run_bytes[r]), codes)) return false;
    left = left.subspan(run_bytes[r]);
    const uint32_t first = (r % kBlockRuns) * kRunTokens;
    float* rows = (of_key ? out.k : out.v) + size_t{first} * dim;
    for (uint32_t t = 0; t < kRunTokens; ++t) {
      const uint8_t* row = codes.data() + size_t{t} * dim;
      if (of_key) {
        dequantise_row(row, {k_scales.data(), dim}, rows + size_t{t} * dim);
      } else {
        dequantise_row(row, dim, v_scales[first + t], rows + size_t{t} * dim);
      }
    }
  }
  return left.empty();
}

bool decode_raw_block(std::span<const std::byte> bytes, const BlockOutput& out) {
  if (bytes.size() != raw_block_bytes(out.dim)) return false;
  const std::byte* at = bytes.data();
  const size_t values = size_t{kBlockTokens} * out.dim;
  for (float* side : {out.k, out.v}) {
    for (size_t i = 0; i < values; ++i) {
      uint16_t bits = 0;
      at = get(at, &bits);
      side[i] = from_wide(bits, out.wide);
    }
  }
  return true;
}

}  // namespace thinkv::kernels
