// random_rules.h: rank policies drawn by chance, all of them valid.
#pragma once

#include <random>

#include "thinkv/internal/policy_check.h"

namespace thinkv::testing {

class RuleDice {
 public:
  explicit RuleDice(std::mt19937_64& random) : random_(&random) {}
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((*random_)() % n); }
  float weight() { return below(2) == 0 ? 0.0f : static_cast<float>(1 + below(3)); }

 private:
  std::mt19937_64* random_;
};

// Any rule, of which most contradict something.
inline RankRule draw_rule(RuleDice dice) {
  const auto below = [&](uint32_t n) { return dice.below(n); };
  const auto weight = [&] { return dice.weight(); };
  constexpr uint16_t kEvery[] = {0, 1, 1, 5, 16, 24};
  RankRule r;
  r.every = kEvery[below(6)];
  r.at_prompt_end = static_cast<uint8_t>(below(2));
  r.counts = static_cast<BudgetCount>(below(2));
  r.budget = static_cast<BudgetRule>(below(9));
  r.budget_percent = static_cast<uint8_t>(50 + below(51));
  r.representative_percent = static_cast<uint8_t>(below(60));
  r.group_count = 2;
  r.group_share[0] = 3;
  r.group_share[1] = 1;
  r.budget_low = static_cast<float>(below(8)) / 4.0f;
  r.budget_high = r.budget_low + 0.5f;
  r.select = static_cast<RankSelect>(below(6));
  r.action = static_cast<RankAction>(below(2));
  r.recent = static_cast<uint16_t>(below(20));
  r.sinks = static_cast<uint16_t>(below(6));
  // Of half of the rules. Not rolled: the tests count what their seeds do, and one more roll would
  // make other seeds of them all.
  r.recent_percent = static_cast<uint8_t>(r.sinks % 2 == 0 ? 0 : 3 * r.recent);
  r.classes = static_cast<uint8_t>(below(4));
  r.anchor = static_cast<Anchor>(below(5));
  r.pool = static_cast<Pool>(below(3));
  r.pool_width = r.pool == Pool::kNone ? 1 : 5;
  r.attention = weight();
  r.similarity = -weight();
  r.position = weight();
  r.random = weight();
  r.distinct = weight();
  r.value_norm = static_cast<uint8_t>(below(2));
  r.frequent_percent = r.local_percent = 20;
  r.special_classes = 1;
  r.punctuation_classes = 2;
  return r;
}

// Any rule's format of blocks; of them the last rule writes alone, so that none is written twice.
inline void draw_blocks(PolicyParams& p, RuleDice dice) {
  constexpr Format kFormats[] = {Format::kKivi4, Format::kKivi2, Format::kKivi1,
                                 Format::kPair2, Format::kPair1, Format::kThink};
  for (uint32_t i = 0; i < p.rule_count; ++i) p.rules[i].action = RankAction::kEvict;
  RankRule& last = p.rules[p.rule_count - 1];
  last.action = RankAction::kRecode;
  last.recode_format = kFormats[dice.below(6)];
  for (float& eta : p.block_eta) eta = static_cast<float>(dice.below(40)) / 100.0f;
  if (!is_pair(last.recode_format)) return;
  p.rules[0] = last;
  p.rule_count = 1;
  p.rules[0].attention = p.rules[0].similarity = p.rules[0].random = p.rules[0].distinct = 0.0f;
  p.rules[0].pool = Pool::kNone;
  p.rules[0].pool_width = 1;
  p.rules[0].value_norm = 0;
  p.rules[0].position = 1.0f;
}

// Draws until the rules go together, and with p.centre, which must be 0 for blocks. All recode to
// one format, so that no token is recoded twice.
inline void draw_rules(PolicyParams& p, std::mt19937_64& random, bool blocks = false) {
  RuleDice dice(random);
  p.evict = EvictRule::kRank;
  p.segment_tokens = 16 * (1 + dice.below(3));
  p.rule_count = static_cast<uint8_t>(1 + dice.below(kRulesMax));
  do {
    p.grain = static_cast<SelectGrain>(dice.below(2));
    p.budget_tokens = 8 + dice.below(60);
    p.score_kind = static_cast<ScoreKind>(dice.below(4));
    p.score_every = static_cast<uint16_t>(1 + 2 * dice.below(2));
    p.score_window = static_cast<uint16_t>(1 + dice.below(20));
    p.prompt_queries = static_cast<uint16_t>(dice.below(2) * dice.below(90));
    p.prompt_spread = static_cast<uint8_t>(dice.below(2));
    const auto recode = static_cast<Format>(1 + dice.below(kFormatCount - 1));
    for (uint32_t i = 0; i < p.rule_count; ++i) {
      p.rules[i] = draw_rule(dice);
      p.rules[i].recode_format = recode;
      if (p.centre == 0) p.rules[i].distinct = 0.0f;
    }
    if (blocks) draw_blocks(p, dice);
  } while (!policy_params_valid(p));
}

}  // namespace thinkv::testing
