// class_table.cuh: the classes of a sequence's tokens, by position.
//
// A byte a position in pages of the sequence's metadata, which a directory page names; no pages
// before the first class is told. Positions beyond them are of no class.
#pragma once

#include <cstdint>

#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/out_of_line.cuh"

namespace thinkv::cuda {

// Ids in use of the directory, within its bounds whatever the metadata says.
[[nodiscard]] __device__ __forceinline__ uint32_t class_pages_of(const DeviceSequence* sequence,
                                                                 uint32_t head_dim) {
  return min(sequence->class_pages, class_pages_max(head_dim));
}

// The page of a position, or null: of no class, or with kBadMetadata raised.
[[nodiscard]] __device__ __forceinline__ unsigned char* class_page(const BatchView& view,
                                                                   const DeviceSequence* sequence,
                                                                   uint32_t index) {
  if (index >= class_pages_of(sequence, view.geometry.head_dim)) return nullptr;
  const auto* ids = reinterpret_cast<const uint32_t*>(page_at(view, sequence->class_directory));
  return ids == nullptr ? nullptr : page_at(view, ids[index]);
}

[[nodiscard]] __device__ THINKV_OUT_OF_LINE inline uint32_t class_of(const BatchView& view,
                                                                     const DeviceSequence* sequence,
                                                                     uint32_t position) {
  const uint32_t bytes = page_bytes(view.geometry.head_dim);
  const unsigned char* page = class_page(view, sequence, position / bytes);
  return page == nullptr ? 0 : page[position % bytes];
}

}  // namespace thinkv::cuda
