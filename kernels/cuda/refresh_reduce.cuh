// refresh_reduce.cuh: the demotions of one step in one lane, or in all kv heads of a layer, by one
// block (refresh.h).
#pragma once

#include <cstdint>

#include "kernels/cuda/codec.cuh"
#include "kernels/cuda/lane_write.cuh"
#include "kernels/cuda/medoid_stream.cuh"
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
inline constexpr uint32_t kMedoidVectorBytes = medoid_vector_bytes(kCode);
[[nodiscard]] constexpr uint32_t key_shared_bytes(uint32_t code) {
  return medoid_vector_bytes(code) + kMedoidScratchBytes + kMedoidRowsHeld * kKeyRowBytes;
}
static_assert(kMedoidRowsHeld * 2 * sizeof(uint32_t) + 16 <= kMedoidScratchBytes);
static_assert(key_shared_bytes(90) <= 225 * 1024, "227 KiB less what is static");
static_assert(key_shared_bytes(80) <= 161 * 1024, "163 KiB less what is static");

struct KeySpace {
  float* vectors;  // kMedoidVectorBytes, 16-byte aligned
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

// Some dims of a vector.
struct DimRange {
  uint32_t first, count;  // multiples of 32
};

// Those dims of the keys at `place`, eight threads a key, to the start of rows of `stride` floats.
template <int kDim>
__device__ inline void decode_keys(const LaneView& lane, const uint32_t* place, uint32_t n,
                                   DimRange dims, float* keys, uint32_t stride) {
  const uint32_t l = threadIdx.x % 8;
  for (uint32_t i = threadIdx.x / 8; i < n; i += blockDim.x / 8) {
    float x[kDim / 8] = {};
    const DeviceDescriptor* d = descriptor_at(lane, place[i] >> 6);
    unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
    if (page != nullptr && format_valid(d->format)) {  // this policy writes no blocks
      const auto format = static_cast<Format>(d->format);
      const SlotShape shape = slot_shape(kDim, d->format);
      decode_vector<kDim, true>(
          x, format,
          vector_place<kDim, true>(page, shape, coding_of<true>(format), place[i] & 63u));
    }
#pragma unroll
    for (uint32_t c = 0; c < kDim / 32; ++c) {  // as medoid_place() says
      const uint32_t to = 32 * c - dims.first;
      if (to >= dims.count) continue;
      *reinterpret_cast<float4*>(keys + i * stride + to + 4 * l) =
          make_float4(x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
    }
  }
}

// How a selection has its keys: all of them in shared memory, or their places to stream them from.
struct KeyPlan {
  bool resident;
  MedoidStreamSize stream;  // width 0: neither fits (bad metadata)
};
template <int kDim>
[[nodiscard]] __device__ inline KeyPlan plan_keys(const Work& work, uint32_t n, uint32_t target) {
  const uint32_t iterations = work.sequence->policy.kmeans_iterations;
  KeyPlan plan{medoids_fit(kMedoidVectorBytes, n, target, kDim * work.heads),
               {n, target, work.heads, iterations, 0}};
  plan.stream.width = medoid_stream_width(plan.stream, kDim, kMedoidVectorBytes);
  return plan;
}

// What both ways have in common but for where the keys are.
[[nodiscard]] __device__ __forceinline__ Medoids medoids_of(const Work& work, const KeySpace& space,
                                                            uint32_t n, uint32_t target) {
  const PolicyParams& p = work.sequence->policy;
  return {.keys = space.vectors,
          .centres = space.vectors,
          .weights = p.select == SelectRule::kWeightedMedoids ? work.rows.weight : nullptr,
          .cluster_of = space.cluster_of,
          .keep = work.rows.keep,
          .scratch = space.scratch,
          .scratch_bytes = kMedoidScratchBytes,
          .n = n,
          .stride = 0,
          .target = target,
          .iterations = p.kmeans_iterations};
}

template <int kDim>
__device__ inline void keep_resident(const Work& work, Medoids m) {
  m.stride = kDim * work.heads;
  m.centres = m.keys + m.n * m.stride;
  select_medoids(m);
}

// Places of all heads, clusters, what centres are made in, centres, keys.
template <int kDim>
__device__ inline void keep_streamed(const Work& work, Medoids m, const MedoidStreamSize& size) {
  auto* const space = reinterpret_cast<unsigned char*>(m.keys);
  const auto* const places = reinterpret_cast<const uint32_t*>(space);
  auto* const clusters = reinterpret_cast<uint16_t*>(space + size.place_bytes());
  m.stride = size.width;
  m.centres = reinterpret_cast<float*>(space + size.head_bytes());
  m.keys = m.centres + kMedoidCentresTogether * m.stride;
  const uint32_t each = kDim / size.width;  // tiles of a head
  stream_medoids({.m = m,
                  .tiles = work.heads * each,
                  .clusters = clusters,
                  .made_in = space + size.place_bytes() + size.cluster_bytes()},
                 [&](uint32_t tile) {
                   const uint32_t head = tile / each;
                   decode_keys<kDim>(work.lane(head), places + head * m.n, m.n,
                                     {tile % each * size.width, size.width}, m.keys, m.stride);
                 });
}

// rows.keep by the sequence's rule. Requires: read_rows() with the same plan.
template <int kDim>
__device__ inline void keep_medoids(const Work& work, const KeySpace& space, const KeyPlan& plan) {
  const Medoids m = medoids_of(work, space, plan.stream.rows, plan.stream.target);
  for (uint32_t i = threadIdx.x; i < m.n && m.weights != nullptr; i += blockDim.x) {
    float& weight = work.rows.weight[i];
    weight = weight < kWeightFloor ? kWeightFloor : weight;
  }
  __syncthreads();  // the keys too
  if (plan.resident) {
    keep_resident<kDim>(work, m);
  } else {
    keep_streamed<kDim>(work, m, plan.stream);
  }
}

// The rows of one more head. Result: whether they are as many as those of the first.
[[nodiscard]] __device__ inline bool gather_head(const Work& work, const LaneView& lane,
                                                 const Demotion& demotion, uint32_t n) {
  return lane.lane != nullptr &&
         gather_rows(lane, demotion.start, demotion.end, work.rows, work.counts) == n;
}

// Scores of all heads, and their keys or where those are. Result: false where a head holds other
// tokens (bad metadata).
template <int kDim>
[[nodiscard]] __device__ inline bool read_rows(const Work& work, const KeySpace& space,
                                               const Demotion& demotion, uint32_t n,
                                               const KeyPlan& plan) {
  for (uint32_t head = 0; head < work.heads; ++head) {
    const LaneView lane = work.lane(head);
    if (head > 0 && !gather_head(work, lane, demotion, n)) return false;
    if (selects_by_scores(work.sequence->policy.select)) add_scores(lane, work.rows, n, head == 0);
    if constexpr (kDim > 0) {
      if (plan.resident) {
        decode_keys<kDim>(lane, work.rows.place, n, {0, kDim}, space.vectors + head * kDim,
                          kDim * work.heads);
      } else {
        auto* const places = reinterpret_cast<uint32_t*>(space.vectors) + head * n;
        for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) places[i] = work.rows.place[i];
      }
      __syncthreads();  // the next gather writes rows.place
    }
  }
  return true;
}

// rows.keep of `n` rows for the demotion. Result: false for bad metadata.
template <int kDim>
[[nodiscard]] __device__ inline bool choose(const Work& work, const KeySpace& space,
                                            const Demotion& demotion, uint32_t n) {
  KeyPlan plan{};
  if constexpr (kDim > 0) {
    plan = plan_keys<kDim>(work, n, demotion.target);
    if (!plan.resident && plan.stream.width == 0) return false;
  }
  if (!read_rows<kDim>(work, space, demotion, n, plan)) return false;
  if constexpr (kDim > 0) {
    keep_medoids<kDim>(work, space, plan);
  } else if (work.sequence->policy.select == SelectRule::kAttention) {
    keep_heaviest(work.rows, n, demotion.target);
  } else {
    keep_newest(work.rows, n, demotion.target);
  }
  return true;
}

// kDim: of the keys; 0 for the rules that need none. Result: whether tokens were dropped.
template <int kDim>
[[nodiscard]] __device__ inline bool reduce(const Work& work, const KeySpace& space,
                                            const Demotion& demotion) {
  const LaneView first = work.lane(0);
  if (first.lane == nullptr) return false;
  const uint32_t n = gather_rows(first, demotion.start, demotion.end, work.rows, work.counts);
  if (n <= demotion.target || demotion.target == 0) return false;
  bool good = n <= work.rows.room && choose<kDim>(work, space, demotion, n);
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
