#include "client/channel.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>

#include "client/error_text.h"

namespace thinkv::client {
namespace {

// Not FUTEX_PRIVATE: the waker is another process. Works on a read-only mapping.
void futex_wait(const std::atomic<uint32_t>& word, uint32_t seen, std::chrono::nanoseconds limit) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(limit);
  timespec timeout{};
  timeout.tv_sec = static_cast<time_t>(seconds.count());
  timeout.tv_nsec = static_cast<long>((limit - seconds).count());
  // EAGAIN, EINTR, ETIMEDOUT: the caller looks again in any case.
  static_cast<void>(::syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), FUTEX_WAIT, seen,
                              &timeout, nullptr, 0));
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long one sleep lasts before the daemon's life is checked: a killed daemon rings nothing.
constexpr std::chrono::milliseconds kSleepSlice{20};

}  // namespace

void full_fence() {
#if defined(__SANITIZE_THREAD__)
  static std::atomic<uint32_t> word{0};
  word.fetch_add(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

Channel::Channel(ChannelOptions options)
    : options_(std::move(options)),
      requests_(options_.client->requests, &options_.client->request_tail.value,
                &options_.daemon->request_head.value),
      completions_(options_.daemon->completions, &options_.daemon->completion_tail.value,
                   &options_.client->completion_head.value) {
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    grants_.emplace_back(options_.daemon->grants[c], &options_.daemon->grant_tail[c].value,
                         &options_.client->grant_head[c].value);
    returns_.emplace_back(options_.client->returns[c], &options_.client->return_tail[c].value,
                          &options_.daemon->return_head[c].value);
  }
}

Result<protocol::Completion> Channel::call(protocol::Request request) {
  THINKV_TRY(flags_ok());
  request.user_data = next_user_data_++;
  request.size = sizeof(request);
  const Clock::time_point start = Clock::now();
  const Clock::time_point deadline = start + options_.timeout;
  // One call at a time, so the ring is full only after many calls timed out.
  if (requests_.free() == 0) {
    THINKV_TRY(healthy());
    return describe(ErrorCode::kUnavailable, "thinkvd does not take requests any more");
  }
  requests_.push(request);
  requests_.publish();
  ring_bell_if_parked();

  protocol::Completion completion{};
  const Clock::time_point spin_end = start + options_.spin;
  do {
    if (take_completion(request.user_data, completion)) return completion;
    relax();
  } while (Clock::now() < spin_end);
  while (!take_completion(request.user_data, completion)) {
    THINKV_TRY(healthy());
    if (Clock::now() >= deadline) {
      return describe(ErrorCode::kUnavailable, "thinkvd did not answer within %lld ms",
                      static_cast<long long>(options_.timeout.count()));
    }
    sleep_until_doorbell(deadline);
  }
  return completion;
}

bool Channel::take_completion(uint64_t user_data, protocol::Completion& completion) {
  bool found = false;
  uint32_t count = completions_.available();
  if (count == 0) return false;
  for (; count > 0 && !found; --count) {
    completion = completions_.pop();
    found = completion.user_data == user_data;
  }
  completions_.publish();
  return found;
}

// The daemon publishes, bumps the doorbell, fences, then looks at `sleeping`. Here: `sleeping`,
// fence, then look at the ring again. One of the two sees the other, so no wake-up is lost; the
// word is read before that, so a bump in between makes the wait return at once.
void Channel::sleep_until_doorbell(Clock::time_point deadline) {
  const uint32_t seen = options_.daemon->doorbell.value.load(std::memory_order_acquire);
  std::atomic<uint32_t>& sleeping = options_.client->sleeping.value;
  sleeping.store(1, std::memory_order_relaxed);
  full_fence();
  if (completions_.available() == 0 && !broken()) {
    const auto left = std::max(deadline - Clock::now(), Clock::duration::zero());
    futex_wait(options_.daemon->doorbell.value, seen,
               std::min<std::chrono::nanoseconds>(left, kSleepSlice));
  }
  sleeping.store(0, std::memory_order_relaxed);
}

// The mirror image: the index was published, fence, then `parked`. The daemon sets `parked`,
// fences, and looks at the rings once more before it sleeps.
void Channel::ring_bell_if_parked() {
  full_fence();
  if (options_.daemon->parked.value.load(std::memory_order_relaxed) == 0) return;
  if (options_.bell_fd < 0) return;
  const uint64_t one = 1;
  ssize_t written = 0;
  do {
    written = ::write(options_.bell_fd, &one, sizeof(one));
  } while (written < 0 && errno == EINTR);
  // EAGAIN: the bell is at its maximum, so it is ringing already.
}

uint32_t Channel::pull_grants(uint32_t page_class, uint32_t wanted, std::vector<PageId>& pages) {
  Grants& ring = grants_[page_class];
  const uint32_t count = std::min(wanted, ring.available());
  if (count == 0) return 0;
  for (uint32_t i = 0; i < count; ++i) pages.push_back(PageId(ring.pop()));
  ring.publish();
  // Consumed grants make room: a parked daemon has to refill, or the next step finds nothing.
  ring_bell_if_parked();
  return count;
}

uint32_t Channel::push_returns(uint32_t page_class, std::span<const PageId> pages) {
  Returns& ring = returns_[page_class];
  const uint32_t count = std::min(static_cast<uint32_t>(pages.size()), ring.free());
  if (count == 0) return 0;
  for (uint32_t i = 0; i < count; ++i) ring.push(pages[i].raw());
  ring.publish();
  ring_bell_if_parked();
  return count;
}

Status Channel::flags_ok() const {
  if (broken()) {
    return describe(ErrorCode::kUnavailable, "thinkvd wrote an impossible ring index");
  }
  const uint32_t closing = options_.daemon->closing.value.load(std::memory_order_acquire);
  if (closing != 0) {
    return describe(ErrorCode::kUnavailable,
                    "thinkvd let go of this client (%s); open a new client",
                    error_code_name(static_cast<ErrorCode>(closing)));
  }
  return {};
}

Status Channel::healthy() const {
  THINKV_TRY(flags_ok());
  if (options_.daemon_gone && options_.daemon_gone()) {
    return describe(ErrorCode::kUnavailable,
                    "thinkvd is gone; start it again and open a new client");
  }
  return {};
}

bool Channel::broken() const {
  bool any = requests_.broken() || completions_.broken();
  for (const Grants& ring : grants_) any = any || ring.broken();
  for (const Returns& ring : returns_) any = any || ring.broken();
  return any;
}

}  // namespace thinkv::client
