#include "daemon/device/cuda/facts.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace thinkv::device {
namespace {

constexpr const char* kMpsDirectory = "/tmp/nvidia-mps";  // where CUDA looks by default
constexpr const char* kNvml = "libnvidia-ml.so.1";

// The four functions of NVML that are needed, as nvml.h declares them; 0 is success everywhere.
struct Nvml {
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*by_uuid)(const char* uuid, void** device) = nullptr;
  int (*persistence_mode)(void* device, int* mode) = nullptr;
};

template <class Function>
bool find(void* library, const char* name, Function** out) {
  void* found = ::dlsym(library, name);
  std::memcpy(out, &found, sizeof(found));  // as in kernels/cuda/driver.cpp
  return found != nullptr;
}

std::optional<bool> ask(void* library, const DeviceUuid& gpu) {
  Nvml nvml;
  if (!find(library, "nvmlInit_v2", &nvml.init) || !find(library, "nvmlShutdown", &nvml.shutdown) ||
      !find(library, "nvmlDeviceGetHandleByUUID", &nvml.by_uuid) ||
      !find(library, "nvmlDeviceGetPersistenceMode", &nvml.persistence_mode)) {
    return std::nullopt;
  }
  if (nvml.init() != 0) return std::nullopt;
  void* device = nullptr;
  int mode = 0;
  const bool known = nvml.by_uuid(device_uuid_text(gpu).c_str(), &device) == 0 &&
                     nvml.persistence_mode(device, &mode) == 0;
  nvml.shutdown();
  return known ? std::optional<bool>(mode != 0) : std::nullopt;
}

}  // namespace

std::string find_mps_pipe(const char* pipe_directory) {
  const bool set = pipe_directory != nullptr && pipe_directory[0] != '\0';
  std::string pipe = std::string(set ? pipe_directory : kMpsDirectory) + "/control";
  return ::access(pipe.c_str(), F_OK) == 0 ? pipe : std::string();
}

std::optional<bool> read_persistence_mode(const char* library, const DeviceUuid& gpu) {
  void* opened = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) return std::nullopt;
  const std::optional<bool> mode = ask(opened, gpu);
  ::dlclose(opened);
  return mode;
}

GpuFacts read_facts(const cuda::GpuInfo& gpu) {
  return {.gpu = gpu.name + " (" + device_uuid_text(gpu.uuid) + ")",
          .mps_pipe = find_mps_pipe(std::getenv("CUDA_MPS_PIPE_DIRECTORY")),
          .persistence_mode = read_persistence_mode(kNvml, gpu.uuid),
          .compute_mode = gpu.compute_mode};
}

}  // namespace thinkv::device
