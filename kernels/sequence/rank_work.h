// rank_work.h: the tokens of one layer while a rule is applied to them.
//
// Working memory of a sequence: sized by the largest lane so far and kept from rule to rule.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/policy/rank_select.h"
#include "kernels/sequence/lane.h"

namespace thinkv::kernels {

// What becomes of a row.
enum RankFate : uint8_t { kDrop = 0, kKeep = 1, kRecode = 2 };

// The tokens of one lane that are in pages, ascending by position. The buffer's are never touched.
struct RankHead {
  std::vector<SlotRow> rows;
  std::vector<float> attention;  // [rows], 0 where the rule does not use it
  std::vector<float> score;
  std::vector<uint8_t> fixed;  // protected
  std::vector<uint8_t> fate;
  float buffer_square = 0.0f;  // of the buffer's attention, where the rule uses it
  uint32_t counted = 0;        // tokens that the budget counts, the buffer's included
  uint32_t limit = 0;          // of them, how many may stay

  [[nodiscard]] uint32_t size() const { return static_cast<uint32_t>(rows.size()); }
  [[nodiscard]] bool over() const { return counted > limit; }
  // Tokens above the limit; rows that may go; and how many of these stay when the limit is met.
  [[nodiscard]] uint32_t surplus() const { return over() ? counted - limit : 0; }
  [[nodiscard]] uint32_t free() const {
    return static_cast<uint32_t>(std::count(fixed.begin(), fixed.end(), uint8_t{0}));
  }
  [[nodiscard]] uint32_t places() const { return free() - std::min(free(), surplus()); }
};

struct RankWork {
  std::vector<RankHead> heads;     // of one layer
  std::vector<float> keys;         // [rows, dim]
  std::vector<float> columns;      // the same, channel after channel
  std::vector<const float*> sums;  // of a lane, by page
  std::vector<float> numbers;
  std::vector<float> more_numbers;
  std::vector<uint32_t> order;  // [rows] at least, as the marks
  std::vector<uint32_t> shares;
  std::vector<uint32_t> rejected;
  std::vector<uint32_t> distance;
  std::vector<uint8_t> marks;
  std::vector<uint8_t> more_marks;
  std::vector<policy::Signature> signatures;
  std::vector<policy::SharedRow> shared;  // of all heads
  std::vector<uint64_t> chosen;           // slots, by page of a lane
  std::vector<uint8_t> queries_given;     // a flag a layer: prefill_queries() of the open prompt
  uint32_t query_count = 0;
  std::vector<float> query_energy;  // [lanes, head_dim] of the open prompt, where a rule reads it
  std::vector<SlotRow> block_rows;  // go into blocks
  std::vector<SlotRow> first_rows;  // the same tokens of the layer before, for a pair
  std::vector<SlotRow> lane_rows;
  std::vector<float> first_values;  // K then V of a block of that layer
};

}  // namespace thinkv::kernels
