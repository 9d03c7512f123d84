// scores.h: the attention that slots received, one number each, for policies that select by it.
//
// TBE: decayed, fp16. Rank rules: fp32 sums, of which the rules make what they need.
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

// The same for stores with sums. clear_sums() takes the buffer's too.
void accumulate_sums(const Lane& lane, const float* probabilities);
void scale_sums(const Lane& lane, float factor);
void clear_sums(const Lane& lane);

}  // namespace thinkv::kernels
