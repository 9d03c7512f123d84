#include "daemon/core/sequence_table.h"

#include "thinkv/internal/check.h"

namespace thinkv::core {

SequenceId SequenceTable::open(const Sequence& sequence) {
  uint32_t place = free_;
  if (place == kNoSlot) {
    place = static_cast<uint32_t>(places_.size());
    THINKV_CHECK(place < (1u << kPlaceBits));
    places_.emplace_back();
  } else {
    free_ = places_[place].next;
  }
  const uint64_t generation = places_[place].generation + 1;
  THINKV_CHECK(generation % 2 == 1);
  uint32_t& head = heads_[sequence.client.value()];
  places_[place] = sequence;
  places_[place].generation = generation;
  places_[place].prev = kNoSlot;
  places_[place].next = head;
  if (head != kNoSlot) places_[head].prev = place;
  head = place;
  ++count_;
  return id_of(place);
}

Result<Sequence*> SequenceTable::find(ClientSlot client, uint64_t id) {
  const uint32_t place = place_of(id);
  const uint64_t generation = id >> kPlaceBits;
  if (place >= places_.size() || generation % 2 == 0 || generation > places_[place].generation) {
    return make_error(ErrorCode::kNotFound, "no such sequence");
  }
  if (generation < places_[place].generation) {
    return make_error(ErrorCode::kStale, "the sequence was closed");
  }
  if (places_[place].client != client) {
    return make_error(ErrorCode::kNotFound, "no such sequence");
  }
  return &places_[place];
}

void SequenceTable::close(SequenceId id) {
  const uint32_t place = place_of(id.value());
  THINKV_CHECK(place < places_.size() && id_of(place) == id);
  Sequence& sequence = places_[place];
  THINKV_CHECK(sequence.generation % 2 == 1);
  if (sequence.prev != kNoSlot) {
    places_[sequence.prev].next = sequence.next;
  } else {
    heads_[sequence.client.value()] = sequence.next;
  }
  if (sequence.next != kNoSlot) places_[sequence.next].prev = sequence.prev;
  ++sequence.generation;
  sequence.next = free_;
  free_ = place;
  --count_;
}

SequenceId SequenceTable::first(ClientSlot client) const {
  THINKV_CHECK(any(client));
  return id_of(heads_[client.value()]);
}

const Sequence& SequenceTable::at(SequenceId id) const {
  const uint32_t place = place_of(id.value());
  THINKV_CHECK(place < places_.size() && id_of(place) == id);
  return places_[place];
}

const char* SequenceTable::check_invariants(
    const std::array<uint32_t, limits::kClientsMax>& counts) const {
  uint64_t sum = 0;
  for (uint32_t c = 0; c < limits::kClientsMax; ++c) {
    uint32_t open = 0;
    for (uint32_t p = heads_[c]; p != kNoSlot; p = places_[p].next) {
      if (places_[p].generation % 2 == 0 || places_[p].client.value() != c) {
        return "list of a client's sequences";
      }
      if (++open > limits::kSequencesPerClientMax) return "endless list of sequences";
    }
    if (open != counts[c]) return "count of a client's sequences";
    sum += open;
  }
  return sum == count_ ? nullptr : "count of sequences";
}

}  // namespace thinkv::core
