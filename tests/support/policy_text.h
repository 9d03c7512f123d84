// policy_text.h: the text of a policy file, taken or refused.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "daemon/ops/policy_file.h"

namespace thinkv::ops {

// What is wrong with it. Expects that something is.
inline std::string problems(const std::string& text) {
  Diagnostics diagnostics("p.yaml");
  EXPECT_FALSE(parse_policy(text, "/x/p.yaml", &diagnostics).has_value()) << text;
  return diagnostics.text();
}

// Expects that nothing is wrong with it.
inline PolicyParams good(const std::string& text) {
  Diagnostics diagnostics("p.yaml");
  const auto policy = parse_policy(text, "/x/p.yaml", &diagnostics);
  EXPECT_TRUE(policy.has_value()) << diagnostics.text();
  return policy ? policy->params : PolicyParams{};
}

}  // namespace thinkv::ops
