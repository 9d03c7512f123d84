// stream.h: the entropy-coded blocks of one lane, in chained pages of the pool.
//
// Append only: a block is never changed, and goes as a whole. A page goes back when no block is
// left in it; the page that the next block begins in stays while a block is in it. The bytes of
// blocks are K/V pages of the sequence, their table and the list of pages are metadata.
// An object is a view. What is read from the pool is checked against the stream's own bounds.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sequence/lane.h"
#include "kernels/sequence/shared_vector.h"

namespace thinkv::kernels {

// Of a lane in a policy with streams; else null.
[[nodiscard]] inline StreamLane* stream_header(const LaneStore& store, const LaneHeader& lane) {
  if (lane.stream.page == PageId::kNoneRaw) return nullptr;
  return reinterpret_cast<StreamLane*>(store.heap->address(lane.stream));
}

class Stream {
 public:
  Stream(const LaneStore& store, StreamLane& lane)
      : store_(&store),
        lane_(&lane),
        pages_(lane.pages, *store.heap),
        blocks_(lane.blocks, *store.heap) {}

  // An empty stream in memory that was just allocated.
  static void initialise(StreamLane& lane);
  [[nodiscard]] StreamLane& header() const { return *lane_; }
  [[nodiscard]] const SharedVector<StreamBlock>& blocks() const { return blocks_; }

  // Blocks of these lengths at the end: adds what they take. Result: false beyond what a stream
  // can hold.
  [[nodiscard]] bool add_need(std::span<const uint32_t> block_bytes, uint32_t& data_pages,
                              MetaNeed& need) const;
  // Requires: add_need() said true for all that grow_for() names, and its pages are promised.
  void grow_for(std::span<const uint32_t> block_bytes);
  // Requires: room (grow_for); first_position as end_position says.
  void append(bool raw, std::span<const std::byte> bytes);

  // The bytes of block `index`. Result: false where its place is outside of the stream.
  [[nodiscard]] bool read(uint32_t index, std::vector<std::byte>& out) const;
  void remove(uint32_t index);
  // Gives everything back.
  void destroy();
  // Blocks lie in pages that are there, in order, and hold 64 tokens each up to end_position.
  [[nodiscard]] bool fits_together() const;

 private:
  [[nodiscard]] uint64_t end_of(std::span<const uint32_t> block_bytes) const;
  [[nodiscard]] uint32_t pages_for(uint64_t bytes) const;
  // Whether the stream's last byte lies in a page that is there, with room behind it.
  [[nodiscard]] bool has_open_page() const;
  void free_unused_pages();

  const LaneStore* store_;
  StreamLane* lane_;
  SharedVector<uint32_t> pages_;
  SharedVector<StreamBlock> blocks_;
};

}  // namespace thinkv::kernels
