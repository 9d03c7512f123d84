// ptx.cuh: the machine instructions that the kernels are built from, one function each.
//
// sm_80 and up; the bulk copy and its barriers sm_90 and up, where the kernels do without the
// copies of 16 bytes. No policy here. The emulator's versions (emulated/ptx.h) have the same names.
#pragma once

#include "kernels/cuda/platform.cuh"

#if defined(THINKV_CUDA_EMULATED)

#include "kernels/cuda/emulated/ptx.h"

#else

#include <cstdint>

namespace thinkv::cuda {

// D = A B + D, A 16x16 fp16 row-major, B 16x8 fp16 column-major, D 16x8 fp32. Lane (g, c):
// a0 (row g, k 2c..), a1 (row g + 8), a2 (row g, k 2c + 8..), a3; b0 (k 2c.., column g), b1;
// d0, d1 (row g, columns 2c, 2c + 1), d2, d3 (row g + 8).
__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// As mma_f16 with D = A B + C.
__device__ __forceinline__ void mma_f16_from(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1,
                                             const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}

// Transposes an 8x8 matrix of 16-bit values held one row per four lanes.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t rows) {
  uint32_t columns;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Low half first.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Low half first: exact.
__device__ __forceinline__ float2 unpack_f16(uint32_t packed) {
  float2 v;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}\n"
      : "=f"(v.x), "=f"(v.y)
      : "r"(packed));
  return v;
}
__device__ __forceinline__ uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// a b + c, rounded once.
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}

// ---- copies of 16 bytes to shared memory, each thread its own, in groups ----

// Does nothing unless `active`. 16-byte aligned addresses.
__device__ __forceinline__ void copy_16_async(bool active, uint32_t shared, uint64_t global) {
  asm volatile(
      "{\n"
      ".reg .pred some;\n"
      "setp.ne.u32 some, %0, 0;\n"
      "@some cp.async.cg.shared.global [%1], [%2], 16;\n"
      "}\n" ::"r"(static_cast<uint32_t>(active)),
      "r"(shared), "l"(global)
      : "memory");
}
// The copies since the last call are one group, of none too.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all groups of this thread but the kLater newest have arrived; others see them after a
// __syncwarp().
template <uint32_t kLater>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// ---- bulk copy to shared memory with a transaction barrier (sm_90) ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes the initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN_%=:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra AGAIN_%=;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Announces `bytes` and copies them, from the one thread where `elected`; 0 bytes: arrives only.
// 16-byte aligned addresses and size.
__device__ __forceinline__ void bulk_copy_elected(bool elected, uint32_t shared, uint64_t global,
                                                  uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred one, some;\n"
      "setp.ne.u32 one, %0, 0;\n"
      "setp.ne.and.u32 some, %3, 0, one;\n"
      "@one mbarrier.arrive.expect_tx.shared.b64 _, [%4], %3;\n"
      "@some cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%1], [%2], %3, "
      "[%4];\n"
      "}\n" ::"r"(static_cast<uint32_t>(elected)),
      "r"(shared), "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- kernels that overlap in a stream (programmatic dependent launch, sm_90) ----
// Before that launch() never lets them overlap, and there is nothing to wait for.

// Until the kernel before this one has finished and its writes are visible.
__device__ __forceinline__ void wait_for_previous() {
  if constexpr (kCode >= 90) asm volatile("griddepcontrol.wait;" ::: "memory");
}
// Asks for a line of memory that is read soon.
__device__ __forceinline__ void prefetch_l1(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}
// The next kernel's blocks may take the places that this one leaves free.
__device__ __forceinline__ void let_next_start() {
  if constexpr (kCode >= 90) asm volatile("griddepcontrol.launch_dependents;" :::);
}

}  // namespace thinkv::cuda

#endif
