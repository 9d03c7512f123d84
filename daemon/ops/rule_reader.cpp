#include "daemon/ops/rule_reader.h"

#include <array>
#include <string_view>

#include "daemon/ops/policy_reader.h"
#include "thinkv/internal/limits.h"
#include "thinkv/internal/rank_check.h"

namespace thinkv::ops {
namespace {

constexpr std::string_view kPath = "rules[]";
constexpr uint32_t kTokensOfRuleMax = 65535;  // sinks and recent are 16 bits
constexpr double kWeightMax = 1e6;
constexpr double kBelowZero = -1e-9;  // 0 is allowed

constexpr std::array kBudgets = {Choice<BudgetRule>{"fixed", BudgetRule::kFixed},
                                 Choice<BudgetRule>{"pyramid", BudgetRule::kPyramid},
                                 Choice<BudgetRule>{"groups", BudgetRule::kGroups},
                                 Choice<BudgetRule>{"bytes", BudgetRule::kBytes},
                                 Choice<BudgetRule>{"split", BudgetRule::kSplit},
                                 Choice<BudgetRule>{"max_drop", BudgetRule::kMaxDrop},
                                 Choice<BudgetRule>{"threshold", BudgetRule::kThreshold},
                                 Choice<BudgetRule>{"first_fit", BudgetRule::kFirstFit},
                                 Choice<BudgetRule>{"shared", BudgetRule::kShared}};
constexpr std::array kSelections = {Choice<RankSelect>{"topk", RankSelect::kTopK},
                                    Choice<RankSelect>{"argmin1", RankSelect::kArgMin1},
                                    Choice<RankSelect>{"threshold", RankSelect::kThreshold},
                                    Choice<RankSelect>{"prefix", RankSelect::kPrefix},
                                    Choice<RankSelect>{"strata", RankSelect::kStrata},
                                    Choice<RankSelect>{"medoids", RankSelect::kMedoids}};
constexpr std::array kActions = {Choice<RankAction>{"evict", RankAction::kEvict},
                                 Choice<RankAction>{"recode", RankAction::kRecode}};
constexpr std::array kCounts = {Choice<BudgetCount>{"all", BudgetCount::kAll},
                                Choice<BudgetCount>{"generated", BudgetCount::kGenerated}};
constexpr std::array kPools = {Choice<Pool>{"none", Pool::kNone},
                               Choice<Pool>{"average", Pool::kAverage},
                               Choice<Pool>{"maximum", Pool::kMaximum}};
constexpr std::array kAnchors = {
    Choice<Anchor>{"random", Anchor::kRandom}, Choice<Anchor>{"zeros", Anchor::kZeros},
    Choice<Anchor>{"ones", Anchor::kOnes}, Choice<Anchor>{"mean", Anchor::kMean},
    Choice<Anchor>{"alternating", Anchor::kAlternating}};

template <class Small>
void read_small(MapReader* map, const char* key, Bounds bounds, Small* out) {
  uint32_t value = *out;
  if (map->integer32(key, bounds, &value)) *out = static_cast<Small>(value);
}
void read_percent(MapReader* map, const char* key, uint8_t* out) {
  read_small(map, key, {0, 100}, out);
}

// Class numbers 0 to 7, as the bits that thinkv_sequence_token_classes takes.
void read_classes(MapReader* map, const char* key, uint8_t* bits) {
  std::vector<uint32_t> classes;
  map->integers(key, {0, 7}, 8, &classes);
  for (const uint32_t number : classes) *bits = static_cast<uint8_t>(*bits | 1u << number);
}

void read_trigger(MapReader trigger, RankRule* rule) {
  bool at_end = false;
  if (trigger.boolean("prompt_end", &at_end)) rule->at_prompt_end = at_end ? 1 : 0;
  read_small(&trigger, "every", {1, kRankEveryMax}, &rule->every);
  trigger.finish();
}

void read_signal(MapReader signal, RankRule* rule) {
  float redundancy = 0.0f;
  signal.decimal("attention", kBelowZero, kWeightMax, &rule->attention);
  signal.decimal("redundancy", kBelowZero, kWeightMax, &redundancy);
  rule->similarity = redundancy == 0.0f ? 0.0f : -redundancy;
  signal.decimal("above", kBelowZero, 1.0, &rule->similarity_above);
  signal.decimal("distinct", kBelowZero, kWeightMax, &rule->distinct);
  signal.decimal("position", kBelowZero, kWeightMax, &rule->position);
  signal.decimal("random", kBelowZero, kWeightMax, &rule->random);
  signal.integer32("seed", {0, 0xFFFF'FFFFu}, &rule->seed);
  signal.choice<Pool>("pool", kPools, &rule->pool);
  read_small(&signal, "width", {1, kPoolWidthMax}, &rule->pool_width);
  bool values = false;
  if (signal.boolean("values", &values)) rule->value_norm = values ? 1 : 0;
  signal.finish();
}

// A key of another budget rule would only look as if it had an effect.
void refuse_foreign(MapReader* budget, BudgetRule rule) {
  constexpr struct {
    const char* key;
    BudgetRule of;
    const char* name;
  } kKeys[] = {{"beta", BudgetRule::kPyramid, "pyramid"},
               {"shares", BudgetRule::kGroups, "groups"},
               {"representative", BudgetRule::kSplit, "split"},
               {"drop", BudgetRule::kMaxDrop, "max_drop"},
               {"low", BudgetRule::kThreshold, "threshold"},
               {"high", BudgetRule::kThreshold, "threshold"},
               {"recover", BudgetRule::kFirstFit, "first_fit"},
               {"frequent", BudgetRule::kFirstFit, "first_fit"},
               {"local", BudgetRule::kFirstFit, "first_fit"},
               {"special", BudgetRule::kFirstFit, "first_fit"},
               {"punctuation", BudgetRule::kFirstFit, "first_fit"},
               {"least", BudgetRule::kShared, "shared"}};
  for (const auto& [key, of, name] : kKeys) {
    if (rule == of || !budget->has(key)) continue;
    budget->fail(*budget->node(key), key,
                 std::string("has no effect without budget.rule: ") + name);
  }
}

void read_budget(MapReader budget, RankRule* rule) {
  budget.choice<BudgetRule>("rule", kBudgets, &rule->budget);
  budget.choice<BudgetCount>("count", kCounts, &rule->counts);
  read_small(&budget, "percent", {1, 100}, &rule->budget_percent);
  read_percent(&budget, "representative", &rule->representative_percent);
  std::vector<uint32_t> shares;
  budget.integers("shares", {1, 255}, kRankGroupsMax, &shares);
  rule->group_count = static_cast<uint8_t>(shares.size());
  for (size_t i = 0; i < shares.size(); ++i) {
    rule->group_share[i] = static_cast<uint8_t>(shares[i]);
  }
  // The number of the rule, under the name that fits it.
  budget.decimal("beta", kBelowZero, kWeightMax, &rule->budget_low);
  budget.decimal("drop", kBelowZero, 1.0, &rule->budget_low);
  budget.decimal("low", kBelowZero, kWeightMax, &rule->budget_low);
  budget.decimal("recover", kBelowZero, 1.0, &rule->budget_low);
  budget.decimal("least", kBelowZero, 1.0, &rule->budget_low);
  budget.decimal("high", kBelowZero, kWeightMax, &rule->budget_high);
  read_percent(&budget, "frequent", &rule->frequent_percent);
  read_percent(&budget, "local", &rule->local_percent);
  read_classes(&budget, "special", &rule->special_classes);
  read_classes(&budget, "punctuation", &rule->punctuation_classes);
  refuse_foreign(&budget, rule->budget);
  budget.finish();
}

void read_select(MapReader select, RankRule* rule) {
  select.choice<RankSelect>("rule", kSelections, &rule->select);
  select.choice<Anchor>("anchor", kAnchors, &rule->anchor);
  select.finish();
}

void read_protect(MapReader protect, RankRule* rule) {
  read_small(&protect, "sinks", {0, kTokensOfRuleMax}, &rule->sinks);
  read_small(&protect, "recent", {0, kTokensOfRuleMax}, &rule->recent);
  read_percent(&protect, "recent_percent", &rule->recent_percent);
  read_classes(&protect, "classes", &rule->classes);
  protect.finish();
}

// [from, to), up to the last layer that a model can have.
void read_layers(MapReader* map, RankRule* rule) {
  std::vector<uint32_t> range;
  if (!map->integers("layers", {0, limits::kLayersMax}, 2, &range)) return;
  if (range.size() != 2 || range[0] >= range[1]) {
    map->fail(*map->node("layers"), "layers",
              "the first layer and the one after the last are expected, as in [0, 8]");
    return;
  }
  rule->layer_first = static_cast<uint8_t>(range[0]);
  rule->layer_end = static_cast<uint8_t>(range[1] % limits::kLayersMax);  // 0: no end
}

RankRule read_rule(MapReader map) {
  RankRule rule;
  read_trigger(map.child("trigger"), &rule);
  map.require("trigger");
  read_layers(&map, &rule);
  read_signal(map.child("signal"), &rule);
  read_budget(map.child("budget"), &rule);
  read_select(map.child("select"), &rule);
  read_protect(map.child("protect"), &rule);
  map.choice<RankAction>("action", kActions, &rule.action);
  if (map.choice<Format>("format", recode_choices(), &rule.recode_format) &&
      rule.action == RankAction::kEvict) {
    map.fail(*map.node("format"), "format", "has no effect without action: recode");
  }
  map.finish();
  return rule;
}

// The line of `path` ("trigger.every") in the rule, or of the nearest key above it.
uint32_t line_of(const YamlNode& rule, std::string_view path) {
  const YamlNode* node = &rule;
  uint32_t line = rule.line;
  while (!path.empty() && node->kind == YamlNode::Kind::kMap) {
    const size_t dot = path.find('.');
    const YamlEntry* entry = node->find(path.substr(0, dot));
    if (entry == nullptr) break;
    line = entry->line;
    node = &entry->node;
    path = dot == std::string_view::npos ? std::string_view() : path.substr(dot + 1);
  }
  return line;
}

void check_rules(const YamlNode& list, const PolicyParams& params, Diagnostics* diagnostics) {
  for (uint32_t i = 0; i < params.rule_count; ++i) {
    const RankProblem problem = rank_problem(params, i);
    if (!problem.any()) continue;
    const std::string_view key = problem.key;
    const std::string path = std::string(kPath) + (key.empty() ? "" : ".") + std::string(key);
    diagnostics->add(line_of(list.items[i], key), path, problem.what);
  }
}

}  // namespace

void read_rules(MapReader* root, PolicyParams* params, Diagnostics* diagnostics,
                std::vector<std::string>* keys) {
  const YamlNode* list = root->node("rules");
  if (keys != nullptr) {
    (void)read_rule(MapReader(nullptr, std::string(kPath), diagnostics, keys));
    return;
  }
  if (list == nullptr) {
    if (params->evict == EvictRule::kRank) root->require("rules");
    return;
  }
  if (params->evict != EvictRule::kRank) {
    return root->fail(*list, "rules", "go with evict.rule: rank, and only with it");
  }
  if (list->kind != YamlNode::Kind::kList || list->items.empty() ||
      list->items.size() > kRulesMax) {
    return root->fail(*list, "rules",
                      "a list of 1 to " + std::to_string(kRulesMax) + " rules is expected");
  }
  const size_t before = diagnostics->lines().size();
  for (const YamlNode& item : list->items) {
    params->rules[params->rule_count] =
        read_rule(MapReader(&item, std::string(kPath), diagnostics, keys));
    params->rule_count = static_cast<uint8_t>(params->rule_count + 1);
  }
  // What was misread would only be reported twice.
  if (diagnostics->lines().size() == before) check_rules(*list, *params, diagnostics);
}

}  // namespace thinkv::ops
