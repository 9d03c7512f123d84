// The part of TwinBatch that knows of entropy-coded streams: blocks byte for byte, what they decode
// to, and attention over it.
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/sequence/coding.h"
#include "tests/support/device_twin.h"

namespace thinkv::testing {
namespace {

constexpr uint32_t kPagesOfABlock = kernels::kBlockTokens / cuda::kBufferPageSlots;
constexpr uint32_t kMultiprocessors = 2;  // that attention is launched for

// A host block as attention sees it, K and V [64, dim] in bits of the 16-bit type.
struct SeenBlock {
  std::vector<uint16_t> k;
  std::vector<uint16_t> v;
};

std::vector<uint16_t> to_wide(const std::vector<float>& values, Format wide) {
  std::vector<uint16_t> bits;
  for (const float x : values) {
    bits.push_back(wide == Format::kBf16 ? bf16_from_float(x) : fp16_from_float(x));
  }
  return bits;
}

kernels::Stream host_stream(const kernels::SequenceState& state, uint32_t lane) {
  return {state.store, *kernels::stream_header(state.store, *state.lanes[lane])};
}

SeenBlock decode_on_host(const kernels::SequenceState& state, uint32_t lane, uint32_t index) {
  const kernels::Stream stream = host_stream(state, lane);
  const uint32_t dim = state.geometry.head_dim;
  std::vector<std::byte> bytes;
  std::vector<uint8_t> codes;
  std::vector<float> k(size_t{kernels::kBlockTokens} * dim), v(k.size());
  const kernels::BlockOutput out{k.data(), v.data(), dim, state.store.wide};
  const auto& decoders = state.coding.decoders[lane / state.geometry.kv_heads];
  THINKV_CHECK(stream.read(index, bytes) && decoders.has_value());
  THINKV_CHECK(stream.blocks()[index].raw != 0
                   ? kernels::decode_raw_block(bytes, out)
                   : kernels::decode_block(bytes, *decoders, codes, out));
  return {to_wide(k, state.store.wide), to_wide(v, state.store.wide)};
}

uint16_t bits_at(const unsigned char* page, const CodeSection& section, uint32_t slot,
                 uint32_t dim) {
  uint16_t bits = 0;
  std::memcpy(&bits, page + section.site(slot, dim).byte, sizeof bits);
  return bits;
}

// NaN apart, in which machines differ.
bool same_bits(uint16_t a, uint16_t b, Format wide) {
  const uint16_t infinity = wide == Format::kBf16 ? 0x7F80 : 0x7C00;
  return a == b || ((a & 0x7FFF) > infinity && (b & 0x7FFF) > infinity);
}

bool same_page(const unsigned char* page, const SeenBlock& block, uint32_t first, uint32_t dim,
               Format wide) {
  const PageLayout& layout = page_layout(wide, dim);
  for (uint32_t slot = 0; slot < layout.slots; ++slot) {
    for (uint32_t d = 0; d < dim; ++d) {
      const size_t at = size_t{first + slot} * dim + d;
      if (!same_bits(bits_at(page, layout.k, slot, d), block.k[at], wide)) return false;
      if (!same_bits(bits_at(page, layout.v, slot, d), block.v[at], wide)) return false;
    }
  }
  return true;
}

}  // namespace

uint32_t TwinBatch::stream_entries(const DeviceReader& reader, uint32_t lane) {
  const cuda::DeviceStream* stream = reader.stream(lane);
  return stream == nullptr ? 0 : stream->blocks * kPagesOfABlock;
}

void TwinBatch::compare_stream(const Twin& t, const DeviceReader& reader, uint32_t index,
                               const std::string& where) {
  const cuda::DeviceStream* found = reader.stream(index);
  const bool wanted = t.host->policy().entropy.on();
  expect((found != nullptr) == wanted, where + "a stream");
  if (found == nullptr || !wanted) return;
  const kernels::Stream host = host_stream(t.state(), index);
  const std::vector<StoredBlock> blocks = reader.blocks(index);
  expect(blocks.size() == host.blocks().size(), where + "number of blocks");
  expect(found->end_position == host.header().end_position, where + "end of the stream");
  expect(found->end_unit == host.header().end_unit, where + "bytes of the stream");
  for (uint32_t b = 0; b < std::min<size_t>(blocks.size(), host.blocks().size()); ++b) {
    const kernels::StreamBlock& is = host.blocks()[b];
    std::vector<std::byte> bytes;
    THINKV_CHECK(host.read(b, bytes));
    StoredBlock expected{is.unit, is.first_position, is.raw, {}};
    for (const std::byte byte : bytes) {
      expected.bytes.push_back(std::to_integer<unsigned char>(byte));
    }
    expect(blocks[b] == expected, where + "block " + std::to_string(b) + " differs");
    raw_blocks_ += is.raw;
    coded_blocks_ += 1 - is.raw;
  }
  const uint32_t heads = options_.geometry.kv_heads;
  if (index % heads != 0) return;
  const kernels::LayerCodes& codes = t.state().coding.codes[index / heads];
  const bool made = t.state().coding.decoders[index / heads].has_value();
  expect(!made || (std::memcmp(codes.key.data(), found->codes[0], 256) == 0 &&
                   std::memcmp(codes.value.data(), found->codes[1], 256) == 0),
         where + "codebooks");
  expect(made == (found->codes[0][0] != 0), where + "codebooks are made");
}

void TwinBatch::check_streams(uint32_t layer) {
  const ModelGeometry& g = options_.geometry;
  const uint32_t* begin = pool_.lane_begin().data() + uint64_t{layer} * (pool_.rows() + 1);
  for (uint32_t row = 0; row < pool_.rows(); ++row) {
    const Twin* t = twins_[row / g.kv_heads].get();
    if (t == nullptr) continue;
    const uint32_t lane = layer * g.kv_heads + row % g.kv_heads;
    const DeviceReader reader(pool_, t->root);
    const uint32_t entries = stream_entries(reader, lane);
    SeenBlock block;
    for (uint32_t i = 0; i < entries; ++i) {
      const uint64_t at = begin[row] + i;
      const cuda::PageView& entry = pool_.list()[uint64_t{layer} * pool_.options().list_pages + at];
      const unsigned char* page = pool_.stream_page(at);
      expect(entry.live == 0xFF && entry.tagged == (reinterpret_cast<uint64_t>(page) |
                                                    static_cast<uint64_t>(reader.wide())),
             "an entry of a coded block");
      const uint32_t index = i / kPagesOfABlock, first = i % kPagesOfABlock * 8;
      if (first == 0) block = decode_on_host(t->state(), lane, index);
      expect(same_page(page, block, first, g.head_dim, reader.wide()),
             "block " + std::to_string(index) + " is read otherwise");
      const uint32_t position =
          host_stream(t->state(), lane).blocks()[index].first_position + first;
      expect(slot_position(page, reader.wide(), g.head_dim, 0) == position &&
                 slot_position(page, reader.wide(), g.head_dim, 7) == position + 7,
             "positions of a coded block");
    }
  }
}

// What the oracle makes of one row of the list: out [group, dim], lse [group].
TwinBatch::RowAnswer TwinBatch::ask_oracle(uint32_t layer, uint32_t row, const float* q,
                                           bool rotate) const {
  const ModelGeometry& g = options_.geometry;
  const uint32_t group = g.group();
  const uint64_t list = uint64_t{layer} * pool_.options().list_pages;
  const uint32_t* begin = pool_.lane_begin().data() + uint64_t{layer} * (pool_.rows() + 1);
  std::vector<kernels::PageView> pages;
  for (uint32_t i = begin[row]; i < begin[row + 1]; ++i) {
    const cuda::PageView& entry = pool_.list()[list + i];
    pages.push_back({reinterpret_cast<const std::byte*>(entry.tagged & ~uint64_t{63}), entry.live,
                     static_cast<Format>(entry.tagged & 63)});
  }
  std::vector<float> query(q, q + size_t{group} * g.head_dim);
  if (rotate) kernels::reference().rotate(query.data(), group, g.head_dim);
  RowAnswer answer{std::vector<float>(query.size()), std::vector<float>(group)};
  kernels::reference().attend({.pages = pages,
                               .head_dim = g.head_dim,
                               .group = group,
                               .q = query.data(),
                               .softmax_scale = softmax_scale_of(g),
                               .out = answer.out.data(),
                               .lse = answer.lse.data()});
  if (rotate) kernels::reference().rotate_back(answer.out.data(), group, g.head_dim);
  return answer;
}

void TwinBatch::attend(uint32_t layer) {
  const ModelGeometry& g = options_.geometry;
  const uint64_t heads = uint64_t{options_.capacity} * g.q_heads, row_size = g.group() * g.head_dim;
  DeviceVector<float> q(heads * g.head_dim), out(q.size()), lse(heads);
  for (uint64_t i = 0; i < q.size(); ++i) q[i] = normal_(random_);
  const cuda::AttendShape shape =
      cuda::attend_shape(kMultiprocessors, pool_.rows(), g.head_dim, false);
  DeviceVector<float> parts(cuda::attend_part_floats(shape, pool_.rows(), g.group(), g.head_dim));
  bool rotate = false;
  for (const auto& t : twins_) rotate = rotate || (t && t->host->policy().rotate != 0);
  run(cuda::launch_attend(
      {.pages = pool_.list().data() + uint64_t{layer} * pool_.options().list_pages,
       .lane_begin = pool_.lane_begin().data() + uint64_t{layer} * (pool_.rows() + 1),
       .q = q.data(),
       .out = out.data(),
       .lse = lse.data(),
       .parts = parts.data(),
       .lanes = pool_.rows(),
       .group = g.group(),
       .kv_heads = g.kv_heads,
       .head_dim = g.head_dim,
       .softmax_scale = softmax_scale_of(g),
       .q_element = cuda::Element::kF32,
       .out_element = cuda::Element::kF32,
       .rotate = rotate},
      shape, nullptr));
  for (uint32_t row = 0; row < pool_.rows(); ++row) {
    if (!twins_[row / g.kv_heads]) continue;
    compare_answer(ask_oracle(layer, row, q.data() + row * row_size, rotate),
                   out.data() + row * row_size, lse.data() + uint64_t{row} * g.group());
  }
}

// The bounds of tests/gpu/attend_case.h for queries that the kernel rounds, of values of rms 1.
void TwinBatch::compare_answer(const RowAnswer& wanted, const float* out, const float* lse) {
  const bool bf16 = options_.geometry.value_type == ValueType::kBf16;
  for (size_t i = 0; i < wanted.out.size(); ++i) {
    const double error = std::abs(double{out[i]} - double{wanted.out[i]});
    const double bound = (bf16 ? 6.0 : 2.0) * (1e-3 + 2.0 / 128 * std::abs(double{wanted.out[i]}));
    expect(error <= bound, "attention over a lane with coded blocks");
  }
  for (size_t h = 0; h < wanted.lse.size(); ++h) {
    const double error = std::abs(double{lse[h]} - double{wanted.lse[h]});
    expect(error <= (bf16 ? 1.2e-2 : 1.5e-3), "log-sum-exp over coded blocks");
  }
}

}  // namespace thinkv::testing
