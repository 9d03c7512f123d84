// Ring descriptors, returned page ids and consumption of a hostile client, into the shipping core.
//
// The input is a list of steps of a fixed size; the fuzzer plays two clients of two tenants and
// the device. Properties: no check fires, the core's invariants hold, each
// request is answered exactly once, and after both clients died nothing is held.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "daemon/core/service.h"
#include "thinkv/internal/check.h"

namespace {

using thinkv::ClientId;
using thinkv::ExtentId;
namespace core = thinkv::core;
namespace protocol = thinkv::protocol;

constexpr uint64_t kClients = 2;

class World {
 public:
  World() {
    core::Config config;
    config.tenants = {{"a", {1}, {}, uint64_t{2} << 20, uint64_t{8} << 20, 1, 50},
                      {"b", {2}, {}, 0, uint64_t{8} << 20, 2, 10}};
    thinkv::PolicyParams policy;
    std::memcpy(policy.name, "p", 2);
    config.policies = {policy};
    auto made = core::Service::create({uint64_t{12} << 20, uint64_t{2} << 20}, config);
    THINKV_CHECK(made.has_value());
    service_ = std::move(*made);
    for (uint32_t id = 1; id <= kClients; ++id) {
      core::ClientConnected connected;
      connected.client = ClientId(id);
      connected.process = core::ProcessKey(id);
      connected.uid = id;
      connected.name = "fuzz";
      alive_[id] = true;
      feed(connected);
      thinkv::ModelGeometry geometry;
      geometry.layers = 2;
      geometry.q_heads = 4;
      geometry.kv_heads = 2;
      geometry.head_dim = 64;
      feed(core::ModelRegistered{ClientId(id), 1, geometry, "m"});
    }
  }

  void feed(const core::Event& event) {
    step(event);
    while (!to_create_.empty()) {
      const ExtentId next = to_create_.back();
      to_create_.pop_back();
      if (fail_creates_) {
        step(core::ExtentFailed{next, 12, false});
      } else {
        step(core::ExtentReady{next});
      }
    }
  }

  void request(uint64_t client, const uint8_t* bytes) {
    if (!alive_[client]) return;
    core::RequestArrived arrived;
    arrived.client = ClientId(client);
    std::memcpy(&arrived.request, bytes, sizeof arrived.request);
    ++unanswered_[client];
    feed(arrived);
  }

  void consume(uint64_t client, uint32_t page_class, uint64_t count) {
    if (alive_[client]) feed(core::GrantsConsumed{ClientId(client), page_class, count});
  }

  // Pages that it was granted, or any number.
  void give_back(uint64_t client, uint32_t page_class, uint32_t pick, bool honest) {
    if (!alive_[client]) return;
    std::vector<uint32_t>& mine = granted_[client][page_class];
    uint32_t page = pick;
    if (honest) {
      if (mine.empty()) return;
      page = mine[pick % mine.size()];
    }
    feed(core::PagesReturned{ClientId(client), page_class, std::span(&page, 1)});
  }

  void set_failing(bool fail) { fail_creates_ = fail; }

  void end() {
    for (uint64_t id = 1; id <= kClients; ++id) {
      if (alive_[id]) feed(core::ClientGone{ClientId(id), core::EndCause::kKilled});
      feed(core::ProcessExited{core::ProcessKey(id)});
    }
    THINKV_CHECK(service_->check_invariants() == nullptr);
    core::Snapshot snapshot;
    service_->snapshot(&snapshot);
    THINKV_CHECK(snapshot.bytes_granted == 0);
    THINKV_CHECK(snapshot.sequences == 0);
    THINKV_CHECK(snapshot.clients.empty());
  }

 private:
  void step(const core::Event& event) {
    service_->step(event, ++now_, &actions_);
    for (const core::Action& action : actions_.list) {
      if (const auto* create = std::get_if<core::CreateExtent>(&action)) {
        to_create_.push_back(create->extent);
      } else if (const auto* grant = std::get_if<core::GrantPages>(&action)) {
        auto& mine = granted_[grant->client.value()][grant->page_class];
        for (const uint32_t page : actions_.pages_of(*grant)) mine.push_back(page);
      } else if (const auto* complete = std::get_if<core::Complete>(&action)) {
        uint64_t& waiting = unanswered_[complete->client.value()];
        THINKV_CHECK(waiting > 0);
        --waiting;
      } else if (const auto* disconnect = std::get_if<core::Disconnect>(&action)) {
        alive_[disconnect->client.value()] = false;
      }
    }
    // The walk over all pages costs more than the events: every 16th, and at the end.
    if (now_ % 16 == 0) THINKV_CHECK(service_->check_invariants() == nullptr);
  }

  std::unique_ptr<core::Service> service_;
  core::Actions actions_;
  std::vector<ExtentId> to_create_;
  std::array<bool, kClients + 1> alive_{};
  std::array<uint64_t, kClients + 1> unanswered_{};
  std::array<std::array<std::vector<uint32_t>, thinkv::kPageClassCount>, kClients + 1> granted_;
  uint64_t now_ = 0;
  bool fail_creates_ = false;
};

}  // namespace

// A step: what, who, page class, flags, then 64 bytes (a descriptor, or numbers).
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr size_t kStep = 4 + sizeof(protocol::Request);
  constexpr size_t kStepsMax = 64;
  World world;
  for (size_t i = 0; i < kStepsMax && size >= kStep; ++i, data += kStep, size -= kStep) {
    const uint64_t client = 1 + data[1] % kClients;
    const uint32_t page_class = data[2] % thinkv::kPageClassCount;
    uint32_t number = 0;
    std::memcpy(&number, data + 4, sizeof number);
    switch (data[0] % 5) {
      case 0:
        world.request(client, data + 4);
        break;
      case 1:
        world.consume(client, page_class, number % 4096);
        break;
      case 2:
        world.give_back(client, page_class, number, true);
        break;
      case 3:
        world.give_back(client, page_class, number, false);
        break;
      default:
        world.set_failing((data[3] & 1) != 0);
        break;
    }
  }
  world.end();
  return 0;
}
