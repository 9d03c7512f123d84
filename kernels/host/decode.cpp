// Decoding of single slots, one tile at a time.
#include <algorithm>

#include "kernels/host/host_set.h"
#include "kernels/host/tile_decode.h"
#include "thinkv/internal/check.h"

#include "kernels/host/isa_begin.inc"

namespace {

void scale_row(const PageSide& side, uint32_t slot, const float* row, float* out) {
  const uint32_t head_dim = side.section->head_dim;
  std::copy_n(row, head_dim, out);
  if (side.coding.group_scaled()) side.apply_group_scales(slot, out);
  if (!side.coding.vector_scaled()) return;
  const F8 scale = splat(side.vector_scale(slot));
  for (uint32_t d = 0; d < head_dim; d += kLanes) store(out + d, load(out + d) * scale);
}

void decode_side(const PageSide& side, std::span<const uint8_t> slots, float* out) {
  const CodeSection& section = *side.section;
  TileRows rows;
  for (uint32_t tile = 0; tile < section.tiles(); ++tile) {
    uint32_t wanted = 0;
    for (const uint32_t slot : slots) {
      if (slot / section.tile_slots == tile) wanted |= 1u << (slot % section.tile_slots);
    }
    if (wanted == 0) continue;
    side.decode(tile, wanted, rows);
    for (size_t i = 0; i < slots.size(); ++i) {
      if (slots[i] / section.tile_slots != tile) continue;
      scale_row(side, slots[i], rows.row[slots[i] % section.tile_slots],
                out + i * section.head_dim);
    }
  }
}

}  // namespace

void decode(const DecodeParams& params) {
  THINKV_CHECK(head_dim_supported(params.head_dim) && params.format != Format::kNone);
  const PageLayout& layout = page_layout(params.format, params.head_dim);
  for (const uint8_t slot : params.slots) THINKV_CHECK(slot < layout.slots);
  if (params.k != nullptr) decode_side({params.page, layout, true}, params.slots, params.k);
  if (params.v != nullptr) decode_side({params.page, layout, false}, params.slots, params.v);
}

#include "kernels/host/isa_end.inc"
