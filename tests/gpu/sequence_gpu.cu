// sequence_gpu.cu: the sequences of a GPU against the host's, and what a step's kernels cost.
//
//   check   the same tokens on both sides, compared after every step (tests/support/device_twin.h)
//   small   a short check, for compute-sanitizer; tiny: a shorter one
//   rank    the shipped rank policies and 100 rules drawn by chance (THINKV_SEED)
//   blocks  the same of policies that recode to blocks of tokens
//   medoids the rules of `rank` that choose medoids, alone: short, for compute-sanitizer
//   prompt  policies that are told the prompt's queries and token classes; each line as it is done
//   coded   policies with entropy-coded streams, kvcomp as shipped and 40 drawn by chance
//   tier    tailorkv and policies with a host tier drawn by chance: choice, copy and attention
//   bench   microseconds of begin, append, flush and prefill; one line each
//   bench-coded  microseconds of kvcomp: coding a layer's prompt, a step's end where blocks are due
//               and where none is, reading a layer's blocks
//   bench-rank  microseconds of the end of a step with thinkv: where its rules fire, where
//               not, and where they fire first, for the whole prompt
//   bench-tier  microseconds of a layer's choice and copy from a host tier
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

#include "tests/gpu/sequence_bench.cuh"
#include "tests/gpu/tier_bench.cuh"
#include "tests/support/coded_twin.h"
#include "tests/support/device_twin.h"
#include "tests/support/rank_twin.h"
#include "tests/support/seed.h"
#include "tests/support/tier_twin.h"

namespace thinkv::gputest {
namespace {

using testing::TwinBatch;

constexpr Format kFormatsToTest[] = {Format::kF16,   Format::kK8V8,   Format::kK8V4,
                                     Format::kK4V4,  Format::kK4V2,   Format::kK2V2,
                                     Format::kNvfp4, Format::kTernary};

bool good(TwinBatch& batch, const char* what) {
  batch.compare();
  if (batch.wrong().empty()) return true;
  std::printf("%s: %s\n", what, batch.wrong().substr(0, 600).c_str());
  return false;
}

bool steps(TwinBatch& batch, uint32_t count, const char* what) {
  for (uint32_t i = 0; i < count; ++i) {
    batch.step();
    if (i % 5 == 0 && !good(batch, what)) return false;
  }
  return good(batch, what);
}

// Two sequences of one format, evicted and recoded on the way.
bool check_format(Format format, uint32_t dim, ValueType type, Element element, bool rotate) {
  char what[80];
  std::snprintf(what, sizeof what, "format %u, head_dim %u, type %u, element %u, rotate %d",
                static_cast<uint32_t>(format), dim, static_cast<uint32_t>(type),
                static_cast<uint32_t>(element), rotate);
  TwinBatch batch({.geometry = geometry_of(2, 2, dim, type),
                   .element = element,
                   .capacity = 3,
                   .extent_pages = 256,
                   .wild = !rotate});
  PolicyParams policy = plain_policy(format);
  policy.rotate = rotate ? 1 : 0;
  // Without NaN: machines differ in what one is less a number.
  policy.centre = rotate && (dim / 64 + static_cast<uint32_t>(format)) % 2 == 0 ? 1 : 0;
  policy.sink_tokens = 5;
  policy.sink_format = Format::kF16;
  batch.open(2, policy);
  batch.prefill(2, 37);
  batch.open(0, policy);
  if (!steps(batch, 35, what)) return false;
  batch.evict(2, {0, 3, 4, 9, 11, 12, 13, 30, 31, 40, 41});
  if (!good(batch, what)) return false;
  if (!steps(batch, 20, what)) return false;
  batch.recode(2, 2, 60, format == Format::kK2V2 ? Format::kK4V4 : Format::kK2V2);
  if (!good(batch, what) || !steps(batch, 20, what)) return false;
  batch.close(0);
  batch.close(2);
  return good(batch, what);
}

int check(bool small, uint32_t cases_max) {
  uint32_t failed = 0, cases = 0;
  for (const uint32_t dim : kHeadDims) {
    for (const Format format : kFormatsToTest) {
      if (small && dim != 128 && format != Format::kK4V2) continue;
      for (const bool rotate : {false, true}) {
        if (small && rotate != (static_cast<uint32_t>(format) % 2 == 0)) continue;
        if (cases == cases_max) continue;
        const auto type = static_cast<ValueType>(cases % 2);
        const auto element = static_cast<Element>(cases % 3);
        failed += check_format(format, dim, type, element, rotate) ? 0 : 1;
        ++cases;
      }
    }
  }
  std::printf("%u cases, %u failed\n", cases, failed);
  return failed == 0 ? 0 : 1;
}

// Rank policies, as shipped and drawn by chance. All of them run, so that one failure does not hide
// the others.
class Judge {
 public:
  void operator()(const std::string& what, const std::string& wrong) {
    if (wrong.empty()) return;
    std::printf("%s: %s\n", what.c_str(), wrong.substr(0, 600).c_str());
    ++failed_;
  }
  // Calls run(policy, head_dim) for a shipped policy in every width.
  template <class Run>
  void widths(const char* name, uint32_t budget, const Run& run) {
    const auto policy = testing::shipped_params(name, budget);
    if (!policy) return (*this)(name, "the policy cannot be read (THINKV_SOURCE_DIR)");
    for (const uint32_t dim : kHeadDims) (*this)(name, run(*policy, dim));
  }
  [[nodiscard]] int exit_code() const {
    std::printf("%u failed\n", failed_);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  uint32_t failed_ = 0;
};

void judge_medoids(Judge& judge, testing::RankTally& tally) {
  for (const testing::MedoidKind& kind : testing::kMedoidKinds) {
    for (const uint32_t dim : kHeadDims) {
      judge(kind.name() + ", head_dim " + std::to_string(dim),
            testing::run_rank_policy(testing::medoid_policy(kind, 64), dim, tally));
    }
  }
}

int check_medoids() {
  Judge judge;
  testing::RankTally tally;
  judge_medoids(judge, tally);
  return judge.exit_code();
}

int check_rank() {
  Judge judge;
  testing::RankTally tally;
  for (const char* name : testing::kRankPolicies) {
    judge.widths(name, 64, [&](const PolicyParams& policy, uint32_t dim) {
      return testing::run_rank_policy(policy, dim, tally);
    });
  }
  for (const char* name : {"h2o", "thinkv", "fastgen", "dbudgetkv", "kvcrush"}) {
    const auto policy = testing::shipped_params(name, 300);
    if (!policy) continue;  // said above
    judge(std::string(name) + ", a long prompt",
          testing::run_long_prompt(*policy, cuda::kRankRowsMax + 200, 128));
  }
  judge_medoids(judge, tally);
  for (const testing::MedoidKind& kind : testing::kMedoidKinds) {
    judge(kind.name() + ", a long prompt",
          testing::run_long_prompt(testing::medoid_policy(kind, 900), cuda::kRankRowsMax + 200));
  }
  const uint64_t seed = testing::seed_from_environment(20251129);
  for (uint64_t i = 0; i < 100; ++i) {
    judge("seed " + std::to_string(seed + i), testing::run_drawn_rules(seed + i, tally));
  }
  tally.print("rank rules");
  return judge.exit_code();
}

// A case that says how long it took when it is done, so that one that hangs is the next one.
template <class Run>
void timed(Judge& judge, const std::string& what, const Run& run) {
  const auto start = std::chrono::steady_clock::now();
  judge(what, run());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%s: %.2f s\n", what.c_str(), seconds.count());
  std::fflush(stdout);
}

int check_prompt() {
  Judge judge;
  testing::RankTally tally;
  for (const char* name : {"snapkv", "h2o", "thinkv", "fastgen", "uncomp"}) {
    auto policy = testing::shipped_params(name, 64);
    if (!policy) {
      judge(name, "the policy cannot be read (THINKV_SOURCE_DIR)");
      continue;
    }
    for (RankRule& rule : policy->rules) {  // the attention of random numbers is even
      if (rule.budget == BudgetRule::kFirstFit) rule.budget_low = 0.4f;
    }
    for (const uint32_t dim : kHeadDims) {
      timed(judge, std::string(name) + ", head_dim " + std::to_string(dim), [&] {
        return testing::run_rank_policy(*policy, dim, tally, {.queries = 40, .classes = true});
      });
    }
    timed(judge, std::string(name) + ", a long prompt",
          [&] { return testing::run_long_prompt(*policy, cuda::kRankRowsMax + 200, 128, 1, 64); });
  }
  const auto uncomp = testing::shipped_params("uncomp", 50);
  const auto think = testing::shipped_params("think", 24);
  for (const uint32_t dim : kHeadDims) {
    if (!uncomp || !think) break;  // said above
    for (const uint32_t queries : {0u, 33u, 64u}) {
      timed(judge,
            "entropy of " + std::to_string(queries) + " queries, head_dim " + std::to_string(dim),
            [&] { return testing::run_prompt_entropy(*uncomp, dim, queries); });
    }
    timed(judge, "think, head_dim " + std::to_string(dim),
          [&] { return testing::run_block_policy(*think, geometry_of(2, 2, dim), tally, 20); });
  }
  const uint64_t seed = testing::seed_from_environment(20261129);
  for (uint64_t i = 0; i < 40; ++i) {
    timed(judge, "seed " + std::to_string(seed + i),
          [&] { return testing::run_drawn_rules(seed + i, tally); });
  }
  tally.print("rules that are told of the prompt");
  return judge.exit_code();
}

int check_blocks() {
  Judge judge;
  testing::RankTally tally;
  for (const char* name : testing::kBlockPolicies) {
    judge.widths(name, 24, [&](const PolicyParams& policy, uint32_t dim) {
      ModelGeometry geometry = geometry_of(5, 2, dim);
      if (dim == 128) geometry.value_type = ValueType::kBf16;
      return testing::run_block_policy(policy, geometry, tally);
    });
    judge.widths(name, 24, [&](const PolicyParams& policy, uint32_t) {
      return testing::run_long_prompt(policy, cuda::kRankRowsFew + 200, 64, 4);
    });
  }
  const uint64_t seed = testing::seed_from_environment(20260107);
  for (uint64_t i = 0; i < 60; ++i) {
    judge("seed " + std::to_string(seed + i), testing::run_drawn_rules(seed + i, tally, true));
  }
  tally.print("rules with blocks");
  return judge.exit_code();
}

int check_coded() {
  Judge judge;
  testing::CodedTally tally;
  judge.widths("kvcomp", 0, [&](const PolicyParams& policy, uint32_t dim) {
    ModelGeometry geometry = geometry_of(2, 2, dim);
    if (dim == 128) geometry.value_type = ValueType::kBf16;
    const std::string wrong = testing::run_coded_policy(policy, geometry, tally, Element::kBf16);
    tally.print("kvcomp");
    return wrong.empty() ? testing::run_coded_policy(policy, geometry, tally, Element::kF32, true)
                         : wrong;
  });
  if (const auto policy = testing::shipped_params("kvcomp", 0)) {
    judge("kvcomp, a long prompt",
          testing::run_coded_prompt(*policy, geometry_of(1, 2, 128), 20'000, tally));
    tally.print("and a long prompt");
  }
  const uint64_t seed = testing::seed_from_environment(20261129);
  for (uint64_t i = 0; i < 40; ++i) {
    judge("seed " + std::to_string(seed + i), testing::run_drawn_streams(seed + i, tally));
    if (i % 20 == 19) tally.print("and by chance");
  }
  return judge.exit_code();
}

int check_tier() {
  Judge judge;
  testing::TierTally tally;
  const auto say = [](const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::fflush(stdout);
    return what;
  };
  judge.widths("tailorkv", 0, [&](const PolicyParams& policy, uint32_t dim) {
    say("tailorkv, head_dim " + std::to_string(dim));
    const ModelGeometry geometry{.layers = 2,
                                 .q_heads = 8,
                                 .kv_heads = 2,
                                 .head_dim = dim,
                                 .value_type = dim == 256 ? ValueType::kBf16 : ValueType::kFp16};
    return testing::run_tier_policy(policy, geometry, Element::kF16, 700, 10, dim, tally);
  });
  if (auto policy = testing::shipped_params("tailorkv", 0)) {
    policy->tier.dense_layers[0] = 0;
    for (const uint32_t tokens : {cuda::kTierTile + 64, 40'000u}) {
      const ModelGeometry geometry{.layers = 1, .q_heads = 4, .kv_heads = 1, .head_dim = 128};
      judge(say("a prompt of " + std::to_string(tokens) + " tokens"),
            testing::run_tier_policy(*policy, geometry, Element::kBf16, tokens, 3, 7, tally));
    }
  }
  judge(say("a graph"), check_tier_graph());
  const uint64_t seed = testing::seed_from_environment(20261129);
  for (uint64_t i = 0; i < 40; ++i) {
    judge(say("seed " + std::to_string(seed + i)), testing::run_drawn_tier(seed + i, tally));
  }
  std::printf("%llu rows fetched, %llu choices ahead\n",
              static_cast<unsigned long long>(tally.rows),
              static_cast<unsigned long long>(tally.hints));
  return judge.exit_code();
}

int run(int argc, char** argv) {
  const char* mode = argc > 1 ? argv[1] : "check";
  if (std::strcmp(mode, "check") == 0) return check(false, ~0u);
  if (std::strcmp(mode, "small") == 0) return check(true, ~0u);
  if (std::strcmp(mode, "tiny") == 0) return check(true, 3);
  if (std::strcmp(mode, "rank") == 0) return check_rank();
  if (std::strcmp(mode, "medoids") == 0) return check_medoids();
  if (std::strcmp(mode, "blocks") == 0) return check_blocks();
  if (std::strcmp(mode, "prompt") == 0) return check_prompt();
  if (std::strcmp(mode, "coded") == 0) return check_coded();
  if (std::strcmp(mode, "bench-coded") == 0) {
    bench_coded(1, 32, 32768);
    bench_coded(32, 8, 4096);
    return 0;
  }
  if (std::strcmp(mode, "tier") == 0) return check_tier();
  if (std::strcmp(mode, "bench-tier") == 0) {
    bench_tier(1, 32'768);
    bench_tier(1, 131'072);
    bench_tier(16, 8'192);
    return 0;
  }
  if (std::strcmp(mode, "bench-rank") == 0) {
    bench_rank(32, 32, 1200);
    bench_rank(1, 32, 32768);
    return 0;
  }
  bench(32, 32, 1024, false);
  bench(32, 32, 1024, true);
  bench(128, 32, 1024, false);
  bench(1024, 8, 512, false);
  bench(1, 32, 32768, false);
  return 0;
}

}  // namespace
}  // namespace thinkv::gputest

int main(int argc, char** argv) {
  return thinkv::gputest::run(argc, argv);
}
