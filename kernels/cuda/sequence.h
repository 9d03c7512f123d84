// sequence.h: sequences in device memory, and the kernels of a decode step on them.
//
// The state of a sequence lies in pool pages (device_format.h), so it is counted with what it
// describes and outlives the process that made it. What is here launches kernels on a stream and
// nothing else: no allocation, no synchronisation, no host-side length. begin .. end of a step can
// be captured in one graph and replayed for ever; whether a flush, a refresh or a demotion is due
// is decided on the device.
//
// A step of a batch, in stream order:
//   launch_begin                          positions, emission flags, the page lists of all layers
//   for each layer: launch_append         rotate and store the token
//                   launch_read_streams   where sequences have streams: decodes their blocks
//                   launch_tier_fetch     (tier.h) where a sequence has a tier
//                   launch_attend         (attention.h) over the layer's list
//   launch_end                            full buffers are flushed; budget, labels, segments,
//                                         survivors; tokens go into streams; slots and pages are
//                                         freed; progress is told
//
// Pages come from a Lease in device memory. The host fills it (launch_refill) before a step, by the
// bound that step_pages() gives, so no kernel ever finds it empty; pages that lanes lose go into
// it. Threads: any; one stream at a time for all work on one Lease.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/stream.h"
#include "kernels/cuda/tier.h"
#include "thinkv/internal/geometry.h"
#include "thinkv/internal/policy_params.h"

namespace thinkv::cuda {

// The window of virtual addresses in which extent e lies at base + e * extent_bytes (PageId).
struct PoolView {
  uint64_t base;
  uint64_t extent_bytes;
  uint32_t extents = 0;  // how many the window holds; 0: as many as a PageId can name
};

// Free pages, a stack in device memory. `count` is written by kernels alone.
struct Lease {
  uint32_t count;
  uint32_t capacity;
  uint32_t faults;  // LeaseFault bits: defects, never expected
  uint32_t reserved;
  uint64_t used_total;  // pages that sequences hold, their roots included
  uint32_t* pages;      // [capacity] PageId::raw
};
enum LeaseFault : uint32_t {
  kLeaseEmpty = 1,   // a kernel needed a page that was not promised: tokens were dropped
  kLeaseFull = 2,    // a page came back and there was no room: it is lost until the close
  kListFull = 4,     // the page list of a layer was too small: attention missed pages
  kBadMetadata = 8,  // a page id or count in a sequence's metadata was out of bounds
  kRowsFull = 16,    // rank rules had no memory for the tokens or keys of a lane: it is as it was
};

// What the end of a step tells the host, in host memory that the device maps; written by one kernel
// in this order, `steps` last. The host polls it and never waits for it.
struct Progress {
  uint64_t used_total;      // Lease::used_total after the step
  uint32_t faults;          // Lease::faults
  uint32_t lane_pages_max;  // of any lane of the batch: pages in its table
  uint64_t live_slots;      // of all lanes of the batch
  uint64_t steps;           // steps finished on this batch
};

// Where the token of a step goes in one lane: found by launch_begin for all layers at once, so that
// launch_append, which runs once a layer, has one read before it writes.
struct TokenSite {
  uint64_t lane;  // address of the DeviceLane
  uint64_t page;  // address of the buffer's page | flags | tokens in the buffer; 0: no sequence
  static constexpr uint64_t kSums = 64;  // the lane keeps fp32 sums
  static constexpr uint64_t kCentred = 32;
  static constexpr uint64_t kRotates = 16;
  static constexpr uint64_t kTokens = 15;
};

// Working memory of rank rules that has no room in a block: the rows of long lanes, and keys that
// medoids are chosen by. In device memory: the host changes it between launches, so what was
// captured in a graph finds the newest.
struct RankMemory {
  unsigned char* rows;  // [blocks, rank_region_bytes(room, dims)] (rank.h)
  uint32_t room;        // tokens of a lane
  uint32_t dims;        // of a key; 0: no room for any
  uint32_t blocks;      // 0: there is no memory
};

// 16-bit pages that attention reads behind those of a lane, written for one layer before its
// attention and used again by the next one (working.cuh). In device memory, as RankMemory.
struct WorkingPages {
  unsigned char* pages;  // [lanes of a layer, lane_pages]
  uint32_t lane_pages;   // 0: there is no memory
  uint32_t reserved;
};

// What all kernels of one model's batch share. Passed by value; all pointers are device pointers.
struct BatchView {
  PoolView pool;
  ModelGeometry geometry;
  const uint32_t* roots;  // [capacity] root page of each sequence; PageId::kNoneRaw: no sequence
  uint32_t capacity;      // sequences, the rows of k, v, q and out
  uint32_t pages_max;     // of one layer's page list
  Lease* lease;
  Progress* progress;
  const RankMemory* rank_memory;

  // Working memory of a step.
  uint32_t* positions;     // [capacity] of this step's token
  uint8_t* emit;           // [layers, capacity] EmitFlags of attention.h
  uint32_t* lane_begin;    // [layers, capacity * kv_heads + 1]
  TokenSite* sites;        // [layers, capacity * kv_heads]
  PageView* pages;         // [layers, pages_max]
  uint16_t** score_rows;   // [layers, pages_max] fp16, or fp32 of sequences that emit sums
  LaneSparsity* sparsity;  // [layers, capacity * kv_heads]

  // Null where no sequence of the batch keeps tokens outside of its pages.
  const WorkingPages* working = nullptr;
  const TierSequence* const* tiers = nullptr;  // [capacity], null where the sequence has no tier
  const TierMemory* tier_memory = nullptr;

  // Where coded blocks of one layer are decoded to, page i for entry i of its list: 16-bit pages
  // [pages_max]. Null: no sequence of the batch has streams, and no kernel looks for them.
  unsigned char* stream_pages = nullptr;
};

// ---- sizes, for the host ----

// Pages that a sequence holds before its first token, its root apart.
[[nodiscard]] uint32_t open_pages(const ModelGeometry& geometry, const PolicyParams& policy);
// An upper bound of what launch_prefill of one layer takes, launch_code_prompt before it included.
[[nodiscard]] uint32_t prefill_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                                     uint32_t layer, uint32_t tokens);
// A prompt, and of each layer how many of its newest queries were given; 0: none.
struct Prompt {
  uint32_t tokens;
  uint32_t queries = 0;
};
// An upper bound of what launch_prefill_end takes. budget: as launch_open's.
[[nodiscard]] uint32_t prefill_end_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                                         uint32_t budget, const Prompt& prompt);
// A sequence before a step, as the host knows it.
struct StepSequence {
  uint32_t prompt;            // tokens
  uint32_t generated;         // tokens
  uint32_t lane_pages_max;    // an upper bound of the pages of any of its lanes
  uint32_t budget = 0;        // as launch_open's
  uint32_t settled_from = 0;  // the first end of a step (0: of the prompt) after the client last
                              // recoded tokens or set a budget: rules bound what they leave then on
  uint32_t prompt_queries = 0;  // as Prompt::queries
};
// An upper bound of what one step takes for one sequence; 0 for most steps.
[[nodiscard]] uint32_t step_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                                  const StepSequence& sequence);
// An upper bound of what launch_recode takes.
[[nodiscard]] uint32_t recode_pages(const ModelGeometry& geometry, const PolicyParams& policy,
                                    uint32_t lane_pages_max, Format format);
// What a sequence holds for classes of its tokens up to position `end`.
[[nodiscard]] uint32_t class_pages(const ModelGeometry& geometry, uint32_t end);
// Positions that can have a class are below it.
[[nodiscard]] uint32_t classes_max(const ModelGeometry& geometry);
// Errors: kUnsupported with what is too large for the device (lanes, medoid rows, ...).
[[nodiscard]] Status supported(const ModelGeometry& geometry, const PolicyParams& policy);
// What RankMemory has to have room for.
struct RankNeed {
  uint64_t tokens = 0;  // of a lane; 0: a block has room for them
  uint32_t dims = 0;    // of keys that medoids are chosen by; 0: none are
  [[nodiscard]] constexpr bool operator==(const RankNeed&) const = default;
  [[nodiscard]] constexpr RankNeed and_of(const RankNeed& other) const {
    return {std::max(tokens, other.tokens), std::max(dims, other.dims)};
  }
};
// That of the policy's rules before they see a lane of `pages` pages and `tokens` tokens.
[[nodiscard]] RankNeed rank_need(const ModelGeometry& geometry, const PolicyParams& policy,
                                 uint32_t pages, uint64_t tokens);
// What RankMemory is made of for it: the more blocks the faster.
struct RankMemoryShape {
  uint32_t room;
  uint32_t dims;
  uint32_t blocks;
  uint64_t bytes;
};
[[nodiscard]] RankMemoryShape rank_memory_shape(const RankNeed& need, uint32_t multiprocessors);
// Pages that one lane's table can hold, or fewer where rules compare all keys with each other.
[[nodiscard]] uint32_t lane_pages_limit(const ModelGeometry& geometry, const PolicyParams& policy);

// ---- launches; each returns cudaSuccess or a launch error ----

// Pushes `count` page ids. `pages`: device-accessible memory (pinned host memory will do).
[[nodiscard]] cudaError_t launch_refill(Lease* lease, const uint32_t* pages, uint32_t count,
                                        cudaStream_t stream);
// Pops at most `count` into out[1 ..] and writes how many into out[0].
[[nodiscard]] cudaError_t launch_drain(Lease* lease, uint32_t* out, uint32_t count,
                                       cudaStream_t stream);

// Makes `root` (a page that the lease does not hold) the root of a new, empty sequence.
// budget_tokens: 0, none; of rank rules kernels::kBudgetNone, none.
[[nodiscard]] cudaError_t launch_open(const BatchView& view, uint32_t root,
                                      const PolicyParams& policy, uint32_t budget_tokens,
                                      bool trace_sparsity, cudaStream_t stream);
// k, v: [tokens, kv_heads, head_dim] of one layer, after rotary embedding.
[[nodiscard]] cudaError_t launch_prefill(const BatchView& view, uint32_t root, uint32_t layer,
                                         const void* k, const void* v, Element element,
                                         uint32_t tokens, cudaStream_t stream);
// Before it, of a policy with entropy: codes what belongs into streams; prefill_pages() counts what
// it takes too. Uses nothing of the view that belongs to a step.
[[nodiscard]] cudaError_t launch_code_prompt(const BatchView& view, uint32_t root, uint32_t layer,
                                             const void* k, const void* v, Element element,
                                             uint32_t tokens, cudaStream_t stream);
// The centres of the layer's lanes, where the policy centres keys; launch_prefill calls it.
[[nodiscard]] cudaError_t launch_centre(const BatchView& view, uint32_t root, uint32_t layer,
                                        const void* k, Element element, uint32_t tokens,
                                        cudaStream_t stream);
// q: [prompt.queries, q_heads, head_dim] of one layer, after its launch_prefill and before
// launch_prefill_end; read in stream order and not kept. Takes no pages. Requires: 1 to
// prompt.tokens queries.
[[nodiscard]] cudaError_t launch_prefill_queries(const BatchView& view, uint32_t root,
                                                 const PolicyParams& policy, uint32_t layer,
                                                 const void* q, Element element,
                                                 const Prompt& prompt, cudaStream_t stream);
// Rank rules of the prompt's end run here: they take at most prefill_end_pages(). Uses nothing of
// the view that belongs to a step. policy: the sequence's; prompt.queries: as all layers had them.
[[nodiscard]] cudaError_t launch_prefill_end(const BatchView& view, uint32_t root,
                                             const PolicyParams& policy, const Prompt& prompt,
                                             cudaStream_t stream);
// Classes of the tokens at positions first, first + 1, ..; device-accessible memory. Takes what
// class_pages() of the new end says more than of the old one. Requires: first + count is at most
// classes_max().
[[nodiscard]] cudaError_t launch_classes(const BatchView& view, uint32_t root, uint32_t first,
                                         const uint8_t* classes, uint32_t count,
                                         cudaStream_t stream);
// Everything the sequence holds goes into the lease, its root too.
[[nodiscard]] cudaError_t launch_close(const BatchView& view, uint32_t root, cudaStream_t stream);
// positions: device-accessible, ascending. Newest 16 tokens are skipped by the caller. Of a
// sequence with streams blocks go, and only those of which all 64 tokens are named.
[[nodiscard]] cudaError_t launch_evict(const BatchView& view, uint32_t root,
                                       const uint32_t* positions, uint32_t count,
                                       cudaStream_t stream);
// All tokens but the newest `keep`, and at least 16.
[[nodiscard]] cudaError_t launch_trim(const BatchView& view, uint32_t root, uint32_t keep,
                                      cudaStream_t stream);
// Makes `root` (a page that the lease does not hold) the root of a copy of the sequence of `from`:
// every page of it, so the two have nothing in common afterwards. Takes as many pages as `from`
// holds, its root apart.
[[nodiscard]] cudaError_t launch_copy(const BatchView& view, uint32_t from, uint32_t root,
                                      cudaStream_t stream);
// Live tokens with first <= position < end that are not in the buffer, to `format`.
[[nodiscard]] cudaError_t launch_recode(const BatchView& view, uint32_t root, uint32_t first,
                                        uint32_t end, Format format, cudaStream_t stream);
[[nodiscard]] cudaError_t launch_budget(const BatchView& view, uint32_t root,
                                        uint32_t budget_tokens, cudaStream_t stream);

[[nodiscard]] cudaError_t launch_begin(const BatchView& view, cudaStream_t stream);
// k, v: [capacity, kv_heads, head_dim]; rows without a sequence are not read.
[[nodiscard]] cudaError_t launch_append(const BatchView& view, uint32_t layer, const void* k,
                                        const void* v, Element element, cudaStream_t stream);
// Before launch_attend of a layer, where the view has stream_pages.
[[nodiscard]] cudaError_t launch_read_streams(const BatchView& view, uint32_t layer,
                                              cudaStream_t stream);
// After launch_attend of a layer, where the engine reads its lse and a sequence has centred keys:
// adds what their scores lack. q, lse: as launch_attend's.
[[nodiscard]] cudaError_t launch_centred_lse(const BatchView& view, uint32_t layer, const void* q,
                                             Element element, float* lse, cudaStream_t stream);
[[nodiscard]] cudaError_t launch_end(const BatchView& view, cudaStream_t stream);

// The numbers of one sequence, written to device-accessible memory (SequenceNumbers).
struct SequenceNumbers {
  uint64_t tokens, prompt_tokens;
  uint64_t live_slots, live_tokens_max;
  uint64_t data_pages, metadata_pages;
  uint64_t evicted_slots, reused_slots, recoded_slots, recoded_bytes;
  uint64_t demotions, merges, over_budget_steps, refreshes, steps;
  uint64_t segments[kThoughtCount];
  uint64_t budget_tokens;
  uint32_t lane_pages_max;
  uint32_t reserved;
  uint64_t gathered_bytes;
};
[[nodiscard]] cudaError_t launch_numbers(const BatchView& view, uint32_t root, SequenceNumbers* out,
                                         cudaStream_t stream);
// out: [layers] near-zero share of the last step by layer, NaN where it was not measured.
[[nodiscard]] cudaError_t launch_sparsity(const BatchView& view, uint32_t root, float* out,
                                          cudaStream_t stream);

}  // namespace thinkv::cuda
