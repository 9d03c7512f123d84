// device_pool.h: a pool, a lease and the working memory of a batch, for tests of sequence.h.
//
// Compiled for the emulator everything is plain memory; compiled by nvcc it is managed memory, so
// that the same checks read it after a device_wait(). Free pages are full of NaN bits, so what is
// read before it is written shows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/device_format.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/sequence.h"
#include "thinkv/internal/check.h"
#include "thinkv/internal/units.h"

namespace thinkv::testing {

#if defined(THINKV_CUDA_EMULATED)
inline void* device_allocate(uint64_t bytes) {
  return std::aligned_alloc(256, (bytes + 255) / 256 * 256);
}
inline void device_free(void* memory) {
  std::free(memory);
}
inline void device_wait() {}
#else
inline void* device_allocate(uint64_t bytes) {
  void* memory = nullptr;
  THINKV_CHECK(cudaMallocManaged(&memory, bytes) == cudaSuccess);
  return memory;
}
inline void device_free(void* memory) {
  static_cast<void>(cudaFree(memory));
}
inline void device_wait() {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  THINKV_CHECK(error == cudaSuccess);
}
#endif

// An array that kernels and the host both see.
template <class T>
class DeviceVector {
 public:
  explicit DeviceVector(uint64_t count)
      : count_(count), data_(static_cast<T*>(device_allocate(count * sizeof(T)))) {
    std::memset(static_cast<void*>(data_), 0xFF, count * sizeof(T));
  }
  ~DeviceVector() { device_free(data_); }
  DeviceVector(const DeviceVector&) = delete;
  DeviceVector& operator=(const DeviceVector&) = delete;
  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] uint64_t size() const { return count_; }
  [[nodiscard]] T& operator[](uint64_t i) const { return data_[i]; }

 private:
  uint64_t count_;
  T* data_;
};

class DevicePool {
 public:
  static constexpr uint32_t kRankBlocks = 2;
  struct Options {
    ModelGeometry geometry;
    uint32_t capacity = 1;  // rows of the batch
    uint32_t extents = 3;
    uint32_t extent_pages = 512;
    uint32_t list_pages = 4096;  // BatchView::pages_max
    uint64_t seed = 1;           // order in which pages are handed out
    uint32_t rank_tokens = 0;    // of the longest lane that rank rules see
    uint32_t rank_dims = 0;      // of keys that they choose medoids by
    uint32_t tier_rows = 0;      // of a lane's tier; 0: no sequence has one
    uint32_t tier_fetch = 0;     // of them, that a step fetches
    bool streams = false;        // BatchView::stream_pages is there
  };

  explicit DevicePool(const Options& o)
      : options_(o),
        page_bytes_(page_bytes(o.geometry.head_dim)),
        extent_bytes_(uint64_t{o.extent_pages} * page_bytes_ + 256),  // a rest that is no page
        memory_(extent_bytes_ * o.extents),
        lease_(1),
        lease_pages_(uint64_t{o.extents} * o.extent_pages),
        progress_(1),
        roots_(o.capacity),
        positions_(o.capacity),
        emit_(uint64_t{o.geometry.layers} * o.capacity),
        lane_begin_(uint64_t{o.geometry.layers} * (rows() + 1)),
        sites_(uint64_t{o.geometry.lanes()} * o.capacity),
        pages_(uint64_t{o.geometry.layers} * o.list_pages),
        score_rows_(uint64_t{o.geometry.layers} * o.list_pages),
        sparsity_(uint64_t{o.geometry.layers} * rows()),
        rank_rows_(cuda::rank_memory_shape({o.rank_tokens, o.rank_dims}, kRankBlocks).bytes),
        rank_memory_(1),
        working_pages_(uint64_t{rows()} * working_lane_pages() * page_bytes_),
        scores_(uint64_t{cuda::tier_regions(o.capacity, o.geometry.kv_heads)} * o.tier_rows),
        picks_(uint64_t{o.geometry.layers} * rows() * (1 + o.tier_fetch)),
        working_(1),
        tier_memory_(1),
        tiers_(o.capacity),
        stream_pages_(o.streams ? uint64_t{o.list_pages} * page_bytes_ : 1),
        transfer_(lease_pages_.size() + 1) {
    lease_[0] = {.count = 0,
                 .capacity = static_cast<uint32_t>(lease_pages_.size()),
                 .faults = 0,
                 .reserved = 0,
                 .used_total = 0,
                 .pages = lease_pages_.data()};
    progress_[0] = {};
    const cuda::RankMemoryShape shape =
        cuda::rank_memory_shape({o.rank_tokens, o.rank_dims}, kRankBlocks);
    rank_memory_[0] = {rank_rows_.data(), shape.room, shape.dims, shape.blocks};
    working_[0] = {working_pages_.data(), working_lane_pages(), 0};
    tier_memory_[0] = {scores_.data(), picks_.data(), o.tier_rows, o.tier_fetch};
    for (uint32_t row = 0; row < o.capacity; ++row) tiers_[row] = nullptr;
    for (uint64_t i = 0; i < sparsity_.size(); ++i) sparsity_[i] = {};
    for (uint32_t e = 0; e < o.extents; ++e) {
      for (uint32_t i = 0; i < o.extent_pages; ++i) {
        free_.push_back(PageId(ExtentId(e), i).raw());
      }
    }
    std::mt19937_64 random(o.seed);
    for (size_t i = free_.size(); i > 1; --i) std::swap(free_[i - 1], free_[random() % i]);
  }

  [[nodiscard]] cuda::BatchView view() const {
    return {.pool = {reinterpret_cast<uint64_t>(memory_.data()), extent_bytes_, options_.extents},
            .geometry = options_.geometry,
            .roots = roots_.data(),
            .capacity = options_.capacity,
            .pages_max = options_.list_pages,
            .lease = lease_.data(),
            .progress = progress_.data(),
            .rank_memory = rank_memory_.data(),
            .positions = positions_.data(),
            .emit = emit_.data(),
            .lane_begin = lane_begin_.data(),
            .sites = sites_.data(),
            .pages = pages_.data(),
            .score_rows = score_rows_.data(),
            .sparsity = sparsity_.data(),
            .working = options_.tier_rows == 0 ? nullptr : working_.data(),
            .tiers = options_.tier_rows == 0 ? nullptr : tiers_.data(),
            .tier_memory = options_.tier_rows == 0 ? nullptr : tier_memory_.data(),
            .stream_pages = options_.streams ? stream_pages_.data() : nullptr};
  }
  [[nodiscard]] const Options& options() const { return options_; }
  [[nodiscard]] uint32_t rows() const { return options_.capacity * options_.geometry.kv_heads; }
  [[nodiscard]] uint32_t working_lane_pages() const {
    return (options_.tier_fetch + cuda::kBufferPageSlots - 1) / cuda::kBufferPageSlots;
  }
  // Rows that lane `row` of a layer has in working pages, and these.
  [[nodiscard]] uint32_t fetched(uint32_t layer, uint32_t row) const {
    const cuda::TierSequence* tier = tiers_[row / options_.geometry.kv_heads];
    return tier == nullptr ? 0 : cuda::fetched_rows(*tier, layer);
  }
  [[nodiscard]] unsigned char* working_page(uint32_t row, uint32_t page) const {
    return working_pages_.data() + (uint64_t{row} * working_lane_pages() + page) * page_bytes_;
  }
  [[nodiscard]] const cuda::TierSequence*& tier(uint32_t row) const { return tiers_[row]; }
  [[nodiscard]] uint64_t total_pages() const { return lease_pages_.size(); }

  // A page of the host's own, for a root.
  [[nodiscard]] uint32_t take() {
    THINKV_CHECK(!free_.empty());
    const uint32_t raw = free_.back();
    free_.pop_back();
    return raw;
  }
  // The lease holds exactly `pages` afterwards, each of them poisoned.
  void supply(uint32_t pages) {
    THINKV_CHECK(cuda::launch_drain(lease_.data(), transfer_.data(), lease_[0].capacity, nullptr) ==
                 cudaSuccess);
    device_wait();
    free_.insert(free_.begin(), transfer_.data() + 1, transfer_.data() + 1 + transfer_[0]);
    THINKV_CHECK(pages <= free_.size());
    for (uint32_t i = 0; i < pages; ++i) {
      transfer_[i] = take();
      std::memset(address(transfer_[i]), 0xFF, page_bytes_);
    }
    THINKV_CHECK(cuda::launch_refill(lease_.data(), transfer_.data(), pages, nullptr) ==
                 cudaSuccess);
    device_wait();
  }
  // Free pages, those in the lease included.
  [[nodiscard]] uint64_t free_pages() const { return free_.size() + lease_[0].count; }

  [[nodiscard]] unsigned char* address(uint32_t raw) const {
    const PageId id(raw);
    THINKV_CHECK(id.valid() && id.extent().value() < options_.extents &&
                 id.index() < options_.extent_pages);
    return memory_.data() + id.extent().value() * extent_bytes_ +
           uint64_t{id.index()} * page_bytes_;
  }
  [[nodiscard]] cuda::Lease& lease() const { return lease_[0]; }
  [[nodiscard]] cuda::Progress& progress() const { return progress_[0]; }
  [[nodiscard]] uint32_t& root(uint32_t row) const { return roots_[row]; }
  [[nodiscard]] const DeviceVector<uint32_t>& lane_begin() const { return lane_begin_; }
  [[nodiscard]] const DeviceVector<cuda::PageView>& list() const { return pages_; }
  [[nodiscard]] const DeviceVector<uint16_t*>& score_rows() const { return score_rows_; }
  [[nodiscard]] const DeviceVector<uint32_t>& positions() const { return positions_; }
  // Page i of BatchView::stream_pages.
  [[nodiscard]] const unsigned char* stream_page(uint64_t i) const {
    return stream_pages_.data() + i * page_bytes_;
  }
  [[nodiscard]] const DeviceVector<uint8_t>& emit() const { return emit_; }

 private:
  Options options_;
  uint32_t page_bytes_;
  uint64_t extent_bytes_;
  DeviceVector<unsigned char> memory_;
  DeviceVector<cuda::Lease> lease_;
  DeviceVector<uint32_t> lease_pages_;
  DeviceVector<cuda::Progress> progress_;
  DeviceVector<uint32_t> roots_;  // all ones: no sequence
  DeviceVector<uint32_t> positions_;
  DeviceVector<uint8_t> emit_;
  DeviceVector<uint32_t> lane_begin_;
  DeviceVector<cuda::TokenSite> sites_;
  DeviceVector<cuda::PageView> pages_;
  DeviceVector<uint16_t*> score_rows_;
  DeviceVector<cuda::LaneSparsity> sparsity_;
  DeviceVector<unsigned char> rank_rows_;
  DeviceVector<cuda::RankMemory> rank_memory_;
  DeviceVector<unsigned char> working_pages_;
  DeviceVector<uint32_t> scores_;
  DeviceVector<uint32_t> picks_;
  DeviceVector<cuda::WorkingPages> working_;
  DeviceVector<cuda::TierMemory> tier_memory_;
  DeviceVector<const cuda::TierSequence*> tiers_;
  DeviceVector<unsigned char> stream_pages_;
  DeviceVector<uint32_t> transfer_;
  std::vector<uint32_t> free_;
};

}  // namespace thinkv::testing
