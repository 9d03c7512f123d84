// kernel_table.h: the GPU kernels that this library was built with.
//
// The rest of the client is compiled once; only what is behind this table differs between a build
// with CUDA, one without, and the tests' build on the emulated GPU.
#pragma once

#include <cstdint>

#include "kernels/cuda/driver_types.h"
#include "kernels/cuda/sequence.h"

namespace thinkv::client {

using cuda::StreamHandle;

// The functions of attention.h and sequence.h with a stream of the driver; each launch returns 0
// or the runtime's error code.
struct KernelTable {
  int (*refill)(cuda::Lease*, const uint32_t* pages, uint32_t count, StreamHandle);
  int (*drain)(cuda::Lease*, uint32_t* out, uint32_t count, StreamHandle);
  int (*open)(const cuda::BatchView&, uint32_t root, const PolicyParams&, uint32_t budget,
              bool trace_sparsity, StreamHandle);
  int (*prefill)(const cuda::BatchView&, uint32_t root, uint32_t layer, const void* k,
                 const void* v, cuda::Element, uint32_t tokens, StreamHandle);
  int (*code_prompt)(const cuda::BatchView&, uint32_t root, uint32_t layer, const void* k,
                     const void* v, cuda::Element, uint32_t tokens, StreamHandle);
  int (*prefill_queries)(const cuda::BatchView&, uint32_t root, const PolicyParams&, uint32_t layer,
                         const void* q, cuda::Element, const cuda::Prompt&, StreamHandle);
  int (*prefill_end)(const cuda::BatchView&, uint32_t root, const PolicyParams&,
                     const cuda::Prompt&, StreamHandle);
  int (*classes)(const cuda::BatchView&, uint32_t root, uint32_t first, const uint8_t* classes,
                 uint32_t count, StreamHandle);
  int (*close)(const cuda::BatchView&, uint32_t root, StreamHandle);
  int (*evict)(const cuda::BatchView&, uint32_t root, const uint32_t* positions, uint32_t count,
               StreamHandle);
  int (*trim)(const cuda::BatchView&, uint32_t root, uint32_t keep, StreamHandle);
  int (*copy)(const cuda::BatchView&, uint32_t from, uint32_t root, StreamHandle);
  int (*recode)(const cuda::BatchView&, uint32_t root, uint32_t first, uint32_t end, Format,
                StreamHandle);
  int (*budget)(const cuda::BatchView&, uint32_t root, uint32_t tokens, StreamHandle);
  int (*numbers)(const cuda::BatchView&, uint32_t root, cuda::SequenceNumbers* out, StreamHandle);
  int (*sparsity)(const cuda::BatchView&, uint32_t root, float* out, StreamHandle);
  int (*begin)(const cuda::BatchView&, StreamHandle);
  int (*append)(const cuda::BatchView&, uint32_t layer, const void* k, const void* v, cuda::Element,
                StreamHandle);
  int (*end)(const cuda::BatchView&, StreamHandle);
  int (*read_streams)(const cuda::BatchView&, uint32_t layer, StreamHandle);
  int (*attend)(const cuda::AttendParams&, const cuda::AttendShape&, StreamHandle);
  int (*centred_lse)(const cuda::BatchView&, uint32_t layer, const void* q, cuda::Element,
                     float* lse, StreamHandle);
  int (*tier_put)(const cuda::TierPut&, StreamHandle);
  int (*tier_choose)(const cuda::BatchView&, const cuda::TierQuery&, StreamHandle);
  int (*tier_fetch)(const cuda::BatchView&, const cuda::TierQuery&, StreamHandle);

  cuda::AttendShape (*attend_shape)(uint32_t multiprocessors, uint32_t lanes, uint32_t head_dim,
                                    bool two_bits);
  uint64_t (*attend_part_floats)(const cuda::AttendShape&, uint32_t lanes, uint32_t group,
                                 uint32_t head_dim);
  uint64_t (*emit_scratch_bytes)(uint64_t pages, uint32_t group);
  uint32_t (*open_pages)(const ModelGeometry&, const PolicyParams&);
  uint32_t (*prefill_pages)(const ModelGeometry&, const PolicyParams&, uint32_t layer,
                            uint32_t tokens);
  uint32_t (*prefill_end_pages)(const ModelGeometry&, const PolicyParams&, uint32_t budget,
                                const cuda::Prompt&);
  uint32_t (*class_pages)(const ModelGeometry&, uint32_t end);
  uint32_t (*classes_max)(const ModelGeometry&);
  uint32_t (*step_pages)(const ModelGeometry&, const PolicyParams&, const cuda::StepSequence&);
  uint32_t (*recode_pages)(const ModelGeometry&, const PolicyParams&, uint32_t lane_pages_max,
                           Format);
  cuda::RankNeed (*rank_need)(const ModelGeometry&, const PolicyParams&, uint32_t pages,
                              uint64_t tokens);
  cuda::RankMemoryShape (*rank_memory_shape)(const cuda::RankNeed&, uint32_t multiprocessors);
  Status (*supported)(const ModelGeometry&, const PolicyParams&);
  uint32_t (*lane_pages_limit)(const ModelGeometry&, const PolicyParams&);
};

// Null in a library that was built without CUDA.
[[nodiscard]] const KernelTable* kernel_table();

}  // namespace thinkv::client
