#include "daemon/ops/policy_reader.h"

#include <array>
#include <cstring>
#include <filesystem>
#include <string_view>

#include "daemon/ops/placement_reader.h"
#include "daemon/ops/rule_reader.h"
#include "thinkv/internal/centring_check.h"
#include "thinkv/internal/limits.h"

namespace thinkv::ops {
namespace {

// "f16" is 16 bits in the model's own value type; a policy does not choose between the two.
constexpr size_t kSlotFormats = 8;  // the first ones: their slots stand alone
constexpr std::array kFormatNames = {
    Choice<Format>{"f16", Format::kF16},     Choice<Format>{"k8v8", Format::kK8V8},
    Choice<Format>{"k8v4", Format::kK8V4},   Choice<Format>{"k4v4", Format::kK4V4},
    Choice<Format>{"k4v2", Format::kK4V2},   Choice<Format>{"k2v2", Format::kK2V2},
    Choice<Format>{"nvfp4", Format::kNvfp4}, Choice<Format>{"ternary", Format::kTernary},
    Choice<Format>{"kivi4", Format::kKivi4}, Choice<Format>{"kivi2", Format::kKivi2},
    Choice<Format>{"kivi1", Format::kKivi1}, Choice<Format>{"pair2", Format::kPair2},
    Choice<Format>{"pair1", Format::kPair1}, Choice<Format>{"think", Format::kThink}};
constexpr std::array kRotations = {Choice<uint8_t>{"hadamard", 1}, Choice<uint8_t>{"none", 0}};
constexpr std::array kCentrings = {Choice<uint8_t>{"prompt", 1}, Choice<uint8_t>{"none", 0}};
constexpr std::array kRules = {Choice<EvictRule>{"tbe", EvictRule::kTbe},
                               Choice<EvictRule>{"rank", EvictRule::kRank},
                               Choice<EvictRule>{"none", EvictRule::kNone}};
constexpr std::array kSelects = {
    Choice<SelectRule>{"medoids", SelectRule::kMedoids},
    Choice<SelectRule>{"weighted-medoids", SelectRule::kWeightedMedoids},
    Choice<SelectRule>{"attention", SelectRule::kAttention},
    Choice<SelectRule>{"recent", SelectRule::kRecent}};
constexpr std::array kGrains = {Choice<SelectGrain>{"kv_head", SelectGrain::kKvHead},
                                Choice<SelectGrain>{"layer", SelectGrain::kLayer}};
constexpr std::array kFloors = {Choice<FloorRule>{"soft", FloorRule::kSoft},
                                Choice<FloorRule>{"merge", FloorRule::kMerge}};
constexpr std::array kOrders = {Choice<DemoteOrder>{"importance", DemoteOrder::kImportance},
                                Choice<DemoteOrder>{"oldest", DemoteOrder::kOldest}};
// kernels::GqaReduce, as the step reads it.
constexpr std::array kReduces = {Choice<uint8_t>{"mean-probability", 0},
                                 Choice<uint8_t>{"max-probability", 1},
                                 Choice<uint8_t>{"max-logit", 2}};
constexpr std::array kScoreKinds = {
    Choice<ScoreKind>{"decayed", ScoreKind::kDecayed}, Choice<ScoreKind>{"sum", ScoreKind::kSum},
    Choice<ScoreKind>{"mean", ScoreKind::kMean}, Choice<ScoreKind>{"window", ScoreKind::kWindow}};

constexpr uint32_t kSinksMax = 4096;
constexpr uint32_t kSegmentMax = 1024;
constexpr size_t kDescriptionMax = 400;

void read_formats(MapReader formats, PolicyParams* params) {
  formats.choice<Format>("prompt", format_choices(), &params->prompt_format);
  formats.require("prompt");
  params->sink_format = params->prompt_format;
  formats.choice<Format>("sinks", format_choices(), &params->sink_format);
  MapReader thoughts = formats.child("thoughts");
  formats.require("thoughts");
  constexpr std::array<std::string_view, kThoughtCount> kNames = {"reasoning", "execution",
                                                                  "transition"};
  for (uint32_t i = 0; i < kThoughtCount; ++i) {
    thoughts.choice<Format>(kNames[i], format_choices(), &params->thought_format[i]);
    if (formats.has("thoughts")) thoughts.require(kNames[i]);
  }
  thoughts.finish();
  formats.finish();
}

// Three thought types need layers to look at and two thresholds between three modes.
void read_classes(MapReader* labels, PolicyParams* params) {
  std::vector<uint32_t> layers;
  const bool has_layers =
      labels->integers("layers", {0, limits::kLayersMax - 1}, kLabelLayersMax, &layers);
  for (size_t i = 0; i < layers.size(); ++i) {
    params->label_layers[i] = static_cast<uint16_t>(layers[i]);
  }
  params->label_layer_count = static_cast<uint8_t>(layers.size());
  const YamlNode* thresholds = labels->node("thresholds");
  labels->decimal("near_zero", 0.0, 0.5, &params->near_zero);
  if (thresholds == nullptr) {
    if (has_layers && !layers.empty()) labels->require("thresholds");
    return;
  }
  constexpr const char* kAllowed = "two sparsities in 0.0 to 1.0 are expected, the lower first";
  if (layers.empty()) labels->require("layers");
  if (thresholds->kind != YamlNode::Kind::kList) {
    return labels->fail(*thresholds, "thresholds", kAllowed);
  }
  if (thresholds->items.empty() && layers.empty()) return;
  bool ok = thresholds->items.size() == 2;
  for (size_t i = 0; ok && i < 2; ++i) {
    const YamlNode& item = thresholds->items[i];
    // MapReader reads by key: a map of one key gives lists the same number rules.
    YamlNode one;
    one.kind = YamlNode::Kind::kMap;
    one.entries.push_back({"value", item.line, item});
    Diagnostics problems("");
    ok = MapReader(&one, "", &problems).decimal("value", -1e-9, 1.0, &params->thresholds[i]);
  }
  if (!ok || params->thresholds[0] > params->thresholds[1]) {
    labels->fail(*thresholds, "thresholds", kAllowed);
  }
}

// The file that tools/calibrate writes.
bool read_calibration(const std::string& file, PolicyParams* params, Diagnostics* diagnostics) {
  Diagnostics problems(file);
  const std::optional<std::string> text = read_text_file(file, &problems);
  const std::optional<YamlNode> tree = text ? parse_yaml(*text, &problems) : std::nullopt;
  if (tree) {
    MapReader root(&*tree, "", &problems);
    std::string ignored;
    uint32_t classes = 0;
    uint32_t tau = 0;
    root.text("model", 256, &ignored);
    root.text("note", 4096, &ignored);
    root.integer32("tau", {16, kSegmentMax}, &tau);
    root.integer32("classes", {1, kThoughtCount}, &classes);
    root.require("classes");
    read_classes(&root, params);
    root.finish();
    if (classes == 2) problems.add(0, "classes", "1 and 3 are allowed");
    if (classes == 1) params->label_layer_count = 0;
    if (classes == 3 && params->label_layer_count == 0) root.require("layers");
    if (tau != 0) params->segment_tokens = tau;
  }
  for (const std::string& line : problems.lines()) diagnostics->add(0, "labels.calibration", line);
  return problems.ok();
}

void read_labels(MapReader* root, const std::string& file, PolicyParams* params,
                 Diagnostics* diagnostics, std::vector<std::string>* keys) {
  const YamlNode* node = root->node("labels");
  if (node != nullptr && node->kind == YamlNode::Kind::kScalar) {
    if (node->scalar == "one class") return;
    return root->fail(*node, "labels",
                      MapReader::quote(node->scalar) +
                          " is not known; allowed: one class, or a map with calibration, or with "
                          "layers and thresholds");
  }
  MapReader labels(node, "labels", diagnostics, keys);
  std::string calibration;
  if (labels.text("calibration", 1024, &calibration)) {
    if (labels.has("layers") || labels.has("thresholds") || labels.has("near_zero")) {
      labels.fail(*node, "calibration", "stands alone: the file brings layers and thresholds");
    }
    const std::filesystem::path given(calibration);
    const auto path =
        given.is_absolute() ? given : std::filesystem::path(file).parent_path() / given;
    read_calibration(path.lexically_normal().string(), params, diagnostics);
    (void)labels.node("layers"), (void)labels.node("thresholds"), (void)labels.node("near_zero");
  } else {
    read_classes(&labels, params);
  }
  labels.finish();
}

void read_budget(MapReader* evict, PolicyParams* params) {
  const YamlNode* budget = evict->node("budget");
  if (budget == nullptr || (budget->kind == YamlNode::Kind::kScalar && budget->scalar == "none")) {
    return;
  }
  YamlNode one;
  one.kind = YamlNode::Kind::kMap;
  one.entries.push_back({"budget", budget->line, *budget});
  Diagnostics problems("");
  MapReader reader(&one, "", &problems);
  const bool rank = params->evict == EvictRule::kRank;
  const uint32_t least = rank ? 1 : params->segment_tokens;
  if (!reader.integer32("budget", {least, limits::kTokensMax}, &params->budget_tokens)) {
    evict->fail(*budget, "budget",
                "none, or a number of tokens from " +
                    (rank ? std::string("1") : "one segment (" + std::to_string(least) + ")") +
                    " to " + std::to_string(limits::kTokensMax) + " is allowed");
  }
}

void read_schedule(MapReader* evict, PolicyParams* params) {
  std::vector<uint32_t> schedule;
  if (!evict->integers("schedule", {1, kSegmentMax}, kScheduleMax, &schedule)) {
    evict->require("schedule");
    return;
  }
  uint32_t before = params->segment_tokens;
  bool falls = !schedule.empty();
  for (size_t i = 0; i < schedule.size(); ++i) {
    falls = falls && schedule[i] < before;
    before = schedule[i];
    params->schedule[i] = static_cast<uint16_t>(schedule[i]);
  }
  params->schedule_length = static_cast<uint8_t>(schedule.size());
  if (!falls) {
    evict->fail(*evict->node("schedule"), "schedule",
                "1 to 8 falling numbers below segment.tokens (" +
                    std::to_string(params->segment_tokens) +
                    ") are allowed, none of them 0: a segment is never removed whole");
  }
}

// A key without an effect would only look as if it had one.
void refuse(MapReader* map, std::span<const char* const> keys, const char* needed) {
  for (const char* key : keys) {
    if (const YamlNode* node = map->node(key)) {
      map->fail(*node, key, std::string("has no effect without ") + needed);
    }
  }
}

void read_evict(MapReader evict, PolicyParams* params) {
  constexpr std::array kOfTbe = {"schedule", "select", "floor", "order", "on_transition"};
  constexpr std::array kOfBoth = {"budget", "grain"};
  evict.choice<EvictRule>("rule", kRules, &params->evict);
  if (params->evict != EvictRule::kTbe) {
    refuse(&evict, kOfTbe, "evict.rule: tbe");
    if (params->evict == EvictRule::kNone) {
      refuse(&evict, kOfBoth, "evict.rule: tbe or rank");
    } else {
      read_budget(&evict, params);
      evict.choice<SelectGrain>("grain", kGrains, &params->grain);
    }
    return evict.finish();
  }
  read_schedule(&evict, params);
  read_budget(&evict, params);
  evict.choice<SelectRule>("select", kSelects, &params->select);
  evict.choice<SelectGrain>("grain", kGrains, &params->grain);
  evict.choice<FloorRule>("floor", kFloors, &params->floor_rule);
  evict.choice<DemoteOrder>("order", kOrders, &params->order);
  bool on_transition = true;
  evict.boolean("on_transition", &on_transition);
  params->demote_on_transition = on_transition ? 1 : 0;
  evict.finish();
}

void read_scores(MapReader scores, PolicyParams* params, bool lists_keys) {
  scores.decimal("decay", 0.0, 1.0, &params->score_decay);
  uint32_t every = params->score_every;
  if (scores.integer32("every", {1, kSegmentMax}, &every)) {
    params->score_every = static_cast<uint16_t>(every);
  }
  scores.choice<uint8_t>("reduce", kReduces, &params->score_reduce);
  if (params->evict != EvictRule::kRank && !lists_keys) {
    constexpr std::array kOfRank = {"accumulate", "window", "prompt_queries", "spread"};
    refuse(&scores, kOfRank, "evict.rule: rank");
    return scores.finish();
  }
  scores.choice<ScoreKind>("accumulate", kScoreKinds, &params->score_kind);
  uint32_t window = params->score_window;
  if (scores.integer32("window", {1, kScoreWindowMax}, &window)) {
    params->score_window = static_cast<uint16_t>(window);
  }
  uint32_t queries = 0;
  if (scores.integer32("prompt_queries", {1, kPromptQueriesMax}, &queries)) {
    params->prompt_queries = static_cast<uint16_t>(queries);
  }
  bool spread = false;
  if (scores.boolean("spread", &spread)) params->prompt_spread = spread ? 1 : 0;
  scores.finish();
}

// After the rules: an eta that no format reads would only look as if it had an effect.
void read_blocks(MapReader blocks, PolicyParams* params, bool lists_keys) {
  constexpr double kBelowZero = -1e-9;  // 0 is allowed
  constexpr const char* kKeys[2] = {"eta_1bit", "eta_2bit"};
  constexpr const char* kNeeds[2] = {"has no effect without a rule that recodes to kivi1 or pair1",
                                     "has no effect without a rule that recodes to kivi2 or pair2"};
  bool read[2] = {false, false};
  for (uint32_t i = 0; i < params->rule_count; ++i) {
    const uint32_t bits = format_info(params->rules[i].recode_format).k.bits;
    if (writes_blocks(params->rules[i]) && bits <= 2) read[bits - 1] = true;
  }
  for (const uint32_t i : {0u, 1u}) {
    const bool given = blocks.decimal(kKeys[i], kBelowZero, 0.4999, &params->block_eta[i]);
    if (given && !read[i] && !lists_keys) blocks.fail(*blocks.node(kKeys[i]), kKeys[i], kNeeds[i]);
  }
  blocks.finish();
}

void read_segment(MapReader segment, PolicyParams* params) {
  segment.integer32("tokens", {16, kSegmentMax}, &params->segment_tokens);
  if (params->segment_tokens % 16 != 0) {
    segment.fail(*segment.node("tokens"), "tokens",
                 "must be a multiple of 16, the tokens of a flush");
  }
  segment.finish();
}

void read_name(MapReader* root, const std::string& file, PolicyParams* params) {
  std::string name;
  const bool ok = root->name("name", kPolicyNameMax - 1, &name);
  root->require("name");
  if (!ok) return;
  std::memcpy(params->name, name.data(), name.size());
  // The name a client asks for and the file an operator edits stay the same.
  const std::string stem = std::filesystem::path(file).stem().string();
  if (name != stem) {
    root->fail(*root->node("name"), "name", "must be the file's name, " + MapReader::quote(stem));
  }
}

void report(const PolicyProblem& problem, MapReader& root, Diagnostics* diagnostics) {
  if (!problem.any()) return;
  const std::string_view key = problem.key;
  const YamlNode* node = root.node(key.substr(0, key.find('.')));
  diagnostics->add(node == nullptr ? 0 : node->line, problem.key, problem.what);
}

}  // namespace

std::span<const Choice<Format>> format_choices() {
  return std::span(kFormatNames).first<kSlotFormats>();
}

std::span<const Choice<Format>> recode_choices() {
  return kFormatNames;
}

void read_policy(const PolicySource& source, PolicyParams* params, std::string* description,
                 Diagnostics* diagnostics) {
  std::vector<std::string>* const keys = source.keys;
  const std::string& file = source.file;
  MapReader root(source.tree, "", diagnostics, keys);
  read_name(&root, file, params);
  root.text("description", kDescriptionMax, description);
  read_formats(root.child("formats"), params);
  root.require("formats");
  root.choice<uint8_t>("rotation", kRotations, &params->rotate);
  root.require("rotation");
  root.choice<uint8_t>("centring", kCentrings, &params->centre);
  MapReader sinks = root.child("sinks");
  sinks.integer32("tokens", {0, kSinksMax}, &params->sink_tokens);
  sinks.finish();
  read_segment(root.child("segment"), params);
  // Before evict: a calibration was made for one segment length, and schedules depend on it.
  read_labels(&root, file, params, diagnostics, keys);
  if (keys != nullptr) params->evict = EvictRule::kTbe;
  read_evict(root.child("evict"), params);
  read_scores(root.child("scores"), params, keys != nullptr);
  read_rules(&root, params, diagnostics, keys);
  read_blocks(root.child("blocks"), params, keys != nullptr);
  root.integer32("kmeans_iterations", {1, 16}, &params->kmeans_iterations);
  const size_t before = diagnostics->lines().size();
  read_placement(&root, params);
  // What was misread would only be reported twice.
  if (keys == nullptr && diagnostics->lines().size() == before) {
    report(placement_problem(*params), root, diagnostics);
    report(centring_problem(*params), root, diagnostics);
  }
  root.finish();
}

}  // namespace thinkv::ops
