#include "daemon/core/service.h"

#include <algorithm>
#include <utility>

#include "daemon/core/service_impl.h"
#include "thinkv/internal/check.h"

namespace thinkv::core {
namespace {

// Names come from clients and go into messages and logs.
std::string printable(std::string_view text) {
  std::string out(text.substr(0, limits::kNameMax - 1));
  for (char& c : out) {
    if (c < 0x20 || c > 0x7E) c = '?';
  }
  return out;
}

}  // namespace

const char* end_cause_name(EndCause cause) {
  switch (cause) {
    case EndCause::kClean:
      return "clean";
    case EndCause::kKilled:
      return "killed";
    case EndCause::kProtocol:
      return "protocol";
    case EndCause::kSlow:
      return "slow";
    case EndCause::kVersion:
      return "version";
    case EndCause::kShutdown:
      return "shutdown";
  }
  return "unknown";
}

Service::Service(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Service::~Service() = default;

Result<std::unique_ptr<Service>> Service::create(const PoolOptions& pool, const Config& config,
                                                 std::string* why) {
  THINKV_TRY(validate(pool, config, why));
  return std::unique_ptr<Service>(new Service(std::make_unique<Impl>(pool, config)));
}

void Service::step(const Event& event, uint64_t now_ns, Actions* actions) {
  impl_->step(event, now_ns, actions);
}
Status Service::check_reload(const Config& config, std::string* why) const {
  return impl_->check_reload(config, why);
}
void Service::snapshot(Snapshot* out) const {
  impl_->snapshot(out);
}
const char* Service::check_invariants() const {
  return impl_->check_invariants();
}

Service::Impl::Impl(const PoolOptions& pool, const Config& config)
    : options_(pool), extents_(pool.extent_count(), pool.extent_bytes), tenants_(pool) {
  needs_.reserve(limits::kRequestRing);
  const Status configured = configure(config);
  THINKV_CHECK(configured.has_value());  // empty tables have room for whatever validate() accepts
}

void Service::Impl::step(const Event& event, uint64_t now_ns, Actions* actions) {
  THINKV_CHECK(now_ns >= now_ns_);
  now_ns_ = now_ns;
  actions->clear();
  out_ = actions;
  std::visit([this](const auto& e) { on(e); }, event);
  settle();
  out_ = nullptr;
  ++steps_;
  THINKV_DCHECK(check(walk_is_cheap() || steps_ % 256 == 0) == nullptr);
}

void Service::Impl::refuse(ClientId client, uint32_t request_id, const Error& error,
                           std::string text) {
  act(Refuse{.client = client,
             .request_id = request_id,
             .code = error.code,
             .fatal = !clients_.find(client).has_value(),
             .text = text.empty() ? std::string(error.what) : std::move(text)});
}

void Service::Impl::on(const ClientConnected& event) {
  THINKV_CHECK(event.client.value() != 0 && !clients_.find(event.client));
  const auto turn_away = [&](const Error& error) {
    ++counters_.refused;
    refuse(event.client, 0, error);
  };
  if (closing_) return turn_away(make_error(ErrorCode::kUnavailable, "the daemon stops"));
  const std::optional<TenantId> tenant = tenants_.match(event.uid, event.gid, event.groups);
  if (!tenant) {
    return turn_away(
        make_error(ErrorCode::kPermission, "this user belongs to no tenant of the configuration"));
  }
  if (const Status room = clients_.room_for(event, clients_per_uid_); !room) {
    return turn_away(room.error());
  }
  clients_.add(event, *tenant, now_ns_);
  ++tenants_.at(*tenant).clients;
  ++counters_.connected;
  act(Admit{event.client, *tenant, tenants_.at(*tenant).config.name});
}

void Service::Impl::on(const ModelRegistered& event) {
  const std::optional<ClientSlot> slot = clients_.find(event.client);
  if (!slot) return;
  if (const Status valid = validate(event.geometry); !valid) {
    return refuse(event.client, event.request_id, valid.error());
  }
  Client& client = clients_.at(*slot);
  if (client.models.size() == limits::kModelsPerClientMax) {
    return refuse(event.client, event.request_id,
                  make_error(ErrorCode::kInvalidArgument, "a client can register 16 models"));
  }
  const ModelId id(static_cast<uint32_t>(client.models.size()) + 1);
  client.models.push_back(
      {id, event.geometry, std::string(event.name.substr(0, limits::kNameMax - 1))});
  update_watermarks(*slot);
  const uint32_t c = page_class(event.geometry.head_dim);
  ReplyModel action{.client = event.client, .request_id = event.request_id};
  action.reply.model_id = id.value();
  action.reply.page_class = c;
  action.reply.page_bytes = class_page_bytes(c);
  action.reply.lease_low_pages = client.leases[c].low;
  action.reply.lease_high_pages = client.leases[c].high;
  act(action);
  refill(*slot, c);
}

void Service::Impl::on(const PolicyAsked& event) {
  if (!clients_.find(event.client)) return;
  const Result<const Policy*> policy = policies_.by_name(event.name);
  if (!policy) {
    const size_t room = sizeof(protocol::Refused::text) - 2 * limits::kNameMax;
    return refuse(
        event.client, event.request_id, policy.error(),
        "no policy named '" + printable(event.name) + "'; there are: " + policies_.names(room));
  }
  ReplyPolicy action{.client = event.client, .request_id = event.request_id};
  action.reply.policy_id = (*policy)->id.value();
  action.reply.params = (*policy)->params;
  act(action);
}

// On copies: policies and tenants change together or not at all.
Result<Service::Impl::Tables> Service::Impl::tables_of(const Config& config) const {
  std::array<uint32_t, limits::kTenantsMax> held{};
  for (uint32_t t = 0; t < held.size(); ++t) held[t] = extents_.tenant_extents(TenantId(t));
  Tables next{policies_, tenants_};
  THINKV_TRY(next.policies.configure(config.policies));
  THINKV_TRY(next.tenants.configure(config, held));
  return next;
}

Status Service::Impl::configure(const Config& config) {
  THINKV_ASSIGN_OR_RETURN(Tables next, tables_of(config));
  policies_ = next.policies;
  tenants_ = std::move(next.tenants);
  clients_per_uid_ = config.clients_per_uid;
  return {};
}

Status Service::Impl::check_reload(const Config& config, std::string* why) const {
  THINKV_TRY(validate(options_, config, why));
  const Result<Tables> next = tables_of(config);
  if (next) return {};
  *why = next.error().what;
  return next.error();
}

void Service::Impl::on(const ConfigReloaded& event) {
  THINKV_CHECK(event.config != nullptr);
  std::string why;
  Status status = check_reload(*event.config, &why);
  if (status) status = configure(*event.config);
  if (!status) {
    ++counters_.reloads_failed;
    act(ReloadResult{status.error().code, why});
    return;
  }
  ++counters_.reloads;
  pages_freed_ = true;  // limits and reserves may have moved
  act(ReloadResult{});
}

}  // namespace thinkv::core
