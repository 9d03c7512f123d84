#include "daemon/core/policy_table.h"

#include <algorithm>
#include <cstring>

#include "thinkv/internal/check.h"

namespace thinkv::core {
namespace {

bool same(const PolicyParams& a, const PolicyParams& b) {
  // As bytes on purpose: a float that differs only in its sign of zero makes a new policy, no harm.
  // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison)
  return std::memcmp(&a, &b, sizeof(PolicyParams)) == 0;
}

}  // namespace

Status PolicyTable::configure(const std::vector<PolicyParams>& policies) {
  const auto unchanged = [&](const Policy& p) {
    return p.current && std::any_of(policies.begin(), policies.end(),
                                    [&](const PolicyParams& n) { return same(n, p.params); });
  };
  size_t places = policies.size();
  for (const Policy& p : policies_) places += p.sequences > 0 && !unchanged(p) ? 1 : 0;
  if (places > policies_.size()) {
    return make_error(ErrorCode::kExhausted,
                      "too many policies: sequences still run with replaced ones");
  }
  for (Policy& p : policies_) p.current = unchanged(p);
  for (const PolicyParams& params : policies) {
    if (by_name(params.name)) continue;  // unchanged
    Policy& p = place();
    p = Policy{.id = PolicyId(++last_id_), .params = params, .current = true, .sequences = 0};
  }
  return {};
}

// Empty places first, then the longest replaced one without sequences.
Policy& PolicyTable::place() {
  Policy* best = nullptr;
  for (Policy& p : policies_) {
    if (p.current || p.sequences > 0) continue;
    if (best == nullptr || p.id < best->id) best = &p;
  }
  THINKV_CHECK(best != nullptr);
  return *best;
}

Result<const Policy*> PolicyTable::by_name(std::string_view name) const {
  for (const Policy& p : policies_) {
    if (p.current && name == p.params.name) return &p;
  }
  return make_error(ErrorCode::kNotFound, "no such policy");
}

Result<Policy*> PolicyTable::by_id(uint64_t id) {
  if (id == 0 || id > last_id_) return make_error(ErrorCode::kNotFound, "no such policy");
  for (Policy& p : policies_) {
    if (p.id.value() == id) return &p;
  }
  return make_error(ErrorCode::kStale, "the policy was replaced; ask for it again");
}

std::string PolicyTable::names(size_t bytes) const {
  std::string text;
  for (const Policy& p : policies_) {
    if (!p.current) continue;
    const std::string_view name = p.params.name;
    if (text.size() + name.size() + 5 > bytes) return text + "...";
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

}  // namespace thinkv::core
