// The oracle of attention: decodes every slot that counts and evaluates the softmax in double.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "thinkv/internal/check.h"

#include "kernels/reference/reference.h"

namespace thinkv::kernels::ref {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// The slots that count, decoded, with where each came from.
struct Lane {
  std::vector<uint32_t> origin;  // page index * kSlotsPerPageMax + slot
  std::vector<float> k;          // [n, head_dim]
  std::vector<float> v;
  std::vector<double> logits;  // [group, n]; later probabilities
  [[nodiscard]] size_t size() const { return origin.size(); }
};

bool in_window(const PageView& page, const PageLayout& layout, uint32_t slot,
               const AttendParams& params) {
  if (params.window == 0) return true;
  uint32_t position = 0;
  std::memcpy(&position, page.bytes + layout.position_offset + slot * kPositionBytes,
              sizeof(position));
  return position < params.sinks || uint64_t{position} + params.window > params.query_position;
}

Lane gather(const AttendParams& params) {
  Lane lane;
  for (size_t p = 0; p < params.pages.size(); ++p) {
    const PageView& page = params.pages[p];
    const PageLayout& layout = page_layout(page.format, params.head_dim);
    std::vector<uint8_t> slots;
    for (uint32_t slot = 0; slot < layout.slots; ++slot) {
      if (((page.live >> slot) & 1u) == 0 || !in_window(page, layout, slot, params)) continue;
      slots.push_back(static_cast<uint8_t>(slot));
      lane.origin.push_back(static_cast<uint32_t>(p) * kSlotsPerPageMax + slot);
    }
    const size_t at = lane.k.size();
    lane.k.resize(at + slots.size() * params.head_dim);
    lane.v.resize(at + slots.size() * params.head_dim);
    decode({.page = page.bytes,
            .format = page.format,
            .head_dim = params.head_dim,
            .slots = slots,
            .k = lane.k.data() + at,
            .v = lane.v.data() + at});
  }
  return lane;
}

double largest(const double* row, size_t n) {
  return n == 0 ? kMinusInfinity : *std::max_element(row, row + n);
}

void score(const AttendParams& params, Lane& lane) {
  const size_t n = lane.size();
  lane.logits.resize(params.group * n);
  for (uint32_t head = 0; head < params.group; ++head) {
    for (size_t i = 0; i < n; ++i) {
      double dot = 0.0;
      for (uint32_t d = 0; d < params.head_dim; ++d) {
        dot += double{params.q[size_t{head} * params.head_dim + d]} *
               double{lane.k[i * params.head_dim + d]};
      }
      lane.logits[head * n + i] = dot * double{params.softmax_scale};
    }
  }
}

// The elementwise maximum of the logits over the query heads.
std::vector<double> max_logits(const AttendParams& params, const Lane& lane) {
  const size_t n = lane.size();
  std::vector<double> row(n, kMinusInfinity);
  for (uint32_t head = 0; head < params.group; ++head) {
    for (size_t i = 0; i < n; ++i) row[i] = std::max(row[i], lane.logits[head * n + i]);
  }
  return row;
}

SparsityCount count_sparsity(const std::vector<double>& row, float near_zero) {
  // p_i < near_zero * p_max, compared in the log domain.
  const double bound = largest(row.data(), row.size()) + std::log(double{near_zero});
  SparsityCount count;
  count.live = static_cast<uint32_t>(row.size());
  for (const double logit : row) count.near_zero += logit < bound ? 1 : 0;
  return count;
}

// Turns logits into probabilities in place; returns the log of the sum of exp.
double softmax(double* row, size_t n) {
  const double top = largest(row, n);
  if (top == kMinusInfinity) return kMinusInfinity;
  double sum = 0.0;
  for (size_t i = 0; i < n; ++i) sum += row[i] = std::exp(row[i] - top);
  for (size_t i = 0; i < n; ++i) row[i] /= sum;
  return top + std::log(sum);
}

void weigh_values(const AttendParams& params, const Lane& lane) {
  const size_t n = lane.size();
  for (uint32_t head = 0; head < params.group; ++head) {
    for (uint32_t d = 0; d < params.head_dim; ++d) {
      double sum = 0.0;
      for (size_t i = 0; i < n; ++i) {
        sum += lane.logits[head * n + i] * double{lane.v[i * params.head_dim + d]};
      }
      params.out[size_t{head} * params.head_dim + d] = static_cast<float>(sum);
    }
  }
}

void emit(const AttendParams& params, const Lane& lane, std::vector<double> max_row) {
  std::fill_n(params.probabilities, params.pages.size() * kSlotsPerPageMax, 0.0f);
  const size_t n = lane.size();
  if (params.reduce == GqaReduce::kMaxLogit) softmax(max_row.data(), n);
  for (size_t i = 0; i < n; ++i) {
    double value = 0.0;
    for (uint32_t head = 0; head < params.group; ++head) {
      const double p = lane.logits[head * n + i];
      value = params.reduce == GqaReduce::kMeanProbability ? value + p / params.group
                                                           : std::max(value, p);
    }
    if (params.reduce == GqaReduce::kMaxLogit) value = max_row[i];
    params.probabilities[lane.origin[i]] = static_cast<float>(value);
  }
}

}  // namespace

void attend(const AttendParams& params) {
  THINKV_CHECK(head_dim_supported(params.head_dim));
  THINKV_CHECK(params.group >= 1 && params.group <= kGroupMax);
  Lane lane = gather(params);
  score(params, lane);
  const std::vector<double> max_row = max_logits(params, lane);
  if (params.sparsity != nullptr) *params.sparsity = count_sparsity(max_row, params.near_zero);
  for (uint32_t head = 0; head < params.group; ++head) {
    params.lse[head] =
        static_cast<float>(softmax(lane.logits.data() + head * lane.size(), lane.size()));
  }
  weigh_values(params, lane);
  if (params.probabilities != nullptr) emit(params, lane, max_row);
}

}  // namespace thinkv::kernels::ref
