#include "client/session.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "client/error_text.h"
#include "client/pool_choice.h"
#include "thinkv/internal/policy_check.h"
#include "thinkv/version.h"

namespace thinkv::client {
namespace {

using protocol::MessageType;

// Fixed char fields of the protocol: cut, zero-padded, always terminated.
template <size_t kSize>
void copy_text(char (&out)[kSize], const std::string& text) {
  const size_t bytes = std::min(text.size(), kSize - 1);
  std::memset(out, 0, kSize);
  std::memcpy(out, text.data(), bytes);
}

Error refused(const protocol::Refused& refusal) {
  auto code = static_cast<ErrorCode>(refusal.code);
  if (refusal.code <= 0 || refusal.code > static_cast<int32_t>(ErrorCode::kInternal)) {
    code = ErrorCode::kUnavailable;
  }
  Error error = describe(code, "%.*s", static_cast<int>(sizeof(refusal.text)), refusal.text);
  error.os_error = refusal.os_error;
  return error;
}

bool same(const ModelGeometry& a, const ModelGeometry& b) {
  return a.layers == b.layers && a.q_heads == b.q_heads && a.kv_heads == b.kv_heads &&
         a.head_dim == b.head_dim && a.value_type == b.value_type &&
         a.softmax_scale == b.softmax_scale;
}

bool on_gpu(const protocol::Welcome& welcome) {
  return std::strcmp(welcome.backend, "cuda") == 0;
}

// One writer per word (the session's mutex), so a load and a store are enough.
void add(std::atomic<uint64_t>& word, uint64_t delta) {
  word.store(word.load(std::memory_order_relaxed) + delta, std::memory_order_relaxed);
}

// The daemon knows numbers only: no budget is one that no sequence can exceed.
uint32_t wire_budget(uint32_t budget_tokens) {
  return std::min(budget_tokens, limits::kTokensMax);
}

constexpr std::chrono::seconds kPolicyAge{1};

}  // namespace

Result<std::unique_ptr<Session>> Session::open(const SessionOptions& options) {
  THINKV_ASSIGN_OR_RETURN(ControlSocket socket, ControlSocket::connect(options.socket_path));
  std::unique_ptr<Session> session(new Session(std::move(socket), options.timeout));
  const std::lock_guard lock(session->mutex_);
  THINKV_TRY(session->attach(options));
  THINKV_TRY(session->take_welcome(session->inbox_));
  THINKV_TRY(session->map_regions(session->inbox_));
  session->start_rings();
  THINKV_TRY(session->open_window());
  return session;
}

Session::~Session() {
  const std::lock_guard lock(mutex_);
  // Without it the end counts as a crash; the pages come back either way.
  if (channel_) static_cast<void>(socket_.send_empty(MessageType::kBye, 0));
}

Status Session::attach(const SessionOptions& options) {
  if (options.pool.size() >= limits::kNameMax) {
    return describe(ErrorCode::kInvalidArgument, "a pool's name has at most %zu bytes",
                    limits::kNameMax - 1);
  }
  THINKV_TRY(say_hello(options, options.pool));
  if (inbox_.type() == MessageType::kWelcome) return {};
  THINKV_ASSIGN_OR_RETURN(const std::string pool, choose_pool(inbox_.body_as<protocol::Pools>()));
  // A new connection: the daemon does not wait for a driver to be loaded.
  THINKV_ASSIGN_OR_RETURN(socket_, ControlSocket::connect(options.socket_path));
  THINKV_TRY(say_hello(options, pool));
  if (inbox_.type() == MessageType::kWelcome) return {};
  return describe(ErrorCode::kUnavailable, "thinkvd does not take the name of its pool '%s'",
                  pool.c_str());
}

Status Session::say_hello(const SessionOptions& options, const std::string& pool) {
  protocol::Hello hello{};
  hello.protocol_major = kProtocolMajor;
  hello.protocol_minor = kProtocolMinor;
  hello.role = static_cast<uint32_t>(protocol::ClientRole::kEngine);
  copy_text(hello.client_name, options.client_name);
  copy_text(hello.library_version, kVersionText);
  copy_text(hello.pool, pool);
  // A pidfd of our own making cannot mean another process, as a pid read later could. Kernels or
  // sandboxes without it: the daemon opens one itself.
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)));
  request_id_ += 1;
  THINKV_TRY(socket_.send(MessageType::kHello, request_id_, hello, pidfd.get()));
  return await_reply(MessageType::kWelcome);
}

Status Session::take_welcome(ControlMessage& message) {
  welcome_ = message.body_as<protocol::Welcome>();
  welcome_.backend[sizeof(welcome_.backend) - 1] = '\0';
  welcome_.daemon_version[sizeof(welcome_.daemon_version) - 1] = '\0';
  welcome_.pool[sizeof(welcome_.pool) - 1] = '\0';
  if (welcome_.protocol_major != kProtocolMajor) {
    return describe(ErrorCode::kVersionMismatch,
                    "thinkvd %s speaks protocol %u, this library (%s) speaks %u: upgrade one",
                    welcome_.daemon_version, welcome_.protocol_major, kVersionText, kProtocolMajor);
  }
  if (!on_gpu(welcome_) && std::strcmp(welcome_.backend, "host") != 0) {
    return describe(
        ErrorCode::kVersionMismatch,
        "thinkvd %s has backend '%s', which this library (%s) does not know: upgrade it",
        welcome_.daemon_version, welcome_.backend, kVersionText);
  }
  if (welcome_.extent_bytes < limits::kExtentBytesMin ||
      welcome_.extent_bytes > limits::kExtentBytesMax ||
      welcome_.extent_bytes % limits::kExtentBytesMin != 0) {
    return describe(ErrorCode::kVersionMismatch,
                    "thinkvd %s announced extents of %llu bytes: upgrade it or this library (%s)",
                    welcome_.daemon_version, static_cast<unsigned long long>(welcome_.extent_bytes),
                    kVersionText);
  }
  return {};
}

Status Session::map_regions(ControlMessage& message) {
  if (welcome_.daemon_region_bytes < sizeof(shm::DaemonRegion) ||
      welcome_.client_region_bytes < sizeof(shm::ClientRegion)) {
    return describe(ErrorCode::kVersionMismatch,
                    "thinkvd's shared memory is smaller than this library needs: upgrade one");
  }
  THINKV_ASSIGN_OR_RETURN(daemon_range_,
                          MappedRange::map(message.fds[0].get(), welcome_.daemon_region_bytes,
                                           Access::kRead, "the ring memory"));
  THINKV_ASSIGN_OR_RETURN(client_range_,
                          MappedRange::map(message.fds[1].get(), welcome_.client_region_bytes,
                                           Access::kReadWrite, "the request memory"));
  bell_ = std::move(message.fds[2]);
  const auto* daemon = reinterpret_cast<const shm::DaemonRegion*>(daemon_range_.data());
  if (daemon->magic != shm::kMagicDaemon || daemon->protocol_major != kProtocolMajor ||
      daemon->boot_epoch != welcome_.boot_epoch) {
    return describe(ErrorCode::kVersionMismatch,
                    "the ring memory is not of this protocol (magic 0x%08x, protocol %u)",
                    daemon->magic, daemon->protocol_major);
  }
  client_region_ = reinterpret_cast<shm::ClientRegion*>(client_range_.data());
  client_region_->protocol_major = kProtocolMajor;
  client_region_->protocol_minor = kProtocolMinor;
  client_region_->magic = shm::kMagicClient;
  return {};
}

void Session::start_rings() {
  channel_.emplace(
      ChannelOptions{.daemon = reinterpret_cast<const shm::DaemonRegion*>(daemon_range_.data()),
                     .client = client_region_,
                     .bell_fd = bell_.get(),
                     .daemon_gone = [this] { return socket_.hung_up(); },
                     .timeout = timeout_});
  leases_.reserve(kPageClassCount);
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    leases_.emplace_back(LeaseOptions{
        .channel = &*channel_, .extents = &extents_, .page_class = c, .receive_extents = [this] {
          return receive_extents();
        }});
  }
}

Status Session::open_window() {
  extents_.expect(welcome_.extent_bytes, nullptr);
  if (!on_gpu(welcome_)) return {};
  const Result<const cuda::Driver*> driver = cuda::Driver::load();
  if (!driver)
    return describe(driver.error().code, "thinkvd's pool is on a GPU: %s", driver.error().what);
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kClientStats);
  THINKV_ASSIGN_OR_RETURN(const protocol::Completion completion, call(request, "count pages"));
  const uint64_t extents = completion.result[4] / welcome_.extent_bytes;
  DeviceWindow::Options options;
  std::memcpy(options.device.bytes.data(), welcome_.device_uuid, sizeof(welcome_.device_uuid));
  options.extent_bytes = welcome_.extent_bytes;
  options.extents_min = static_cast<uint32_t>(std::min<uint64_t>(extents, limits::kExtentsMax));
  THINKV_ASSIGN_OR_RETURN(window_, DeviceWindow::open(**driver, options));
  extents_.expect(welcome_.extent_bytes, window_.get());
  return {};
}

template <class Body>
Status Session::ask(MessageType type, const Body& body, MessageType wanted) {
  request_id_ += 1;
  THINKV_TRY(socket_.send(type, request_id_, body));
  return await_reply(wanted);
}

Status Session::await_reply(MessageType wanted) {
  const Clock::time_point deadline = Clock::now() + timeout_;
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    if (left.count() <= 0) {
      return describe(ErrorCode::kUnavailable, "thinkvd did not answer within %lld ms",
                      static_cast<long long>(timeout_.count()));
    }
    THINKV_ASSIGN_OR_RETURN(const bool arrived,
                            socket_.receive(inbox_, static_cast<int>(left.count())));
    if (!arrived) continue;
    const uint32_t id = inbox_.header.request_id;
    const bool pools = wanted == MessageType::kWelcome && inbox_.type() == MessageType::kPools;
    if ((inbox_.type() == wanted || pools) && id == request_id_) return {};
    if (inbox_.type() == MessageType::kRefused && id == request_id_) {
      return refused(inbox_.body_as<protocol::Refused>());
    }
    THINKV_TRY(handle_pushed(inbox_));
  }
}

// Replies to requests that timed out are dropped; a Refused that nobody asked for ends the session.
Status Session::handle_pushed(ControlMessage& message) {
  if (message.type() == MessageType::kExtent) {
    return extents_.add(message.body_as<protocol::Extent>(), message.fds[0].get());
  }
  if (message.type() == MessageType::kRefused && message.header.request_id == 0) {
    return refused(message.body_as<protocol::Refused>());
  }
  return {};
}

Status Session::receive_extents() {
  for (;;) {
    THINKV_ASSIGN_OR_RETURN(const bool arrived, socket_.receive(inbox_, 0));
    if (!arrived) return {};
    THINKV_TRY(handle_pushed(inbox_));
  }
}

Result<uint32_t> Session::register_model(const ModelGeometry& geometry, const std::string& name) {
  const std::lock_guard lock(mutex_);
  for (const Registered& known : models_) {
    if (same(known.geometry, geometry) && known.name == name) return known.id;
  }
  protocol::RegisterModel body{.layers = geometry.layers,
                               .q_heads = geometry.q_heads,
                               .kv_heads = geometry.kv_heads,
                               .head_dim = geometry.head_dim,
                               .value_type = static_cast<uint32_t>(geometry.value_type),
                               .softmax_scale = geometry.softmax_scale,
                               .model_name = {},
                               .reserved = {}};
  copy_text(body.model_name, name);
  THINKV_TRY(ask(MessageType::kRegisterModel, body, MessageType::kModelRegistered));
  const auto reply = inbox_.body_as<protocol::ModelRegistered>();
  const uint32_t expected_class = page_class(geometry.head_dim);
  if (reply.page_class != expected_class || reply.page_bytes != page_bytes(geometry.head_dim)) {
    return describe(ErrorCode::kUnavailable, "thinkvd registered the model with pages of %u bytes",
                    reply.page_bytes);
  }
  high_pages_[expected_class] = std::max(high_pages_[expected_class], reply.lease_high_pages);
  leases_[expected_class].set_high(std::min(high_pages_[expected_class], limits::kGrantRing));
  models_.push_back({geometry, name, reply.model_id});
  return reply.model_id;
}

Result<PolicyEntry> Session::policy(const std::string& name) {
  const std::lock_guard lock(mutex_);
  const auto known = policies_.find(name);
  if (known != policies_.end() && Clock::now() - known->second.asked < kPolicyAge) {
    return known->second.entry;
  }
  protocol::GetPolicy body{};
  copy_text(body.policy_name, name);
  THINKV_TRY(ask(MessageType::kGetPolicy, body, MessageType::kPolicyReply));
  const auto reply = inbox_.body_as<protocol::PolicyReply>();
  if (!policy_params_valid(reply.params)) {
    return describe(ErrorCode::kUnavailable, "thinkvd sent an impossible policy '%s'",
                    name.c_str());
  }
  const PolicyEntry entry{reply.policy_id, reply.params};
  policies_[name] = {entry, Clock::now()};
  return entry;
}

Result<protocol::Completion> Session::call(const protocol::Request& request, const char* what) {
  THINKV_ASSIGN_OR_RETURN(const protocol::Completion completion, channel_->call(request));
  if (completion.status == static_cast<int32_t>(ErrorCode::kOk)) return completion;
  const auto code = static_cast<ErrorCode>(completion.status);
  return describe(code, "thinkvd refused to %s: %s (%u)", what, error_code_name(code),
                  completion.detail);
}

Result<uint64_t> Session::open_sequence(uint32_t model_id, uint32_t policy_id,
                                        uint32_t budget_tokens) {
  const std::lock_guard lock(mutex_);
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kOpenSequence);
  request.arg[0] = model_id;
  request.arg[1] = policy_id;
  request.arg[2] = wire_budget(budget_tokens);
  THINKV_ASSIGN_OR_RETURN(const protocol::Completion completion, call(request, "open a sequence"));
  return completion.result[0];
}

void Session::close_sequence(uint64_t id) {
  const std::lock_guard lock(mutex_);
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kCloseSequence);
  request.handle = id;
  static_cast<void>(call(request, "close a sequence"));
}

Status Session::set_budget(uint64_t id, uint32_t budget_tokens) {
  const std::lock_guard lock(mutex_);
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kSetBudget);
  request.handle = id;
  request.arg[0] = wire_budget(budget_tokens);
  THINKV_TRY(call(request, "set the budget"));
  return {};
}

Status Session::ping() {
  const std::lock_guard lock(mutex_);
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kPing);
  THINKV_TRY(call(request, "answer a ping"));
  return {};
}

Result<PoolUse> Session::pool_use() {
  const std::lock_guard lock(mutex_);
  protocol::Request request{};
  request.op = static_cast<uint16_t>(protocol::Op::kClientStats);
  THINKV_ASSIGN_OR_RETURN(const protocol::Completion completion, call(request, "count pages"));
  PoolUse use{.tenant_used_bytes = completion.result[1],
              .tenant_limit_bytes = completion.result[2],
              .pool_free_bytes = completion.result[3],
              .pool_bytes = completion.result[4]};
  // What this client has is counted here: the daemon's count is of pages of all sizes together.
  for (uint32_t c = 0; c < kPageClassCount; ++c) {
    const uint64_t bytes = page_bytes(kHeadDims[c]);
    const uint64_t leased = leases_[c].held() + channel_->grants_waiting(c);
    use.leased_bytes += leased * bytes;
    use.granted_bytes += (leased + leases_[c].used()) * bytes;
  }
  return use;
}

Result<std::string> Session::status_json() {
  const std::lock_guard lock(mutex_);
  request_id_ += 1;
  THINKV_TRY(socket_.send_empty(MessageType::kGetStatus, request_id_));
  THINKV_TRY(await_reply(MessageType::kStatusReply));
  const uint64_t bytes = inbox_.body_as<protocol::StatusReply>().json_bytes;
  THINKV_ASSIGN_OR_RETURN(
      const MappedRange text,
      MappedRange::map(inbox_.fds[0].get(), bytes, Access::kRead, "the status text"));
  return std::string(reinterpret_cast<const char*>(text.data()), bytes);
}

std::unique_ptr<LeaseSource> Session::make_source(uint32_t page_class) {
  return std::make_unique<LeaseSource>(mutex_, leases_[page_class], extents_);
}

void Session::add_counters(const CounterDelta& delta) {
  const std::lock_guard lock(mutex_);
  shm::ClientCounters& counters = client_region_->counters;
  add(counters.tokens, delta.tokens);
  add(counters.live_slots, delta.live_slots);
  add(counters.evicted_slots, delta.evicted_slots);
  add(counters.reused_slots, delta.reused_slots);
  add(counters.steps, delta.steps);
  add(counters.demotions, delta.demotions);
  add(counters.over_budget_steps, delta.over_budget_steps);
  for (uint32_t i = 0; i < kThoughtCount; ++i) add(counters.thoughts[i], delta.thoughts[i]);
  add(counters.held_bytes, delta.held_bytes);
  add(counters.f16_bytes, delta.f16_bytes);
}

void Session::set_spin(std::chrono::microseconds spin) {
  const std::lock_guard lock(mutex_);
  channel_->set_spin(spin);
}

}  // namespace thinkv::client
