// refresh_reduce.cuh: the demotions of one step in one lane, or in all kv heads of a layer, by one
// block (refresh.h).
#pragma once

#include <cstdint>

#include "kernels/cuda/codec.cuh"
#include "kernels/cuda/lane_write.cuh"
#include "kernels/cuda/medoids.cuh"
#include "kernels/cuda/select.cuh"

namespace thinkv::cuda {

[[nodiscard]] __host__ __device__ constexpr bool selects_by_keys(SelectRule rule) {
  return rule == SelectRule::kMedoids || rule == SelectRule::kWeightedMedoids;
}
[[nodiscard]] __host__ __device__ constexpr bool selects_by_scores(SelectRule rule) {
  return rule == SelectRule::kWeightedMedoids || rule == SelectRule::kAttention;
}
// The layout follows the policy: pages carry scores exactly where the selection reads them.

// The dynamic shared memory of a block. Rules that need keys put positions as found where the
// k-means has its scratch later.
inline constexpr uint32_t kPlainRowBytes = 4 * sizeof(uint32_t) + sizeof(uint8_t);
inline constexpr uint32_t kPlainSharedBytes = (kRefreshRowsMax + 4) * kPlainRowBytes;
inline constexpr uint32_t kKeyRowBytes =
    sizeof(uint32_t) + sizeof(float) + sizeof(uint16_t) + sizeof(uint8_t);
inline constexpr uint32_t kKeySharedBytes =
    kMedoidVectorBytes + kMedoidScratchBytes + kMedoidRowsHeld * kKeyRowBytes;
static_assert(medoid_rows_max(64) <= kMedoidRowsHeld);
static_assert(kMedoidRowsHeld * 2 * sizeof(uint32_t) + 16 <= kMedoidScratchBytes);
static_assert(kKeySharedBytes <= 226 * 1024, "227 KiB less what is static");

struct KeySpace {
  float* vectors;
  unsigned char* scratch;
  uint16_t* cluster_of;
};

[[nodiscard]] __device__ __forceinline__ RowSpace plain_rows(unsigned char* shared) {
  constexpr uint32_t kRoom = kRefreshRowsMax;
  auto* words = reinterpret_cast<uint32_t*>(shared);
  return {.position = words,
          .found = words + (kRoom + 4),
          .place = words + 2 * (kRoom + 4),
          .weight = reinterpret_cast<float*>(words + 3 * (kRoom + 4)),
          .keep = shared + 4 * sizeof(uint32_t) * (kRoom + 4),
          .room = kRoom};
}
[[nodiscard]] __device__ __forceinline__ RowSpace key_rows(unsigned char* shared, KeySpace& keys) {
  constexpr uint32_t kRoom = kMedoidRowsHeld;
  keys.vectors = reinterpret_cast<float*>(shared);
  keys.scratch = shared + kMedoidVectorBytes;
  auto* words = reinterpret_cast<uint32_t*>(keys.scratch);
  auto* rows = reinterpret_cast<uint32_t*>(keys.scratch + kMedoidScratchBytes);
  keys.cluster_of = reinterpret_cast<uint16_t*>(rows + 2 * kRoom);
  return {.position = words,
          .found = words + (kRoom + 4),
          .place = rows,
          .weight = reinterpret_cast<float*>(rows + kRoom),
          .keep = reinterpret_cast<uint8_t*>(keys.cluster_of + kRoom),
          .room = kRoom};
}

namespace reduce_detail {

// One piece of work of a block: `heads` lanes from `first_lane` on that keep the same tokens.
struct Work {
  const BatchView* batch;
  DeviceSequence* sequence;
  uint32_t first_lane;
  uint32_t heads;
  RowSpace rows;
  RowCounts* counts;
  [[nodiscard]] __device__ __forceinline__ LaneView lane(uint32_t head) const {
    return lane_view(*batch, sequence, first_lane + head);
  }
};

// The keys of the rows, eight threads a key, into dims head * kDim .. of rows of `stride` floats.
template <int kDim>
__device__ inline void decode_keys(const LaneView& lane, const RowSpace& rows, uint32_t n,
                                   float* keys, uint32_t stride) {
  const uint32_t l = threadIdx.x % 8;
  for (uint32_t i = threadIdx.x / 8; i < n; i += blockDim.x / 8) {
    float x[kDim / 8] = {};
    const DeviceDescriptor* d = descriptor_at(lane, rows.place[i] >> 6);
    unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
    if (page != nullptr) {
      const auto format = static_cast<Format>(d->format);
      const SlotShape shape = slot_shape(kDim, d->format);
      decode_vector<kDim, true>(
          x, format,
          vector_place<kDim, true>(page, shape, coding_of<true>(format), rows.place[i] & 63u));
    }
#pragma unroll
    for (int c = 0; c < kDim / 32; ++c) {  // as medoid_place() says
      *reinterpret_cast<float4*>(keys + i * stride + 32 * c + 4 * l) =
          make_float4(x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
    }
  }
}

// rows.keep by the sequence's rule. Result: false where the keys do not fit (bad metadata).
template <int kDim>
[[nodiscard]] __device__ inline bool keep_medoids(const Work& work, const KeySpace& space,
                                                  uint32_t n, uint32_t target) {
  const PolicyParams& p = work.sequence->policy;
  const uint32_t stride = kDim * work.heads;
  if ((n + target) * stride * sizeof(float) > kMedoidVectorBytes) return false;
  const bool weighted = p.select == SelectRule::kWeightedMedoids;
  if (weighted) {
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      float& weight = work.rows.weight[i];
      weight = weight < kWeightFloor ? kWeightFloor : weight;
    }
  }
  __syncthreads();  // the keys too
  select_medoids({.keys = space.vectors,
                  .centres = space.vectors + n * stride,
                  .weights = weighted ? work.rows.weight : nullptr,
                  .cluster_of = space.cluster_of,
                  .keep = work.rows.keep,
                  .scratch = space.scratch,
                  .n = n,
                  .stride = stride,
                  .target = target,
                  .iterations = p.kmeans_iterations});
  return true;
}

// The rows of one more head. Result: whether they are as many as those of the first.
[[nodiscard]] __device__ inline bool gather_head(const Work& work, const LaneView& lane,
                                                 const Demotion& demotion, uint32_t n) {
  return lane.lane != nullptr &&
         gather_rows(lane, demotion.start, demotion.end, work.rows, work.counts) == n;
}

// Scores and keys of all heads. Result: false where a head holds other tokens (bad metadata).
template <int kDim>
[[nodiscard]] __device__ inline bool read_rows(const Work& work, const KeySpace& space,
                                               const Demotion& demotion, uint32_t n) {
  const SelectRule rule = work.sequence->policy.select;
  for (uint32_t head = 0; head < work.heads; ++head) {
    const LaneView lane = work.lane(head);
    if (head > 0 && !gather_head(work, lane, demotion, n)) return false;
    if (selects_by_scores(rule)) add_scores(lane, work.rows, n, head == 0);
    if constexpr (kDim > 0) {
      if ((n + demotion.target) * kDim * work.heads * sizeof(float) > kMedoidVectorBytes) {
        return false;
      }
      decode_keys<kDim>(lane, work.rows, n, space.vectors + head * kDim, kDim * work.heads);
      __syncthreads();  // the next gather writes rows.place
    }
  }
  return true;
}

template <int kDim>
[[nodiscard]] __device__ inline bool choose(const Work& work, const KeySpace& space, uint32_t n,
                                            uint32_t target) {
  if constexpr (kDim > 0) {
    return keep_medoids<kDim>(work, space, n, target);
  } else {
    if (work.sequence->policy.select == SelectRule::kAttention) {
      keep_heaviest(work.rows, n, target);
    } else {
      keep_newest(work.rows, n, target);
    }
    return true;
  }
}

// kDim: of the keys; 0 for the rules that need none. Result: whether tokens were dropped.
template <int kDim>
[[nodiscard]] __device__ inline bool reduce(const Work& work, const KeySpace& space,
                                            const Demotion& demotion) {
  const LaneView first = work.lane(0);
  if (first.lane == nullptr) return false;
  const uint32_t n = gather_rows(first, demotion.start, demotion.end, work.rows, work.counts);
  if (n <= demotion.target || demotion.target == 0) return false;
  bool good = n <= work.rows.room && read_rows<kDim>(work, space, demotion, n) &&
              choose<kDim>(work, space, n, demotion.target);
  for (uint32_t head = 0; head < work.heads && good; ++head) {
    const LaneView lane = work.lane(head);
    good = work.heads == 1 || gather_head(work, lane, demotion, n);
    if (good) drop_rows(lane, work.rows, n, n - demotion.target, work.counts);
  }
  if (!good && threadIdx.x == 0) raise_fault(work.batch->lease, kBadMetadata);
  return good;
}

}  // namespace reduce_detail

// All demotions that decide listed for the sequence, in lane `index` (for SelectGrain::kLayer: in
// all lanes of its layer if it is the first, else nothing); then its empty pages go to the lease.
template <int kDim>
__device__ inline void reduce_lane(const BatchView& view, DeviceSequence* sequence, uint32_t index,
                                   const RowSpace& rows, const KeySpace& space, RowCounts* counts) {
  const uint32_t heads = sequence->policy.grain == SelectGrain::kLayer ? view.geometry.kv_heads : 1;
  if (index % heads != 0) return;
  const auto* list = reinterpret_cast<const Demotion*>(page_at(view, sequence->work_page));
  if (list == nullptr) return;
  const reduce_detail::Work work{&view, sequence, index, heads, rows, counts};
  const uint32_t listed = min(sequence->demotions, demotions_per_page(view.geometry.head_dim));
  bool dropped = false;
  for (uint32_t i = 0; i < listed; ++i) {
    dropped = reduce_detail::reduce<kDim>(work, space, list[i]) || dropped;
    __syncthreads();
  }
  if (!dropped) return;
  for (uint32_t head = threadIdx.x / 32; head < heads; head += blockDim.x / 32) {
    const LaneView lane = work.lane(head);
    if (lane.lane != nullptr) sweep_lane(lane);
  }
  __syncthreads();
}

}  // namespace thinkv::cuda
