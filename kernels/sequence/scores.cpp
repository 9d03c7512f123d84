#include "kernels/sequence/scores.h"

#include <algorithm>
#include <bit>

#include "kernels/sequence/sequence.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::kernels {
namespace {

constexpr float kScoreMax = 65504.0f;

template <class Visit>
void for_each_slot(uint64_t slots, Visit visit) {
  for (; slots != 0; slots &= slots - 1) visit(static_cast<uint32_t>(std::countr_zero(slots)));
}

}  // namespace

uint16_t add_score(uint16_t score, float probability) {
  const float sum = fp16_to_float(score) + probability;
  return fp16_from_float(sum < kScoreMax ? sum : kScoreMax);  // NaN becomes the maximum
}

void accumulate_scores(const Lane& lane, const float* probabilities) {
  lane.pages().for_each([&](uint32_t index, const PageDescriptor& page) {
    uint16_t* scores = lane.scores(page);
    const float* row = probabilities + size_t{index} * kSlotsPerPageMax;
    for_each_slot(page.live, [&](uint32_t s) { scores[s] = add_score(scores[s], row[s]); });
  });
  const float* buffer = probabilities + size_t{lane.pages().size()} * kSlotsPerPageMax;
  LaneHeader& header = lane.header();
  for (uint32_t i = 0; i < header.buffer_count; ++i) {
    const uint32_t page = i / kBufferPageSlots;
    header.buffer_score[i] =
        add_score(header.buffer_score[i], buffer[page * kSlotsPerPageMax + i % kBufferPageSlots]);
  }
}

void decay_scores(const Lane& lane, float factor) {
  if (factor == 1.0f) return;
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    uint16_t* scores = lane.scores(page);
    for_each_slot(page.live, [&](uint32_t s) {
      scores[s] = fp16_from_float(fp16_to_float(scores[s]) * factor);
    });
  });
}

void accumulate_sums(const Lane& lane, const float* probabilities) {
  lane.pages().for_each([&](uint32_t index, const PageDescriptor& page) {
    float* sums = lane.sums(page);
    const float* row = probabilities + size_t{index} * kSlotsPerPageMax;
    for_each_slot(page.live, [&](uint32_t s) { sums[s] += row[s]; });
  });
  const float* buffer = probabilities + size_t{lane.pages().size()} * kSlotsPerPageMax;
  float* sums = lane.rank().buffer_sum;
  for (uint32_t i = 0; i < lane.header().buffer_count; ++i) {
    sums[i] += buffer[i / kBufferPageSlots * kSlotsPerPageMax + i % kBufferPageSlots];
  }
}

void scale_sums(const Lane& lane, float factor) {
  if (factor == 1.0f) return;
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    float* sums = lane.sums(page);
    for_each_slot(page.live, [&](uint32_t s) { sums[s] *= factor; });
  });
}

void clear_sums(const Lane& lane) {
  lane.pages().for_each([&](uint32_t, const PageDescriptor& page) {
    std::fill_n(lane.sums(page), lane.layout(page).slots, 0.0f);
  });
  std::fill_n(lane.rank().buffer_sum, kBufferTokens, 0.0f);
}

}  // namespace thinkv::kernels
