// rank_prefix.cuh: DBudgetKV's max_drop: how many of the least important tokens all heads of a
// layer drop, so that the norm of attention loses little (policy::droppable), by one block.
//
// The norms of what is left after m drops are added head by head into one row of numbers; a head's
// own are made in its turn, and its tokens are read again when they are dropped.
#pragma once

#include <cstdint>

#include "kernels/cuda/rank_apply.cuh"
#include "kernels/cuda/rank_head.cuh"

namespace thinkv::cuda {
namespace prefix_detail {

// The key of a row in the order in which rows go: those that are fixed last. rows.place is the row.
[[nodiscard]] __device__ __forceinline__ uint64_t order_key(const RankRows& rows, uint32_t i) {
  if (rows.fixed[i] != 0) return lane_detail::kNoKey;
  return rank_detail::rank_key(rows.score[i], rows.place[i]);
}
template <class T>
__device__ __forceinline__ void exchange(T& a, T& b) {
  const T kept = a;
  a = b;
  b = kept;
}
__device__ __forceinline__ void exchange_in_order(const RankRows& rows, uint32_t n, uint32_t mask) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
    const uint32_t j = i ^ mask;
    if (j <= i || j >= n || order_key(rows, i) <= order_key(rows, j)) continue;
    exchange(rows.place[i], rows.place[j]);
    exchange(rows.score[i], rows.score[j]);
    exchange(rows.attention[i], rows.attention[j]);
    exchange(rows.fixed[i], rows.fixed[j]);
  }
  __syncthreads();
}

// rows.attention in the order in which rows go. Places are lost.
__device__ inline void order_attention(const RankRows& rows, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) rows.place[i] = i;
  __syncthreads();
  for (uint32_t run = 1; run < n; run *= 2) {
    exchange_in_order(rows, n, 2 * run - 1);
    for (uint32_t step = run / 2; step > 0; step /= 2) exchange_in_order(rows, n, step);
  }
}

[[nodiscard]] __device__ __forceinline__ float plus_square(float sum, float x) {
  return exact_add(sum, exact_mul(x, x));
}

// Squares of what never goes: the buffer, then the fixed rows. One thread, in the host's order.
[[nodiscard]] __device__ inline float fixed_squares(const LoadedHead& head) {
  const RankRows& rows = head.item.rows;
  const DeviceLane& lane = *head.lane.lane;
  const uint32_t buffered = lane.buffer_count;
  float sum = 0.0f;
  for (uint32_t i = 0; i < buffered; ++i) {
    const uint32_t position = head.item.sequence->tokens - buffered + i;
    sum = plus_square(sum,
                      rank_detail::attention_of(head.item.sequence, lane.buffer_sum[i], position));
  }
  for (uint32_t i = 0; i < head.n; ++i) {
    if (rows.fixed[i] != 0) sum = plus_square(sum, rows.attention[i]);
  }
  return sum;
}

// Adds the head's norms to item.tails [shortest + 1]; `first` sets them.
__device__ inline void add_tails(const LoadedHead& head, uint32_t shortest, bool first) {
  const RankRows& rows = head.item.rows;
  float* tails = head.item.tails;
  float sum = 0.0f;
  if (threadIdx.x == 0) sum = fixed_squares(head);
  __syncthreads();
  order_attention(rows, head.n);
  if (threadIdx.x == 0) {
    for (uint32_t i = shortest; i < head.free; ++i) sum = plus_square(sum, rows.attention[i]);
    for (uint32_t m = shortest + 1; m-- > 0;) {
      if (m < shortest) sum = plus_square(sum, rows.attention[m]);
      tails[m] = exact_add(first ? 0.0f : tails[m], exact_sqrt(sum));
    }
  }
  __syncthreads();
}

// policy::droppable with the sums over the heads.
[[nodiscard]] __device__ inline uint32_t droppable(const float* tails, uint32_t n, uint32_t heads,
                                                   float loss) {
  const auto all = static_cast<float>(heads);
  const float base = exact_div(tails[0], all);
  const float most_lost = exact_mul(loss, base);
  uint32_t most = 0;
  for (uint32_t m = 1; m <= n; ++m) {
    if (!(exact_sub(base, exact_div(tails[m], all)) <= most_lost)) break;
    most = m;
  }
  return most;
}

}  // namespace prefix_detail

// The rule on all heads of a layer.
template <int kDim>
__device__ inline void drop_prefix(const RankItem& layer, const RankRule& rule) {
  bool due = false;
  uint32_t shortest = 0xFFFF'FFFFu, most = 0xFFFF'FFFFu;
  for (uint32_t h = 0; h < layer.heads; ++h) {
    due = budget_of(layer, rule, layer.lane(h)).due || due;
  }
  if (!due) return;
  LoadedHead head;
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!load_head<kDim>(layer, rule, h, false, head)) return;
    shortest = min(shortest, head.free);
    most = min(most, head.budget.limit.surplus());
  }
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!load_head<kDim>(layer, rule, h, true, head)) return;
    prefix_detail::add_tails(head, shortest, h == 0);
  }
  if (threadIdx.x == 0) {
    layer.shared->digit =
        prefix_detail::droppable(layer.tails, shortest, layer.heads, rule.budget_low);
  }
  __syncthreads();
  most = min(most, layer.shared->digit);
  for (uint32_t h = 0; h < layer.heads; ++h) {
    if (!load_head<kDim>(layer, rule, h, true, head)) return;
    keep_best(head.item, head.n, head.free, head.free - most);
    recode_dropped(head.item, rule, head.n);
    apply_fates<kDim>(head.item, rule, head.lane, head.item.first_lane, head.n);
  }
}

}  // namespace thinkv::cuda
