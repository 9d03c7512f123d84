#include "client/handles.h"

#include <pthread.h>

#include <memory>

#include "client/error_text.h"
#include "client/fork_guard.h"
#include "thinkv/internal/check.h"

namespace thinkv::client {
namespace {

// Handle: generation (32) | place (24) | kind (4) | tag (4). The tag is odd, so a handle is never
// null and never a pointer to anything: a stray pointer passed as a handle is told apart.
constexpr uint64_t kTag = 0x5;
constexpr uint64_t kPlaceMask = 0xFF'FFFF;

Handle make_handle(uint32_t generation, uint32_t place, HandleKind kind) {
  return uint64_t{generation} << 32 | uint64_t{place} << 8 | static_cast<uint64_t>(kind) << 4 |
         kTag;
}
uint32_t place_of(Handle handle) {
  return static_cast<uint32_t>(handle >> 8 & kPlaceMask);
}
uint32_t generation_of(Handle handle) {
  return static_cast<uint32_t>(handle >> 32);
}
bool well_formed(Handle handle, HandleKind kind) {
  return (handle & 0xF) == kTag && (handle >> 4 & 0xF) == static_cast<uint64_t>(kind);
}

constexpr uint64_t kClosing = uint64_t{1} << 31;
constexpr uint64_t kLive = uint64_t{1} << 30;
constexpr uint64_t kPins = kLive - 1;
uint32_t generation_in(uint64_t state) {
  return static_cast<uint32_t>(state >> 32);
}

}  // namespace

const char* handle_kind_name(HandleKind kind) {
  switch (kind) {
    case HandleKind::kClient:
      return "client";
    case HandleKind::kModel:
      return "model";
    case HandleKind::kSequence:
      return "sequence";
    case HandleKind::kStep:
      return "step";
    case HandleKind::kBatch:
      return "batch";
  }
  return "handle";
}

// The mutex is taken over a fork, so that a child does not inherit it locked by a thread that it
// does not have.
HandleTable::HandleTable() {
  ::pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
}

HandleTable& HandleTable::instance() {
  static HandleTable& table = *new HandleTable;
  return table;
}

Result<Handle> HandleTable::add(HandleKind kind, void* object) {
  const std::lock_guard lock(mutex_);
  uint32_t place = free_;
  if (place == kNone) {
    if (used_ == kChunks * kChunkPlaces) {
      return make_error(ErrorCode::kExhausted, "too many open handles in this process");
    }
    if (used_ % kChunkPlaces == 0) {
      chunks_[used_ / kChunkPlaces].store(std::make_unique<Chunk>().release(),
                                          std::memory_order_release);
    }
    place = used_++;
  }
  Place& entry =
      chunks_[place / kChunkPlaces].load(std::memory_order_relaxed)->places[place % kChunkPlaces];
  if (place == free_) free_ = entry.next_free;
  entry.object = object;
  entry.kind = kind;
  entry.fork_generation = fork_generation();
  const uint32_t generation = generation_in(entry.state.load(std::memory_order_relaxed));
  // Release: pairs with the acquire of pin(), which reads object and kind after it.
  entry.state.store(uint64_t{generation} << 32 | kLive, std::memory_order_release);
  return make_handle(generation, place, kind);
}

HandleTable::Place* HandleTable::find(Handle handle) const {
  const uint32_t place = place_of(handle);
  if (place >= kChunks * kChunkPlaces) return nullptr;
  Chunk* chunk = chunks_[place / kChunkPlaces].load(std::memory_order_acquire);
  return chunk == nullptr ? nullptr : &chunk->places[place % kChunkPlaces];
}

Result<void*> HandleTable::pin(Handle handle, HandleKind kind, Use use) {
  const char* name = handle_kind_name(kind);
  if (handle == 0) return describe(ErrorCode::kInvalidArgument, "the %s is null", name);
  Place* place = well_formed(handle, kind) ? find(handle) : nullptr;
  if (place == nullptr) {
    return describe(ErrorCode::kInvalidArgument, "this is not a %s handle", name);
  }
  uint64_t state = place->state.load(std::memory_order_acquire);
  do {
    const bool live = (state & kLive) != 0 && (state & kClosing) == 0;
    if (!live || generation_in(state) != generation_of(handle)) {
      return describe(ErrorCode::kStale, "the %s was closed", name);
    }
    if (use == Use::kExclusive && (state & kPins) != 0) {
      return describe(ErrorCode::kInvalidArgument,
                      "the %s is in use by another call; calls on one %s must not overlap", name,
                      name);
    }
  } while (!place->state.compare_exchange_weak(state, state + 1, std::memory_order_acquire));
  if (place->fork_generation != fork_generation()) {
    unpin(handle);
    return describe(ErrorCode::kStale,
                    "the %s belongs to the parent of this forked process: "
                    "open a new client",
                    name);
  }
  return place->object;
}

// Release: the destroyer sees what the call did.
void HandleTable::unpin(Handle handle) {
  Place* place = find(handle);
  const uint64_t before = place->state.fetch_sub(1, std::memory_order_release);
  THINKV_CHECK((before & kPins) != 0);
  if ((before & kClosing) != 0) place->state.notify_all();
}

void* HandleTable::begin_close(Handle handle, HandleKind kind) {
  Place* place = well_formed(handle, kind) ? find(handle) : nullptr;
  // A child must not touch its parent's session: it shares the socket and lacks the mappings.
  if (place == nullptr) return nullptr;
  uint64_t state = place->state.load(std::memory_order_acquire);
  for (;;) {
    if (generation_in(state) != generation_of(handle) || (state & kLive) == 0) return nullptr;
    if (place->fork_generation != fork_generation()) return nullptr;
    if ((state & kClosing) != 0) {
      place->state.wait(state);
      state = place->state.load(std::memory_order_acquire);
      continue;
    }
    if (place->state.compare_exchange_weak(state, state | kClosing, std::memory_order_acquire)) {
      state |= kClosing;
      break;
    }
  }
  while ((state & kPins) != 0) {
    place->state.wait(state);
    state = place->state.load(std::memory_order_acquire);
  }
  return place->object;
}

void HandleTable::end_close(Handle handle) {
  Place* place = find(handle);
  const std::lock_guard lock(mutex_);
  place->object = nullptr;
  place->next_free = free_;
  free_ = place_of(handle);
  const uint32_t generation = generation_of(handle) + 1;
  place->state.store(uint64_t{generation} << 32, std::memory_order_release);
  place->state.notify_all();
}

}  // namespace thinkv::client
