// refresh_world.cuh: many sequences in device memory, each with one closed segment of 128 tokens
// that a budget of 128 makes due for a demotion to 64, for refresh_gpu.cu.
#pragma once

#include <cstdio>
#include <vector>

#include "gpu/device_array.h"
#include "kernels/cuda/lane.cuh"
#include "kernels/cuda/refresh.h"
#include "thinkv/internal/small_float.h"

namespace thinkv::gputest {

using cuda::BatchView;
using cuda::descriptors_per_page;
using cuda::DeviceDescriptor;
using cuda::DeviceLane;
using cuda::DeviceSequence;
using cuda::lane_view;
using cuda::lanes_per_page;
using cuda::LaneView;
using cuda::launch_open;
using cuda::launch_refresh;
using cuda::Lease;
using cuda::page_at;
using cuda::PageView;
using cuda::scores_of;
using cuda::segment_at;
using cuda::sequence_at;
using cuda::slot_shape;
using cuda::SlotShape;
using cuda::take_page;

constexpr uint32_t kSegment = 128;
constexpr uint32_t kWorldPages = 4;  // of a lane: 32 slots each

__host__ __device__ inline uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
// Pages of a lane hold every fourth token, as reuse of slots mixes them.
__host__ __device__ inline uint32_t position_in(uint32_t page, uint32_t slot) {
  return slot * kWorldPages + page;
}

// Codes, positions and scores of one lane's closed segment; a block a lane.
static __global__ void fill_kernel(const __grid_constant__ BatchView view) {
  const uint32_t lanes = view.geometry.lanes(), dim = view.geometry.head_dim;
  DeviceSequence* sequence = sequence_at(view, view.roots[blockIdx.x / lanes]);
  const LaneView lane = lane_view(view, sequence, blockIdx.x % lanes);
  const SlotShape shape = slot_shape(dim, static_cast<uint32_t>(Format::kK4V4));
  for (uint32_t i = 0; i < kWorldPages; ++i) {
    auto* table = reinterpret_cast<DeviceDescriptor*>(page_at(view, lane.lane->table[0]));
    if (threadIdx.x == 0) table[i].page = take_page(view.lease);
    __syncthreads();
    unsigned char* page = page_at(view, table[i].page);
    for (uint32_t w = threadIdx.x; w < page_bytes(dim) / 4; w += blockDim.x) {
      reinterpret_cast<uint32_t*>(page)[w] = hash(blockIdx.x * 4096u + i * 1024u * 1024u + w);
    }
    __syncthreads();
    for (uint32_t s = threadIdx.x; s < shape.slots; s += blockDim.x) {
      reinterpret_cast<uint16_t*>(page + shape.k_scale_offset)[s] = fp16_from_float(0.5f);
      reinterpret_cast<uint32_t*>(page + shape.position_offset)[s] = position_in(i, s);
      if (lane.scored()) {
        scores_of(lane, table + i, i)[s] =
            fp16_from_float(static_cast<float>(hash(blockIdx.x + 77 * position_in(i, s)) % 999));
      }
    }
  }
}

// The state before the demotion, but for what the K/V pages hold; a thread a lane.
static __global__ void restore_kernel(const __grid_constant__ BatchView view,
                                      const uint32_t* pages) {
  const uint32_t lanes = view.geometry.lanes();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= view.capacity * lanes) return;
  DeviceSequence* sequence = sequence_at(view, view.roots[i / lanes]);
  const LaneView lane = lane_view(view, sequence, i % lanes);
  auto* table = reinterpret_cast<DeviceDescriptor*>(page_at(view, lane.lane->table[0]));
  for (uint32_t p = 0; p < kWorldPages; ++p) {
    table[p] = {.live = 0xFFFF'FFFFu,
                .page = pages[i * kWorldPages + p],
                .format = static_cast<uint8_t>(Format::kK4V4),
                .filled = 32,
                .reserved0 = 0,
                .first_position = position_in(p, 0),
                .last_position = position_in(p, 31),
                .marks = 0};
  }
  lane.lane->pages = kWorldPages;
  lane.lane->live = kSegment;
  lane.lane->free_slots[static_cast<uint32_t>(Format::kK4V4)] = 0;
  if (i % lanes != 0) return;
  sequence->tokens = kSegment + 1;
  sequence->segments = 2;
  sequence->generated_live = kSegment;
  auto* segments = segment_at(view, sequence, 0);
  segments[0] = {.start = 0,
                 .end = kSegment,
                 .label = 0,
                 .level = 0,
                 .merged = 0,
                 .waiting = 0,
                 .live = kSegment};
  segments[1] = {.start = kSegment,
                 .end = policy::kOpenEnd,
                 .label = 0,
                 .level = 0,
                 .merged = 0,
                 .waiting = 0,
                 .live = 0};
}

static __global__ void read_pages_kernel(const __grid_constant__ BatchView view, uint32_t* pages) {
  const uint32_t lanes = view.geometry.lanes(), i = blockIdx.x;
  const LaneView lane = lane_view(view, sequence_at(view, view.roots[i / lanes]), i % lanes);
  auto* table = reinterpret_cast<DeviceDescriptor*>(page_at(view, lane.lane->table[0]));
  if (threadIdx.x < kWorldPages) pages[i * kWorldPages + threadIdx.x] = table[threadIdx.x].page;
}

class World {
 public:
  World(uint32_t sequences, uint32_t layers, uint32_t kv_heads, uint32_t head_dim,
        const PolicyParams& policy, uint32_t budget, bool filled)
      : pages_total_(pages_for(sequences, layers * kv_heads, head_dim, filled)),
        per_extent_(kExtent / page_bytes(head_dim)),
        pool_(size_t{(pages_total_ + per_extent_ - 1) / per_extent_} * kExtent),
        lease_pages_(page_ids()),
        lease_(1),
        roots_(root_ids(sequences)),
        list_(4096),
        emit_(size_t{layers} * sequences),
        own_pages_(filled ? size_t{sequences} * layers * kv_heads * kWorldPages : 1) {
    view = {.pool = {reinterpret_cast<uint64_t>(pool_.data), kExtent, 0},
            .geometry = {layers, kv_heads, kv_heads, head_dim, ValueType::kFp16, 0.0f},
            .roots = roots_.data,
            .capacity = sequences,
            .pages_max = 4096,
            .lease = lease_.data};
    view.pages = list_.data;
    view.emit = emit_.data;
    CUDA_OK(cudaMemset(emit_.data, 0, emit_.count));
    Lease lease{};
    lease.count = lease.capacity = pages_total_;
    lease.count -= sequences;  // the last are the roots
    lease.pages = lease_pages_.data;
    CUDA_OK(cudaMemcpy(lease_.data, &lease, sizeof lease, cudaMemcpyHostToDevice));
    for (const uint32_t root : roots_.host()) {
      CUDA_OK(launch_open(view, root, policy, budget, false, nullptr));
    }
    if (filled) {
      fill_kernel<<<lanes(), 128>>>(view);
      read_pages_kernel<<<lanes(), 32>>>(view, own_pages_.data);
      restore();
    }
    CUDA_OK(cudaDeviceSynchronize());
  }

  [[nodiscard]] uint32_t lanes() const { return view.capacity * view.geometry.lanes(); }
  // Also after a refresh: what it gave to the lease is the lanes' again.
  void restore() {
    if (lease_count_ == 0) lease_count_ = lease().count;
    CUDA_OK(cudaMemcpy(&lease_.data->count, &lease_count_, 4, cudaMemcpyHostToDevice));
    restore_kernel<<<(lanes() + 127) / 128, 128>>>(view, own_pages_.data);
    CUDA_OK(cudaGetLastError());
  }
  [[nodiscard]] Lease lease() const { return lease_.host()[0]; }
  template <class T>
  [[nodiscard]] T read(uint32_t page, size_t offset) const {
    T value;
    const unsigned char* from =
        pool_.data + size_t{page >> PageId::kIndexBits} * kExtent +
        size_t{page & PageId::kIndexMask} * page_bytes(view.geometry.head_dim) + offset;
    CUDA_OK(cudaMemcpy(&value, from, sizeof value, cudaMemcpyDeviceToHost));
    return value;
  }
  [[nodiscard]] std::vector<uint32_t> roots() const { return roots_.host(); }
  [[nodiscard]] std::vector<uint32_t> own_pages() const { return own_pages_.host(); }

  BatchView view{};

 private:
  static constexpr uint64_t kExtent = uint64_t{64} << 20;
  static uint32_t pages_for(uint32_t sequences, uint32_t lanes, uint32_t dim, bool filled) {
    const uint32_t lane_pages = (lanes + lanes_per_page(dim) - 1) / lanes_per_page(dim);
    return sequences * (4 + lane_pages + lanes * (3 + (filled ? kWorldPages : 0)));
  }
  [[nodiscard]] uint32_t raw(uint32_t i) const {
    return (i / per_extent_) << PageId::kIndexBits | i % per_extent_;
  }
  [[nodiscard]] std::vector<uint32_t> page_ids() const {
    std::vector<uint32_t> ids(pages_total_);
    for (uint32_t i = 0; i < pages_total_; ++i) ids[i] = raw(i);
    return ids;
  }
  [[nodiscard]] std::vector<uint32_t> root_ids(uint32_t count) const {
    std::vector<uint32_t> ids(count);
    for (uint32_t i = 0; i < count; ++i) ids[i] = raw(pages_total_ - count + i);
    return ids;
  }

  uint32_t pages_total_;
  uint32_t per_extent_;
  DeviceArray<unsigned char> pool_;
  DeviceArray<uint32_t> lease_pages_;
  DeviceArray<Lease> lease_;
  DeviceArray<uint32_t> roots_;
  DeviceArray<PageView> list_;
  DeviceArray<uint8_t> emit_;
  DeviceArray<uint32_t> own_pages_;
  uint32_t lease_count_ = 0;
};

}  // namespace thinkv::gputest
