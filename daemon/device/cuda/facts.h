// facts.h: reads what advice.h judges, from the driver, NVML and the file system.
//
// Nothing here can fail: what cannot be read is not known, and gives no advice.
#pragma once

#include <optional>
#include <string>

#include "daemon/device/cuda/advice.h"
#include "kernels/cuda/gpu.h"

namespace thinkv::device {

// Needs no context on the GPU.
[[nodiscard]] GpuFacts read_facts(const cuda::GpuInfo& gpu);

// The pipe of an MPS control daemon that a CUDA program with this CUDA_MPS_PIPE_DIRECTORY (null:
// not set) would join. Empty: there is none.
[[nodiscard]] std::string find_mps_pipe(const char* pipe_directory);

// From NVML, if `library` is there.
[[nodiscard]] std::optional<bool> read_persistence_mode(const char* library, const DeviceUuid& gpu);

}  // namespace thinkv::device
