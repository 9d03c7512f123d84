// Pages of block formats on the device, in the emulator: the bytes of the oracle's encoder and the
// values of its decoder.
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/codec_block_encode.cuh"
#include "kernels/kernels.h"

namespace thinkv::cuda {
namespace {

struct BlockCase {
  unsigned char* page;
  Format format;
  uint32_t head_dim;
  const float* values[2][2];  // [slots, head_dim] of V and K, of the first and the second layer
  BlockNotes notes;
};

__global__ void __launch_bounds__(128) encode_kernel(const BlockCase c) {
  __shared__ BlockTile tile;
  const auto load = [&](const BlockPart& part, float* rows) {
    const float* from = c.values[part.is_k ? 1 : 0][part.second ? 1 : 0];
    for (uint32_t i = threadIdx.x; i < part.slots * part.dims; i += blockDim.x) {
      const uint32_t slot = part.first_slot + i / part.dims, dim = part.first_dim + i % part.dims;
      rows[i] = from[slot * c.head_dim + dim];
    }
  };
  encode_block(c.page, block_shape(c.head_dim, c.format), c.notes, load, tile);
}

// k, v: [slots, kDim].
template <int kDim>
__global__ void __launch_bounds__(128)
    decode_kernel(const unsigned char* page, Format format, float* k, float* v) {
  const BlockLayout layout = block_shape(kDim, format);
  for (uint32_t slot = threadIdx.x / 8; slot < layout.slots; slot += blockDim.x / 8) {
    float x[kDim / 8], y[kDim / 8];
    decode_block_vector<kDim, true>(x, page, layout, slot);
    decode_block_vector<kDim, false>(y, page, layout, slot);
    for (uint32_t i = 0; i < kDim / 8; ++i) {
      const uint32_t at = slot * kDim + threadIdx.x % 8 + 8 * i;
      k[at] = x[i];
      v[at] = y[i];
    }
  }
}

void decode_on_device(uint32_t dim, const unsigned char* page, Format format, float* k, float* v) {
  const LaunchSize size{.blocks = 1, .threads = 128};
  const cudaError_t done = dim == 64 ? launch(decode_kernel<64>, size, nullptr, page, format, k, v)
                           : dim == 128
                               ? launch(decode_kernel<128>, size, nullptr, page, format, k, v)
                               : launch(decode_kernel<256>, size, nullptr, page, format, k, v);
  ASSERT_EQ(done, cudaSuccess);
}

// How wild the numbers of a block are.
enum class Kind { kNormal, kOutliers, kWide, kConstant, kZero, kSpecial };
constexpr Kind kKinds[] = {Kind::kNormal,   Kind::kOutliers, Kind::kWide,
                           Kind::kConstant, Kind::kZero,     Kind::kSpecial};

class Rows {
 public:
  Rows(uint32_t slots, uint32_t dim, Kind kind, uint64_t seed) : random_(seed) {
    for (auto* row : {&k, &v, &second_k, &second_v}) {
      for (uint32_t i = 0; i < slots * dim; ++i) row->push_back(value(kind, i % dim));
    }
    for (uint32_t i = 0; i < slots; ++i) positions.push_back(7 * i + 1000);
    channels.assign(dim / 64, 0);
    for (uint32_t left = think_channels(dim); left > 0;) {
      const auto d = static_cast<uint32_t>(random_() % dim);
      const uint64_t bit = uint64_t{1} << d % 64;
      left -= (channels[d / 64] & bit) == 0 ? 1 : 0;
      channels[d / 64] |= bit;
    }
  }
  [[nodiscard]] BlockCase to(unsigned char* page, Format format, uint32_t dim, float eta) const {
    return {page,
            format,
            dim,
            {{v.data(), second_v.data()}, {k.data(), second_k.data()}},
            {positions.data(), reinterpret_cast<const uint32_t*>(channels.data()), eta}};
  }

  std::vector<float> k, v, second_k, second_v;
  std::vector<uint32_t> positions;
  std::vector<uint64_t> channels;

 private:
  float value(Kind kind, uint32_t dim) {
    constexpr float kSpecials[] = {0.0f,
                                   -0.0f,
                                   1e30f,
                                   -1e30f,
                                   65519.0f,
                                   1e-40f,
                                   -70000.f,
                                   std::numeric_limits<float>::infinity(),
                                   std::numeric_limits<float>::quiet_NaN()};
    const float x = normal_(random_);
    switch (kind) {
      case Kind::kNormal:
        return x;
      case Kind::kOutliers:
        return dim % 16 == 3 ? 40.0f + 8.0f * x : x;
      case Kind::kWide:
        return std::ldexp(x, static_cast<int>(random_() % 60) - 40);
      case Kind::kConstant:
        return 0.5f * static_cast<float>(dim) - 3.0f;
      case Kind::kZero:
        return random_() % 2 == 0 ? 0.0f : -0.0f;
      default:
        return random_() % 8 == 0 ? kSpecials[random_() % std::size(kSpecials)] : x;
    }
  }

  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
};

struct alignas(64) Page {
  unsigned char bytes[page_bytes(256)];
  [[nodiscard]] std::byte* data() { return reinterpret_cast<std::byte*>(bytes); }
};

Page encode_by_oracle(Format format, uint32_t dim, const Rows& rows, float eta) {
  Page page;
  std::memset(page.bytes, 0xA5, sizeof page.bytes);
  kernels::reference().encode_block({.page = page.data(),
                                     .format = format,
                                     .head_dim = dim,
                                     .k = rows.k.data(),
                                     .v = rows.v.data(),
                                     .positions = rows.positions.data(),
                                     .eta = eta,
                                     .second_k = rows.second_k.data(),
                                     .second_v = rows.second_v.data(),
                                     .channels = rows.channels.data()});
  return page;
}

template <class Visit>
void for_each_format(const Visit& visit) {
  for (const uint32_t dim : kHeadDims) {
    for (uint32_t f = kFormatCount; f < kAllFormatCount; ++f) {
      SCOPED_TRACE(std::string(format_info(static_cast<Format>(f)).name) + " " +
                   std::to_string(dim));
      visit(static_cast<Format>(f), dim);
    }
  }
}

TEST(CudaBlock, EncodesTheBytesOfTheOracle) {
  for_each_format([](Format format, uint32_t dim) {
    if (is_second(format)) return;  // written with the first
    const uint32_t slots = block_layout(format, dim).slots;
    for (const Kind kind : kKinds) {
      for (const float eta : {0.0f, 0.09f, 0.25f}) {
        const Rows rows(slots, dim, kind, slots + dim);
        Page expected = encode_by_oracle(format, dim, rows, eta), page;
        std::memset(page.bytes, 0xA5, sizeof page.bytes);
        const BlockCase c = rows.to(page.bytes, format, dim, eta);
        ASSERT_EQ(launch(encode_kernel, {.blocks = 1, .threads = 128}, nullptr, c), cudaSuccess);
        ASSERT_EQ(std::memcmp(page.bytes, expected.bytes, sizeof page.bytes), 0)
            << "kind " << static_cast<int>(kind) << " eta " << eta;
      }
    }
  });
}

TEST(CudaBlock, DecodesTheValuesOfTheOracle) {
  for_each_format([](Format format, uint32_t dim) {
    const BlockLayout layout = block_layout(format, dim);
    for (const Kind kind : kKinds) {
      const Rows rows(layout.slots, dim, kind, layout.slots);
      Page page = encode_by_oracle(is_second(format) ? first_of(format) : format, dim, rows, 0.09f);
      std::vector<uint8_t> all(layout.slots);
      for (uint32_t i = 0; i < layout.slots; ++i) all[i] = static_cast<uint8_t>(i);
      const size_t count = size_t{layout.slots} * dim;
      std::vector<float> k(count), v(count), expected_k(count), expected_v(count);
      kernels::reference().decode({.page = page.data(),
                                   .format = format,
                                   .head_dim = dim,
                                   .slots = all,
                                   .k = expected_k.data(),
                                   .v = expected_v.data()});
      ASSERT_NO_FATAL_FAILURE(decode_on_device(dim, page.bytes, format, k.data(), v.data()));
      EXPECT_EQ(std::memcmp(k.data(), expected_k.data(), count * sizeof(float)), 0);
      EXPECT_EQ(std::memcmp(v.data(), expected_v.data(), count * sizeof(float)), 0);
    }
  });
}

}  // namespace
}  // namespace thinkv::cuda
