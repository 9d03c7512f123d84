// Policy files: the shipped ones mean what they say; bad ones say why.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "daemon/ops/policy_file.h"
#include "daemon/ops/yaml_tree.h"
#include "tests/support/policy_text.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::ops {
namespace {

std::string source_folder(const std::string& name) {
  const char* root = std::getenv("THINKV_SOURCE_DIR");
  return std::string(root == nullptr ? "." : root) + "/" + name;
}

PolicySet shipped() {
  std::vector<std::string> problems;
  auto set = load_policies(
      {source_folder("config/policies"), source_folder("config/policies/formats")}, {}, &problems);
  for (const std::string& problem : problems) ADD_FAILURE() << problem;
  return set ? std::move(*set) : PolicySet{};
}

TEST(Policy, AllShippedFilesAreValid) {
  const PolicySet set = shipped();
  for (const char* name : {"thinkv", "thinkv-paper", "full-f16", "k4v4-only", "k8v8-only",
                           "k8v4-only", "k4v2-only", "k2v2-only", "nvfp4-only", "ternary-only"}) {
    const Policy* policy = set.find(name);
    ASSERT_NE(policy, nullptr) << name;
    EXPECT_TRUE(policy_params_valid(policy->params)) << name;
    EXPECT_FALSE(policy->description.empty()) << name;
  }
  EXPECT_EQ(set.find("no-such-policy"), nullptr);
}

TEST(Policy, PaperIsTheFaithfulConfiguration) {
  const PolicySet set = shipped();
  const Policy* policy = set.find("thinkv-paper");
  ASSERT_NE(policy, nullptr);
  const PolicyParams& p = policy->params;
  EXPECT_EQ(p.prompt_format, Format::kNvfp4);
  EXPECT_EQ(p.thought_format[0], Format::kNvfp4);
  EXPECT_EQ(p.thought_format[2], Format::kTernary);
  EXPECT_EQ(p.rotate, 0);
  EXPECT_EQ(p.select, SelectRule::kMedoids);
  EXPECT_EQ(p.grain, SelectGrain::kLayer);
  EXPECT_EQ(p.segment_tokens, 128u);
  const std::vector<uint16_t> schedule(p.schedule, p.schedule + p.schedule_length);
  EXPECT_EQ(schedule, (std::vector<uint16_t>{64, 32, 16, 8, 4}));
}

TEST(Policy, OnlyFormatsEvictNothing) {
  const PolicySet set = shipped();
  for (const char* name : {"full-f16", "k4v4-only", "nvfp4-only", "ternary-only"}) {
    const Policy* policy = set.find(name);
    ASSERT_NE(policy, nullptr) << name;
    EXPECT_EQ(policy->params.evict, EvictRule::kNone) << name;
    EXPECT_EQ(policy->params.sink_format, policy->params.prompt_format) << name;
    EXPECT_EQ(policy->params.thought_format[2], policy->params.prompt_format) << name;
    EXPECT_EQ(policy->params.rotate != 0, policy->params.prompt_format != Format::kF16) << name;
  }
}

// thinkv.yaml is the documentation of the schema: every key is in it, or in its comments.
TEST(Policy, ShippedDefaultShowsEveryKey) {
  std::ifstream in(source_folder("config/policies/thinkv.yaml"));
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  EXPECT_GT(policy_keys().size(), 20u);
  for (const std::string& key : policy_keys()) {
    const std::string last = key.substr(key.rfind('.') + 1) + ":";
    EXPECT_NE(text.find(last), std::string::npos) << key;
  }
}

const std::string kGood =
    "name: p\n"
    "formats:\n"
    "  prompt: k4v4\n"
    "  thoughts: {reasoning: k4v4, execution: k8v4, transition: k4v2}\n"
    "rotation: hadamard\n";

std::optional<Policy> parse(const std::string& text, Diagnostics* diagnostics) {
  return parse_policy(text, "/x/p.yaml", diagnostics);
}

TEST(Policy, SmallestFile) {
  Diagnostics diagnostics("p.yaml");
  const auto policy = parse(kGood, &diagnostics);
  ASSERT_TRUE(policy) << diagnostics.text();
  EXPECT_STREQ(policy->params.name, "p");
  EXPECT_EQ(policy->params.thought_format[1], Format::kK8V4);
  EXPECT_EQ(policy->params.sink_format, Format::kK4V4);
  EXPECT_EQ(policy->params.evict, EvictRule::kNone);
}

TEST(Policy, EverySetting) {
  Diagnostics diagnostics("p.yaml");
  const auto policy =
      parse(kGood +
                "sinks: {tokens: 8}\nsegment: {tokens: 64}\n"
                "labels: {layers: [1, 5], thresholds: [0.25, 0.75], near_zero: 0.02}\n"
                "evict: {rule: tbe, schedule: [32, 4], budget: 512, select: weighted-medoids,\n"
                "        grain: layer, floor: merge, order: oldest, on_transition: false}\n"
                "scores: {decay: 0.9, every: 4, reduce: max-logit}\nkmeans_iterations: 7\n",
            &diagnostics);
  ASSERT_TRUE(policy) << diagnostics.text();
  const PolicyParams& p = policy->params;
  EXPECT_EQ(p.sink_tokens, 8u);
  EXPECT_EQ(p.segment_tokens, 64u);
  EXPECT_EQ(p.label_layer_count, 2);
  EXPECT_EQ(p.label_layers[1], 5);
  EXPECT_FLOAT_EQ(p.thresholds[0], 0.25f);
  EXPECT_FLOAT_EQ(p.thresholds[1], 0.75f);
  EXPECT_FLOAT_EQ(p.near_zero, 0.02f);
  EXPECT_EQ(p.schedule_length, 2);
  EXPECT_EQ(p.budget_tokens, 512u);
  EXPECT_EQ(p.select, SelectRule::kWeightedMedoids);
  EXPECT_EQ(p.grain, SelectGrain::kLayer);
  EXPECT_EQ(p.floor_rule, FloorRule::kMerge);
  EXPECT_EQ(p.order, DemoteOrder::kOldest);
  EXPECT_EQ(p.demote_on_transition, 0);
  EXPECT_FLOAT_EQ(p.score_decay, 0.9f);
  EXPECT_EQ(p.score_every, 4);
  EXPECT_EQ(p.score_reduce, 2);
  EXPECT_EQ(p.kmeans_iterations, 7u);
}

struct BadPolicy {
  std::string text;
  std::string message;
};

class PolicyBad : public testing::TestWithParam<BadPolicy> {};

TEST_P(PolicyBad, NamesTheKeyAndWhatIsAllowed) {
  EXPECT_EQ(problems(GetParam().text), GetParam().message);
}

const std::string kThresholds =
    "p.yaml:6: labels.thresholds: two sparsities in 0.0 to 1.0 are expected, the lower first";

INSTANTIATE_TEST_SUITE_P(
    Words, PolicyBad,
    testing::Values(
        BadPolicy{"name: q\n" + kGood.substr(8), "p.yaml:1: name: must be the file's name, \"p\""},
        BadPolicy{kGood + "budget: 5\n",
                  "p.yaml:6: budget: unknown key; allowed here: name, description, formats, "
                  "rotation, centring, sinks, segment, labels, evict, scores, rules, blocks, "
                  "kmeans_iterations, entropy, tier"},
        BadPolicy{kGood + "rotation: none\n", "p.yaml:6: rotation: given twice, first in line 5"},
        BadPolicy{kGood.substr(0, kGood.size() - 9) + "yes\n",
                  "p.yaml:5: rotation: \"yes\" is not known; allowed: hadamard, none"},
        BadPolicy{"name: p\nrotation: none\nformats: {prompt: bf16, thoughts: {reasoning: f16, "
                  "execution: f16, transition: f16}}",
                  "p.yaml:3: formats.prompt: \"bf16\" is not known; allowed: f16, k8v8, k8v4, "
                  "k4v4, k4v2, k2v2, nvfp4, ternary"},
        BadPolicy{"name: p\nrotation: none\nformats: {prompt: f16, thoughts: {reasoning: f16}}",
                  "p.yaml:3: formats.thoughts.execution: must be given\n"
                  "p.yaml:3: formats.thoughts.transition: must be given"},
        BadPolicy{kGood + "centring: keys\n",
                  "p.yaml:6: centring: \"keys\" is not known; allowed: prompt, none"},
        BadPolicy{
            kGood + "centring: prompt\nscores: {reduce: max-logit}\n",
            "p.yaml:7: scores.reduce: must not be max-logit with centring: logits of different "
            "query heads move apart"},
        BadPolicy{kGood + "centring: prompt\nlabels: {layers: [1], thresholds: [0.5, 0.8]}\n",
                  "p.yaml:7: labels: must be one class with centring: sparsity compares logits of "
                  "query heads"},
        BadPolicy{kGood + "evict: {rule: lru}\n",
                  "p.yaml:6: evict.rule: \"lru\" is not known; allowed: tbe, rank, none"},
        BadPolicy{"- a", "p.yaml:1: keys and values are expected, not a list"},
        BadPolicy{"", "p.yaml: keys and values are expected, not nothing"}));

INSTANTIATE_TEST_SUITE_P(
    Labels, PolicyBad,
    testing::Values(
        BadPolicy{kGood + "labels: two classes\n",
                  "p.yaml:6: labels: \"two classes\" is not known; allowed: one class, or a map "
                  "with calibration, or with layers and thresholds"},
        BadPolicy{kGood + "labels: {layers: [1]}\n", "p.yaml:6: labels.thresholds: must be given"},
        BadPolicy{kGood + "labels: {layers: [1], thresholds: [0.8, 0.2]}\n", kThresholds},
        BadPolicy{kGood + "labels: {layers: [1], thresholds: [0.1, 0.2, 0.3]}\n", kThresholds},
        BadPolicy{kGood + "labels: {layers: [1], thresholds: [0.1, 1.2]}\n", kThresholds},
        BadPolicy{kGood + "labels: {calibration: nowhere.yaml}\n",
                  "p.yaml: labels.calibration: /x/nowhere.yaml: cannot be read: No such file or "
                  "directory"}));

INSTANTIATE_TEST_SUITE_P(
    Numbers, PolicyBad,
    testing::Values(
        BadPolicy{kGood + "segment: {tokens: 100}\n",
                  "p.yaml:6: segment.tokens: must be a multiple of 16, the tokens of a flush"},
        BadPolicy{kGood + "evict: {rule: tbe}\n", "p.yaml:6: evict.schedule: must be given"},
        BadPolicy{kGood + "evict: {rule: none, budget: 512}\n",
                  "p.yaml:6: evict.budget: has no effect without evict.rule: tbe or rank"},
        BadPolicy{kGood + "evict: {rule: tbe, schedule: [64, 64]}\n",
                  "p.yaml:6: evict.schedule: 1 to 8 falling numbers below segment.tokens (128) "
                  "are allowed, none of them 0: a segment is never removed whole"},
        BadPolicy{kGood + "evict: {rule: tbe, schedule: [64, 0]}\n",
                  "p.yaml:6: evict.schedule: \"0\" is out of range; allowed: 1 to 1024"},
        BadPolicy{kGood + "evict: {rule: tbe, schedule: [64], budget: 12}\n",
                  "p.yaml:6: evict.budget: none, or a number of tokens from one segment (128) to "
                  "16777216 is allowed"},
        BadPolicy{kGood + "scores: {decay: 1.5}\n",
                  "p.yaml:6: scores.decay: \"1.5\" is out of range; allowed: above 0.000000, at "
                  "most 1.000000"},
        BadPolicy{kGood + "scores: {decay: 9e-1}\n",
                  "p.yaml:6: scores.decay: \"9e-1\": a decimal number is expected, as in 0.97"},
        BadPolicy{kGood + "kmeans_iterations: 17\n",
                  "p.yaml:6: kmeans_iterations: \"17\" is out of range; allowed: 1 to 16"}));

class PolicyFolder : public testing::Test {
 protected:
  void SetUp() override {
    const std::string test = testing::UnitTest::GetInstance()->current_test_info()->name();
    folder_ = std::filesystem::temp_directory_path() /
              ("thinkv-policy-" + std::to_string(::getpid()) + test);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
  }
  std::optional<PolicySet> load(std::vector<std::string>* found) const {
    return load_policies({folder_.string()}, {}, found);
  }
  std::filesystem::path folder_;
};

TEST_F(PolicyFolder, CalibrationFileBringsLayersAndThresholds) {
  write("c.cal",
        "model: m\ntau: 64\nclasses: 3\nlayers: [3, 4]\nthresholds: [0.5, 0.6]\n"
        "near_zero: 0.01\nnote: text\n");
  write("p.yaml", kGood + "labels: {calibration: c.cal}\n");
  std::vector<std::string> found;
  const auto set = load(&found);
  ASSERT_TRUE(set) << (found.empty() ? "" : found[0]);
  EXPECT_EQ(set->policies[0].params.label_layer_count, 2);
  EXPECT_EQ(set->policies[0].params.segment_tokens, 64u);
}

TEST_F(PolicyFolder, OneClassCalibrationLabelsNothing) {
  write("c.cal", "model: m\ntau: 128\nclasses: 1\nlayers: []\nthresholds: []\n");
  write("p.yaml", kGood + "labels: {calibration: c.cal}\n");
  std::vector<std::string> found;
  const auto set = load(&found);
  ASSERT_TRUE(set) << (found.empty() ? "" : found[0]);
  EXPECT_EQ(set->policies[0].params.label_layer_count, 0);
}

TEST_F(PolicyFolder, BadCalibrationIsReportedWithItsOwnLine) {
  write("c.cal", "classes: 3\nlayers: [3]\n");
  write("p.yaml", kGood + "labels: {calibration: c.cal}\n");
  std::vector<std::string> found;
  EXPECT_FALSE(load(&found));
  ASSERT_EQ(found.size(), 1u);
  EXPECT_NE(found[0].find("c.cal:1: thresholds: must be given"), std::string::npos) << found[0];
}

TEST_F(PolicyFolder, OneBadFileRefusesTheSetAndNamesTheFile) {
  write("p.yaml", kGood);
  write("q.yaml", kGood);  // its name is p
  std::vector<std::string> found;
  EXPECT_FALSE(load(&found));
  ASSERT_EQ(found.size(), 1u);
  EXPECT_NE(found[0].find("q.yaml:1: name: must be the file's name"), std::string::npos);
}

TEST_F(PolicyFolder, EmptyAndAbsentFoldersAreErrors) {
  std::vector<std::string> found;
  EXPECT_FALSE(load(&found));
  EXPECT_EQ(found.size(), 1u);
  found.clear();
  EXPECT_FALSE(load_policies({"/no/such/folder"}, {}, &found));
  EXPECT_EQ(found.size(), 1u);
}

}  // namespace
}  // namespace thinkv::ops
