// scores.h: decayed attention, one fp16 number a slot, for policies that select by it.
//
// A token starts at 0 in the buffer, takes its score with it when it is flushed, and every flush
// first multiplies what the lane's pages hold. Fp16 saturates at its largest finite value: an
// infinite weight would make a centre of the k-means NaN.
#pragma once

#include <cstdint>

#include "kernels/sequence/lane.h"

namespace thinkv::kernels {

[[nodiscard]] uint16_t add_score(uint16_t score, float probability);

// probabilities [pages of the table, then buffer pages][kSlotsPerPageMax], as attend() emits them.
void accumulate_scores(const Lane& lane, const float* probabilities);
void decay_scores(const Lane& lane, float factor);

}  // namespace thinkv::kernels
