// rank.cu: the two kernels of rank.h and their launches.
#include "kernels/cuda/rank.h"

#include <cstdint>

#include "kernels/cuda/due_rows.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rank_adaptive.cuh"
#include "kernels/cuda/rank_apply.cuh"
#include "kernels/cuda/rank_medoids.cuh"
#include "kernels/cuda/rank_prefix.cuh"
#include "kernels/cuda/rank_shared.cuh"
#include "kernels/cuda/rank_signals.cuh"
#include "kernels/cuda/rank_strata.cuh"

namespace thinkv::cuda {
namespace {

constexpr uint32_t kThreadsFew = 256, kThreadsMost = 512;  // of the two launches
constexpr uint32_t kBlocksFew = 4;                         // of a multiprocessor
constexpr uint32_t kFinishThreads = 128;

// Which lanes a launch takes: those that held fewer than kRankRowsFew tokens when the rules began,
// or all others. No rule makes a lane larger, so each lane is one launch's.
struct RankParams {
  uint32_t root;  // kNoneRaw: the rows of the batch that are due
  bool few;
};

// One rule on the lanes of an item. Result: false where what is protected is more than the budget.
template <int kDim>
__device__ bool run_rule(const RankItem& item, const RankRule& rule) {
  const RankBudget budget = budget_of(item, rule, item.lane(0));
  if (!budget.due || !has_medoid_room<kDim>(item, rule)) return true;
  const RankRows& rows = item.rows;
  uint32_t n = 0;
  for (uint32_t head = 0; head < item.heads; ++head) {
    const LaneView lane = item.lane(head);
    if (lane.lane == nullptr) return true;
    const uint32_t found = gather_lane(item, lane);
    if (found >= rows.room || (head > 0 && found != n)) return true;
    n = found;
    score_rows<kDim>(item, rule, lane, item.first_lane + head, budget.limit, n);
    for (uint32_t i = threadIdx.x; i < n && item.heads > 1; i += blockDim.x) {
      rows.attention[i] = head == 0 ? rows.score[i] : exact_add(rows.attention[i], rows.score[i]);
    }
    __syncthreads();
  }
  for (uint32_t i = threadIdx.x; i < n && item.heads > 1; i += blockDim.x) {
    rows.score[i] = rows.attention[i];
  }
  protect_rows(item, rule, budget.limit, n);
  const uint32_t free =
      rank_detail::count_rows(*item.shared, n, [&](uint32_t i) { return rows.fixed[i] == 0; });
  if (rule.select == RankSelect::kMedoids) {
    keep_medoids<kDim>(item, rule, free - min(free, budget.limit.surplus()), n, free);
  } else {
    choose(item, rule, item.lane(0), budget.limit, n, free);
  }
  for (uint32_t head = 0; head < item.heads; ++head) {
    const LaneView lane = item.lane(head);
    if (item.heads > 1 && gather_lane(item, lane) != n) return true;
    apply_fates<kDim>(item, rule, lane, item.first_lane + head, n);
  }
  return is_adaptive(rule.budget) || budget.limit.surplus() <= free;
}

// A rule on all lanes of an item, together or one by one.
template <int kDim>
__device__ bool run_on_item(const RankItem& item, const RankRule& rule) {
  if (item.sequence->policy.grain == SelectGrain::kLayer) return run_rule<kDim>(item, rule);
  if (rule.budget == BudgetRule::kMaxDrop) {
    drop_prefix<kDim>(item, rule);
    return true;
  }
  if (rule.budget == BudgetRule::kSplit) return keep_strata<kDim>(item, rule);
  if (rule.budget == BudgetRule::kShared) {
    share_layer<kDim>(item, rule);
    return true;
  }
  bool reached = true;
  for (uint32_t head = 0; head < item.heads; ++head) {
    reached = run_rule<kDim>(item.head(head), rule) && reached;
    __syncthreads();
  }
  return reached;
}

// A cut of the prompt leaves few tokens in many pages, and no later write fills them soon. In
// decoding nothing moves: evicted slots are written again within a few flushes.
__device__ THINKV_OUT_OF_LINE void compact_item(const RankItem& item) {
  for (uint32_t head = 0; head < item.heads; ++head) {
    const LaneView lane = item.lane(head);
    if (lane.lane == nullptr) continue;
    const uint64_t bytes = move_to_fullest(lane, lane.score_bytes, item.shared->compact);
    if (threadIdx.x < 32) put_pages_aside(lane);
    if (threadIdx.x == 0 && bytes != 0) add_64(&item.sequence->gathered_bytes, bytes);
    __syncthreads();
  }
}

// A rule that fires or not writes the pages of a layer and its partner. Such a rule is the only one
// of these layers (rank_check.h), and the second's block works on the lanes of both.
[[nodiscard]] __device__ bool is_paired(const BatchView& view, const PolicyParams& policy,
                                        uint32_t layer) {
  for (uint32_t i = 0; i < min(uint32_t{policy.rule_count}, kRulesMax); ++i) {
    const RankRule& rule = policy.rules[i];
    if (rule.action != RankAction::kRecode || !is_pair(rule.recode_format)) continue;
    if (covers_layer(rule, layer) && (layer % 2 == 1 || layer + 1 < view.geometry.layers)) {
      return true;
    }
  }
  return false;
}
[[nodiscard]] __device__ bool is_second_of_pair(const RankItem& item) {
  return item.layer() % 2 == 1 && is_paired(*item.batch, item.sequence->policy, item.layer());
}

// All rules that fire, and where the prompt was cut its tokens move together.
template <int kDim>
__device__ void run_rules(const RankItem& item) {
  DeviceSequence* sequence = item.sequence;
  const uint32_t plan = sequence->rank_step;
  const uint32_t count = min(uint32_t{sequence->policy.rule_count}, kRulesMax);
  bool reached = true;
  for (uint32_t i = 0; i < count; ++i) {
    const RankRule& rule = sequence->policy.rules[i];
    if (((plan >> i) & 1u) == 0 || !covers_layer(rule, item.layer())) continue;
    if (done_by_partner(*item.batch, rule, item.layer())) continue;
    reached = run_on_item<kDim>(item, rule) && reached;
    __syncthreads();
  }
  if ((plan & kRankCompacts) != 0) {
    if (is_second_of_pair(item)) compact_item(item.before());
    compact_item(item);
  }
  if (threadIdx.x != 0 || reached) return;
  if (atomicExch(&sequence->over_budget, 1u) == 0) {
    add_64(&sequence->counters.over_budget_steps, 1);
  }
}

// Lanes with their rows in the block's shared memory.
__device__ inline RankItem short_item(const BatchView& view, DeviceSequence* sequence,
                                      uint32_t index, uint32_t heads, RankShared* shared,
                                      uint32_t room) {
  unsigned char* const beside = dynamic_shared() + room * kRankRowBytes;
  auto* const tails = reinterpret_cast<float*>(beside);
  auto* const tiles = drops_prefix(sequence->policy) ? tails + room : tails;
  return {&view, sequence, index, heads, rank_rows(dynamic_shared(), room), shared, tails, tiles};
}

// Lanes with their rows in the block's part of RankMemory. Without one they have room for none.
__device__ inline RankItem long_item(const BatchView& view, DeviceSequence* sequence,
                                     uint32_t index, uint32_t heads, RankShared* shared) {
  const RankMemory memory = memory_of(view);
  const uint32_t room = memory.room;
  unsigned char* const region = region_of(memory);
  RankRows rows = rank_rows(region, room);
  rows.map = reinterpret_cast<uint32_t*>(dynamic_shared());
  rows.map_words = kRankRowsMax * kRankRowBytes / sizeof(uint32_t);
  auto* const tails = reinterpret_cast<float*>(region + uint64_t{room} * kRankRowBytes);
  return {&view, sequence, index, heads, rows, shared, tails, tails};
}

// Item `index` of a sequence: the lane of that number, or where its heads are decided together, the
// layer if it is its first lane.
template <int kDim>
__device__ void run_item(const BatchView& view, const RankParams& params, DeviceSequence* sequence,
                         uint32_t index, RankShared* shared) {
  const PolicyParams& policy = sequence->policy;
  const uint32_t heads = couples_heads(policy) ? view.geometry.kv_heads : 1;
  if (index % heads != 0) return;
  const uint32_t layer = index / view.geometry.kv_heads;
  if (layer % 2 == 0 && is_paired(view, policy, layer)) return;
  const bool most = needs_most_room(policy);
  uint32_t live = 0;
  for (uint32_t head = 0; head < heads; ++head) {
    const LaneView lane = lane_view(view, sequence, index + head);
    if (lane.lane == nullptr) return;
    live = max(live, lane.lane->live);
  }
  const uint32_t room = params.few ? kRankRowsFew : rank_rows_max(policy, kDim);
  const bool beyond = !params.few && live >= room && !compares_keys(policy);
  const RankItem item = beyond ? long_item(view, sequence, index, heads, shared)
                               : short_item(view, sequence, index, heads, shared, room);
  __syncthreads();  // all have read what the rules will change
  const bool few = live < kRankRowsFew && !most;
  if (few == params.few) run_rules<kDim>(item);
}

template <int kDim>
__global__ void __launch_bounds__(kThreadsMost)
    rank_kernel(const __grid_constant__ BatchView view, const __grid_constant__ RankParams params) {
  __shared__ DueRows due;
  __shared__ RankShared shared;
  wait_for_previous();
  const bool of_batch = params.root == PageId::kNoneRaw;
  const uint32_t rows = of_batch ? load_due(view, kDueRank, due) : 1;
  if (rows == 0) return;
  const uint32_t lanes = view.geometry.lanes();
  const uint32_t parts = params.few ? 0 : memory_of(view).blocks;
  const uint32_t blocks = parts == 0 ? gridDim.x : min(parts, gridDim.x);
  if (blockIdx.x >= blocks) return;
  for (uint64_t item = blockIdx.x; item < uint64_t{rows} * lanes; item += blocks) {
    uint32_t root = params.root;
    if (of_batch) root = view.roots[due_row(view, static_cast<uint32_t>(item / lanes), due)];
    DeviceSequence* sequence = sequence_at(view, root);
    if (sequence == nullptr) continue;
    run_item<kDim>(view, params, sequence, static_cast<uint32_t>(item % lanes), &shared);
    __syncthreads();
  }
}

// Pages that the rules of the prompt's end put aside; a thread a lane.
__global__ void __launch_bounds__(kFinishThreads)
    give_kernel(const __grid_constant__ BatchView view, uint32_t root) {
  const uint32_t index = blockIdx.x * kFinishThreads + threadIdx.x;
  DeviceSequence* sequence = sequence_at(view, root);
  if (sequence == nullptr || index >= view.geometry.lanes()) return;
  const LaneView lane = lane_view(view, sequence, index);
  if (lane.lane != nullptr && lane.lane->pending != 0) give_aside(lane);
}

template <int kDim>
cudaError_t launch_rank_of(const BatchView& view, uint32_t root, uint32_t multiprocessors,
                           cudaStream_t stream) {
  const bool overlaps = root == PageId::kNoneRaw;
  const cudaError_t few = launch(rank_kernel<kDim>,
                                 {.blocks = kBlocksFew * multiprocessors,
                                  .threads = kThreadsFew,
                                  .shared_bytes = kRankRowsFew * kRankRowBytes,
                                  .overlaps_previous = overlaps},
                                 stream, view, RankParams{root, true});
  if (few != cudaSuccess) return few;
  return launch(rank_kernel<kDim>,
                {.blocks = multiprocessors,
                 .threads = kThreadsMost,
                 .shared_bytes = kRankRowsMax * kRankRowBytes,
                 .overlaps_previous = overlaps},
                stream, view, RankParams{root, false});
}

cudaError_t launch_rules(const BatchView& view, uint32_t root, cudaStream_t stream) {
  uint32_t multiprocessors = 0;
  const cudaError_t counted = count_multiprocessors(multiprocessors);
  if (counted != cudaSuccess) return counted;
  switch (view.geometry.head_dim) {
    case 64:
      return launch_rank_of<64>(view, root, multiprocessors, stream);
    case 128:
      return launch_rank_of<128>(view, root, multiprocessors, stream);
    case 256:
      return launch_rank_of<256>(view, root, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_rank(const BatchView& view, cudaStream_t stream) {
  return launch_rules(view, PageId::kNoneRaw, stream);
}

cudaError_t launch_prompt_rules(const BatchView& view, uint32_t root, cudaStream_t stream) {
  const cudaError_t ruled = launch_rules(view, root, stream);
  if (ruled != cudaSuccess) return ruled;
  const uint32_t lanes = view.geometry.lanes();
  return launch(
      give_kernel,
      {.blocks = (lanes + kFinishThreads - 1) / kFinishThreads, .threads = kFinishThreads}, stream,
      view, root);
}

}  // namespace thinkv::cuda
