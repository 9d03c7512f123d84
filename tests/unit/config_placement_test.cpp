// The sections entropy and tier of policy files: each key into its field, each refusal with its key
// and its reason, and any bytes in the numbers.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "tests/support/policy_text.h"
#include "thinkv/internal/policy_check.h"

namespace thinkv::ops {
namespace {

const std::string kWide =
    "name: p\n"
    "formats:\n"
    "  prompt: f16\n"
    "  thoughts: {reasoning: f16, execution: f16, transition: f16}\n"
    "rotation: none\n";
const std::string kEntropy = "entropy: {key_step: 0.05, value_step: 0.1}\n";
const std::string kTier = "tier: {host_bytes: 1GiB}\n";

TEST(Placement, EverySetting) {
  const PolicyParams streams =
      good(kWide + "entropy: {key_step: 0.02, value_step: 0.2, recent: 256}\n");
  EXPECT_TRUE(streams.entropy.on());
  EXPECT_FALSE(streams.tier.on());
  EXPECT_FLOAT_EQ(streams.entropy.key_step, 0.02f);
  EXPECT_FLOAT_EQ(streams.entropy.value_step, 0.2f);
  EXPECT_EQ(streams.entropy.recent, 256u);
  const PolicyParams tier =
      good(kWide +
           "tier: {host_bytes: 3MiB, dense_layers: [0, 33, 255], dense_format: k4v4, start: 4,\n"
           "       recent: 60, fetch: 64, channels: 16}\n");
  EXPECT_FALSE(tier.entropy.on());
  EXPECT_EQ(tier.tier.host_bytes, uint64_t{3} << 20);
  for (uint32_t layer = 0; layer < 256; ++layer) {
    EXPECT_EQ(tier.tier.dense(layer), layer == 0 || layer == 33 || layer == 255) << layer;
  }
  EXPECT_EQ(tier.tier.dense_format, Format::kK4V4);
  EXPECT_EQ(tier.tier.start, 4);
  EXPECT_EQ(tier.tier.recent, 60);
  EXPECT_EQ(tier.tier.fetch, 64);
  EXPECT_EQ(tier.tier.channels, 16);
  EXPECT_TRUE(policy_params_valid(streams) && policy_params_valid(tier));
}

TEST(Placement, WithoutTheSectionsNothingChanges) {
  const PolicyParams p = good(kWide);
  EXPECT_FALSE(p.entropy.on() || p.tier.on());
}

struct Bad {
  std::string text;
  std::string message;
};

TEST(Placement, EachRefusalNamesItsKeyAndTheReason) {
  const std::string narrow =
      "name: p\nformats: {prompt: k4v4, thoughts: {reasoning: f16, execution: f16, "
      "transition: f16}}\nrotation: none\n";
  const Bad cases[] = {
      {kWide + "entropy: {key_step: 0.05}\n", "p.yaml:6: entropy.value_step: must be given"},
      {kWide + "entropy: {value_step: 0.05}\n", "p.yaml:6: entropy.key_step: must be given"},
      {kWide + "entropy: {key_step: 0.004, value_step: 0.1}\n",
       "p.yaml:6: entropy.key_step: must be 0.005 to 0.5"},
      {kWide + "entropy: {key_step: 0.05, value_step: 0.001}\n",
       "p.yaml:6: entropy.value_step: must be 0.005 to 0.5"},
      {kWide + "entropy: {key_step: 0.05, value_step: 0.1, recent: 200}\n",
       "p.yaml:6: entropy.recent: must be a multiple of 64 from 128 to 4096: whole blocks leave"},
      {kWide + "evict: {rule: tbe, schedule: [64, 4], budget: 512}\n" + kEntropy,
       "p.yaml:6: evict.rule: must be none with entropy: a token of a block cannot be evicted "
       "alone, because the codes behind it could not be found"},
      {kWide + "evict: {rule: rank, budget: 512}\n" + kEntropy +
           "rules: [{trigger: {every: 1}, signal: {position: 1}}]\n",
       "p.yaml:6: evict.rule: must be none with entropy: a token of a block cannot be evicted "
       "alone, because the codes behind it could not be found"},
      {narrow + kEntropy,
       "p.yaml:2: formats: must all be f16 with entropy: blocks are coded from 16-bit pages, once"},
      {kWide + kEntropy + kTier,
       "p.yaml:7: tier: and entropy do not go together: one place for old tokens"},
      {kWide + kTier + "centring: prompt\n",
       "p.yaml:7: centring: does not go with entropy or tier: their keys come back bit by bit"},
      {kWide + "tier: {fetch: 8}\n", "p.yaml:6: tier.host_bytes: must be given"},
      {narrow + kTier,
       "p.yaml:2: formats: must all be f16 with tier: rows come back bit by bit as they were"},
      {kWide + "evict: {rule: rank, budget: 512}\n" + kTier +
           "rules: [{trigger: {every: 1}, signal: {position: 1}}]\n",
       "p.yaml:6: evict.rule: must be none with tier: every token stays, in a page or in the tier"},
      {kWide + "tier: {host_bytes: 1GiB, spill: 3}\n",
       "p.yaml:6: tier.spill: unknown key; allowed here: host_bytes, dense_layers, dense_format, "
       "start, recent, fetch, channels"}};
  for (const Bad& bad : cases) EXPECT_EQ(problems(bad.text), bad.message) << bad.text;
}

// What arrives over the socket or lies in the pool: a number out of range is never accepted.
TEST(Placement, ParamsOfAnyBytesAreCheckedOrRefused) {
  const auto with = [](auto change) {
    PolicyParams p = good(kWide + kEntropy);
    change(p);
    return policy_params_valid(p);
  };
  EXPECT_TRUE(with([](PolicyParams&) {}));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(with([&](PolicyParams& p) { p.entropy.key_step = nan; }));
  EXPECT_FALSE(with([&](PolicyParams& p) { p.entropy.value_step = nan; }));
  EXPECT_FALSE(with([](PolicyParams& p) { p.entropy.key_step = 0.0f; }));
  EXPECT_FALSE(with([](PolicyParams& p) { p.entropy.recent = 64; }));
  EXPECT_FALSE(with([](PolicyParams& p) { p.thought_format[2] = Format::kK4V4; }));
  EXPECT_FALSE(with([](PolicyParams& p) { p.tier.host_bytes = 1; }));
  const auto tiered = [](auto change) {
    PolicyParams p = good(kWide + kTier);
    change(p);
    return policy_params_valid(p);
  };
  EXPECT_TRUE(tiered([](PolicyParams&) {}));
  EXPECT_FALSE(tiered([](PolicyParams& p) { p.tier.host_bytes = ~uint64_t{0}; }));
  EXPECT_FALSE(tiered([](PolicyParams& p) { p.tier.fetch = 0; }));
  EXPECT_FALSE(tiered([](PolicyParams& p) { p.tier.start = 5000; }));
  EXPECT_FALSE(tiered([](PolicyParams& p) { p.tier.recent = 5000; }));
  EXPECT_FALSE(tiered([](PolicyParams& p) { p.tier.channels = 0; }));
  EXPECT_FALSE(tiered([](PolicyParams& p) { p.tier.channels = 65; }));
  EXPECT_FALSE(tiered([](PolicyParams& p) { p.tier.dense_format = static_cast<Format>(200); }));
}

}  // namespace
}  // namespace thinkv::ops
