// device_lanes.h: what device metadata says, read by the host, for tests of sequence.h.
#pragma once

#include <bit>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/stream/block_rule.h"
#include "tests/support/device_pool.h"

namespace thinkv::testing {

// A live token, decoded by the reference codec.
struct LaneToken {
  Format format;
  bool buffered;
  uint32_t score;  // bits of an fp16 or fp32
  std::vector<float> k;
  std::vector<float> v;
  friend bool operator==(const LaneToken& a, const LaneToken& b) {
    const auto same = [](const std::vector<float>& x, const std::vector<float>& y) {
      return x.size() == y.size() && std::memcmp(x.data(), y.data(), 4 * x.size()) == 0;
    };
    return a.format == b.format && a.buffered == b.buffered && a.score == b.score &&
           same(a.k, b.k) && same(a.v, b.v);
  }
};
using LaneTokens = std::map<uint32_t, LaneToken>;  // by position

// A descriptor without its page id: what host and device must have in common.
struct PlacedPage {
  Format format;
  uint64_t live;
  uint32_t filled;
  uint32_t first_position;
  uint32_t last_position;
  std::vector<uint32_t> positions;  // of live slots, ascending by slot
  friend bool operator==(const PlacedPage&, const PlacedPage&) = default;
};

inline LaneToken decode_slot(const void* page, Format format, uint32_t dim, uint32_t slot) {
  LaneToken token{format, false, 0, std::vector<float>(dim), std::vector<float>(dim)};
  const auto index = static_cast<uint8_t>(slot);
  kernels::reference().decode({.page = static_cast<const std::byte*>(page),
                               .format = format,
                               .head_dim = dim,
                               .slots = {&index, 1},
                               .k = token.k.data(),
                               .v = token.v.data()});
  return token;
}
inline uint32_t slot_position(const void* page, Format format, uint32_t dim, uint32_t slot) {
  uint32_t position = 0;
  std::memcpy(&position,
              static_cast<const std::byte*>(page) + page_layout(format, dim).position_offset +
                  slot * kPositionBytes,
              sizeof position);
  return position;
}

// A coded block, and its bytes.
struct StoredBlock {
  uint32_t unit;
  uint32_t first_position;
  uint32_t raw;
  std::vector<unsigned char> bytes;
  friend bool operator==(const StoredBlock&, const StoredBlock&) = default;
};

// The metadata of one sequence. Errors of structure are collected in `wrong`.
class DeviceReader {
 public:
  DeviceReader(const DevicePool& pool, uint32_t root)
      : pool_(&pool),
        dim_(pool.options().geometry.head_dim),
        root_(root),
        header_(reinterpret_cast<cuda::DeviceSequence*>(pool.address(root))) {}

  [[nodiscard]] cuda::DeviceSequence& header() const { return *header_; }
  [[nodiscard]] cuda::DeviceLane& lane(uint32_t index) const {
    const uint32_t per_page = cuda::lanes_per_page(dim_);
    const auto* ids = reinterpret_cast<const uint32_t*>(header_ + 1);
    return reinterpret_cast<cuda::DeviceLane*>(
        pool_->address(ids[index / per_page]))[index % per_page];
  }
  [[nodiscard]] cuda::DeviceDescriptor& descriptor(const cuda::DeviceLane& lane,
                                                   uint32_t index) const {
    return reinterpret_cast<cuda::DeviceDescriptor*>(
        pool_->address(lane.table[index / per_table()]))[index % per_table()];
  }
  // The numbers of a descriptor's slots, fp16 or fp32 (DeviceSequence.score_bytes).
  [[nodiscard]] unsigned char* scores(const cuda::DeviceLane& lane, uint32_t index) const {
    auto* table =
        reinterpret_cast<cuda::DeviceDescriptor*>(pool_->address(lane.table[index / per_table()]));
    return reinterpret_cast<unsigned char*>(table + per_table()) +
           index % per_table() * kSlotsPerPageMax * header_->score_bytes;
  }
  [[nodiscard]] uint32_t score_bits(const void* row, uint32_t i) const {
    return header_->score_bytes == 4 ? static_cast<const uint32_t*>(row)[i]
                                     : static_cast<const uint16_t*>(row)[i];
  }
  [[nodiscard]] Format wide() const {
    return pool_->options().geometry.value_type == ValueType::kBf16 ? Format::kBf16 : Format::kF16;
  }
  [[nodiscard]] const unsigned char* buffer_page(const cuda::DeviceLane& lane, uint32_t i) const {
    return pool_->address(lane.buffer_page[i / cuda::kBufferPageSlots]);
  }

  // Null where the lane has none.
  [[nodiscard]] cuda::DeviceStream* stream(uint32_t lane_index) const {
    const uint32_t raw = lane(lane_index).stream_page;
    if (raw == PageId::kNoneRaw) return nullptr;
    return reinterpret_cast<cuda::DeviceStream*>(pool_->address(raw));
  }
  [[nodiscard]] kernels::StreamBlock& block(const cuda::DeviceStream& stream, uint32_t i) const {
    const uint32_t each = cuda::stream_blocks_per_page(dim_);
    return reinterpret_cast<kernels::StreamBlock*>(
        pool_->address(stream.block_page[i / each]))[i % each];
  }
  [[nodiscard]] uint32_t& listed_page(const cuda::DeviceStream& stream, uint32_t i) const {
    const uint32_t each = cuda::stream_ids_per_page(dim_);
    return reinterpret_cast<uint32_t*>(pool_->address(stream.list_page[i / each]))[i % each];
  }
  [[nodiscard]] unsigned char& stream_byte(const cuda::DeviceStream& stream, uint64_t at) const {
    const uint32_t page = page_bytes(dim_);
    return pool_->address(listed_page(stream, static_cast<uint32_t>(at / page)))[at % page];
  }
  [[nodiscard]] std::vector<StoredBlock> blocks(uint32_t lane_index) const {
    std::vector<StoredBlock> all;
    const cuda::DeviceStream* s = stream(lane_index);
    for (uint32_t i = 0; s != nullptr && i < s->blocks; ++i) {
      const kernels::StreamBlock& b = block(*s, i);
      StoredBlock stored{b.unit, b.first_position, b.raw, {}};
      const uint64_t begin = uint64_t{b.unit} * kernels::kStreamUnitBytes;
      for (uint32_t j = 0; j < b.bytes; ++j) stored.bytes.push_back(stream_byte(*s, begin + j));
      all.push_back(std::move(stored));
    }
    return all;
  }

  [[nodiscard]] std::vector<PlacedPage> placement(uint32_t lane_index) const {
    const cuda::DeviceLane& l = lane(lane_index);
    std::vector<PlacedPage> pages;
    for (uint32_t i = 0; i < l.pages; ++i) {
      const cuda::DeviceDescriptor& d = descriptor(l, i);
      const auto format = static_cast<Format>(d.format);
      PlacedPage page{format, d.live, d.filled, d.first_position, d.last_position, {}};
      for (uint64_t left = d.live; left != 0; left &= left - 1) {
        const auto slot = static_cast<uint32_t>(std::countr_zero(left));
        page.positions.push_back(slot_position(pool_->address(d.page), format, dim_, slot));
      }
      pages.push_back(page);
    }
    return pages;
  }

  // Every live token. A position that is there twice is wrong.
  [[nodiscard]] LaneTokens tokens(uint32_t lane_index, std::string& wrong) const {
    const cuda::DeviceLane& l = lane(lane_index);
    LaneTokens tokens;
    const auto put = [&](uint32_t position, LaneToken token) {
      if (!tokens.emplace(position, std::move(token)).second) {
        wrong += "position " + std::to_string(position) + " twice; ";
      }
    };
    for (uint32_t i = 0; i < l.pages; ++i) {
      const cuda::DeviceDescriptor& d = descriptor(l, i);
      const auto format = static_cast<Format>(d.format);
      const void* page = pool_->address(d.page);
      for (uint64_t left = d.live; left != 0; left &= left - 1) {
        const auto slot = static_cast<uint32_t>(std::countr_zero(left));
        LaneToken token = decode_slot(page, format, dim_, slot);
        if (header_->score_bytes != 0) token.score = score_bits(scores(l, i), slot);
        put(slot_position(page, format, dim_, slot), std::move(token));
      }
    }
    for (uint32_t i = 0; i < l.buffer_count; ++i) {
      const void* page = buffer_page(l, i);
      LaneToken token = decode_slot(page, wide(), dim_, i % cuda::kBufferPageSlots);
      token.buffered = true;
      if (header_->score_bytes != 0) token.score = score_bits(l.buffer_sum, i);
      put(slot_position(page, wide(), dim_, i % cuda::kBufferPageSlots), std::move(token));
    }
    return tokens;
  }

  // What must hold between any two calls; `owned` collects page ids over all sequences of a pool.
  void check(std::set<uint32_t>& owned, std::string& wrong) const {
    const auto own = [&](uint32_t raw) {
      if (!owned.insert(raw).second) wrong += "page " + std::to_string(raw) + " has two owners; ";
    };
    const auto expect = [&](bool good, const char* what) {
      if (!good) wrong += std::string(what) + "; ";
    };
    uint32_t data_pages = 0, metadata_pages = 1;
    own(root_);
    const uint32_t lanes = pool_->options().geometry.lanes();
    const auto* ids = reinterpret_cast<const uint32_t*>(header_ + 1);
    for (uint32_t i = 0; i < header_->lane_pages; ++i) own(ids[i]);
    for (uint32_t i = 0; i < header_->segment_pages; ++i) own(header_->segment_page[i]);
    own(header_->work_page);
    metadata_pages += header_->lane_pages + header_->segment_pages + 1;
    for (const uint32_t raw : class_pages()) own(raw), ++metadata_pages;
    for (uint32_t index = 0; index < lanes; ++index) {
      const cuda::DeviceLane& l = lane(index);
      uint32_t free_slots[kFormatCount] = {}, live = l.buffer_count, owned_pages = 2;
      for (uint32_t i = 0; i < l.table_pages; ++i) own(l.table[i]);
      for (const uint32_t raw : l.buffer_page) own(raw);
      for (uint32_t i = 0; i < l.pages; ++i) {
        const cuda::DeviceDescriptor& d = descriptor(l, i);
        const auto format = static_cast<Format>(d.format);
        if (is_pair(format)) {
          check_pair(index, d, wrong);
        } else {
          own(d.page);
          ++owned_pages;
        }
        const auto in_page = static_cast<uint32_t>(std::popcount(d.live));
        const uint32_t slots = page_layout(format, dim_).slots;
        expect(in_page > 0, "an empty page was kept");
        expect(d.filled <= slots && std::bit_width(d.live) <= d.filled, "live beyond filled");
        if (!is_block(format)) free_slots[d.format] += slots - in_page;
        live += in_page;
      }
      live += own_stream(index, own, owned_pages, metadata_pages);
      expect(std::memcmp(free_slots, l.free_slots, sizeof free_slots) == 0, "free_slots");
      expect(l.live == live && l.live_prompt <= live, "live");
      expect(l.pending == 0, "a page was left aside");
      expect(l.table_pages == std::max((l.pages + per_table() - 1) / per_table(), 1u), "tables");
      data_pages += owned_pages;
      metadata_pages += l.table_pages;
    }
    expect(header_->data_pages == data_pages, "data_pages");
    expect(header_->metadata_pages == metadata_pages, "metadata_pages");
  }

 private:
  // Calls own(page id) for all pages of a stream, where there is one, and counts them. Result: its
  // tokens.
  template <class Own>
  uint32_t own_stream(uint32_t lane_index, Own own, uint32_t& data_pages,
                      uint32_t& metadata_pages) const {
    if (stream(lane_index) == nullptr) return 0;
    const cuda::DeviceStream& s = *stream(lane_index);
    own(lane(lane_index).stream_page);
    metadata_pages += 1 + s.block_pages + s.list_pages;
    for (uint32_t i = 0; i < s.block_pages; ++i) own(s.block_page[i]);
    for (uint32_t i = 0; i < s.list_pages; ++i) own(s.list_page[i]);
    for (uint32_t i = 0; i < s.pages; ++i) {
      if (listed_page(s, i) == PageId::kNoneRaw) continue;
      own(listed_page(s, i));
      ++data_pages;
    }
    return s.blocks * kernels::kBlockTokens;
  }
  // The next layer's lane of the same head has the page of a pair too, with the same tokens live.
  void check_pair(uint32_t index, const cuda::DeviceDescriptor& first, std::string& wrong) const {
    const uint32_t partner = index + pool_->options().geometry.kv_heads;
    uint32_t found = 0;
    for (uint32_t i = 0; i < lane(partner).pages; ++i) {
      const cuda::DeviceDescriptor& d = descriptor(lane(partner), i);
      if (d.page == first.page && d.live == first.live && d.format == first.format + 1) ++found;
    }
    if (found != 1) wrong += "a pair's page is not in both lanes; ";
  }
  // The directory of token classes and its pages.
  [[nodiscard]] std::vector<uint32_t> class_pages() const {
    if (header_->class_pages == 0) return {};
    const auto* ids = reinterpret_cast<const uint32_t*>(pool_->address(header_->class_directory));
    std::vector<uint32_t> pages(ids, ids + header_->class_pages);
    pages.push_back(header_->class_directory);
    return pages;
  }
  [[nodiscard]] uint32_t per_table() const {
    return cuda::descriptors_per_page(dim_, header_->score_bytes);
  }

  const DevicePool* pool_;
  uint32_t dim_;
  uint32_t root_;
  cuda::DeviceSequence* header_;
};

}  // namespace thinkv::testing
