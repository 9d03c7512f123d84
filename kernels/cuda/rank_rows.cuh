// rank_rows.cuh: the tokens of a lane in the memory of a block while a rule is applied to them:
// places and protection, as kernels/sequence/rank_rows.cpp makes them (rank.h).
//
// Functions of a whole block; every thread calls them with the same arguments.
#pragma once

#include <cstdint>

#include "kernels/cuda/class_table.cuh"
#include "kernels/cuda/codec_block_encode.cuh"
#include "kernels/cuda/codec_token.cuh"
#include "kernels/cuda/compact.cuh"
#include "kernels/cuda/out_of_line.cuh"
#include "kernels/cuda/rank_step.cuh"
#include "kernels/cuda/recode.cuh"
#include "kernels/cuda/select.cuh"
#include "kernels/policy/rank_budget.h"
#include "kernels/policy/rank_signal.h"

namespace thinkv::cuda {

// What becomes of a row; the host's RankFate.
enum RankFate : uint8_t { kRankDrop = 0, kRankKeep = 1, kRankRecode = 2 };

// Shared or global memory for at most `room` rows, ascending by position. `score` begins at 8
// bytes, and `number` follows it: together they are the masks of recoding.
struct RankRows {
  uint32_t* place;  // descriptor << 6 | slot
  uint32_t* position;
  float* attention;  // of a layer's heads together: the sum of their scores
  float* score;
  float* number;
  uint8_t* fixed;  // protected
  uint8_t* fate;
  uint32_t room;
  uint32_t* map;  // working memory of gather_lane(): `number`, or shared memory where rows are not
  uint32_t map_words;
};
[[nodiscard]] __device__ __forceinline__ RankRows rank_rows(unsigned char* memory, uint32_t room) {
  auto* words = reinterpret_cast<uint32_t*>(memory);
  return {.place = words,
          .position = words + room,
          .attention = reinterpret_cast<float*>(words + 2 * room),
          .score = reinterpret_cast<float*>(words + 3 * room),
          .number = reinterpret_cast<float*>(words + 4 * room),
          .fixed = memory + 5 * sizeof(uint32_t) * room,
          .fate = memory + 5 * sizeof(uint32_t) * room + room,
          .room = room,
          .map = words + 4 * room,
          .map_words = room};
}

[[nodiscard]] __device__ __forceinline__ RankMemory memory_of(const BatchView& view) {
  return view.rank_memory == nullptr ? RankMemory{} : *view.rank_memory;
}
// The block's part of it.
[[nodiscard]] __device__ __forceinline__ unsigned char* region_of(const RankMemory& memory) {
  return memory.rows + blockIdx.x * rank_region_bytes(memory.room, memory.dims);
}

// Tokens that go to another format at a time.
inline constexpr uint32_t kRankRecodeMax = 256;
struct RankRecode {
  uint32_t from[kRankRecodeMax];  // descriptor << 6 | slot
  uint32_t positions[kRankRecodeMax];
  uint32_t scores[kRankRecodeMax];
  SlotPlace places[kRankRecodeMax];
};

// Static shared memory of a block.
struct RankShared {
  uint32_t bins[256];
  uint32_t digit, left, whole;  // of the radix selection
  uint32_t count;
  uint32_t of_prompt;
  uint64_t least[2];  // of the tiers of DiffKV: the lowest row's key
  float sum;
  uint64_t own[kSharedHeadsMax];  // of kShared, by head
  uint32_t places[kSharedHeadsMax];
  uint32_t taken;
  RowCounts counts;
  union {
    RankRecode recode;
    CompactShared compact;
    BlockTile tile;
    uint32_t layer_bins[256];  // of all heads, because loading a head uses `bins`
  };
};

// A lane's budget. As RankHead of the host.
struct RankLimit {
  uint32_t counted;  // tokens that the budget counts, the buffer's included
  uint32_t limit;    // of them, how many may stay
  bool local;        // of first_fit in decoding: the mask holds the newest tokens
  uint32_t classes;  // of tokens that are protected
  [[nodiscard]] __device__ __forceinline__ bool over() const { return counted > limit; }
  [[nodiscard]] __device__ __forceinline__ uint32_t surplus() const {
    return over() ? counted - limit : 0;
  }
};

// `heads` lanes from `first_lane` on that are decided together, and the rule at work on them.
struct RankItem {
  const BatchView* batch;
  DeviceSequence* sequence;
  uint32_t first_lane;
  uint32_t heads;
  RankRows rows;
  RankShared* shared;
  float* tails;  // [rows.room] where the policy has max_drop
  float* tiles;  // similarity_bytes() where it compares keys
  // One of its lanes.
  [[nodiscard]] __device__ __forceinline__ RankItem head(uint32_t h) const {
    return {batch, sequence, first_lane + h, 1, rows, shared, tails, tiles};
  }
  [[nodiscard]] __device__ __forceinline__ LaneView lane(uint32_t head) const {
    return lane_view(*batch, sequence, first_lane + head);
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t layer() const {
    return first_lane / batch->geometry.kv_heads;
  }
  // The same lanes of the layer before.
  [[nodiscard]] __device__ __forceinline__ RankItem before() const {
    RankItem item = *this;
    item.first_lane -= batch->geometry.kv_heads;
    return item;
  }
};

namespace rank_detail {

// How many rows `yes` says yes to. Result: the same for all threads.
template <class Yes>
[[nodiscard]] __device__ __forceinline__ uint32_t count_rows(RankShared& shared, uint32_t n,
                                                             const Yes& yes) {
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (uint32_t base = 0; base < n; base += blockDim.x) {
    const uint32_t i = base + threadIdx.x;
    const uint32_t ballot = __ballot_sync(kAllLanes, i < n && yes(i));
    if (threadIdx.x % 32 == 0 && ballot != 0) {
      atomicAdd(&shared.count, static_cast<uint32_t>(__popc(ballot)));
    }
  }
  __syncthreads();
  const uint32_t count = shared.count;
  __syncthreads();
  return count;
}

// Compares and exchanges rows i and i ^ mask for all i: the smaller position goes first. Rows from
// n on are larger than all and stay where they are.
__device__ __forceinline__ void exchange_rows(const RankRows& rows, uint32_t n, uint32_t mask) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t j = i ^ mask;
    if (j <= i || j >= n) continue;
    const uint32_t mine = rows.position[i], other = rows.position[j];
    if (mine <= other) continue;
    rows.position[i] = other;
    rows.position[j] = mine;
    const uint32_t place = rows.place[i];
    rows.place[i] = rows.place[j];
    rows.place[j] = place;
  }
  __syncthreads();
}

// A bitonic network whose comparisons all point upwards, so that any n will do.
__device__ inline void sort_rows(const RankRows& rows, uint32_t n) {
  for (uint32_t run = 1; run < n; run *= 2) {
    exchange_rows(rows, n, 2 * run - 1);
    for (uint32_t step = run / 2; step > 0; step /= 2) exchange_rows(rows, n, step);
  }
}

// A slot's sum as the policy reads it.
[[nodiscard]] __device__ __forceinline__ float attention_of(const DeviceSequence* s, float sum,
                                                            uint32_t position) {
  if (s->policy.score_kind == ScoreKind::kMean) {
    const policy::Lifetimes lives{.tokens = s->tokens,
                                  .prompt = s->prompt_tokens,
                                  .queries = policy::prompt_sample(s->policy, s->prompt_queries)};
    return exact_div(sum, static_cast<float>(max(policy::lifetime(lives, position), 1u)));
  }
  if (s->policy.score_kind == ScoreKind::kWindow) {
    return exact_div(sum, static_cast<float>(max(s->window_queries, 1u)));
  }
  return sum;
}

// policy::dot; eight threads hold the vectors, all of the warp call. The first of the eight has the
// host's order of additions.
template <int kDim>
[[nodiscard]] __device__ __forceinline__ float dot_of_eight(const float (&x)[kDim / 8],
                                                            const float (&y)[kDim / 8]) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kDim / 8; ++c) sum = exact_add(sum, exact_mul(x[c], y[c]));
  for (uint32_t h = 4; h >= 1; h /= 2) sum = exact_add(sum, __shfl_xor_sync(kAllLanes, sum, h));
  return sum;
}

// Protected newest tokens of a lane with that limit.
[[nodiscard]] __device__ __forceinline__ uint32_t recent_tokens(const RankItem& item,
                                                                const RankRule& rule,
                                                                const RankLimit& limit) {
  const DeviceSequence& s = *item.sequence;
  uint32_t recent = policy::newest_protected(rule, limit.limit);
  if (limit.local) recent = max(recent, policy::percent_of(s.prompt_tokens, rule.local_percent));
  return min(recent, s.tokens);
}

}  // namespace rank_detail

namespace rank_detail {

// Calls visit(position, place) for the live tokens of a lane in pages: a warp a page.
template <class Visit>
__device__ __forceinline__ void for_each_token(const LaneView& lane, const Visit& visit) {
  const uint32_t warps = blockDim.x / 32, thread = threadIdx.x % 32;
  for (uint32_t index = threadIdx.x / 32; index < lane.lane->pages; index += warps) {
    const DeviceDescriptor* d = descriptor_at(lane, index);
    const unsigned char* page = d == nullptr ? nullptr : page_at(*lane.batch, d->page);
    if (page == nullptr) continue;
    const SlotShape shape = slot_shape(lane.head_dim, d->format);
    for (uint32_t slot = thread; slot < shape.slots; slot += 32) {
      if (((d->live >> slot) & 1u) == 0) continue;
      visit(position_of(page, shape.position_offset, slot), index << 6 | slot);
    }
  }
}

// words[i]: how many bits are set in the words of `map` before it. Result: of all. The words of a
// thread lie together, so each adds up its own twice.
[[nodiscard]] __device__ inline uint32_t count_before(RankShared& shared, const uint32_t* map,
                                                      uint32_t* words, uint32_t count) {
  const uint32_t each = (count + blockDim.x - 1) / blockDim.x;
  const uint32_t first = min(threadIdx.x * each, count), end = min(first + each, count);
  const uint32_t thread = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t mine = 0;
  for (uint32_t i = first; i < end; ++i) mine += static_cast<uint32_t>(__popc(map[i]));
  uint32_t through = mine;
  for (uint32_t x = 1; x < 32; x *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, through, x);
    if (thread >= x) through += below;
  }
  if (thread == 31) shared.bins[warp] = through;
  __syncthreads();
  uint32_t before = through - mine, all = 0;
  for (uint32_t w = 0; w < blockDim.x / 32; ++w) {
    if (w < warp) before += shared.bins[w];
    all += shared.bins[w];
  }
  for (uint32_t i = first; i < end; ++i) {
    words[i] = before;
    before += static_cast<uint32_t>(__popc(map[i]));
  }
  __syncthreads();
  return all;
}

// gather_lane() by a bit for each position that the sequence ever had: no row is compared.
[[nodiscard]] __device__ inline uint32_t gather_by_map(const RankItem& item, const LaneView& lane) {
  const RankRows& rows = item.rows;
  const uint32_t tokens = item.sequence->tokens, words = (tokens + 31) / 32;
  uint32_t* const before = rows.map + words;
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) rows.map[i] = 0;
  __syncthreads();
  for_each_token(lane, [&](uint32_t position, uint32_t) {
    if (position < tokens) atomicOr(&rows.map[position / 32], 1u << position % 32);
  });
  __syncthreads();
  const uint32_t n = count_before(*item.shared, rows.map, before, words);
  if (n >= rows.room) return n;
  for_each_token(lane, [&](uint32_t position, uint32_t place) {
    if (position >= tokens) return;
    const uint32_t word = position / 32, below = (1u << position % 32) - 1;
    const uint32_t row = before[word] + static_cast<uint32_t>(__popc(rows.map[word] & below));
    rows.position[row] = position;
    rows.place[row] = place;
  });
  __syncthreads();
  return n;
}

// gather_lane() by sorting, where the sequence had too many tokens for the map.
[[nodiscard]] __device__ inline uint32_t gather_by_sorting(const RankItem& item,
                                                           const LaneView& lane) {
  const RankRows& rows = item.rows;
  const RowSpace space{.position = rows.position,
                       .found = rows.place,
                       .place = rows.place,
                       .weight = nullptr,
                       .keep = nullptr,
                       .room = rows.room};
  RowCounts& counts = item.shared->counts;
  if (threadIdx.x == 0) counts.rows = 0;
  __syncthreads();
  select_detail::gather_unordered(lane, 0, item.sequence->tokens, space, &counts);
  __syncthreads();
  const uint32_t n = counts.rows;
  __syncthreads();
  if (n < rows.room) sort_rows(rows, n);
  return n;
}

}  // namespace rank_detail

// The live tokens of a lane that are in pages: place and position, ascending. rows.map is lost.
// Result: how many; not less than there is room for: kRowsFull is raised and nothing is written.
[[nodiscard]] __device__ inline uint32_t gather_lane(const RankItem& item, const LaneView& lane) {
  const bool mapped = 2 * ((uint64_t{item.sequence->tokens} + 31) / 32) <= item.rows.map_words;
  const uint32_t n =
      mapped ? rank_detail::gather_by_map(item, lane) : rank_detail::gather_by_sorting(item, lane);
  if (n >= item.rows.room && threadIdx.x == 0) raise_fault(lane.batch->lease, kRowsFull);
  return n;
}

// rows.fixed of a lane with that limit.
__device__ inline void protect_rows(const RankItem& item, const RankRule& rule,
                                    const RankLimit& limit, uint32_t n) {
  const DeviceSequence& s = *item.sequence;
  const uint32_t recent = rank_detail::recent_tokens(item, rule, limit);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t where = item.rows.position[i];
    const bool outside = rule.counts == BudgetCount::kGenerated && where < s.prompt_tokens;
    const bool in_class = limit.classes != 0 && s.class_pages != 0 &&
                          (class_of(*item.batch, &s, where) & limit.classes) != 0;
    const bool fixed = where < rule.sinks || where >= s.tokens - recent || outside || in_class;
    item.rows.fixed[i] = fixed ? 1 : 0;
  }
  __syncthreads();
}

}  // namespace thinkv::cuda
