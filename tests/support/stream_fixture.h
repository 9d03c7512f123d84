// stream_fixture.h: what the streams of a sequence hold, and attention over given tokens.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <span>
#include <vector>

#include "kernels/sequence/coding.h"
#include "tests/support/rank_fixture.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::testing {

inline float to_16bit(float value, Format wide) {
  return wide == Format::kBf16 ? bf16_to_float(bf16_from_float(value))
                               : fp16_to_float(fp16_from_float(value));
}

inline kernels::Stream stream_of(const kernels::Sequence& sequence, uint32_t lane) {
  const kernels::SequenceState& state = *sequence.state();
  return {state.store, *kernels::stream_header(state.store, *state.lanes[lane])};
}

// Every token of a lane's stream by position, decoded from the pool and rounded to 16 bits as
// attention sees it.
inline std::map<uint32_t, StoredToken> read_stream(const kernels::Sequence& sequence,
                                                   uint32_t lane) {
  const kernels::SequenceState& state = *sequence.state();
  const kernels::Stream stream = stream_of(sequence, lane);
  const uint32_t dim = state.geometry.head_dim;
  std::map<uint32_t, StoredToken> tokens;
  std::vector<float> k(size_t{kernels::kBlockTokens} * dim), v(k.size());
  std::vector<std::byte> bytes;
  std::vector<uint8_t> codes;
  for (uint32_t b = 0; b < stream.blocks().size(); ++b) {
    const kernels::StreamBlock block = stream.blocks()[b];
    const kernels::BlockOutput out{k.data(), v.data(), dim, state.store.wide};
    EXPECT_TRUE(stream.read(b, bytes));
    EXPECT_TRUE(block.raw != 0 ? kernels::decode_raw_block(bytes, out)
                               : kernels::decode_block(
                                     bytes, *state.coding.decoders[lane / state.geometry.kv_heads],
                                     codes, out));
    for (uint32_t i = 0; i < kernels::kBlockTokens; ++i) {
      StoredToken token{state.store.wide, false, {}, {}};
      for (uint32_t c = 0; c < dim; ++c) {
        token.k.push_back(to_16bit(k[size_t{i} * dim + c], state.store.wide));
        token.v.push_back(to_16bit(v[size_t{i} * dim + c], state.store.wide));
      }
      EXPECT_TRUE(tokens.emplace(block.first_position + i, std::move(token)).second);
    }
  }
  return tokens;
}

// What attention should give for one query head of a policy without rotation, in double.
inline std::vector<double> attend_over(const std::map<uint32_t, StoredToken>& tokens,
                                       const float* q, uint32_t dim) {
  std::vector<double> out(dim, 0.0);
  for (const auto& [position, weight] : attention_over(tokens, q, 1, dim)) {
    const StoredToken& token = tokens.at(position);
    for (uint32_t d = 0; d < dim; ++d) out[d] += weight * double{token.v[d]};
  }
  return out;
}

}  // namespace thinkv::testing
