// Random operations on a batch of small sequences, on the device and on the host.
//
// Before each operation the lease holds exactly the bound that sequence.h gives for it, so a bound
// that is too small raises kLeaseEmpty and fails the test.
#include <cstdio>
#include <string>

#include "gtest/gtest.h"

#include "tests/support/device_twin.h"
#include "tests/support/seed.h"

namespace thinkv::cuda {
namespace {

using testing::Twin;
using testing::TwinBatch;

constexpr uint32_t kOperations = 2000;
constexpr uint32_t kRows = 4;

Format any_format(TwinBatch& batch) {
  return static_cast<Format>(1 + batch.below(kFormatCount - 1));
}

PolicyParams any_policy(TwinBatch& batch) {
  PolicyParams p;
  std::snprintf(p.name, sizeof p.name, "%s", "random");
  p.prompt_format = any_format(batch);
  p.sink_format = any_format(batch);
  for (Format& f : p.thought_format) f = any_format(batch);
  p.rotate = batch.below(2) == 0 ? 0 : 1;
  p.centre = batch.below(3) == 0 ? 1 : 0;
  p.sink_tokens = batch.below(3) * batch.below(24);
  p.segment_tokens = 16 * (1 + batch.below(6));
  p.score_every = static_cast<uint16_t>(1 + batch.below(3));
  p.score_decay = batch.below(4) == 0 ? 1.0f : 0.9f;
  if (batch.below(2) == 0) return p;
  p.evict = EvictRule::kTbe;
  p.select = batch.below(2) == 0 ? SelectRule::kAttention : SelectRule::kRecent;
  p.schedule_length = 2;
  p.schedule[0] = static_cast<uint16_t>(p.segment_tokens / 2);
  p.schedule[1] = static_cast<uint16_t>(p.segment_tokens / 4);
  p.budget_tokens = batch.below(2) == 0 ? 0 : 20 + batch.below(100);
  return p;
}

// Operations by how often they come.
struct Tally {
  uint32_t steps = 0;
  uint32_t evictions = 0;
  uint32_t recodings = 0;
  uint32_t openings = 0;
};

void open_row(TwinBatch& batch, uint32_t row, Tally& tally) {
  batch.open(row, any_policy(batch), batch.below(4) == 0);
  if (batch.below(3) != 0) batch.prefill(row, 1 + batch.below(batch.below(4) == 0 ? 120 : 30));
  ++tally.openings;
}

void evict_some(TwinBatch& batch, uint32_t row, Tally& tally) {
  const uint32_t tokens = batch.twin(row)->host->tokens();
  if (tokens == 0) return;
  std::vector<uint32_t> positions;
  const uint32_t one_in = 1 + batch.below(8), first = batch.below(tokens);
  for (uint32_t p = first; p < tokens + 3; ++p) {
    if (batch.below(one_in) == 0) positions.push_back(p);
  }
  // Only of prompts: the device counts what the budget bounds without asking every lane
  // (refresh.h).
  const uint32_t prompt = tokens - batch.twin(row)->generated;
  if (batch.twin(row)->host->policy().evict == EvictRule::kTbe) {
    std::erase_if(positions, [&](uint32_t p) { return p >= prompt; });
  }
  batch.evict(row, positions);
  ++tally.evictions;
}

void operate(TwinBatch& batch, Tally& tally) {
  const uint32_t row = batch.below(kRows), kind = batch.below(100);
  if (batch.twin(row) == nullptr) {
    if (kind < 30) return open_row(batch, row, tally);
  } else if (kind < 4 || batch.twin(row)->host->tokens() > 260) {
    return batch.close(row);
  } else if (kind < 12) {
    return evict_some(batch, row, tally);
  } else if (kind < 18 && batch.twin(row)->host->tokens() > 0) {
    const uint32_t tokens = batch.twin(row)->host->tokens(), first = batch.below(tokens);
    batch.recode(row, first, first + 1 + batch.below(tokens - first), any_format(batch));
    ++tally.recodings;
    return;
  }
  for (uint32_t i = 1 + batch.below(5); i > 0; --i) {
    batch.step();
    ++tally.steps;
  }
}

void run_operations(const ModelGeometry& geometry, uint32_t operations, uint64_t seed) {
  TwinBatch batch({.geometry = geometry,
                   .element = static_cast<Element>(seed % 3),
                   .capacity = kRows,
                   .extent_pages = 1024,
                   .seed = seed,
                   .plant_scores = true});
  Tally tally;
  for (uint32_t i = 0; i < operations; ++i) {
    operate(batch, tally);
    batch.compare();
    ASSERT_EQ(batch.wrong(), "") << "operation " << i << " of seed " << seed;
  }
  for (uint32_t row = 0; row < kRows; ++row) {
    if (batch.twin(row) != nullptr) batch.close(row);
  }
  batch.compare();
  EXPECT_EQ(batch.wrong(), "");
  EXPECT_EQ(batch.pool().free_pages(), batch.pool().total_pages());
  EXPECT_GT(tally.evictions, operations / 100) << "the operations test too little";
  EXPECT_GT(tally.recodings, operations / 100);
  std::printf("%u steps, %u evictions, %u recodings, %u openings\n", tally.steps, tally.evictions,
              tally.recodings, tally.openings);
}

TEST(CudaSequenceRandom, AgreesWithTheHost) {
  const uint64_t seed = testing::seed_from_environment(20251122);
  const ModelGeometry geometry{.layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 64};
  run_operations(geometry, testing::random_rounds(kOperations), seed);
}

TEST(CudaSequenceRandom, AgreesWithTheHostInOtherShapes) {
  const uint64_t seed = testing::seed_from_environment(20251123);
  const ModelGeometry wide{
      .layers = 2, .q_heads = 1, .kv_heads = 1, .head_dim = 128, .value_type = ValueType::kBf16};
  run_operations(wide, kOperations / 20, seed);
  run_operations({.layers = 1, .q_heads = 3, .kv_heads = 3, .head_dim = 256}, kOperations / 20,
                 seed + 1);
}

}  // namespace
}  // namespace thinkv::cuda
