#include "client/lease.h"

#include <algorithm>

#include "client/error_text.h"

namespace thinkv::client {
namespace {

// A request must fit into the grant ring beside what a refill may have put there meanwhile.
constexpr uint32_t kAskMax = limits::kGrantRing / 4;

// The daemon says limit, used and requested bytes with these two codes.
Error refused(const protocol::Completion& completion) {
  const auto code = static_cast<ErrorCode>(completion.status);
  const auto kib = [&](size_t i) {
    return static_cast<unsigned long long>(completion.result[i] / 1024);
  };
  switch (code) {
    case ErrorCode::kExhausted:
      return describe(code,
                      "the pool is full: %llu KiB more are needed, %llu of %llu KiB are granted; "
                      "evict, close sequences, or retry later",
                      kib(2), kib(1), kib(0));
    case ErrorCode::kQuotaExceeded:
      return describe(code,
                      "the tenant's limit is reached: %llu KiB more are needed, %llu of %llu KiB "
                      "are used; close sequences or raise the limit",
                      kib(2), kib(1), kib(0));
    default:
      return describe(code, "thinkvd refused more pages: %s", error_code_name(code));
  }
}

}  // namespace

Status Lease::take(uint32_t count, std::vector<PageId>& pages) {
  if (free_.size() < count) THINKV_TRY(fill(count));
  pages.insert(pages.end(), free_.end() - count, free_.end());
  free_.resize(free_.size() - count);
  used_ += count;
  return {};
}

// On failure the pages that did come stay in the private list: no worse than a refill, and the
// surplus goes back.
Status Lease::fill(uint32_t count) {
  THINKV_TRY(pull(count - static_cast<uint32_t>(free_.size())));
  while (free_.size() < count) {
    const uint32_t missing = count - static_cast<uint32_t>(free_.size());
    if (Status asked = ask(std::min(missing, kAskMax)); !asked) {
      return_surplus();
      return asked;
    }
    const size_t before = free_.size();
    THINKV_TRY(pull(missing));
    if (free_.size() == before) {
      return describe(ErrorCode::kUnavailable, "thinkvd promised pages and granted none");
    }
  }
  return {};
}

Status Lease::pull(uint32_t wanted) {
  const size_t first = free_.size();
  options_.channel->pull_grants(options_.page_class, wanted, free_);
  for (size_t i = first; i < free_.size(); ++i) {
    // The descriptor was sent before the grant was published, so it is in the socket by now.
    if (!options_.extents->mapped(free_[i].extent())) {
      if (Status received = options_.receive_extents(); !received) {
        free_.resize(first);
        return received;
      }
    }
    if (!options_.extents->holds(free_[i], options_.page_class)) {
      const uint32_t raw = free_[i].raw();
      free_.resize(first);
      return describe(ErrorCode::kUnavailable, "thinkvd granted page 0x%08x that no extent has",
                      raw);
    }
  }
  return {};
}

Status Lease::ask(uint32_t pages) {
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kNeedPages);
  request.arg[0] = options_.page_class;
  request.arg[1] = pages;
  THINKV_ASSIGN_OR_RETURN(const protocol::Completion completion, options_.channel->call(request));
  if (completion.status != static_cast<int32_t>(ErrorCode::kOk)) return refused(completion);
  return {};
}

void Lease::give(std::span<const PageId> pages) {
  THINKV_CHECK(pages.size() <= used_);
  free_.insert(free_.end(), pages.begin(), pages.end());
  used_ -= pages.size();
  return_surplus();
}

void Lease::return_surplus() {
  if (free_.size() <= high_) return;
  const std::span<const PageId> oldest(free_.data(), free_.size() - high_);
  const uint32_t sent = options_.channel->push_returns(options_.page_class, oldest);
  free_.erase(free_.begin(), free_.begin() + sent);
}

}  // namespace thinkv::client
