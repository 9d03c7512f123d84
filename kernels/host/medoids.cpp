// k-means over real tokens: the arithmetic of reference/medoids.cpp, eight dims at a time.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/host/host_set.h"
#include "kernels/host/vec.h"
#include "thinkv/internal/check.h"

#include "kernels/host/isa_begin.inc"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows padded with zeros to whole vectors: a zero difference adds nothing to a partial sum.
struct Rows {
  Rows(uint32_t count, uint32_t dim)
      : stride((dim + kLanes - 1) / kLanes * kLanes), values(size_t{count} * stride, 0.0f) {}
  [[nodiscard]] float* row(uint32_t i) { return values.data() + size_t{i} * stride; }
  uint32_t stride;
  std::vector<float> values;
};

THINKV_LANE_INLINE float squared_distance(const float* a, const float* b, uint32_t stride) {
  F8 sum = splat(0.0f);
  for (uint32_t d = 0; d < stride; d += kLanes) {
    const F8 difference = load(a + d) - load(b + d);
    sum += difference * difference;
  }
  return fold(sum);
}

class KMeans {
 public:
  explicit KMeans(const MedoidParams& params)
      : params_(params),
        keys_(params.n, params.dim),
        centres_(params.target, params.dim),
        sums_(params.target, params.dim),
        totals_(params.target),
        cluster_of_(params.n) {
    for (uint32_t i = 0; i < params.n; ++i) {
      std::copy_n(params.keys + size_t{i} * params.dim, params.dim, keys_.row(i));
    }
    for (uint32_t j = 0; j < params.target; ++j) {
      const uint32_t start = medoid_start_row(j, params.n, params.target);
      std::copy_n(keys_.row(start), keys_.stride, centres_.row(j));
    }
  }

  // False once no row changed its cluster: further rounds would repeat the same centres.
  bool lloyd_round(bool first) {
    bool changed = first;
    for (uint32_t i = 0; i < params_.n; ++i) {
      const uint32_t nearest = nearest_centre(i);
      changed |= nearest != cluster_of_[i];
      cluster_of_[i] = nearest;
    }
    if (changed) move_centres();
    return changed;
  }

  void pick() {
    std::fill_n(params_.keep, params_.n, uint8_t{0});
    for (uint32_t j = 0; j < params_.target; ++j) {
      uint32_t best = params_.n;
      float best_cost = kInfinity;
      for (uint32_t i = 0; i < params_.n; ++i) {
        if (params_.keep[i] != 0) continue;
        const float distance = squared_distance(keys_.row(i), centres_.row(j), keys_.stride);
        const float cost = distance / weight(i);
        if (best == params_.n || cost < best_cost) {
          best = i;
          best_cost = cost;
        }
      }
      params_.keep[best] = 1;
    }
  }

 private:
  float weight(uint32_t row) const {
    return params_.weights != nullptr ? params_.weights[row] : 1.0f;
  }

  uint32_t nearest_centre(uint32_t row) {
    const float* const key = keys_.row(row);
    uint32_t best = 0;
    float best_distance = kInfinity;
    for (uint32_t j = 0; j < params_.target; ++j) {
      const float distance = squared_distance(key, centres_.row(j), keys_.stride);
      if (distance < best_distance) {
        best_distance = distance;
        best = j;
      }
    }
    return best;
  }

  void move_centres() {
    std::fill(sums_.values.begin(), sums_.values.end(), 0.0f);
    std::fill(totals_.begin(), totals_.end(), 0.0f);
    for (uint32_t i = 0; i < params_.n; ++i) {
      float* const sum = sums_.row(cluster_of_[i]);
      const float* const key = keys_.row(i);
      const F8 w = splat(weight(i));
      for (uint32_t d = 0; d < keys_.stride; d += kLanes) {
        store(sum + d, load(sum + d) + w * load(key + d));
      }
      totals_[cluster_of_[i]] += weight(i);
    }
    for (uint32_t j = 0; j < params_.target; ++j) {
      if (totals_[j] == 0.0f) continue;  // an empty cluster keeps its centre
      const F8 total = splat(totals_[j]);
      for (uint32_t d = 0; d < keys_.stride; d += kLanes) {
        store(centres_.row(j) + d, load(sums_.row(j) + d) / total);
      }
    }
  }

  const MedoidParams& params_;
  Rows keys_;
  Rows centres_;
  Rows sums_;
  std::vector<float> totals_;
  std::vector<uint32_t> cluster_of_;
};

}  // namespace

void medoids(const MedoidParams& params) {
  THINKV_CHECK(params.n >= 1 && params.n <= kMedoidRowsMax && params.dim >= 1);
  THINKV_CHECK(params.target >= 1 && params.target <= params.n);
  KMeans clusters(params);
  for (uint32_t i = 0; i < params.iterations; ++i) {
    if (!clusters.lloyd_round(i == 0)) break;
  }
  clusters.pick();
}

#include "kernels/host/isa_end.inc"
