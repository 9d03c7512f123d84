// ptx.h: the functions of ptx.cuh for the emulator.
//
// Matrix instructions multiply in fp32 and add in fp32, in order of k: not the hardware's order,
// so results agree with it to rounding. A bulk copy happens at once, so its barriers do nothing;
// copies of 16 bytes arrive when they are waited for (CopyQueue).
#pragma once

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/emulated/device.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::cuda {
namespace emulated {

struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
};

template <float (*kToFloat)(uint16_t)>
float half_of(uint32_t pair, uint32_t index) {
  return kToFloat(static_cast<uint16_t>(pair >> (16 * index)));
}

// D = A B + D of m16n8k16, see mma_f16 for who holds what.
template <float (*kToFloat)(uint16_t)>
void mma(float (&d)[4], const Fragments& mine) {
  const Exchanged<Fragments> all(mine);
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t high_row = i / 2, column = 2 * c + i % 2;
    float sum = d[i];
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t part = k / 8, holder = k % 8 / 2;
      const float a = half_of<kToFloat>(all.of(4 * g + holder).a[2 * part + high_row], k % 2);
      const float b = half_of<kToFloat>(all.of(4 * column + holder).b[part], k % 2);
      sum += a * b;
    }
    d[i] = sum;
  }
}

[[noreturn]] inline void ptx_stop(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

inline float fp16_value(uint16_t half) {
  return fp16_to_float(half);
}
inline float bf16_value(uint16_t half) {
  return bf16_to_float(half);
}

}  // namespace emulated

inline void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1) {
  emulated::mma<emulated::fp16_value>(d, {{a0, a1, a2, a3}, {b0, b1}});
}
inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  emulated::mma<emulated::bf16_value>(d, {{a0, a1, a2, a3}, {b0, b1}});
}

inline void mma_f16_from(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1, const float (&c)[4]) {
  float sum[4] = {c[0], c[1], c[2], c[3]};
  mma_f16(sum, a0, a1, a2, a3, b0, b1);
  for (uint32_t i = 0; i < 4; ++i) d[i] = sum[i];
}

inline uint32_t transpose_8x8(uint32_t rows) {
  const emulated::Exchanged<uint32_t> all(rows);
  const uint32_t lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  const auto element = [&](uint32_t r, uint32_t c) {
    return (all.of(4 * r + c / 2) >> (16 * (c % 2))) & 0xFFFFu;
  };
  return element(column, row) | element(column + 1, row) << 16;
}

inline float exp2_approx(float x) {
  return std::exp2(x);
}
inline uint32_t pack_f16(float low, float high) {
  return fp16_from_float(low) | uint32_t{fp16_from_float(high)} << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return bf16_from_float(low) | uint32_t{bf16_from_float(high)} << 16;
}

inline float2 unpack_f16(uint32_t packed) {
  return {fp16_to_float(static_cast<uint16_t>(packed)),
          fp16_to_float(static_cast<uint16_t>(packed >> 16))};
}
inline uint32_t add_f16x2(uint32_t a, uint32_t b) {
  const float2 x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(x.x + y.x, x.y + y.y);  // fp32 first: rounded as if once (24 >= 2 x 11 + 2)
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  const float2 x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(x.x * y.x, x.y * y.y);
}
// Through fp32: of a sum that has more than its 24 bits the machine rounds once, this twice.
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = unpack_f16(a), y = unpack_f16(b), z = unpack_f16(c);
  return pack_f16(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

// Offsets into the dynamic shared memory; of anything else (barriers) a value that is not used.
inline uint32_t shared_address(const void* pointer) {
  const auto offset = reinterpret_cast<uintptr_t>(pointer) -
                      reinterpret_cast<uintptr_t>(emulated::dynamic_shared());
  return offset <= emulated::dynamic_shared_bytes() ? static_cast<uint32_t>(offset) : 0xFFFF0000u;
}
inline unsigned char* shared_pointer(uint32_t address, uint32_t bytes) {
  if (address % (bytes < 16 ? bytes : 16) != 0) emulated::ptx_stop("misaligned shared access");
  if (uint64_t{address} + bytes > emulated::dynamic_shared_bytes()) {
    emulated::ptx_stop("shared access out of bounds");
  }
  return emulated::dynamic_shared() + address;
}
inline uint4 load_shared_16(uint32_t address) {
  uint4 v;
  std::memcpy(&v, shared_pointer(address, 16), 16);
  return v;
}
inline uint2 load_shared_8(uint32_t address) {
  uint2 v;
  std::memcpy(&v, shared_pointer(address, 8), 8);
  return v;
}
inline uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  std::memcpy(&v, shared_pointer(address, 4), 4);
  return v;
}
inline uint32_t load_shared_2(uint32_t address) {
  uint16_t v;
  std::memcpy(&v, shared_pointer(address, 2), 2);
  return v;
}

inline void copy_16_async(bool active, uint32_t shared, uint64_t global) {
  if (!active) return;
  if (global % emulated::CopyQueue::kBytes != 0) emulated::ptx_stop("misaligned asynchronous copy");
  emulated::copies().add(shared_pointer(shared, emulated::CopyQueue::kBytes),
                         reinterpret_cast<const unsigned char*>(global));
}
inline void commit_copies() {
  emulated::copies().commit();
}
template <uint32_t kLater>
void wait_copies() {
  emulated::copies().wait(kLater);
}

inline void barrier_init(uint32_t, uint32_t) {}
inline void barrier_init_fence() {}
inline void barrier_wait(uint32_t, uint32_t) {
  emulated::warp_barrier();  // the copying thread may come later in the warp
}
inline void bulk_copy_elected(bool elected, uint32_t shared, uint64_t global, uint32_t bytes,
                              uint32_t) {
  if (!elected || bytes == 0) return;
  if (bytes % 16 != 0 || global % 16 != 0 || shared % 16 != 0) {
    emulated::ptx_stop("misaligned bulk copy");
  }
  if (uint64_t{shared} + bytes > emulated::dynamic_shared_bytes()) {
    emulated::ptx_stop("bulk copy out of bounds");
  }
  std::memcpy(emulated::dynamic_shared() + shared, reinterpret_cast<const void*>(global), bytes);
}

inline void wait_for_previous() {}
inline void let_next_start() {}
inline void prefetch_l1(const void*) {}

}  // namespace thinkv::cuda
