#include "daemon/ipc/client_link.h"

#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <climits>

#include "thinkv/internal/check.h"
#include "thinkv/version.h"

namespace thinkv::ipc {
namespace {

// Orders our store before our load against the peer's store and load (Dekker): without it both
// sides can miss each other and sleep for ever.
void full_fence() {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wtsan"  // TSan does not model fences; races are none here
#endif
  std::atomic_thread_fence(std::memory_order_seq_cst);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
}

template <uint32_t... kClass>
auto grant_rings(shm::DaemonRegion* out, const shm::ClientRegion* in,
                 std::integer_sequence<uint32_t, kClass...>) {
  using Ring = RingProducer<uint32_t, limits::kGrantRing>;
  return std::array<Ring, kPageClassCount>{
      Ring(out->grants[kClass], &out->grant_tail[kClass].value, &in->grant_head[kClass].value)...};
}

template <uint32_t... kClass>
auto return_rings(shm::DaemonRegion* out, const shm::ClientRegion* in,
                  std::integer_sequence<uint32_t, kClass...>) {
  using Ring = RingConsumer<uint32_t, limits::kReturnRing>;
  return std::array<Ring, kPageClassCount>{Ring(in->returns[kClass], &in->return_tail[kClass].value,
                                                &out->return_head[kClass].value)...};
}

constexpr std::make_integer_sequence<uint32_t, kPageClassCount> kEachClass{};

// The regions start as zero bytes: the indices and flags are right as they are.
void fill_daemon_header(void* bytes) {
  auto* region = static_cast<shm::DaemonRegion*>(bytes);
  region->magic = shm::kMagicDaemon;
  region->protocol_major = kProtocolMajor;
  region->protocol_minor = kProtocolMinor;
}

void fill_client_header(void* bytes) {
  auto* region = static_cast<shm::ClientRegion*>(bytes);
  region->magic = shm::kMagicClient;
  region->protocol_major = kProtocolMajor;
  region->protocol_minor = kProtocolMinor;
}

}  // namespace

Result<std::unique_ptr<ClientLink>> ClientLink::create(uint64_t boot_epoch) {
  THINKV_ASSIGN_OR_RETURN(MemfdRegion daemon,
                          MemfdRegion::create("thinkv-daemon", sizeof(shm::DaemonRegion),
                                              RegionWriter::kDaemon, fill_daemon_header));
  THINKV_ASSIGN_OR_RETURN(MemfdRegion client,
                          MemfdRegion::create("thinkv-client", sizeof(shm::ClientRegion),
                                              RegionWriter::kClient, fill_client_header));
  UniqueFd bell(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!bell.valid()) return make_error(ErrorCode::kExhausted, "eventfd", errno);
  static_cast<shm::DaemonRegion*>(daemon.data())->boot_epoch = boot_epoch;
  return std::unique_ptr<ClientLink>(
      new ClientLink(std::move(daemon), std::move(client), std::move(bell)));
}

ClientLink::ClientLink(MemfdRegion daemon, MemfdRegion client, UniqueFd bell)
    : daemon_(std::move(daemon)),
      client_(std::move(client)),
      bell_(std::move(bell)),
      out_(static_cast<shm::DaemonRegion*>(daemon_.data())),
      in_(static_cast<const shm::ClientRegion*>(client_.data())),
      requests_(in_->requests, &in_->request_tail.value, &out_->request_head.value),
      completions_(out_->completions, &out_->completion_tail.value, &in_->completion_head.value),
      grants_(grant_rings(out_, in_, kEachClass)),
      returns_(return_rings(out_, in_, kEachClass)) {}

void ClientLink::silence_bell() {
  uint64_t count = 0;
  iovec data{&count, sizeof count};
  // The client holds the same open file and can clear O_NONBLOCK: read() could then block.
  (void)!::preadv2(bell_.get(), &data, 1, -1, RWF_NOWAIT);
}

uint32_t ClientLink::requests_ready() {
  const uint32_t waiting = requests_.available();
  if (waiting == 0) {
    stalled_ = false;
    return 0;
  }
  const uint32_t free = completions_.free();
  const uint32_t room = free > unanswered_ ? free - unanswered_ : 0;
  stalled_ = room == 0;
  return waiting < room ? waiting : room;
}

protocol::Request ClientLink::take_request() {
  taken_ = true;
  ++unanswered_;
  return requests_.pop();
}

uint64_t ClientLink::take_consumed(uint32_t page_class) {
  GrantRing& ring = grants_[page_class];
  (void)ring.free();  // loads the client's head, and checks it
  const uint64_t count = ring.seen_head() - consumed_[page_class];
  consumed_[page_class] = ring.seen_head();
  return count;
}

uint32_t ClientLink::take_returns(uint32_t page_class, std::span<uint32_t> into) {
  ReturnRing& ring = returns_[page_class];
  const uint32_t waiting = ring.available();
  const uint32_t count = waiting < into.size() ? waiting : static_cast<uint32_t>(into.size());
  for (uint32_t i = 0; i < count; ++i) into[i] = ring.pop();
  taken_ = taken_ || count > 0;
  return count;
}

bool ClientLink::push_grants(uint32_t page_class, std::span<const uint32_t> pages) {
  GrantRing& ring = grants_[page_class];
  if (ring.free() < pages.size()) return false;
  for (const uint32_t page : pages) ring.push(page);
  pushed_ = true;
  return true;
}

bool ClientLink::push_completion(const protocol::Completion& completion) {
  if (completions_.free() == 0) return false;
  THINKV_CHECK(unanswered_ > 0);  // the core answers each request once
  --unanswered_;
  completions_.push(completion);
  pushed_ = true;
  return true;
}

void ClientLink::publish() {
  if (taken_) {
    requests_.publish();
    for (ReturnRing& ring : returns_) ring.publish();
    taken_ = false;
  }
  if (!pushed_) return;
  // Grants first: a completion may promise them.
  for (GrantRing& ring : grants_) ring.publish();
  completions_.publish();
  pushed_ = false;
  wake();
}

void ClientLink::wake() {
  out_->doorbell.value.fetch_add(1, std::memory_order_release);
  full_fence();
  if (in_->sleeping.value.load(std::memory_order_relaxed) == 0) return;
  ::syscall(SYS_futex, &out_->doorbell.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool ClientLink::broken() const {
  bool any = requests_.broken() || completions_.broken();
  for (const GrantRing& ring : grants_) any = any || ring.broken();
  for (const ReturnRing& ring : returns_) any = any || ring.broken();
  return any;
}

bool ClientLink::has_work() {
  if (requests_ready() > 0) return true;
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    (void)grants_[c].free();
    if (grants_[c].seen_head() != consumed_[c] || returns_[c].available() > 0) return true;
  }
  return broken();
}

bool ClientLink::try_park() {
  out_->parked.value.store(1, std::memory_order_relaxed);
  full_fence();
  parked_ = true;
  if (!has_work()) return true;
  unpark();
  return false;
}

void ClientLink::unpark() {
  parked_ = false;
  out_->parked.value.store(0, std::memory_order_relaxed);
}

void ClientLink::close(ErrorCode code) {
  out_->closing.value.store(static_cast<uint32_t>(code), std::memory_order_release);
  wake();
}

uint32_t ClientLink::requests_waiting() {
  return requests_.available();
}

ReportedCounters ClientLink::counters() const {
  const shm::ClientCounters& from = in_->counters;
  const auto load = [](const std::atomic<uint64_t>& word) {
    return word.load(std::memory_order_relaxed);
  };
  ReportedCounters to;
  to.tokens = load(from.tokens);
  to.live_slots = load(from.live_slots);
  to.evicted_slots = load(from.evicted_slots);
  to.reused_slots = load(from.reused_slots);
  to.steps = load(from.steps);
  to.demotions = load(from.demotions);
  to.over_budget_steps = load(from.over_budget_steps);
  for (uint32_t i = 0; i < kThoughtCount; ++i) to.thoughts[i] = load(from.thoughts[i]);
  to.held_bytes = load(from.held_bytes);
  to.f16_bytes = load(from.f16_bytes);
  return to;
}

}  // namespace thinkv::ipc
