// refresh.h: the end of a step on the device: budget, labels, segments, survivors.
//
// What kernels/sequence/refresh.cpp does, for all sequences of a batch at once and in its order:
// the budget, then, where a segment closes, its label, the demotions of a transition and the next
// segment. Three kernels, the same whatever is due, no host synchronisation:
//   decide   a warp a sequence: compares, and where something is due lists the demotions in the
//            sequence's work page; takes segment pages from the lease
//   reduce   twice: rules that need positions and scores alone, then those that need keys. A block
//            a lane (SelectGrain::kLayer: a block all kv heads of a layer). Drops what does not
//            survive and gives empty pages to the lease. Ends at once where nothing is due.
// Differences from the host, which asks its lanes for live counts after every demotion:
//   - decide counts by DeviceSequence.generated_live and Segment.live: exact for every lane until
//     launch_evict() takes generated tokens, an upper bound after it. So a sequence whose tokens
//     were taken by position may be demoted earlier than on the host, never later.
//   - a step lists at most demotions_per_page(); what is left waits for the next steps: demotions
//   of
//     a transition in Segment.waiting, those of the budget by the budget itself.
//   - where the segment table or the lease has no room for one more segment, the two oldest become
//     one without losing a token.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/medoid_limits.h"
#include "kernels/cuda/sequence.h"

namespace thinkv::cuda {

// Of one segment, or of two that the floor rule joins.
inline constexpr uint32_t kRefreshRowsMax = 1024;

// Tokens of the largest segment that a demotion meets.
[[nodiscard]] constexpr uint32_t refresh_rows(const PolicyParams& policy) {
  if (policy.schedule_length == 0) return policy.segment_tokens;
  const uint32_t joined = 2u * policy.schedule[policy.schedule_length - 1];
  return std::max(policy.segment_tokens, joined);
}

// False where a demotion of this policy needs more memory than a block has, on any GPU that the
// kernels are for: a segment of 256 tokens fits whatever the model.
[[nodiscard]] constexpr bool refresh_supported(const ModelGeometry& geometry,
                                               const PolicyParams& policy) {
  if (policy.evict != EvictRule::kTbe) return true;
  const uint32_t rows = refresh_rows(policy);
  if (rows > kRefreshRowsMax) return false;
  if (policy.select == SelectRule::kAttention || policy.select == SelectRule::kRecent) return true;
  if (rows > kMedoidRowsHeld) return false;
  const MedoidStreamSize size{.rows = rows,
                              .target = std::max<uint32_t>(policy.schedule[0], 1),
                              .heads = policy.grain == SelectGrain::kLayer ? geometry.kv_heads : 1,
                              .iterations = policy.kmeans_iterations,
                              .width = 0};
  return medoid_stream_width(size, geometry.head_dim, medoid_vector_bytes(80)) != 0;
}

// After the flush of closing segments, which counts the step, in the same stream. BatchView::pages
// is its working memory.
[[nodiscard]] cudaError_t launch_refresh(const BatchView& view, cudaStream_t stream);

}  // namespace thinkv::cuda
