// attention.h: decode attention over lanes of pages on a CUDA device.
//
// One launch serves all sequences of a batch in one layer; lane = sequence * kv_heads + kv head.
// What a lane reads is a run of a flat list of pages, so the kernel knows nothing of sequences: the
// list is made by the append kernel of the same layer (sequence.h).
// Threads: any; work is ordered by the stream. All pointers are device pointers. Everything can be
// captured in a graph: the launch depends on no length.
#pragma once

#include <cstdint>

#include "kernels/cuda/stream.h"
#include "thinkv/internal/format.h"

namespace thinkv::cuda {

// Element type of an engine's tensor.
enum class Element : uint8_t { kF32 = 0, kF16 = 1, kBf16 = 2 };
[[nodiscard]] constexpr uint32_t element_bytes(Element e) {
  return e == Element::kF32 ? 4 : 2;
}

// One page as attention reads it. A page whose live mask is 0 is neither copied nor computed.
struct PageView {
  uint64_t live;
  uint64_t tagged;  // address of the page, 64-byte aligned, | Format
};
static_assert(sizeof(PageView) == 16 && kAllFormatCount <= 64);

// The order in which a lane's pages are best listed. Any order is right, but from one format to the
// next a warp changes what it holds of the lane, and between 16 bits and codes it reads q anew. The
// buffer, 16 bits, ends a list; blocks, which are read as values of 16 bits, come before it.
[[nodiscard]] constexpr uint32_t list_rank(Format format) {
  const auto raw = static_cast<uint32_t>(format);
  return is_16bit(format) ? raw + kAllFormatCount : raw;
}

// As kernels::SparsityCount.
struct LaneSparsity {
  uint32_t live;
  uint32_t near_zero;
};

struct AttendParams {
  const PageView* pages;       // [lane_begin[lanes]], lane after lane
  const uint32_t* lane_begin;  // [lanes + 1]
  const void* q;               // [lanes, group, head_dim] of q_element, not rotated, not scaled
  void* out;                   // [lanes, group, head_dim] of out_element
  float* lse;                  // [lanes, group] natural log; -inf where nothing is live; or null
  float* parts;                // attend_part_floats(...) of scratch
  uint32_t lanes;
  uint32_t group;     // 1..16
  uint32_t kv_heads;  // lanes of one sequence
  uint32_t head_dim;  // 64, 128, 256
  float softmax_scale;
  Element q_element;
  Element out_element;
  bool rotate;  // q is rotated and the output rotated back (rotation.h)

  // Pages of block formats may be listed: kernels of their own, with windows and emission.
  bool blocks = false;

  // Sliding window (kernels::AttendParams): window 0, no window. query_position: [sequences].
  uint32_t window = 0;
  uint32_t sinks = 0;
  const uint32_t* query_position = nullptr;

  // Emission, for sequences whose flag is not 0. Null flags: none in this layer.
  //   kEmitScores: adds the probability of every slot, reduced over the group, to its fp16 score
  //   kEmitSums: the same to an fp32 sum
  //   kEmitSparsity: writes sparsity[lane]
  // Both as kernels::attend and add_score of the oracle define them.
  const uint8_t* emit = nullptr;          // [sequences] bits
  uint16_t* const* score_rows = nullptr;  // [pages] where the scores of each page's slots are, or
                                          // the sums
  LaneSparsity* sparsity = nullptr;       // [lanes]
  void* emit_scratch = nullptr;           // emit_scratch_bytes(...)
  float near_zero = 0.01f;
  uint8_t score_reduce = 0;  // kernels::GqaReduce
};
inline constexpr uint8_t kEmitScores = 1;
inline constexpr uint8_t kEmitSparsity = 2;
inline constexpr uint8_t kEmitSums = 4;

// The launch of a GPU: chosen once, it does not depend on the lengths.
struct AttendShape {
  uint32_t ctas = 0;   // one a multiprocessor
  uint32_t warps = 0;  // of a block
};
// Result: the shape for a batch of `lanes` lanes on a GPU of `multiprocessors`.
// two_bits: most tokens are in formats with 2-bit codes; it makes no difference to the results.
[[nodiscard]] AttendShape attend_shape(uint32_t multiprocessors, uint32_t lanes, uint32_t head_dim,
                                       bool two_bits);

[[nodiscard]] uint64_t attend_part_floats(const AttendShape& shape, uint32_t lanes, uint32_t group,
                                          uint32_t head_dim);
// For at most `pages` pages in the list.
[[nodiscard]] uint64_t emit_scratch_bytes(uint64_t pages, uint32_t group);

// Attention of all lanes, with the merge of cut lanes and the emission where asked. Errors:
// cudaErrorInvalidValue for a shape that is not built; launch errors.
[[nodiscard]] cudaError_t launch_attend(const AttendParams& params, const AttendShape& shape,
                                        cudaStream_t stream);

}  // namespace thinkv::cuda
