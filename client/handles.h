// handles.h: the numbers behind the opaque pointers of the C ABI.
//
// A handle is not an address: it names a place in a table that only grows, and the generation of
// that place. So a call with a closed handle finds out, instead of reading freed memory, and a
// forked child's handles are recognised as its parent's.
// Threads: every function from any thread. pin() and unpin() are one locked instruction each.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>

#include "thinkv/result.h"

namespace thinkv::client {

enum class HandleKind : uint8_t { kClient = 1, kModel = 2, kSequence = 3, kStep = 4, kBatch = 5 };
[[nodiscard]] const char* handle_kind_name(HandleKind kind);

enum class Use { kShared, kExclusive };

using Handle = uint64_t;  // 0: none

class HandleTable {
 public:
  // Lives as long as the process: handles may be used from exit handlers.
  static HandleTable& instance();

  // Errors: kExhausted.
  [[nodiscard]] Result<Handle> add(HandleKind kind, void* object);
  // Keeps the object from being destroyed until unpin(). Errors: kInvalidArgument (null, not a
  // handle of this kind; kExclusive: another call uses it), kStale (closed, or a forked child).
  [[nodiscard]] Result<void*> pin(Handle handle, HandleKind kind, Use use);
  void unpin(Handle handle);

  // Refuses new calls, waits for the running ones, and returns the object to its destroyer, who
  // then calls end_close(). Null: it is closed, or another thread closes it and was waited for.
  // Requires: the caller has no pin on it.
  [[nodiscard]] void* begin_close(Handle handle, HandleKind kind);
  void end_close(Handle handle);

 private:
  struct alignas(64) Place {
    std::atomic<uint64_t> state{0};  // generation | closing | live | pins
    void* object = nullptr;
    HandleKind kind = HandleKind::kClient;
    uint64_t fork_generation = 0;
    uint32_t next_free = 0;
  };
  static constexpr uint32_t kChunkPlaces = 1024;
  static constexpr uint32_t kChunks = 2048;
  struct Chunk {
    std::array<Place, kChunkPlaces> places;
  };

  HandleTable();
  [[nodiscard]] Place* find(Handle handle) const;

  std::mutex mutex_;  // guards the free list and growth
  std::array<std::atomic<Chunk*>, kChunks> chunks_{};
  uint32_t used_ = 0;
  uint32_t free_ = kNone;
  static constexpr uint32_t kNone = 0xFFFF'FFFFu;
};

// A pin with a scope.
template <class Object>
class Pinned {
 public:
  [[nodiscard]] static Result<Pinned> get(Handle handle, HandleKind kind, Use use) {
    THINKV_ASSIGN_OR_RETURN(void* object, HandleTable::instance().pin(handle, kind, use));
    return Pinned(handle, static_cast<Object*>(object));
  }
  Pinned(Pinned&& other) noexcept
      : handle_(std::exchange(other.handle_, 0)), object_(other.object_) {}
  Pinned& operator=(Pinned&&) = delete;
  ~Pinned() {
    if (handle_ != 0) HandleTable::instance().unpin(handle_);
  }
  [[nodiscard]] Object* operator->() const { return object_; }
  [[nodiscard]] Object& operator*() const { return *object_; }

 private:
  Pinned(Handle handle, Object* object) : handle_(handle), object_(object) {}
  Handle handle_;
  Object* object_;
};

}  // namespace thinkv::client
