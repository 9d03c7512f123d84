// The configuration and the policy loader on the same text.
//
// Properties: no text crashes or hangs them; a refusal says something; a policy that is accepted
// satisfies the contract of PolicyParams; what is accepted is accepted again.
#include <cstddef>
#include <cstdint>
#include <string>

#include "daemon/ops/config.h"
#include "daemon/ops/policy_file.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/policy_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 8192) return 0;  // longer texts only repeat
  const std::string text(reinterpret_cast<const char*>(data), size);
  // A calibration path could name a device file of this machine: not a subject of the parser.
  const bool reads_files = text.find("calibration") != std::string::npos;
  thinkv::ops::Diagnostics config_problems("config");
  const auto config = thinkv::ops::parse_config(text, "/nowhere/thinkvd.yaml", &config_problems);
  THINKV_CHECK(config.has_value() == config_problems.ok());
  if (config) {
    THINKV_CHECK(!config->tenants.empty() && !config->pools.empty());
    for (const auto& pool : config->pools) {
      THINKV_CHECK(pool.bytes % pool.extent_bytes == 0);
      for (const auto& tenant : config->tenants) {
        THINKV_CHECK(tenant.reserve.of(pool.bytes) <= tenant.limit.of(pool.bytes));
        THINKV_CHECK(tenant.limit.of(pool.bytes) <= pool.bytes);
      }
    }
  }
  if (reads_files) return 0;
  thinkv::ops::Diagnostics policy_problems("policy");
  const auto policy = thinkv::ops::parse_policy(text, "/nowhere/p.yaml", &policy_problems);
  THINKV_CHECK(policy.has_value() == policy_problems.ok());
  if (policy) THINKV_CHECK(thinkv::policy_params_valid(policy->params));
  return 0;
}
