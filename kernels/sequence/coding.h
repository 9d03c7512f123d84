// coding.h: blocks of 64 tokens on their way from 16-bit pages into streams, and back to attention.
//
// A block leaves when the newest tokens (policy: entropy.recent) no longer reach into it: at the
// prompt's end many at once, without ever having had pages; in decoding one at the end of a step.
// It is coded when the step begins, so that its exact bytes are promised, and written when the step
// ends, so that a step can still be cancelled. The first blocks of a layer make its codebooks.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/policy/coded_tokens.h"
#include "kernels/sequence/stream.h"
#include "kernels/stream/coded_block.h"
#include "thinkv/result.h"

namespace thinkv::kernels {

class SequenceState;
struct AttendScratch;
struct PromptRows;

// Blocks of one lane that are coded and not written yet.
struct PendingBlocks {
  std::vector<std::vector<std::byte>> bytes;
  std::vector<uint32_t> sizes;
  std::vector<uint8_t> raw;
};

struct CodingWork {
  std::vector<std::optional<BlockDecoders>> decoders;  // by layer; none before its codebooks
  std::vector<LayerCodes> codes;                       // by layer: as in the pool, or made just now
  std::vector<PendingBlocks> pending;                  // by lane
  std::vector<BlockCodes> blocks;                      // of one layer
  bool due = false;                                    // this step writes a block of each lane
};

using policy::coded_tokens;

// Makes the working memory and reads the codebooks. Result: false where they are no codebooks or a
// stream does not fit together. Requires: a policy with streams.
[[nodiscard]] bool load_coding(SequenceState& state);

// The first `tokens` tokens of the prompt in every lane of the layer, into state.coding.pending.
void code_prompt(SequenceState& state, uint32_t layer, const PromptRows& rows, uint32_t tokens);
// Appends what is pending in a lane. Requires: promised pages, and room (Stream::grow_for).
void write_pending(SequenceState& state, uint32_t lane);
// The layer's codebooks go into the pool, unless they are there.
void keep_codebooks(SequenceState& state, uint32_t layer);

// If a block is due at this step's end: codes it in every lane. Errors: kInternal where a token of
// it is in no page.
[[nodiscard]] Status code_step(SequenceState& state);
// Adds what it takes in one lane. Result: false beyond what a stream can hold.
[[nodiscard]] bool add_coding_need(const SequenceState& state, uint32_t lane, uint32_t& data_pages,
                                   MetaNeed& need);
void finish_coding_step(SequenceState& state);

// Decodes a lane's blocks into scratch.staging and adds their views. Errors: kInternal (damaged).
[[nodiscard]] Status add_stream_views(const SequenceState& state, uint32_t lane,
                                      AttendScratch& scratch);

// Sequence::evict of a policy with streams: whole blocks only.
[[nodiscard]] Result<uint64_t> evict_blocks(SequenceState& state,
                                            std::span<const uint32_t> positions);

}  // namespace thinkv::kernels
