// device_array.h: device memory for tests and benchmarks; any CUDA error ends the program.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace thinkv::gputest {

#define CUDA_OK(expr)                                                                           \
  do {                                                                                          \
    const cudaError_t thinkv_error = (expr);                                                    \
    if (thinkv_error != cudaSuccess) {                                                          \
      std::fprintf(stderr, "%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(thinkv_error)); \
      std::exit(1);                                                                             \
    }                                                                                           \
  } while (false)

template <class T>
struct DeviceArray {
  explicit DeviceArray(size_t n) : count(n) { CUDA_OK(cudaMalloc(&data, n * sizeof(T) + 16)); }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    CUDA_OK(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }
  [[nodiscard]] std::vector<T> host() const {
    std::vector<T> out(count);
    CUDA_OK(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
  T* data = nullptr;
  size_t count;
};

}  // namespace thinkv::gputest
