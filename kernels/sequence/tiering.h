// tiering.h: the host tier of a sequence in its prompt and its steps.
//
// Internal to this folder: what SequenceState::tier holds, and when it is looked at.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/sequence/prompt.h"
#include "kernels/sequence/sequence_state.h"

namespace thinkv::kernels {

// Errors: kQuotaExceeded where `tokens` more rows of a layer's lanes pass the policy's host_bytes.
[[nodiscard]] Status require_tier_room(const SequenceState& state, uint32_t layer, uint32_t tokens);
// Requires: room.
void put_into_tier(SequenceState& state, uint32_t layer, const PromptRows& rows,
                   const PromptRange& range);
// As Sequence::prefetch. Requires: a policy with a tier.
void prefetch_layer(SequenceState& state, uint32_t layer, const float* q);
// Fetches the rows of the step into scratch.staging and adds their views. Requires: scratch.query
// begins with the lane's query, rotated where the policy rotates.
void add_tier_views(const SequenceState& state, uint32_t lane, AttendScratch& scratch);
// Errors: kUnsupported where a position lies in the tier.
[[nodiscard]] Status require_none_in_tier(const SequenceState& state,
                                          std::span<const uint32_t> positions);

}  // namespace thinkv::kernels
