// policy_table.h: policies by name and by id.
//
// An id stands for one set of numbers for ever: a reload that changes a policy gives its name a new
// id. The old id stays valid for the sequences that run with it, and for clients that still hold it
// until its place is needed; afterwards it is stale.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "thinkv/internal/limits.h"
#include "thinkv/internal/policy_params.h"
#include "thinkv/internal/units.h"
#include "thinkv/result.h"

namespace thinkv::core {

struct Policy {
  PolicyId id;  // 0: empty place
  PolicyParams params;
  bool current = false;
  uint64_t sequences = 0;
};

class PolicyTable {
 public:
  // Takes validated policies. Errors: kExhausted when too many replaced ones are still in use; then
  // nothing changed.
  [[nodiscard]] Status configure(const std::vector<PolicyParams>& policies);

  // Errors: kNotFound.
  [[nodiscard]] Result<const Policy*> by_name(std::string_view name) const;
  // Errors: kStale (was known once), kNotFound.
  [[nodiscard]] Result<Policy*> by_id(uint64_t id);
  [[nodiscard]] const std::array<Policy, limits::kPoliciesMax>& all() const { return policies_; }
  // "a, b, c" of the current ones, at most `bytes` long.
  [[nodiscard]] std::string names(size_t bytes) const;

 private:
  [[nodiscard]] Policy& place();

  std::array<Policy, limits::kPoliciesMax> policies_;
  uint32_t last_id_ = 0;
};

}  // namespace thinkv::core
