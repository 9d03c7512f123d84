// rank_adaptive.cpp: selections that look at more than one number a token: DBudgetKV's norm loss,
// DiffKV's tiers, KVCrush's representatives, FastGen's masks.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/policy/rank_budget.h"
#include "kernels/policy/rank_signal.h"
#include "kernels/sequence/rank.h"

namespace thinkv::kernels {
namespace {

// Rows that may go, the least important first. Result: how many.
uint32_t sort_ascending(std::span<const float> score, std::span<const uint8_t> fixed,
                        std::vector<uint32_t>& order) {
  const uint32_t free = policy::free_rows(fixed, order);
  std::sort(order.begin(), order.begin() + free,
            [&](uint32_t a, uint32_t b) { return policy::ranks_above(score, b, a); });
  return free;
}

// ---- max_drop ----

// The attention of a head's rows in that order to work.numbers, and the squares of all else.
// Requires: stride - 1 rows of the head may go.
float load_order(RankWork& work, const RankHead& head, float* in_order, size_t stride) {
  const uint32_t free = sort_ascending(head.score, head.fixed, work.order);
  float rest = head.buffer_square;
  for (uint32_t i = 0; i < head.size(); ++i) {
    if (head.fixed[i] != 0) rest += head.attention[i] * head.attention[i];
  }
  for (uint32_t i = 0; i < free; ++i) {
    const float weight = head.attention[work.order[i]];
    if (i + 1 < stride) in_order[i] = weight;
    if (i + 1 >= stride) rest += weight * weight;
  }
  return rest;
}

}  // namespace

// A head's own limit is what it has after the sharing; the layer keeps heads x B.
void share_layer(SequenceState& state, const RankRule& rule) {
  RankWork& work = state.rank;
  const auto heads = static_cast<uint32_t>(work.heads.size());
  const uint32_t budget = work.heads.front().limit;
  const auto own = static_cast<uint32_t>(rule.budget_low * static_cast<float>(budget));
  uint64_t counted = 0, free_all = 0;
  work.shared.clear();
  work.shares.assign(2 * size_t{heads}, 0);
  const std::span<uint32_t> least(work.shares.data(), heads),
      places(work.shares.data() + heads, heads);
  for (uint32_t h = 0; h < heads; ++h) {
    const RankHead& head = work.heads[h];
    const uint32_t free = sort_ascending(head.score, head.fixed, work.order);
    for (uint32_t i = free; i-- > 0;) {
      const float score = head.score[work.order[i]];
      work.shared.push_back({std::isnan(score) ? -INFINITY : score, h, work.order[i]});
    }
    const uint32_t staying = head.counted - free;
    least[h] = own > staying ? own - staying : 0;
    counted += head.counted;
    free_all += free;
  }
  const uint64_t limit = uint64_t{budget} * heads;
  if (counted <= limit) return;
  const uint64_t surplus = std::min(counted - limit, free_all);
  policy::share_places(work.shared, least, static_cast<uint32_t>(free_all - surplus), places);
  for (uint32_t h = 0; h < heads; ++h) {
    RankHead& head = work.heads[h];
    policy::keep_best(head.score, head.fixed, places[h], work.order, head.fate);
  }
}

void drop_prefix(SequenceState& state, const RankRule& rule) {
  RankWork& work = state.rank;
  const auto heads = static_cast<uint32_t>(work.heads.size());
  uint32_t shortest = std::numeric_limits<uint32_t>::max();
  uint32_t most = shortest;
  for (const RankHead& head : work.heads) {
    shortest = std::min(shortest, head.free());
    most = std::min(most, head.surplus());
  }
  const size_t stride = size_t{shortest} + 1;
  work.numbers.assign(heads * stride, 0.0f);
  work.more_numbers.assign(heads, 0.0f);
  for (uint32_t h = 0; h < heads; ++h) {
    float* const in_order = work.numbers.data() + h * stride;
    work.more_numbers[h] = load_order(work, work.heads[h], in_order, stride);
  }
  most = std::min(most, policy::droppable(work.numbers, heads, work.more_numbers, rule.budget_low));
  for (RankHead& head : work.heads) {
    policy::keep_best(head.score, head.fixed, head.free() - most, work.order, head.fate);
  }
}

// ---- threshold ----

namespace {

policy::Tiers tiers(const SequenceState& state, const RankRule& rule) {
  // Without a low format there is one threshold.
  const bool two = rule.action == RankAction::kRecode;
  return policy::tiers_of(rule.budget_low, two ? rule.budget_high : rule.budget_low,
                          state.header->tokens);
}

}  // namespace

// The prompt: every token by its own mean; the lowest go first where the budget ends it.
void sort_into_tiers(SequenceState& state, const RankRule& rule, uint32_t, RankHead& head) {
  const policy::Tiers t = tiers(state, rule);
  const std::vector<uint32_t>& order = state.rank.order;
  const uint32_t free = sort_ascending(head.attention, head.fixed, state.rank.order);
  const uint8_t lower = rule.action == RankAction::kRecode ? kRecode : kKeep;
  uint32_t left = head.surplus();
  for (uint32_t i = 0; i < free; ++i) {
    const policy::Tier tier = policy::tier_of(head.attention[order[i]], t);
    if (tier == policy::Tier::kHigh) break;
    const bool goes = tier == policy::Tier::kPruned && left > 0;
    if (goes) --left;
    head.fate[order[i]] = goes ? uint8_t{kDrop} : lower;
  }
}

// A decode step: at most one token leaves its slot.
void move_one_tier(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  constexpr float kNothing = std::numeric_limits<float>::infinity();
  const Lane view = state.lane(lane);
  const bool two = rule.action == RankAction::kRecode;
  uint32_t lowest[2] = {0, 0};
  float least[2] = {kNothing, kNothing};  // high, low
  for (uint32_t i = 0; i < head.size(); ++i) {
    if (head.fixed[i] != 0) continue;
    const uint8_t format = view.pages()[head.rows[i].page].format;
    const size_t tier = two && format == static_cast<uint8_t>(rule.recode_format) ? 1 : 0;
    if (!(head.attention[i] < least[tier])) continue;
    least[tier] = head.attention[i];
    lowest[tier] = i;
  }
  switch (policy::tier_move(least[0], least[1], tiers(state, rule))) {
    case policy::TierMove::kNone:
      return;
    case policy::TierMove::kEvictHigh:
      head.fate[lowest[0]] = kDrop;
      return;
    case policy::TierMove::kRecodeReplace:
      head.fate[lowest[1]] = kDrop;
      [[fallthrough]];
    case policy::TierMove::kRecode:
      if (two) head.fate[lowest[0]] = kRecode;
      return;
  }
}

// ---- strata ----

namespace {

// While a layer is decided: kept for the spread, and not because a head finds it important.
constexpr uint8_t kRepresentative = 4;

// Bit g of a row's signature: head g counts the token at that position among its best.
void sign_rows(const std::vector<RankHead>& heads, const RankHead& head,
               std::vector<policy::Signature>& signatures) {
  signatures.assign(head.rows.size(), policy::Signature{});
  for (uint32_t g = 0; g < heads.size(); ++g) {
    const RankHead& other = heads[g];
    uint32_t j = 0;
    for (uint32_t i = 0; i < head.size(); ++i) {
      const uint32_t where = head.rows[i].position;
      while (j < other.size() && other.rows[j].position < where) ++j;
      if (j == other.size()) break;
      if (other.rows[j].position != where || other.fate[j] != kKeep) continue;
      signatures[i].bits[g / 64] |= uint64_t{1} << (g % 64);
    }
  }
}

void mark_representatives(RankWork& work, const RankRule& rule, uint32_t layer, RankHead& head) {
  sign_rows(work.heads, head, work.signatures);
  const policy::Signature anchor =
      policy::anchor_of(rule.anchor, static_cast<uint32_t>(work.heads.size()),
                        policy::random_bits(rule.seed, layer, 0),
                        policy::random_bits(rule.seed, layer, 1), work.signatures);
  work.rejected.clear();
  work.distance.clear();
  for (uint32_t i = 0; i < head.size(); ++i) {
    if (head.fate[i] != kDrop) continue;
    work.rejected.push_back(i);
    work.distance.push_back(policy::hamming(work.signatures[i], anchor));
  }
  const auto count = static_cast<uint32_t>(work.rejected.size());
  policy::pick_strata(work.distance, count - std::min(count, head.surplus()), work.order,
                      {work.marks.data(), count});
  for (uint32_t i = 0; i < count; ++i) {
    if (work.marks[i] != 0) head.fate[work.rejected[i]] = kRepresentative;
  }
}

}  // namespace

void keep_strata(SequenceState& state, const RankRule& rule, uint32_t layer) {
  RankWork& work = state.rank;
  for (RankHead& head : work.heads) {
    const uint32_t places = head.places();
    const uint32_t spread = policy::percent_of(head.limit, rule.representative_percent);
    const uint32_t best = head.over() ? places - std::min(places, spread) : places;
    policy::keep_best(head.score, head.fixed, best, work.order, head.fate);
  }
  for (RankHead& head : work.heads) mark_representatives(work, rule, layer, head);
  for (RankHead& head : work.heads) {
    std::replace(head.fate.begin(), head.fate.end(), kRepresentative, uint8_t{kKeep});
  }
}

// ---- first_fit ----

namespace {

// Marks every row with the first mask that holds it (work.more_marks), and chooses the head's.
uint32_t choose_mask(SequenceState& state, const RankRule& rule, const RankHead& head) {
  RankWork& work = state.rank;
  const uint32_t n = head.size();
  const uint32_t prompt = state.header->prompt_tokens;
  work.more_marks.resize(3 * size_t{n});
  const std::span<uint8_t> first(work.more_marks.data(), n);
  const std::span<uint8_t> special(work.more_marks.data() + n, n);
  const std::span<uint8_t> punctuation(work.more_marks.data() + 2 * size_t{n}, n);
  for (uint32_t i = 0; i < n; ++i) {
    const uint8_t bits = class_of(state, head.rows[i].position);
    special[i] = head.fixed[i] != 0 || (bits & rule.special_classes) != 0 ? 1 : 0;
    punctuation[i] = (bits & rule.punctuation_classes) != 0 ? 1 : 0;
  }
  policy::first_masks(head.attention, special, punctuation,
                      policy::percent_of(prompt, rule.frequent_percent),
                      policy::percent_of(prompt, rule.local_percent), work.order, first);
  return policy::choose_mask(head.attention, first, rule.budget_low).mask;
}

void fit_mask(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  RankLane& rank = state.lane(lane).rank();
  rank.mask = choose_mask(state, rule, head);
  rank.mask_tokens = 0;
  const auto classes =
      static_cast<uint8_t>(rule.classes | rule.special_classes |
                           (rank.mask >= policy::kMaskPunctuation ? rule.punctuation_classes : 0));
  for (uint32_t i = 0; i < head.size(); ++i) {
    if (state.rank.more_marks[i] > rank.mask) continue;
    head.fixed[i] = 1;
    const bool in_class = (class_of(state, head.rows[i].position) & classes) != 0;
    rank.mask_tokens += in_class ? 0 : 1;
  }
  policy::keep_best(head.attention, head.fixed, head.places(), state.rank.order, head.fate);
}

}  // namespace

void apply_first_fit(SequenceState& state, const RankRule& rule, uint32_t lane, RankHead& head) {
  if (rule.at_prompt_end != 0) return fit_mask(state, rule, lane, head);
  if (!head.over()) return;
  // Without a frequent part the oldest goes, else the one with the least attention.
  const bool frequent = state.lane(lane).rank().mask >= policy::kMaskFrequent;
  for (uint32_t i = 0; i < head.size(); ++i) {
    head.score[i] = frequent ? head.attention[i] : static_cast<float>(head.rows[i].position);
  }
  policy::keep_best(head.score, head.fixed, head.places(), state.rank.order, head.fate);
}

}  // namespace thinkv::kernels
