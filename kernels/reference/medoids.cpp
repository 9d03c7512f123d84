#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "thinkv/internal/check.h"

#include "kernels/reference/reference.h"

namespace thinkv::kernels::ref {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Eight partial sums over dims l, l + 8, ..; then folded by halves: the order that makes every
// implementation break near-ties alike.
float squared_distance(const float* a, const float* b, uint32_t dim) {
  std::array<float, 8> sums{};
  for (uint32_t d = 0; d < dim; ++d) {
    const float difference = a[d] - b[d];
    sums[d % 8] += difference * difference;
  }
  for (uint32_t h = 4; h >= 1; h /= 2) {
    for (uint32_t i = 0; i < h; ++i) sums[i] += sums[i + h];
  }
  return sums[0];
}

class KMeans {
 public:
  explicit KMeans(const MedoidParams& params)
      : params_(params), centres_(size_t{params.target} * params.dim), cluster_of_(params.n) {
    for (uint32_t j = 0; j < params.target; ++j) {
      const float* const row = key(medoid_start_row(j, params.n, params.target));
      std::copy_n(row, params.dim, centre(j));
    }
  }

  void lloyd_round() {
    for (uint32_t i = 0; i < params_.n; ++i) cluster_of_[i] = nearest_centre(i);
    move_centres();
  }

  void pick() {
    std::fill_n(params_.keep, params_.n, uint8_t{0});
    for (uint32_t j = 0; j < params_.target; ++j) {
      uint32_t best = params_.n;
      float best_cost = kInfinity;
      for (uint32_t i = 0; i < params_.n; ++i) {
        if (params_.keep[i] != 0) continue;
        const float cost = squared_distance(key(i), centre(j), params_.dim) / weight(i);
        // The first free row is taken even if its cost is not a number: exactly `target` rows.
        if (best == params_.n || cost < best_cost) {
          best = i;
          best_cost = cost;
        }
      }
      params_.keep[best] = 1;
    }
  }

 private:
  const float* key(uint32_t row) const { return params_.keys + size_t{row} * params_.dim; }
  float* centre(uint32_t j) { return centres_.data() + size_t{j} * params_.dim; }
  float weight(uint32_t row) const {
    return params_.weights != nullptr ? params_.weights[row] : 1.0f;
  }

  uint32_t nearest_centre(uint32_t row) {
    uint32_t best = 0;
    float best_distance = kInfinity;
    for (uint32_t j = 0; j < params_.target; ++j) {
      const float distance = squared_distance(key(row), centre(j), params_.dim);
      if (distance < best_distance) {
        best_distance = distance;
        best = j;
      }
    }
    return best;
  }

  void move_centres() {
    std::vector<float> sums(centres_.size(), 0.0f);
    std::vector<float> totals(params_.target, 0.0f);
    for (uint32_t i = 0; i < params_.n; ++i) {
      float* const sum = sums.data() + size_t{cluster_of_[i]} * params_.dim;
      for (uint32_t d = 0; d < params_.dim; ++d) sum[d] += weight(i) * key(i)[d];
      totals[cluster_of_[i]] += weight(i);
    }
    for (uint32_t j = 0; j < params_.target; ++j) {
      if (totals[j] == 0.0f) continue;  // an empty cluster keeps its centre
      for (uint32_t d = 0; d < params_.dim; ++d) {
        centre(j)[d] = sums[size_t{j} * params_.dim + d] / totals[j];
      }
    }
  }

  const MedoidParams& params_;
  std::vector<float> centres_;  // [target, dim]
  std::vector<uint32_t> cluster_of_;
};

}  // namespace

void medoids(const MedoidParams& params) {
  THINKV_CHECK(params.n >= 1 && params.n <= kMedoidRowsMax && params.dim >= 1);
  THINKV_CHECK(params.target >= 1 && params.target <= params.n);
  KMeans clusters(params);
  for (uint32_t i = 0; i < params.iterations; ++i) clusters.lloyd_round();
  clusters.pick();
}

}  // namespace thinkv::kernels::ref
