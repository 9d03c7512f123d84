#include "daemon/device/cuda/advice.h"

namespace thinkv::device {
namespace {

std::string mib(uint64_t bytes) {
  return std::to_string(bytes >> 20) + " MiB";
}

void advise_compute_mode(const GpuFacts& facts, std::vector<Advice>* advice) {
  const std::string repair =
      "; allow several processes: nvidia-smi -c DEFAULT (sudo nvidia-smi -i GPU -c 0)";
  switch (facts.compute_mode) {
    case cuda::ComputeMode::kExclusiveProcess:
      advice->push_back({Severity::kError,
                         facts.gpu +
                             " is in compute mode EXCLUSIVE_PROCESS: while thinkvd runs, no engine "
                             "could use it" +
                             repair});
      break;
    case cuda::ComputeMode::kProhibited:
      advice->push_back({Severity::kError, facts.gpu +
                                               " is in compute mode PROHIBITED: nobody may use "
                                               "it" +
                                               repair});
      break;
    case cuda::ComputeMode::kDefault:
      break;
  }
}

}  // namespace

std::vector<Advice> advise(const GpuFacts& facts) {
  std::vector<Advice> advice;
  advise_compute_mode(facts, &advice);
  if (!facts.mps_pipe.empty()) {
    advice.push_back({Severity::kWarning,
                      "MPS is in force (" + facts.mps_pipe +
                          "): an engine that is killed in mid-kernel takes the contexts of all MPS "
                          "clients with it, thinkvd's too; start thinkvd, not the engines, with "
                          "CUDA_MPS_PIPE_DIRECTORY set to an empty folder"});
  }
  if (facts.persistence_mode && !*facts.persistence_mode) {
    advice.push_back({Severity::kWarning,
                      "persistence mode is off on " + facts.gpu +
                          ": when the last process closes the GPU its memory is lost, so pages "
                          "may not survive a restart of thinkvd; run nvidia-persistenced, or "
                          "nvidia-smi -pm 1"});
  }
  return advice;
}

std::optional<Advice> advise_memory(const Capacity& capacity, uint64_t pool_bytes) {
  if (capacity.available_bytes >= pool_bytes) return std::nullopt;
  const bool ever = capacity.total_bytes >= pool_bytes;
  return Advice{Severity::kError,
                "pool.bytes is " + mib(pool_bytes) + ", the GPU has " +
                    mib(capacity.available_bytes) + " free of " + mib(capacity.total_bytes) +
                    (ever ? ": stop what else uses it (nvidia-smi shows it; engines of an earlier "
                            "thinkvd hold its memory until they end), or lower pool.bytes"
                          : ": lower pool.bytes")};
}

}  // namespace thinkv::device
