// device_steps.cuh: steps of fp32 and fp64 numbers that are rounded once each and never contracted,
// for the functions that both sides share (kernels/policy/exact_exp.h, exact_steps.h).
//
// Of both sides because these functions are; the host calls none.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/platform.cuh"

namespace thinkv::cuda {

struct DeviceSteps {
#if defined(__CUDA_ARCH__)
  static __device__ __forceinline__ float add(float a, float b) {
    return exact_add(a, b);
  }
  static __device__ __forceinline__ float mul(float a, float b) {
    return exact_mul(a, b);
  }
  static __device__ __forceinline__ float from_bits(uint32_t x) {
    return __uint_as_float(x);
  }
#else
  static float add(float a, float b) {
    return a + b;
  }
  static float mul(float a, float b) {
    return a * b;
  }
  static float from_bits(uint32_t x) {
    return std::bit_cast<float>(x);
  }
#endif
};

struct DeviceSteps64 {
#if defined(__CUDA_ARCH__)
  static __device__ __forceinline__ double add(double a, double b) {
    return __dadd_rn(a, b);
  }
  static __device__ __forceinline__ double mul(double a, double b) {
    return __dmul_rn(a, b);
  }
  static __device__ __forceinline__ double div(double a, double b) {
    return __ddiv_rn(a, b);
  }
  static __device__ __forceinline__ double sqrt(double a) {
    return __dsqrt_rn(a);
  }
  static __device__ __forceinline__ uint64_t to_bits(double a) {
    return static_cast<uint64_t>(__double_as_longlong(a));
  }
  static __device__ __forceinline__ double from_bits(uint64_t a) {
    return __longlong_as_double(static_cast<int64_t>(a));
  }
#else
  static double add(double a, double b) {
    return a + b;
  }
  static double mul(double a, double b) {
    return a * b;
  }
  static double div(double a, double b) {
    return a / b;
  }
  static double sqrt(double a) {
    return std::sqrt(a);
  }
  static uint64_t to_bits(double a) {
    return std::bit_cast<uint64_t>(a);
  }
  static double from_bits(uint64_t a) {
    return std::bit_cast<double>(a);
  }
#endif
};

}  // namespace thinkv::cuda
