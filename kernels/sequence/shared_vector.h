// shared_vector.h: a growing array whose bytes lie in meta pages.
//
// Small: one block of 2^n granules, grown by doubling and copying. Large: a directory block of
// table pages, grown by a page at a time, so that nothing big is ever copied. An object is a view:
// a VectorHeader in the pool and the heap that it lives in.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "kernels/sequence/meta_heap.h"
#include "thinkv/internal/check.h"

namespace thinkv::kernels {

template <class T>
class SharedVector {
 public:
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(kGranuleBytes % sizeof(T) == 0 || sizeof(T) % kGranuleBytes == 0);

  SharedVector(VectorHeader& header, MetaHeap& heap) : header_(&header), heap_(&heap) {}

  static void initialise(VectorHeader& header) {
    header = {.block = {PageId::kNoneRaw, 0}, .size = 0, .capacity = 0};
  }

  [[nodiscard]] uint32_t size() const { return header_->size; }
  [[nodiscard]] uint32_t size_max() const { return directory_entries_max() * per_table(); }

  [[nodiscard]] T& operator[](uint32_t i) const {
    THINKV_CHECK(i < header_->size);
    return *element(i);
  }
  // The elements from `i` to the end of its block or table page: the way to walk the vector.
  // Requires: i < size().
  [[nodiscard]] std::span<T> run(uint32_t i) const {
    const uint32_t end = is_large() ? (i / per_table() + 1) * per_table() : header_->capacity;
    return {element(i), std::min(end, header_->size) - i};
  }
  template <class Visit>
  void for_each(Visit visit) const {
    for (uint32_t i = 0; i < header_->size;) {
      for (T& item : run(i)) visit(i++, item);
    }
  }

  // What grow_for(extra) can take. Requires: size() + extra <= size_max().
  void add_need(uint32_t extra, MetaNeed& need) const {
    const uint32_t wanted = header_->size + extra;
    if (wanted <= header_->capacity) return;
    if (wanted <= small_max()) {
      need.add_blocks(block_granules(wanted));
      return;
    }
    const uint32_t tables = tables_for(wanted);
    const uint32_t have = is_large() ? tables_for(header_->capacity) : 0;
    need.add_pages(tables - have);
    if (have == 0 || directory_granules(tables) != directory_granules(have)) {
      need.add_blocks(directory_granules(tables));
    }
  }
  // Room for `extra` more. Requires: pages promised (add_need), size() + extra <= size_max().
  void grow_for(uint32_t extra) {
    const uint32_t wanted = header_->size + extra;
    if (wanted <= header_->capacity) return;
    THINKV_CHECK(wanted <= std::max(size_max(), small_max()));
    if (wanted <= small_max()) {
      grow_small(wanted);
    } else {
      grow_large(wanted);
    }
  }
  // Requires: room (grow_for).
  T& push(const T& value) {
    THINKV_CHECK(header_->size < header_->capacity);
    T* slot = element(header_->size);
    *slot = value;
    header_->size += 1;
    return *slot;
  }
  void pop() {
    THINKV_CHECK(header_->size > 0);
    header_->size -= 1;
    // One spare table is kept, so a vector that goes up and down at a border is left alone.
    if (is_large() && header_->capacity - header_->size >= 2 * per_table()) drop_last_table();
  }
  // Order is not kept: the last element moves into the gap.
  void remove_unordered(uint32_t i) {
    THINKV_CHECK(i < header_->size);
    *element(i) = *element(header_->size - 1);
    pop();
  }
  void remove_ordered(uint32_t i) {
    THINKV_CHECK(i < header_->size);
    for (; i + 1 < header_->size; ++i) *element(i) = *element(i + 1);
    pop();
  }
  // Gives all memory back.
  void destroy() {
    if (is_large()) {
      const uint32_t tables = tables_for(header_->capacity);
      for (uint32_t t = 0; t < tables; ++t) heap_->give_table(PageId(directory()[t]));
      heap_->free(header_->block, directory_granules(tables));
    } else if (header_->capacity > 0) {
      heap_->free(header_->block, block_granules(header_->capacity));
    }
    initialise(*header_);
  }

 private:
  static constexpr uint32_t kIdsPerGranule = kGranuleBytes / sizeof(uint32_t);

  [[nodiscard]] uint32_t small_max() const {
    return heap_->block_granules_max() * kGranuleBytes / static_cast<uint32_t>(sizeof(T));
  }
  [[nodiscard]] uint32_t per_table() const {
    return heap_->page_bytes() / static_cast<uint32_t>(sizeof(T));
  }
  [[nodiscard]] uint32_t tables_for(uint32_t elements) const {
    return (elements + per_table() - 1) / per_table();
  }
  [[nodiscard]] uint32_t directory_entries_max() const {
    return heap_->block_granules_max() * kIdsPerGranule;
  }
  // Requires: tables >= 1.
  [[nodiscard]] static uint32_t directory_granules(uint32_t tables) {
    return std::bit_ceil((tables + kIdsPerGranule - 1) / kIdsPerGranule);
  }
  [[nodiscard]] static uint32_t block_granules(uint32_t elements) {
    const size_t bytes = size_t{elements} * sizeof(T);
    return static_cast<uint32_t>(std::bit_ceil((bytes + kGranuleBytes - 1) / kGranuleBytes));
  }
  // A small capacity is that of a whole block and never above small_max().
  [[nodiscard]] bool is_large() const { return header_->capacity > small_max(); }
  [[nodiscard]] uint32_t* directory() const {
    return reinterpret_cast<uint32_t*>(heap_->address(header_->block));
  }
  [[nodiscard]] T* element(uint32_t i) const {
    if (!is_large()) return reinterpret_cast<T*>(heap_->address(header_->block)) + i;
    return reinterpret_cast<T*>(heap_->table(directory()[i / per_table()])) + i % per_table();
  }

  void grow_small(uint32_t wanted) {
    const uint32_t granules = block_granules(wanted);
    const BlockRef block = heap_->allocate(granules);
    if (header_->capacity > 0) {
      std::memcpy(heap_->address(block), heap_->address(header_->block), header_->size * sizeof(T));
      heap_->free(header_->block, block_granules(header_->capacity));
    }
    header_->block = block;
    header_->capacity = granules * kGranuleBytes / static_cast<uint32_t>(sizeof(T));
  }

  void grow_large(uint32_t wanted) {
    const uint32_t tables = tables_for(wanted);
    const uint32_t have = is_large() ? tables_for(header_->capacity) : 0;
    const uint32_t granules = directory_granules(tables);
    const VectorHeader old = *header_;
    if (have == 0 || granules != directory_granules(have)) {
      header_->block = heap_->allocate(granules);
      if (have > 0) {
        std::memcpy(directory(), heap_->address(old.block), have * sizeof(uint32_t));
        heap_->free(old.block, directory_granules(have));
      }
    }
    for (uint32_t t = have; t < tables; ++t) directory()[t] = heap_->take_table().raw();
    header_->capacity = tables * per_table();
    if (have > 0 || old.capacity == 0) return;
    // One block never holds more than one table page.
    std::memcpy(heap_->table(directory()[0]), heap_->address(old.block), old.size * sizeof(T));
    heap_->free(old.block, block_granules(old.capacity));
  }

  void drop_last_table() {
    const uint32_t tables = tables_for(header_->capacity);
    // The directory keeps its size class by staying where it is only while that class holds.
    if (directory_granules(tables) != directory_granules(tables - 1)) return;
    heap_->give_table(PageId(directory()[tables - 1]));
    header_->capacity -= per_table();
  }

  VectorHeader* header_;
  MetaHeap* heap_;
};

}  // namespace thinkv::kernels
