// The page layout, enumerated: which bits are whose, and that a tensor core may read them as
// page_format.h says.
#include "unit/kernels_support.h"

#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

TEST(PageLayout, EveryCodeHasItsOwnBitsInsideItsSection) {
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    std::vector<uint8_t> used(page_bytes(layout->head_dim) * 8, 0);
    for (const CodeSection* section : {&layout->k, &layout->v}) {
      for (uint32_t slot = 0; slot < layout->slots; ++slot) {
        for (uint32_t dim = 0; dim < layout->head_dim; ++dim) {
          const CodeSite site = section->site(slot, dim);
          ASSERT_GE(site.byte, section->offset);
          ASSERT_LE(site.byte * 8 + site.shift + section->bits,
                    (section->offset + section->bytes()) * 8);
          for (uint32_t bit = 0; bit < section->bits; ++bit) {
            ASSERT_EQ(used[site.byte * 8 + site.shift + bit]++, 0) << slot << " " << dim;
          }
        }
      }
    }
  }
}

TEST(PageLayout, NoByteBelongsToTwoSlots) {
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    ASSERT_LE(layout->bytes_used, page_bytes(layout->head_dim));
    std::vector<int> owner(page_bytes(layout->head_dim), -1);
    for (uint32_t slot = 0; slot < layout->slots; ++slot) {
      for (const uint32_t byte : slot_bytes(*layout, slot)) {
        ASSERT_LT(byte, layout->bytes_used);
        ASSERT_TRUE(owner[byte] == -1 || owner[byte] == static_cast<int>(slot)) << byte;
        owner[byte] = static_cast<int>(slot);
      }
    }
  }
}

TEST(PageLayout, SectionsDoNotOverlapAndAreAligned) {
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    const FormatInfo& info = format_info(layout->format);
    const uint32_t d = layout->head_dim, n = layout->slots;
    EXPECT_EQ(layout->k.offset, 0u);
    EXPECT_GE(layout->v.offset, layout->k.bytes());
    EXPECT_EQ(layout->v.offset % 16, 0u);
    EXPECT_GE(layout->k_scale_offset, layout->v.offset + layout->v.bytes());
    EXPECT_GE(layout->v_scale_offset, layout->k_scale_offset + n * info.k.scale_bytes(d));
    EXPECT_GE(layout->position_offset, layout->v_scale_offset + n * info.v.scale_bytes(d));
    EXPECT_EQ(layout->position_offset % 4, 0u);
    EXPECT_EQ(layout->full_mask(), n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1);
  }
}

// One more pair of slots would not fit, unless the mask is the limit.
TEST(PageLayout, HoldsAsManySlotsAsFit) {
  for (const PageLayout* layout : all_layouts()) {
    if (layout->slots == kSlotsPerPageMax) continue;
    const PageLayout larger =
        page_format_detail::layout_with(layout->format, layout->head_dim, layout->slots + 2);
    EXPECT_GT(larger.bytes_used, page_bytes(layout->head_dim)) << describe(*layout);
  }
}

class SlotOverwrite : public testing::TestWithParam<const KernelSet*> {};

TEST_P(SlotOverwrite, ChangesAllBytesOfTheSlotAndNoOthers) {
  Rng rng(3);
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    const std::vector<int> owner = byte_owners(*layout);
    for (uint32_t s = 0; s < layout->slots; ++s) {
      const std::vector<float> k = gaussian(rng, layout->head_dim);
      const std::vector<float> v = gaussian(rng, layout->head_dim);
      const uint8_t slot = static_cast<uint8_t>(s);
      const uint32_t position = 0xA5A5'0000u + s;
      TestPage zeros(layout->head_dim, 0x00), ones(layout->head_dim, 0xFF);
      for (TestPage* page : {&zeros, &ones}) {
        GetParam()->encode({.page = page->bytes(),
                            .format = layout->format,
                            .head_dim = layout->head_dim,
                            .slots = {&slot, 1},
                            .k = k.data(),
                            .v = v.data(),
                            .positions = &position});
      }
      for (uint32_t byte = 0; byte < zeros.size(); ++byte) {
        if (owner[byte] == static_cast<int>(s)) {
          ASSERT_EQ(zeros.at(byte), ones.at(byte)) << "not written: " << byte;
        } else {
          ASSERT_EQ(zeros.at(byte), 0x00) << byte;
          ASSERT_EQ(ones.at(byte), 0xFF) << byte;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sets, SlotOverwrite, testing::ValuesIn(all_sets()), [](const auto& param) {
  std::string name = param.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

// A warp's A operand of one m16n8k16, assembled register by register.
// a0: row g, columns 2c, 2c + 1; a1: row g + 8; a2: row g, columns + 8; a3: both.
struct FragmentA {
  double value[16][16] = {};
  void set(uint32_t lane, uint32_t reg, double low, double high) {
    const uint32_t g = lane / 4, c = lane % 4;
    const uint32_t row = g + 8 * (reg % 2), column = 2 * c + 8 * (reg / 2);
    value[row][column] = low;
    value[row][column + 1] = high;
  }
};

uint32_t word_part(const TestPage& page, uint32_t byte) {
  uint32_t word = 0;
  std::memcpy(&word, page.bytes() + byte, sizeof(word));
  return word;
}

// Both halves of a masked register as the fp16 values that the tensor core sees, times 2^24 / 2^up.
void set_codes(FragmentA& a, uint32_t lane, uint32_t reg, uint32_t masked, uint32_t up) {
  const double unit = std::ldexp(1.0, 24 - static_cast<int>(up));
  a.set(lane, reg, fp16_to_float(static_cast<uint16_t>(masked)) * unit,
        fp16_to_float(static_cast<uint16_t>(masked >> 16)) * unit);
}

// Fills a page with random codes; 16-bit codes are small integers, exact in fp16 and bf16.
TestPage random_page(const PageLayout& layout, Rng& rng) {
  TestPage page(layout.head_dim);
  for (uint32_t i = 0; i < page.size(); ++i) page.bytes()[i] = static_cast<std::byte>(rng() & 255);
  if (layout.k.bits != 16) return page;
  for (const CodeSection* section : {&layout.k, &layout.v}) {
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      for (uint32_t dim = 0; dim < layout.head_dim; ++dim) {
        const uint16_t code = fp16_from_float(static_cast<float>(below(rng, 64)));
        std::memcpy(page.bytes() + section->site(slot, dim).byte, &code, sizeof(code));
      }
    }
  }
  return page;
}

double code_number(const TestPage& page, const CodeSection& section, uint32_t slot, uint32_t dim) {
  const uint32_t code = read_code(page, section, slot, dim);
  return section.bits == 16 ? double{fp16_to_float(static_cast<uint16_t>(code))}
                            : static_cast<double>(code);
}

// K fragments of k-slice `slice` of a tile, read as the header says.
FragmentA read_k(const TestPage& page, const CodeSection& s, uint32_t tile, uint32_t slice) {
  FragmentA a;
  const uint32_t per_byte = s.bits == 16 ? 1 : 8 / s.bits;
  const uint32_t block = slice * 16 / s.block_dims, in_block = slice * 16 % s.block_dims / 16;
  const uint32_t n = in_block % per_byte;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t g = lane / 4, c = lane % 4;
    if (g >= s.tile_rows(tile)) continue;
    const uint32_t word =
        s.tile_offset(tile) + ((block * s.tile_rows(tile) + g) * 4 + c) * s.word_bytes;
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t w = word_part(page, word + 4 * (2 * (in_block / per_byte) + half));
      if (s.bits == 16) {
        set_codes(a, lane, 2 * half, w, 24);
        continue;
      }
      const uint32_t mask = ((1u << s.bits) - 1) * 0x0001'0001u << (s.bits * n);
      set_codes(a, lane, 2 * half, w & mask, s.bits * n);
      set_codes(a, lane, 2 * half + 1, (w >> 8) & mask, s.bits * n);
    }
  }
  return a;
}

// V fragments of dims 16 m .. 16 m + 15 of a tile.
FragmentA read_v(const TestPage& page, const CodeSection& s, uint32_t tile, uint32_t m) {
  FragmentA a;
  const uint32_t per_byte = s.bits == 16 ? 1 : 8 / s.bits;
  const uint32_t block = m * 16 / s.block_dims;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t g = lane / 4, c = lane % 4;
    if (c >= s.tile_rows(tile)) continue;
    const uint32_t word =
        s.tile_offset(tile) + ((block * 8 + g) * s.tile_rows(tile) + c) * s.word_bytes;
    for (uint32_t upper = 0; upper < 2; ++upper) {
      const uint32_t i = m * 16 % s.block_dims / 8 + upper;
      const uint32_t w = word_part(page, word + 4 * (i / per_byte)), n = i % per_byte;
      if (s.bits == 16) {
        set_codes(a, lane, upper, w, 24);
        continue;
      }
      const uint32_t mask = ((1u << s.bits) - 1) * 0x0001'0001u << (s.bits * n);
      set_codes(a, lane, upper, w & mask, s.bits * n);
      set_codes(a, lane, 2 + upper, (w >> 8) & mask, s.bits * n);
    }
  }
  return a;
}

uint32_t slots_in_tile(const CodeSection& s, uint32_t tile) {
  return std::min(s.tile_slots, s.slots - tile * s.tile_slots);
}

// S = K q: rows of the MMA are slots 2g (g < 8) and 2g + 1 (g + 8); slot g at 16 bits.
TEST(Fragments, KTimesQueryIsThePlainDotProduct) {
  Rng rng(5);
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    const TestPage page = random_page(*layout, rng);
    const CodeSection& s = layout->k;
    std::vector<double> q(layout->head_dim);
    for (double& value : q) value = static_cast<double>(below(rng, 17)) - 8;
    for (uint32_t tile = 0; tile < s.tiles(); ++tile) {
      double sums[16] = {};
      for (uint32_t slice = 0; slice < layout->head_dim / 16; ++slice) {
        const FragmentA a = read_k(page, s, tile, slice);
        for (uint32_t row = 0; row < 16; ++row) {
          for (uint32_t k = 0; k < 16; ++k) sums[row] += a.value[row][k] * q[slice * 16 + k];
        }
      }
      for (uint32_t i = 0; i < slots_in_tile(s, tile); ++i) {
        double expected = 0;
        for (uint32_t dim = 0; dim < layout->head_dim; ++dim) {
          expected += code_number(page, s, tile * s.tile_slots + i, dim) * q[dim];
        }
        ASSERT_EQ(sums[s.bits == 16 ? i : i / 2 + 8 * (i % 2)], expected) << tile << " " << i;
      }
    }
  }
}

// O = V^T p: k-index 0..7 are the even slots of the tile, 8..15 the odd ones; in order at 16 bits.
TEST(Fragments, ProbabilitiesTimesVIsThePlainSum) {
  Rng rng(6);
  for (const PageLayout* layout : all_layouts()) {
    SCOPED_TRACE(describe(*layout));
    const TestPage page = random_page(*layout, rng);
    const CodeSection& s = layout->v;
    for (uint32_t tile = 0; tile < s.tiles(); ++tile) {
      const uint32_t here = slots_in_tile(s, tile);
      double p[16] = {};  // by slot of the tile; 0 past the cut
      for (uint32_t i = 0; i < here; ++i) p[i] = below(rng, 32);
      for (uint32_t m = 0; m < layout->head_dim / 16; ++m) {
        const FragmentA a = read_v(page, s, tile, m);
        for (uint32_t row = 0; row < 16; ++row) {
          double sum = 0, expected = 0;
          for (uint32_t k = 0; k < 16; ++k) {
            sum += a.value[row][k] * p[s.bits == 16 ? k : k < 8 ? 2 * k : 2 * (k - 8) + 1];
          }
          for (uint32_t i = 0; i < here; ++i) {
            expected += code_number(page, s, tile * s.tile_slots + i, m * 16 + row) * p[i];
          }
          ASSERT_EQ(sum, expected) << tile << " " << m << " " << row;
        }
      }
    }
  }
}

}  // namespace
}  // namespace thinkv::kernels
