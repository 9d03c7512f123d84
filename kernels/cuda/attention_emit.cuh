// attention_emit.cuh: the raw scores of a page on their way to the emission kernel.
//
// Scratch of a page: fp32 [tiles 4][heads], the running maxima (log2 units) when the tile was
// computed, then fp16 [slots 64][heads], each score minus the maximum of its tile; -inf where a
// slot does not count. Heads are rounded up to even.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_softmax.cuh"
#include "kernels/cuda/attention_state.cuh"

namespace thinkv::cuda {

constexpr uint32_t kEmitTiles = kSlotsPerPageMax / 16;
[[nodiscard]] __host__ __device__ constexpr uint32_t emit_heads(uint32_t group) {
  return (group + 1) / 2 * 2;
}
[[nodiscard]] __host__ __device__ constexpr uint32_t emit_page_bytes(uint32_t group) {
  return emit_heads(group) * (4 * kEmitTiles + 2 * kSlotsPerPageMax);
}
[[nodiscard]] __device__ __forceinline__ unsigned char* emit_page_of(const AttendParams& p,
                                                                     uint32_t page) {
  return static_cast<unsigned char*>(p.emit_scratch) + uint64_t{page} * emit_page_bytes(p.group);
}

// Of a launch without emission.
struct NoEmit {
  template <int kMaskFrom, class Scores, class State, class Live>
  __device__ __forceinline__ void tiles(const Scores&, const State&, const Live&, int) const {}
  template <class Scores, class State, class Live>
  __device__ __forceinline__ void values_page(const Scores&, const State&, const Live&) const {}
};

class EmitScores {
 public:
  // `scratch`: of this page, or null where the sequence does not emit.
  __device__ __forceinline__ EmitScores(unsigned char* scratch, uint32_t group)
      : scratch_(scratch), heads_(emit_heads(group)) {}

  // Of tiles first + t. Row g of tile t is slot 16 t + 2g, row g + 8 the next.
  template <int kMaskFrom, class State, int kN, int kTiles, class Live>
  __device__ __forceinline__ void tiles(const PageScores<kN, kTiles>& scores, const State& s,
                                        const Live& live, int first) const {
    if (scratch_ == nullptr) return;
    const uint32_t g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t slot = 16 * (first + t) + 2 * g;
        store_maximum(n, first + t, s.maximum[n]);
        store(n, slot, t < kMaskFrom || live.even(t), scores, s, t, 0);
        store(n, slot + 1, t < kMaskFrom || live.odd(t), scores, s, t, 2);
      }
    }
  }
  // The same where row g is slot g.
  template <class State, int kN, class Live>
  __device__ __forceinline__ void values_page(const PageScores<kN, 1>& scores, const State& s,
                                              const Live& live) const {
    if (scratch_ == nullptr) return;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      store_maximum(n, 0, s.maximum[n]);
      store(n, threadIdx.x % 32 / 4, live.even(0), scores, s, 0, 0);
    }
  }

  // No slot of the page counts.
  __device__ __forceinline__ void nothing() const {
    for (uint32_t i = threadIdx.x % 32; i < heads_ / 2 * kSlotsPerPageMax; i += 32) {
      reinterpret_cast<uint32_t*>(scratch_ + 4 * kEmitTiles * heads_)[i] = 0xFC00FC00u;
    }
  }

 private:
  [[nodiscard]] static __device__ __forceinline__ uint32_t head(int n) {
    return 8 * n + threadIdx.x % 4 * 2;
  }
  __device__ __forceinline__ void store_maximum(int n, int tile, const float (&maximum)[2]) const {
    if (threadIdx.x % 32 >= 4 || head(n) >= heads_) return;
    float* row = reinterpret_cast<float*>(scratch_) + tile * heads_ + head(n);
    row[0] = maximum[0];
    row[1] = maximum[1];
  }
  template <class Scores, class State>
  __device__ __forceinline__ void store(int n, uint32_t slot, bool counts, const Scores& scores,
                                        const State& s, int t, int row) const {
    if (head(n) >= heads_) return;
    const uint32_t pair = pack_f16(scores.scaled(n, t, row) - s.maximum[n][0],
                                   scores.scaled(n, t, row + 1) - s.maximum[n][1]);
    auto* where = reinterpret_cast<uint32_t*>(scratch_ + 4 * kEmitTiles * heads_ +
                                              2 * (uint64_t{slot} * heads_ + head(n)));
    *where = counts ? pair : 0xFC00FC00u;
  }

  unsigned char* scratch_;
  uint32_t heads_;
};

}  // namespace thinkv::cuda
