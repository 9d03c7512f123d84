// fake_libnvidia_ml.cpp: a libnvidia-ml.so.1 that knows every GPU.
//   FAKE_NVML_PERSISTENCE=0|1      its persistence mode (1)
//   FAKE_NVML_FAIL=1               initialisation fails
#include <cstdlib>
#include <cstring>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

bool is(const char* variable, const char* value) {
  const char* text = std::getenv(variable);
  return text != nullptr && std::strcmp(text, value) == 0;
}

int references = 0;

}  // namespace

FAKE_EXPORT int nvmlInit_v2() {
  if (is("FAKE_NVML_FAIL", "1")) return 9;  // NVML_ERROR_DRIVER_NOT_LOADED
  ++references;
  return 0;
}

FAKE_EXPORT int nvmlShutdown() {
  return references-- > 0 ? 0 : 1;
}

FAKE_EXPORT int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  if (references == 0 || std::strncmp(uuid, "GPU-", 4) != 0) return 2;
  *device = &references;
  return 0;
}

FAKE_EXPORT int nvmlDeviceGetPersistenceMode(void* device, int* mode) {
  if (device != &references) return 2;
  *mode = is("FAKE_NVML_PERSISTENCE", "0") ? 0 : 1;
  return 0;
}
