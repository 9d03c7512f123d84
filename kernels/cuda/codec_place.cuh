// codec_place.cuh: the coding of a format and the place of one vector in a page, at run time.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"

namespace thinkv::cuda {

// Codings of all formats, K then V.
struct Codings {
  VectorCoding of[kFormatCount][2];
};
[[nodiscard]] constexpr Codings make_codings() {
  Codings all{};
  for (uint32_t f = 0; f < kFormatCount; ++f) {
    all.of[f][0] = kFormats[f].k;
    all.of[f][1] = kFormats[f].v;
  }
  return all;
}
template <bool kIsK>
[[nodiscard]] __device__ __forceinline__ VectorCoding coding_of(Format format) {
  static constexpr Codings kCodings = make_codings();
  return kCodings.of[static_cast<uint32_t>(format)][kIsK ? 0 : 1];
}

// One vector of a page.
struct VectorPlace {
  unsigned char* codes;   // of the section
  unsigned char* scales;  // of this vector
  uint32_t slots;         // of the page
  uint32_t slot;
};
template <int kDim, bool kIsK>
[[nodiscard]] __device__ __forceinline__ VectorPlace
vector_place(unsigned char* page, const SlotShape& shape, VectorCoding coding, uint32_t slot) {
  const uint32_t scales = kIsK ? shape.k_scale_offset : shape.v_scale_offset;
  return {page + (kIsK ? 0 : shape.v_offset), page + scales + slot * coding.scale_bytes(kDim),
          shape.slots, slot};
}

}  // namespace thinkv::cuda
