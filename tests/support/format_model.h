// format_model.h: what tokens become in a format, worked out by the oracle in pages of its own.
#pragma once

#include <map>
#include <vector>

#include "tests/support/sequence_fixture.h"

namespace thinkv::testing {

using LaneModel = std::map<uint32_t, StoredToken>;  // by position

// What a token becomes in a format: encode and decode in slot 0 of a page of our own.
inline StoredToken through_format(const std::vector<float>& k, const std::vector<float>& v,
                                  Format format, bool buffered) {
  alignas(64) static std::byte page[page_bytes(256)];
  const auto dim = static_cast<uint32_t>(k.size());
  const uint8_t slot = 0;
  const uint32_t position = 0;
  kernels::reference().encode({.page = page,
                               .format = format,
                               .head_dim = dim,
                               .slots = {&slot, 1},
                               .k = k.data(),
                               .v = v.data(),
                               .positions = &position});
  StoredToken token{format, buffered, std::vector<float>(dim), std::vector<float>(dim)};
  kernels::reference().decode({.page = page,
                               .format = format,
                               .head_dim = dim,
                               .slots = {&slot, 1},
                               .k = token.k.data(),
                               .v = token.v.data()});
  return token;
}

// The tokens of one block, in the order of its slots.
struct BlockModel {
  Format view;
  uint32_t head_dim;
  std::vector<uint32_t> positions;
  std::vector<float> k[2] = {};  // [1]: of the second layer of a pair
  std::vector<float> v[2] = {};
  float eta = 0.0f;
  uint64_t channels = 0;  // think, head_dim 64

  void add(const StoredToken& token, uint32_t layer) {
    k[layer].insert(k[layer].end(), token.k.begin(), token.k.end());
    v[layer].insert(v[layer].end(), token.v.begin(), token.v.end());
  }
  [[nodiscard]] LaneModel coded() const {
    alignas(64) static std::byte page[page_bytes(256)];
    kernels::reference().encode_block({.page = page,
                                       .format = is_second(view) ? first_of(view) : view,
                                       .head_dim = head_dim,
                                       .k = k[0].data(),
                                       .v = v[0].data(),
                                       .positions = positions.data(),
                                       .eta = eta,
                                       .second_k = k[1].data(),
                                       .second_v = v[1].data(),
                                       .channels = &channels});
    LaneModel tokens;
    for (uint32_t s = 0; s < positions.size(); ++s) {
      StoredToken token{view, false, std::vector<float>(head_dim), std::vector<float>(head_dim)};
      const auto slot = static_cast<uint8_t>(s);
      kernels::reference().decode({.page = page,
                                   .format = view,
                                   .head_dim = head_dim,
                                   .slots = {&slot, 1},
                                   .k = token.k.data(),
                                   .v = token.v.data()});
      tokens.emplace(positions[s], std::move(token));
    }
    return tokens;
  }
};

}  // namespace thinkv::testing
