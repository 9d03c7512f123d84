// sequence_table.h: open sequences, each owned by one client.
//
// An id is (generation of the place, place): 40 + 24 bits. An id of a closed sequence is told apart
// from one that never was.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "daemon/core/slots.h"
#include "thinkv/result.h"

namespace thinkv::core {

struct Sequence {
  uint64_t generation = 0;  // even: free place; odd: open
  uint32_t prev = kNoSlot;  // of the same client
  uint32_t next = kNoSlot;  // of the same client, or of the free places
  ClientSlot client;
  ModelId model;
  PolicyId policy;
  uint32_t budget_tokens = 0;  // effective
};

class SequenceTable {
 public:
  SequenceTable() { heads_.fill(kNoSlot); }

  // Requires: the client has fewer than limits::kSequencesPerClientMax.
  [[nodiscard]] SequenceId open(const Sequence& sequence);
  // Errors: kStale (closed), kNotFound (never was, or another client's: which one is not said).
  [[nodiscard]] Result<Sequence*> find(ClientSlot client, uint64_t id);
  // Requires: `id` was found.
  void close(SequenceId id);
  [[nodiscard]] bool any(ClientSlot client) const { return heads_[client.value()] != kNoSlot; }
  [[nodiscard]] SequenceId first(ClientSlot client) const;  // Requires: any(client)
  [[nodiscard]] uint64_t count() const { return count_; }
  [[nodiscard]] const Sequence& at(SequenceId id) const;
  // Null, or what is inconsistent. `counts`: of sequences by client slot.
  [[nodiscard]] const char* check_invariants(
      const std::array<uint32_t, limits::kClientsMax>& counts) const;

 private:
  static constexpr uint32_t kPlaceBits = 24;
  static_assert(uint64_t{limits::kSequencesPerClientMax} * limits::kClientsMax <=
                uint64_t{1} << kPlaceBits);
  [[nodiscard]] static uint32_t place_of(uint64_t id) {
    return static_cast<uint32_t>(id & ((1u << kPlaceBits) - 1));
  }
  [[nodiscard]] SequenceId id_of(uint32_t place) const {
    return SequenceId(places_[place].generation << kPlaceBits | place);
  }

  std::vector<Sequence> places_;
  std::array<uint32_t, limits::kClientsMax> heads_;
  uint32_t free_ = kNoSlot;
  uint64_t count_ = 0;
};

}  // namespace thinkv::core
