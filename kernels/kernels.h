// kernels.h: the kernels by name, and the two CPU sets of them.
//
// reference() is plain code and the oracle of every other implementation; host() is the fast path
// that the host backend runs. Same names, same bytes: codes, scales and rotations are bit-exact
// between all sets (fp32, no contraction, the reduction orders stated here), attention agrees to
// rounding. Everything works on memory that the caller resolved; nothing allocates pages.
// Threads: all functions are reentrant.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "thinkv/internal/page_format.h"

namespace thinkv::kernels {

// Vectors are rows of head_dim fp32 values, row after row.

struct EncodeParams {
  std::byte* page;  // page_bytes(head_dim), 16-byte aligned
  Format format;    // not a block format
  uint32_t head_dim;
  std::span<const uint8_t> slots;  // [n] where each row goes; each < layout.slots, distinct
  const float* k;                  // [n, head_dim] already rotated where the policy rotates
  const float* v;                  // [n, head_dim]
  const uint32_t* positions;       // [n]
};

// A whole page of a block format. Rows as in EncodeParams, one for each slot of the page.
struct BlockParams {
  std::byte* page;
  Format format;  // a block format; of a pair, the first layer's
  uint32_t head_dim;
  const float* k;
  const float* v;
  const uint32_t* positions;
  float eta = 0.0f;                 // 0 .. below 0.5: how far the end points move inwards
  const float* second_k = nullptr;  // pairs: the second layer's rows of the same tokens
  const float* second_v = nullptr;
  const uint64_t* channels = nullptr;  // think: bits [head_dim], think_channels(head_dim) set
};

struct DecodeParams {
  const std::byte* page;
  Format format;
  uint32_t head_dim;
  std::span<const uint8_t> slots;  // [n]
  float* k;                        // [n, head_dim], or null: not wanted
  float* v;                        // [n, head_dim], or null
};

// One page of a lane as attention sees it. Slots whose bit in `live` is 0 are never read.
struct PageView {
  const std::byte* bytes;
  uint64_t live;
  Format format;
};

// How per-slot probabilities of the query heads of one kv head become one number.
enum class GqaReduce : uint8_t {
  kMeanProbability = 0,
  kMaxProbability = 1,
  kMaxLogit = 2,  // softmax of the elementwise maximum of the logits
};

// ThinKV's statistic for one (lane, step): entries of the softmax row (GQA: of the elementwise
// maximum of the logits over the query heads) below near_zero times the row's maximum.
struct SparsityCount {
  uint32_t live = 0;
  uint32_t near_zero = 0;
};

inline constexpr uint32_t kGroupMax = 16;

// Decode attention of the query heads of one kv head over one lane.
struct AttendParams {
  std::span<const PageView> pages;
  uint32_t head_dim;
  uint32_t group;  // query heads per kv head, 1..kGroupMax
  const float* q;  // [group, head_dim], rotated where K is; not scaled
  float softmax_scale;
  float* out;  // [group, head_dim]; 0 where nothing is live
  float* lse;  // [group] natural log of the sum of exp; -inf where nothing is live
  // Sliding window: a slot counts if position + window > query_position, or position < sinks.
  // window 0: no window.
  uint32_t window = 0;
  uint32_t sinks = 0;
  uint32_t query_position = 0;
  // Optional outputs.
  SparsityCount* sparsity = nullptr;
  float near_zero = 0.01f;
  float* probabilities = nullptr;  // [pages, kSlotsPerPageMax]; 0 for slots that do not count
  GqaReduce reduce = GqaReduce::kMeanProbability;
};

// k-means over real tokens; keeps the real token nearest each centre (thinkv-method: TBE).
// Evenly spaced rows start; `iterations` Lloyd rounds; squared L2; an empty cluster keeps its
// centre; picks are distinct, greedy by cluster, ties to the lower row.
// With weights, centres are weighted means and the pick minimises distance / weight.
struct MedoidParams {
  const float* keys;     // [n, dim]
  const float* weights;  // [n] > 0, or null
  uint32_t n;
  uint32_t dim;
  uint32_t target;  // 1..n
  uint32_t iterations = 4;
  uint8_t* keep;  // [n] out: 1 for exactly `target` rows
};
inline constexpr uint32_t kMedoidRowsMax = 1024;

// The row that starts cluster j: the middle of the j-th of `target` equal runs of rows. Distinct
// for distinct j, because target <= n.
[[nodiscard]] constexpr uint32_t medoid_start_row(uint32_t j, uint32_t n, uint32_t target) {
  return (2 * j + 1) * n / (2 * target);
}

// One implementation of all kernels.
struct KernelSet {
  const char* name;
  // In place, `rows` vectors: y = H D x / sqrt(d). Butterfly stages of distance 1, 2, 4, ..., then
  // one multiplication by rotation_norm: bit-exact everywhere.
  void (*rotate)(float* x, uint32_t rows, uint32_t head_dim);
  void (*rotate_back)(float* y, uint32_t rows, uint32_t head_dim);
  void (*encode)(const EncodeParams&);
  void (*encode_block)(const BlockParams&);
  void (*decode)(const DecodeParams&);
  void (*attend)(const AttendParams&);
  void (*medoids)(const MedoidParams&);
};

[[nodiscard]] const KernelSet& reference();
[[nodiscard]] const KernelSet& host();  // widest instruction set of this machine

}  // namespace thinkv::kernels
