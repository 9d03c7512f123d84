// attention_softmax.cuh: from the raw scores of a page's tiles to probabilities relative to the
// running maximum.
//
// The exponentials are taken before it is known whether the maximum still serves: almost always it
// does, and the check is then one vote on the sums, which are needed anyway.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_state.cuh"

namespace thinkv::cuda {

// Which slots of this thread's rows count: tile t, row g (even slot 2g) or g + 8 (odd, 2g + 1).
struct CodeLive {
  uint32_t words[2];
  __device__ __forceinline__ explicit CodeLive(uint64_t live) {
    const uint32_t shift = threadIdx.x % 32 / 4 * 2;
    words[0] = static_cast<uint32_t>(live) >> shift;
    words[1] = static_cast<uint32_t>(live >> 32) >> shift;
  }
  // The same counted from tile `first`.
  [[nodiscard]] __device__ __forceinline__ CodeLive from(int first) const {
    CodeLive later = *this;
    for (int t = 0; t < first; ++t) {
      later.words[0] = later.words[0] >> 16 | later.words[1] << 16;
      later.words[1] >>= 16;
    }
    return later;
  }
  [[nodiscard]] __device__ __forceinline__ bool even(int t) const {
    return ((words[t / 2] >> (16 * (t % 2))) & 1u) != 0;
  }
  [[nodiscard]] __device__ __forceinline__ bool odd(int t) const {
    return ((words[t / 2] >> (16 * (t % 2))) & 2u) != 0;
  }
  // All ones in the halves whose slots count.
  [[nodiscard]] __device__ __forceinline__ uint32_t halves(int t) const {
    return (even(t) ? 0x0000FFFFu : 0u) | (odd(t) ? 0xFFFF0000u : 0u);
  }
};
// The same for 16-bit pages: row g is slot g, rows g + 8 are empty.
struct ValueLive {
  bool row;
  __device__ __forceinline__ explicit ValueLive(uint64_t live)
      : row(((static_cast<uint32_t>(live) >> (threadIdx.x % 32 / 4)) & 1u) != 0) {}
  [[nodiscard]] __device__ __forceinline__ bool even(int) const { return row; }
  [[nodiscard]] __device__ __forceinline__ bool odd(int) const { return false; }
};

// The scores of a page's tiles: d as the MMA leaves them, scale of the even and the odd slot.
template <int kN, int kTiles>
struct PageScores {
  float d[kN][kTiles][4];
  float scale[kTiles][2];
  [[nodiscard]] __device__ __forceinline__ float scaled(int n, int t, int i) const {
    return d[n][t][i] * scale[t][i / 2];
  }
};

// p = 2^(score - maximum) for all; slots of tiles kMaskFrom.. that do not count get 0.
// Result: true where the running maximum is too low for one of them.
template <int kMaskFrom, int kHeadDim, int kN, int kTiles, class Live>
__device__ __forceinline__ bool exponentials(const PageScores<kN, kTiles>& scores,
                                             const LaneState<kHeadDim, kN>& s, const Live& live,
                                             float (&p)[kN][kTiles][4], float (&sum)[kN][2]) {
  bool high = false;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool counts = t < kMaskFrom || (i < 2 ? live.even(t) : live.odd(t));
        const float e =
            exp2_approx(fmaf(scores.d[n][t][i], scores.scale[t][i / 2], -s.maximum[n][i % 2]));
        p[n][t][i] = counts ? e : 0.0f;
        sum[n][i % 2] = t == 0 && i < 2 ? p[n][t][i] : sum[n][i % 2] + p[n][t][i];
      }
    }
    // Also true for NaN: nothing was live before.
    high = high || !(sum[n][0] <= kLazyLimit) || !(sum[n][1] <= kLazyLimit);
  }
  return high;
}

// Raises the running maximum to that of this page's scores.
template <int kMaskFrom, int kHeadDim, int kN, int kTiles, class Live>
__device__ __forceinline__ void raise_maximum(const PageScores<kN, kTiles>& scores,
                                              LaneState<kHeadDim, kN>& s, const Live& live) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = kNegativeInfinity;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (t < kMaskFrom || live.even(t)) top = fmaxf(top, scores.scaled(n, t, h));
        if (t < kMaskFrom || live.odd(t)) top = fmaxf(top, scores.scaled(n, t, h + 2));
      }
#pragma unroll
      for (int x = 4; x < 32; x *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, x));
      top = fmaxf(top, s.maximum[n][h]);
      // Still none: keep -inf out of the subtraction.
      const float factor = top == kNegativeInfinity ? 1.0f : exp2_approx(s.maximum[n][h] - top);
      s.maximum[n][h] = top;
      s.sum[n][h] *= factor;
      s.bias[n][h] *= factor;
#pragma unroll
      for (auto& tile : s.out[n]) {
        tile[h] *= factor;
        tile[h + 2] *= factor;
      }
    }
  }
}

// Probabilities of a page relative to the running maximum, which moves where it must.
template <int kMaskFrom, int kHeadDim, int kN, int kTiles, class Live>
__device__ __forceinline__ void soften(const PageScores<kN, kTiles>& scores,
                                       LaneState<kHeadDim, kN>& s, const Live& live,
                                       float (&p)[kN][kTiles][4]) {
  float sum[kN][2];
  const bool high = exponentials<kMaskFrom>(scores, s, live, p, sum);
  if (__any_sync(kFullWarp, high)) {
    raise_maximum<kMaskFrom>(scores, s, live);
    (void)exponentials<kMaskFrom>(scores, s, live, p, sum);
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    s.sum[n][0] += sum[n][0];
    s.sum[n][1] += sum[n][1];
  }
}

}  // namespace thinkv::cuda
