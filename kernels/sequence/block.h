// block.h: recoding into pages of a block format (block_format.h), whole blocks at a time.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/sequence/sequence_state.h"

namespace thinkv::kernels {

// At most half of the block lives: with the next recoding its tokens are written anew with others,
// so what evictions leave behind is never more than half of the bytes.
[[nodiscard]] inline bool is_sparse_block(const Lane& lane, const PageDescriptor& page) {
  return is_block(static_cast<Format>(page.format)) &&
         2u * static_cast<uint32_t>(std::popcount(page.live)) <= lane.layout(page).slots;
}

// Recodes the oldest of the rows whose fate it is, and those of sparse blocks, to `format` in
// blocks; what does not fill one stays as it is. The second view of a pair format takes the same
// tokens of the lane of the layer before along. Requires: promised pages.
void recode_blocks(SequenceState& state, Format format, uint32_t lane, const RankHead& head);

}  // namespace thinkv::kernels
