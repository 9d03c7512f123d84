// Rules in policy files: each key into its field, and each refusal with its key and its reason.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "tests/support/policy_text.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::ops {
namespace {

const std::string kFormats =
    "name: p\n"
    "formats:\n"
    "  prompt: k4v4\n"
    "  thoughts: {reasoning: k4v4, execution: k4v4, transition: k4v4}\n"
    "rotation: hadamard\n";
const std::string kRank = kFormats + "evict: {rule: rank, budget: 512}\n";

TEST(Rules, EverySetting) {
  const PolicyParams p =
      good(kRank +
           "scores: {accumulate: window, window: 16, reduce: max-logit}\n"
           "rules:\n"
           "  - trigger: {prompt_end: true, every: 64}\n"
           "    signal: {attention: 0.5, pool: maximum, width: 7, values: true, redundancy: 0.25,\n"
           "             above: 0.75, position: 2, random: 3, seed: 9}\n"
           "    budget: {rule: split, count: generated, percent: 50, representative: 30}\n"
           "    select: {rule: strata, anchor: mean}\n"
           "    protect: {sinks: 4, recent: 8, recent_percent: 25, classes: [0, 3]}\n"
           "    action: recode\n"
           "    format: k2v2\n"
           "  - trigger: {every: 1}\n"
           "    signal: {position: 1}\n"
           "    action: evict\n");
  EXPECT_EQ(p.evict, EvictRule::kRank);
  EXPECT_EQ(p.score_kind, ScoreKind::kWindow);
  EXPECT_EQ(p.score_window, 16);
  EXPECT_EQ(p.score_reduce, 2);
  ASSERT_EQ(p.rule_count, 2);
  const RankRule& r = p.rules[0];
  EXPECT_EQ(r.at_prompt_end, 1);
  EXPECT_EQ(r.every, 64);
  EXPECT_FLOAT_EQ(r.attention, 0.5f);
  EXPECT_EQ(r.pool, Pool::kMaximum);
  EXPECT_EQ(r.pool_width, 7);
  EXPECT_EQ(r.value_norm, 1);
  EXPECT_FLOAT_EQ(r.similarity, -0.25f);
  EXPECT_FLOAT_EQ(r.similarity_above, 0.75f);
  EXPECT_FLOAT_EQ(r.position, 2.0f);
  EXPECT_FLOAT_EQ(r.random, 3.0f);
  EXPECT_EQ(r.seed, 9u);
  EXPECT_EQ(r.budget, BudgetRule::kSplit);
  EXPECT_EQ(r.counts, BudgetCount::kGenerated);
  EXPECT_EQ(r.budget_percent, 50);
  EXPECT_EQ(r.representative_percent, 30);
  EXPECT_EQ(r.select, RankSelect::kStrata);
  EXPECT_EQ(r.sinks, 4);
  EXPECT_EQ(r.recent, 8);
  EXPECT_EQ(r.recent_percent, 25);
  EXPECT_EQ(r.classes, 0b1001);
  EXPECT_EQ(r.anchor, Anchor::kMean);
  EXPECT_EQ(r.action, RankAction::kRecode);
  EXPECT_EQ(r.recode_format, Format::kK2V2);
  EXPECT_EQ(p.rules[1].action, RankAction::kEvict);
  EXPECT_EQ(p.rules[1].every, 1);
}

TEST(Rules, DistinctGoesWithCentredKeys) {
  const PolicyParams p =
      good("centring: prompt\n" + kRank +
           "scores: {accumulate: mean}\n"
           "rules: [{trigger: {every: 16}, signal: {attention: 1, distinct: 1.5}}]\n");
  EXPECT_FLOAT_EQ(p.rules[0].distinct, 1.5f);
}

TEST(Rules, KeysOfTheBudgets) {
  const std::string rule = "    select: {rule: topk}\n";
  const auto with = [&](const std::string& budget, const std::string& rest) {
    return good(kRank + "scores: {accumulate: mean}\nrules:\n  - trigger: {prompt_end: true}\n" +
                "    budget: {" + budget + "}\n" + rest)
        .rules[0];
  };
  const std::string signal = "    signal: {attention: 1}\n";
  EXPECT_FLOAT_EQ(with("rule: pyramid, beta: 20", signal).budget_low, 20.0f);
  const RankRule groups = with("rule: groups, shares: [3, 2, 1]", signal);
  EXPECT_EQ(groups.group_count, 3);
  EXPECT_EQ(groups.group_share[0], 3);
  EXPECT_EQ(groups.group_share[2], 1);
  EXPECT_FLOAT_EQ(
      with("rule: max_drop, drop: 0.01", signal + "    select: {rule: prefix}\n").budget_low,
      0.01f);
  const RankRule tiers =
      with("rule: threshold, low: 0.02, high: 1", "    select: {rule: threshold}\n");
  EXPECT_FLOAT_EQ(tiers.budget_low, 0.02f);
  EXPECT_FLOAT_EQ(tiers.budget_high, 1.0f);
  const RankRule shared = with("rule: shared, least: 0.25", signal);
  EXPECT_EQ(shared.budget, BudgetRule::kShared);
  EXPECT_FLOAT_EQ(shared.budget_low, 0.25f);
  const RankRule fit = with(
      "rule: first_fit, recover: 0.9, frequent: 30, local: 20, special: [0], punctuation: [1, 2]",
      "");
  EXPECT_FLOAT_EQ(fit.budget_low, 0.9f);
  EXPECT_EQ(fit.frequent_percent, 30);
  EXPECT_EQ(fit.local_percent, 20);
  EXPECT_EQ(fit.special_classes, 1);
  EXPECT_EQ(fit.punctuation_classes, 6);
}

// A method that nobody published: R-KV's score over 4-bit pages, budgets by layer.
TEST(Rules, APolicyThatIsNotInTheListIsYamlAlone) {
  const PolicyParams p = good(kRank +
                              "scores: {accumulate: window, window: 8, reduce: max-logit}\n"
                              "rules:\n"
                              "  - trigger: {prompt_end: true, every: 128}\n"
                              "    signal: {attention: 0.07, redundancy: 0.93, values: true}\n"
                              "    budget: {rule: pyramid, beta: 8}\n"
                              "    protect: {recent: 8}\n"
                              "  - trigger: {prompt_end: true, every: 128}\n"
                              "    signal: {attention: 1}\n"
                              "    budget: {percent: 50}\n"
                              "    action: recode\n"
                              "    format: k4v2\n");
  EXPECT_TRUE(policy_params_valid(p));
  EXPECT_EQ(p.prompt_format, Format::kK4V4);
}

std::string source_text(const std::string& name) {
  const char* root = std::getenv("THINKV_SOURCE_DIR");
  std::ifstream in(std::string(root == nullptr ? "." : root) + "/" + name);
  return {std::istreambuf_iterator<char>(in), {}};
}

TEST(PoliciesReadme, ItsExamplesArePolicies) {
  const std::string text = source_text("config/policies/README.md");
  size_t end = 0;
  for (const char* file : {"/x/r-kv-4bit.yaml", "/x/r-kv-kivi.yaml"}) {
    const size_t begin = text.find("```yaml\n", end);
    ASSERT_NE(begin, std::string::npos);
    end = text.find("```", begin + 8) + 3;
    Diagnostics diagnostics("README.md");
    const auto policy = parse_policy(text.substr(begin + 8, end - begin - 11), file, &diagnostics);
    ASSERT_TRUE(policy) << diagnostics.text();
    EXPECT_EQ(policy->params.rule_count, 2);
    EXPECT_EQ(policy->params.rules[1].action, RankAction::kRecode);
  }
}

TEST(PoliciesReadme, HasARowForEveryPolicyOfTheFolder) {
  const std::string text = source_text("config/policies/README.md");
  const char* root = std::getenv("THINKV_SOURCE_DIR");
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(
           std::string(root == nullptr ? "." : root) + "/config/policies")) {
    if (entry.path().extension() != ".yaml") continue;
    ++files;
    const std::string name = entry.path().stem().string();
    EXPECT_NE(text.find("`" + name + "`"), std::string::npos) << name;
  }
  EXPECT_GE(files, 16u);
}

struct BadRule {
  std::string text;
  std::string message;
};
class RulesBad : public testing::TestWithParam<BadRule> {};
TEST_P(RulesBad, NamesTheKeyAndTheReason) {
  EXPECT_EQ(problems(GetParam().text), "p.yaml" + GetParam().message);
}

std::string rule(const std::string& keys) {
  return kRank + "rules:\n  - " + keys + "\n";
}
std::string scored(const std::string& scores, const std::string& keys) {
  return kRank + "scores: {" + scores + "}\nrules:\n  - {" + keys + "}\n";
}

INSTANTIATE_TEST_SUITE_P(
    Shape, RulesBad,
    testing::Values(
        BadRule{kFormats + "evict: {rule: tbe, schedule: [64]}\nrules: [{trigger: {every: 1}}]\n",
                ":7: rules: go with evict.rule: rank, and only with it"},
        BadRule{kRank, ":1: rules: must be given"},
        BadRule{kRank + "rules: 5\n", ":7: rules: a list of 1 to 4 rules is expected"},
        BadRule{kRank + "rules: [{}, {}, {}, {}, {}]\n",
                ":7: rules: a list of 1 to 4 rules is expected"},
        BadRule{rule("{triggers: {every: 1}}"),
                ":8: rules[].trigger: must be given\n"
                "p.yaml:8: rules[].triggers: unknown key; allowed here: trigger, layers, signal, "
                "budget, "
                "select, protect, action, format"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: 1}, action: drop}"),
                ":8: rules[].action: \"drop\" is not known; allowed: evict, recode"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: one}}"),
                ":8: rules[].signal.position: \"one\": a decimal number is expected, as in 0.97"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: 1}, format: k4v2}"),
                ":8: rules[].format: has no effect without action: recode"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: 1}, budget: {beta: 20}}"),
                ":8: rules[].budget.beta: has no effect without budget.rule: pyramid"},
        BadRule{kFormats + "evict: {rule: rank, budget: 512, floor: soft}\nrules: [{trigger: "
                           "{every: 1}, signal: {position: 1}}]\n",
                ":6: evict.floor: has no effect without evict.rule: tbe"},
        BadRule{kFormats + "scores: {accumulate: sum}\n",
                ":6: scores.accumulate: has no effect without evict.rule: rank"},
        BadRule{kFormats + "evict: {rule: rank, budget: 0}\nrules: [{trigger: {every: 1}, signal: "
                           "{position: 1}}]\n",
                ":6: evict.budget: none, or a number of tokens from 1 to 16777216 is allowed\n"
                "p.yaml:7: rules[].budget.rule: needs evict.budget, a number of tokens"}));

INSTANTIATE_TEST_SUITE_P(
    Pairs, RulesBad,
    testing::Values(
        BadRule{rule("{trigger: {}, signal: {position: 1}}"),
                ":8: rules[].trigger: needs prompt_end, every, or both: a rule that never fires "
                "does nothing"},
        BadRule{rule("{trigger: {every: 1}}"),
                ":8: rules[].signal: a weight for attention, similarity, position or random is "
                "needed"},
        BadRule{kFormats + "evict: {rule: rank}\nrules: [{trigger: {every: 1}, signal: {position: "
                           "1}}]\n",
                ":7: rules[].budget.rule: needs evict.budget, a number of tokens"},
        BadRule{scored("accumulate: window, window: 32",
                       "trigger: {every: 1}, signal: {attention: 1}, select: {rule: argmin1}"),
                ":9: rules[].trigger.every: must be at least scores.window: the window is "
                "collected between two firings"},
        BadRule{scored("accumulate: sum, every: 4", "trigger: {every: 1}, signal: {attention: 1}"),
                ":9: rules[].signal.attention: needs scores.every: 1: sums, means and windows are "
                "counted in single steps"},
        BadRule{rule("{trigger: {every: 1}, signal: {redundancy: 1}}"),
                ":8: rules[].signal.redundancy: compares all keys with all keys: trigger.every "
                "must be at least 16"},
        BadRule{
            scored("accumulate: mean", "trigger: {every: 16}, signal: {attention: 1, distinct: 2}"),
            ":9: rules[].signal.distinct: needs centring: prompt, which keeps the mean of the "
            "prompt's keys"},
        BadRule{"centring: prompt\n" +
                    rule("{trigger: {every: 16}, signal: {position: 1, distinct: 2}}"),
                ":9: rules[].signal.attention: is needed for distinct, which is scaled to a share "
                "of it"},
        BadRule{rule("{trigger: {every: 1}, select: {rule: threshold}}"),
                ":8: rules[].select.rule: threshold and budget.rule: threshold go together, and "
                "only they"},
        BadRule{scored("accumulate: sum",
                       "trigger: {every: 1}, budget: {rule: threshold, high: 1},"
                       " select: {rule: threshold}"),
                ":9: rules[].budget.rule: threshold compares with uniform attention: "
                "scores.accumulate must be mean"},
        BadRule{rule("{trigger: {prompt_end: true}, signal: {position: 1}, select: {rule: "
                     "argmin1}}"),
                ":8: rules[].select.rule: argmin1 takes one token a step: trigger.every must be 1 "
                "and prompt_end absent"},
        BadRule{rule("{trigger: {prompt_end: true}, signal: {position: 1}, budget: {rule: "
                     "max_drop, drop: 0.1}}"),
                ":8: rules[].select.rule: must be prefix: max_drop finds how much of the order "
                "can go"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: 1}, select: {rule: strata}}"),
                ":8: rules[].select.rule: strata and budget.rule: split go together, and only "
                "they"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: 1}, action: recode, format: f16}"),
                ":8: rules[].action: recoding to 16 bits wins nothing"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: 1}, budget: {rule: shared}, select: "
                     "{rule: prefix}}"),
                ":8: rules[].select.rule: must be topk: shared compares the numbers of all heads "
                "of a layer"},
        BadRule{rule("{trigger: {every: 1}, signal: {position: 1}, budget: {least: 0.5}}"),
                ":8: rules[].budget.least: has no effect without budget.rule: shared"},
        BadRule{scored("accumulate: mean",
                       "trigger: {every: 1}, budget: {rule: first_fit, recover: 0.9}, select: "
                       "{rule: argmin1}"),
                ":9: rules[].budget.rule: first_fit in decoding needs one at the prompt's end"},
        BadRule{kFormats + "evict: {rule: rank, budget: 512, grain: layer}\nrules: [{trigger: "
                           "{prompt_end: true}, signal: {attention: 1}, budget: {rule: groups, "
                           "shares: [2, 1]}}]\n",
                ":7: rules[].budget.rule: works head by head: evict.grain must be kv_head"}));

const std::string kUnrotated =
    "name: p\nformats: {prompt: f16, thoughts: {reasoning: f16, execution: f16, transition: f16}}\n"
    "rotation: none\nevict: {rule: rank, budget: 64}\n";
std::string blocks(const std::string& rules) {
  return kUnrotated + "rules:\n" + rules;
}
const std::string kRecodes = "  - {trigger: {every: 32}, signal: {position: 1}, action: recode, ";

INSTANTIATE_TEST_SUITE_P(
    Blocks, RulesBad,
    testing::Values(
        BadRule{blocks(kRecodes + "format: kivi3}\n"),
                ":6: rules[].format: \"kivi3\" is not known; allowed: f16, k8v8, k8v4, k4v4, k4v2, "
                "k2v2, nvfp4, ternary, kivi4, kivi2, kivi1, pair2, pair1, think"},
        BadRule{
            blocks(kRecodes + "format: pair2-second}\n"),
            ":6: rules[].format: \"pair2-second\" is not known; allowed: f16, k8v8, k8v4, k4v4, "
            "k4v2, k2v2, nvfp4, ternary, kivi4, kivi2, kivi1, pair2, pair1, think"},
        BadRule{
            blocks(kRecodes + "layers: [4, 4], format: kivi2}\n"),
            ":6: rules[].layers: the first layer and the one after the last are expected, as in "
            "[0, 8]"},
        BadRule{blocks(kRecodes + "layers: [3, 8], format: pair2}\n"),
                ":6: rules[].layers: must begin and end with an even number: a layer and the next "
                "are a pair"},
        BadRule{blocks("  - {trigger: {every: 32}, signal: {random: 1}, action: recode, format: "
                       "pair2}\n"),
                ":6: rules[].signal: must be position alone: both layers of a pair choose the same "
                "tokens"},
        BadRule{blocks(kRecodes + "layers: [0, 4], format: pair2}\n" + kRecodes +
                       "layers: [2, 8], format: kivi2}\n"),
                ":6: rules[].layers: another rule has some of them: nothing of a layer pair is "
                "evicted or recoded alone"},
        BadRule{blocks(kRecodes + "format: kivi2}\n"
                                  "  - {trigger: {every: 1}, signal: {position: 1}, select: {rule: "
                                  "argmin1}}\n"),
                ":7: rules[].select.rule: takes single tokens, whose slots a block cannot reuse: "
                "topk, prefix, strata or medoids go with a format of blocks"},
        BadRule{blocks(kRecodes + "format: kivi2}\n"
                                  "  - {trigger: {every: 8}, signal: {position: 1}}\n"),
                ":7: rules[].trigger.every: must be at least 16 where a rule recodes to blocks: "
                "slots of a block are not reused alone, it goes when all of it is dead"},
        BadRule{
            rule("{trigger: {every: 32}, signal: {position: 1}, action: recode, format: think}"),
            ":8: rules[].format: think leaves out channels of the model's own keys: rotation "
            "must be none"},
        BadRule{kUnrotated + "blocks: {eta_1bit: 0.3}\nrules:\n" + kRecodes + "format: kivi2}\n",
                ":5: blocks.eta_1bit: has no effect without a rule that recodes to kivi1 or pair1"},
        BadRule{kUnrotated + "blocks: {eta_2bit: 0.5}\nrules:\n" + kRecodes + "format: kivi2}\n",
                ":5: blocks.eta_2bit: \"0.5\" is out of range; allowed: above -0.000000, at most "
                "0.499900"}));

TEST(RulesGood, BlocksAndLayers) {
  Diagnostics diagnostics("p.yaml");
  const auto policy = parse_policy(kUnrotated + "blocks: {eta_2bit: 0.09}\nrules:\n" + kRecodes +
                                       "layers: [0, 4], format: kivi2}\n" + kRecodes +
                                       "layers: [4, 256], format: pair2}\n",
                                   "/x/p.yaml", &diagnostics);
  ASSERT_TRUE(policy) << diagnostics.text();
  EXPECT_FLOAT_EQ(policy->params.block_eta[1], 0.09f);
  const RankRule* rules = policy->params.rules;
  EXPECT_TRUE(covers_layer(rules[0], 0) && covers_layer(rules[0], 3) && !covers_layer(rules[0], 4));
  EXPECT_TRUE(!covers_layer(rules[1], 3) && covers_layer(rules[1], 4) &&
              covers_layer(rules[1], 255));
  EXPECT_FALSE(share_layers(rules[0], rules[1]));
  EXPECT_EQ(rules[1].recode_format, Format::kPair2);
}

}  // namespace
}  // namespace thinkv::ops
