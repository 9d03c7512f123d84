// rank_choose.cpp: the fate of every row of a layer, where one number a token decides.
#include <algorithm>

#include "kernels/sequence/rank.h"

namespace thinkv::kernels {
namespace {

// Keys of all rows that may go, one after the other at the beginning of work.keys, and their
// weights in work.numbers. Result: how many; their rows are in work.order.
uint32_t load_candidates(SequenceState& state, uint32_t lane, uint32_t heads) {
  RankWork& work = state.rank;
  const uint32_t first = lane % state.geometry.kv_heads;
  const RankHead& head = work.heads[first];
  const size_t dim = size_t{state.geometry.head_dim} * heads;
  for (uint32_t h = 0; h < heads; ++h) {
    decode_head_keys(state, lane + h, work.heads[first + h], dim,
                     size_t{h} * state.geometry.head_dim);
  }
  const uint32_t free = policy::free_rows(head.fixed, work.order);
  work.numbers.resize(free);
  for (uint32_t i = 0; i < free; ++i) {  // order[i] >= i: nothing is overwritten too early
    const uint32_t row = work.order[i];
    if (row != i) std::copy_n(work.keys.data() + row * dim, dim, work.keys.data() + i * dim);
    work.numbers[i] = std::max(head.score[row], 0x1p-24f);
  }
  return free;
}

// Chosen in runs of at most kMedoidRowsMax rows, each with its share of the places.
void keep_medoids(SequenceState& state, const RankRule& rule, uint32_t lane, uint32_t heads) {
  RankWork& work = state.rank;
  RankHead& head = work.heads[lane % state.geometry.kv_heads];
  const size_t dim = size_t{state.geometry.head_dim} * heads;
  const uint32_t places = head.places();
  const uint32_t free = load_candidates(state, lane, heads);
  std::copy(head.fixed.begin(), head.fixed.end(), head.fate.begin());
  const uint32_t runs = (free + kMedoidRowsMax - 1) / kMedoidRowsMax;
  for (uint32_t run = 0; run < runs; ++run) {
    const auto begin = static_cast<uint32_t>(uint64_t{free} * run / runs);
    const auto end = static_cast<uint32_t>(uint64_t{free} * (run + 1) / runs);
    const auto before = static_cast<uint32_t>(uint64_t{places} * begin / free);
    const auto target = static_cast<uint32_t>(uint64_t{places} * end / free) - before;
    if (target == 0) continue;
    state.kernels.medoids({.keys = work.keys.data() + begin * dim,
                           .weights = rule.attention != 0.0f ? &work.numbers[begin] : nullptr,
                           .n = end - begin,
                           .dim = static_cast<uint32_t>(dim),
                           .target = target,
                           .iterations = state.policy().kmeans_iterations,
                           .keep = work.marks.data()});
    for (uint32_t i = begin; i < end; ++i) {
      if (work.marks[i - begin] != 0) head.fate[work.order[i]] = kKeep;
    }
  }
}

void keep_highest(RankHead& head, const RankRule& rule, std::vector<uint32_t>& order) {
  const bool one = rule.select == RankSelect::kArgMin1 && head.surplus() == 1;
  if (one) {
    static_cast<void>(policy::drop_lowest(head.score, head.fixed, head.fate));
  } else {
    policy::keep_best(head.score, head.fixed, head.places(), order, head.fate);
  }
}

// What the rule does not keep goes to the other format instead.
void recode_dropped(RankHead& head) {
  std::replace(head.fate.begin(), head.fate.end(), uint8_t{kDrop}, uint8_t{kRecode});
}

void choose_for_head(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  if (rule.budget == BudgetRule::kFirstFit) return apply_first_fit(state, rule, lane, head);
  if (!head.over()) return;
  if (rule.select == RankSelect::kThreshold) {
    return policy::fires_for_prompt(rule, state.moment) ? sort_into_tiers(state, rule, lane, head)
                                                        : move_one_tier(state, rule, lane, head);
  }
  if (rule.select == RankSelect::kMedoids) {
    const bool whole_layer = state.policy().grain == SelectGrain::kLayer;
    keep_medoids(state, rule, lane, whole_layer ? state.geometry.kv_heads : 1);
  } else {
    keep_highest(head, rule, state.rank.order);
  }
  if (rule.action == RankAction::kRecode) recode_dropped(head);
}

void size_marks(RankWork& work) {
  size_t most = 0;
  for (const RankHead& head : work.heads) most = std::max(most, head.rows.size());
  work.order.resize(std::max(work.order.size(), most));
  work.marks.resize(std::max(work.marks.size(), most));
}

}  // namespace

void choose_fates(SequenceState& state, const RankRule& rule, uint32_t layer) {
  RankWork& work = state.rank;
  size_marks(work);
  const bool shared = rule.budget == BudgetRule::kShared;
  if (shared || rule.budget == BudgetRule::kMaxDrop || rule.select == RankSelect::kStrata) {
    if (shared) share_layer(state, rule);
    if (rule.select == RankSelect::kStrata) keep_strata(state, rule, layer);
    if (rule.budget == BudgetRule::kMaxDrop) drop_prefix(state, rule);
    if (rule.action != RankAction::kRecode) return;
    for (RankHead& head : work.heads) recode_dropped(head);
    return;
  }
  for (uint32_t h = 0; h < work.heads.size(); ++h) {
    RankHead& head = work.heads[h];
    if (h > 0 && state.policy().grain == SelectGrain::kLayer) {
      head.fate = work.heads[0].fate;
    } else {
      choose_for_head(state, rule, state.lane_index(layer, h), head);
    }
  }
}

}  // namespace thinkv::kernels
